"""What a run says when memory runs out: PyTorch's error, raised in every part of it."""

import re
import shlex

import pytest
import torch
import typer
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer, TrainerCallback

from lemo_hf import LemoTrainer, cli, lemo_callbacks
from lemo_hf.errors import LemoError, LemoRunError
from lemo_hf.models.sparse_decoder import sparse_backbone

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}


def is_one_line(error):
    return "\n" not in str(error) and str(error).count("; ") >= 2 and len(str(error)) < 800


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
    )


class WhenTraining(TrainerCallback):
    """Puts hooks in as the steps begin, when the phases are over."""

    def __init__(self, put):
        self.put = put

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            self.put(sparse_backbone(model), model, kwargs["optimizer"])


def in_forward(backbone, model, optimizer):
    backbone.layers[1].self_attn.o_proj.register_forward_pre_hook(out_of_memory)


def in_backward(backbone, model, optimizer):
    # The input's gradient is asked for when layer 1 has all of its own.
    backbone.layers[0].mlp.down_proj.register_full_backward_hook(out_of_memory)


def in_recomputation(backbone, model, optimizer):
    # The first run stands in a function of autograd's, which turns it off.
    backbone.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda *args: (torch.is_grad_enabled() and out_of_memory()) or None
    )


def in_loss(backbone, model, optimizer):
    model.get_base_model().lm_head.register_forward_pre_hook(out_of_memory)


def in_optimizer(backbone, model, optimizer):
    getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(out_of_memory)


def in_evaluation(backbone, model, optimizer):
    backbone.layers[1].register_forward_pre_hook(lambda layer, args: None if layer.training else out_of_memory())


PLACES = {
    "forward": (in_forward, {}, "sparse phase, forward, layer 1", "kept share 0.50", 'set checkpoint="kept_rows"'),
    "backward": (in_backward, {}, "sparse phase, backward, layer 0", "kept share 0.50", "per_device_train_batch_size=1"),
    "recomputation": (
        *(in_recomputation, {"checkpoint": "kept_rows"}, "sparse phase, backward, layer 0", "kept share 0.50"),
        "lower keep_ratio to 0.25",
    ),
    "loss": (in_loss, {}, "sparse phase, loss", "kept share 0.50", "lower segment_size (now 64)"),
    "optimizer": (in_optimizer, {}, "sparse phase, optimizer step", "kept share 0.50", 'optim="adamw_8bit"'),
    "evaluation": (
        in_evaluation,
        {},
        "sparse phase, evaluation, layer 1",
        "every token kept",
        "lower per_device_eval_batch_size",
    ),
}


def fails_in_memory(trainer):
    with pytest.raises(LemoRunError) as failed:
        trainer.train()
    message = str(failed.value)
    assert is_one_line(failed.value)
    assert message.startswith("out of memory in the ")
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB)" in message
    assert isinstance(failed.value.__cause__, torch.OutOfMemoryError)
    # The command line that it proposes is one that `lemo estimate` takes.
    command = shlex.split(re.search(r"`(.*)`", message)[1])
    known = {option for part in typer.main.get_command(cli.app).commands["estimate"].params for option in part.opts}
    assert command[:2] == ["lemo", "estimate"]
    assert {word for word in command if word.startswith("--")} <= known
    return message


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_is_placed(tmp_path, place):
    put, lemo, where, kept, fix = PLACES[place]
    evaluates = {"eval_strategy": "steps", "eval_steps": 2} if place == "evaluation" else {}
    trainer = LemoTrainer(
        model=tiny_lemo_model(**SAMPLED, **lemo),
        args=tiny_arguments(tmp_path, predictor_documents=0, **evaluates),
        train_dataset=RandomText(),
        eval_dataset=RandomText(samples=2),
        callbacks=[WhenTraining(put)],
    )
    message = fails_in_memory(trainer)
    assert message.startswith(f"out of memory in the {where}; 2 x 96 tokens, {kept}")
    assert fix in message
    assert "--seq-len 96" in message


@pytest.mark.parametrize("phase", ["predictor", "calibrate"])
def test_memory_that_runs_out_in_a_phase_is_placed_with_any_trainer(tmp_path, phase):
    lemo = {"selection": "threshold", "attention_forward": "sparse"}
    args = tiny_arguments(tmp_path, predictor_documents=1 if phase == "predictor" else 0, auto_find_batch_size=True)
    model = tiny_lemo_model(**lemo)
    trainer = Trainer(model=model, args=args, train_dataset=RandomText(), callbacks=lemo_callbacks(args))
    sparse_backbone(model).layers[1].self_attn.o_proj.register_forward_pre_hook(out_of_memory)
    message = fails_in_memory(trainer)
    assert message.startswith(f"out of memory in the {phase} phase, layer 1; 1 x 96 tokens, ")


def test_a_batch_size_is_still_found(tmp_path):
    def too_large(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            out_of_memory()

    trainer = tiny_trainer(tmp_path / "a", SAMPLED, auto_find_batch_size=True, predictor_documents=0)
    trainer.model.register_forward_pre_hook(too_large, with_kwargs=True)
    trainer.train()
    assert trainer.state.train_batch_size == 1
    assert len(curve(trainer)) == 6
    hopeless = tiny_trainer(tmp_path / "b", SAMPLED, auto_find_batch_size=True, predictor_documents=0)
    hopeless.model.register_forward_pre_hook(out_of_memory)
    with pytest.raises(LemoRunError, match=r"No executable batch size found"):
        hopeless.train()


def test_other_errors_pass_as_they_are(tmp_path):
    def wrong(*args):
        raise RuntimeError("shapes do not match")

    trainer = tiny_trainer(tmp_path, SAMPLED, predictor_documents=0)
    trainer.model.register_forward_pre_hook(wrong)
    with pytest.raises(RuntimeError, match="shapes do not match") as failed:
        trainer.train()
    assert not isinstance(failed.value, LemoError)
