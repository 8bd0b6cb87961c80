"""What ends a step in its middle, an error or an interrupt, leaves no bytes, no hooks and no counts behind, and the next step is as ever."""

import gc
from contextlib import nullcontext

import pytest
import torch
from offload_models import EVERYTHING, STEADY, LateCopies, assert_same_bits, batch_of, steps
from training_runs import tiny_lemo_model, tiny_trainer
from transformers import TrainerCallback

from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.training.sensitive_offload import SensitiveOffload


def raising(error):
    def hook(*_):
        raise error("in the middle of a step")

    return hook


def stop_in(model, where, error):
    """Has `error` be raised in the upper layer's forward, or in the lower one's backward after the upper one's is over."""
    lower, upper = sparse_backbone(model).layers
    if where == "forward":
        return upper.mlp.down_proj.register_forward_pre_hook(raising(error))
    return lower.self_attn.q_proj.register_full_backward_pre_hook(raising(error))


def hooks_on_stack():
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def hooks_on(model):
    return [each for each in sparse_backbone(model).layers if each._forward_hooks or each._forward_pre_hooks]


@pytest.mark.parametrize(("measured", "form"), [(False, "exact"), (True, "exact"), (False, "kept_keys")])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_ends_a_step_in_its_middle_leaves_nothing(where, error, measured, form):
    """PyTorch calls a module's hooks after errors, not after interrupts; saved bytes may be measured around each step."""
    nearby = 7 if form == "kept_keys" else None
    model = tiny_lemo_model(**STEADY, attention_forward=form, nearby_tokens=nearby).train()
    ((wanted,), _) = steps(model)
    for late in (False, True):
        with SensitiveOffload(sparse_backbone(model), EVERYTHING, copies=LateCopies() if late else None) as offload:
            for _ in range(2):
                hook = stop_in(model, where, error)
                with pytest.raises(error, match="in the middle"), ActivationMemory(model) if measured else nullcontext():
                    model(**batch_of(2, 3)).loss.backward()
                hook.remove()
                gc.collect()  # the traceback is a cycle
                assert (offload.host_bytes, offload.device_bytes) == (0, 0)
                # Another graph, before any layer has run again.
                other = torch.ones(3, requires_grad=True)
                (2 * other).exp().square().sum().backward()
                assert torch.equal(other.grad, 4 * (2 * torch.ones(3)).exp() ** 2)
                with ActivationMemory(model) if measured else nullcontext():
                    (got,), (report,) = steps(model, offload)
                assert_same_bits(got, wanted)
                assert report.moved_bytes == report.saved_bytes
                assert report.host_peak_bytes <= 2 * sum(report.saved_bytes)
                assert hooks_on_stack() is None
            assert where == "backward" or offload.budgets is None, "a forward that was cut short is not timed"
            hook = stop_in(model, where, error)
            with pytest.raises(error):
                model(**batch_of(2, 3)).loss.backward()
            hook.remove()
        assert hooks_on_stack() is None
        assert not hooks_on(model)


class StopAt(TrainerCallback):
    """Raises in the middle of the second step."""

    def __init__(self, where, error):
        self.where, self.error = where, error

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.hook = stop_in(model, self.where, self.error)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_training_that_is_interrupted_leaves_a_model_without_hooks(where, tmp_path):
    """A second Ctrl-C, or any in a notebook's other threads: nobody calls the callbacks then."""
    lemo = {**STEADY, "offload": "sensitive", "offload_budget": "all"}
    trainer = tiny_trainer(tmp_path, lemo, max_steps=3, offload_min_bytes=1, offload_bandwidth=1e9)
    trainer.add_callback(stop := StopAt(where, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="in the middle"):
        trainer.train()
    stop.hook.remove()
    assert hooks_on_stack() is None
    assert not hooks_on(trainer.model)
    ((interrupted,), _) = steps(trainer.model.train())
    trainer.remove_callback(stop)
    assert trainer.train().global_step == 3
    assert {logs["offload/window"] for logs in trainer.state.log_history if "offload/window" in logs} == {1.0}
    assert not hooks_on(trainer.model)
    assert len(interrupted) > 0
