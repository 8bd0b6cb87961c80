"""Offload changes no bit of a gradient, holds what its accounting says, leaks nothing, and its budgets hide what can be hidden."""

import gc
import math

import pytest
import torch
from offload_models import (
    EVERYTHING,
    LINK,
    STEADY,
    Aliases,
    LateCopies,
    Stack,
    assert_same_bits,
    batch_of,
    fails,
    gradients,
    steps,
)
from references.tiny_models import checkpoint_stock_layers
from torch import nn
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer

from lemo_hf import LemoTrainer
from lemo_hf.hub.lemo_files import predictor_tensors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.estimate.offload_plan import HostLink, LayerLoad, peak_on_device, plan_bytes
from lemo_hf.profiling.live_bytes import LiveBytes
from lemo_hf.training.host_copies import PlainCopies
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

# What is moved: everything, parts of storages, parts of all layers, what hides.
BUDGETS = {
    "everything": EVERYTHING,
    "a part": OffloadSettings(budget=100_000, smallest=512, link=LINK, seconds=[(1, 1)] * 2),
    "uniform": OffloadSettings("uniform", budget=77_777, smallest=1, link=LINK, seconds=[(1, 1)] * 2),
    "what hides": OffloadSettings(smallest=1, link=LINK, seconds=[(1e-5, 1e-4)] * 2),
    "little host memory": OffloadSettings(budget=math.inf, smallest=1, host_bytes=50_001),
}
FORMS = {
    "exact": {},
    "sparse": {"attention_forward": "sparse"},
    "kept keys": {"attention_forward": "kept_keys", "nearby_tokens": 7},
    "kept rows": {"checkpoint": "kept_rows"},
    "kept keys, kept rows": {"checkpoint": "kept_rows", "attention_forward": "kept_keys", "nearby_tokens": 7},
    "sparse kept rows": {"checkpoint": "kept_rows", "attention_forward": "sparse"},
    "checkpointing": {},
    "stock": {"enabled": False},
}


def model_of(form):
    made = tiny_lemo_model(**{**STEADY, **FORMS[form]}).train()
    if form == "checkpointing":
        checkpoint_stock_layers(made)
    return made


@pytest.mark.parametrize("form", FORMS)
def test_offload_changes_no_bit_of_any_gradient(form):
    ((wanted,), _) = steps(model_of(form))
    for name, chosen in BUDGETS.items():
        with SensitiveOffload(sparse_backbone(trained := model_of(form)), chosen) as offload:
            found, reports = steps(trained, offload, 3)
        for got in found:
            assert_same_bits(got, wanted)
        for report in reports:
            assert sum(report.moved_bytes) > 0, name
        moved, saved = reports[-1].moved_bytes, reports[-1].saved_bytes
        if name == "everything":
            assert moved == saved
        elif name == "little host memory":
            assert reports[-1].host_peak_bytes <= 50_001
            assert sum(moved) + reports[-1].unmoved_bytes == sum(saved)
        elif name == "what hides":
            assert moved == [min(saved[0], 9000), 0]
        else:
            whole = chosen.budget <= sum(saved)
            assert sum(moved) == pytest.approx(chosen.budget if whole else sum(saved), abs=2 * 512)


@pytest.mark.parametrize("form", ["exact", "kept rows", "kept keys, kept rows", "checkpointing"])
def test_copies_that_come_as_late_as_they_may_change_no_bit(form):
    ((wanted,), _) = steps(model_of(form))
    for chosen in (EVERYTHING, BUDGETS["a part"]):
        with SensitiveOffload(sparse_backbone(trained := model_of(form)), chosen, copies=LateCopies()) as offload:
            found, _ = steps(trained, offload, 3)
            # Graphs that are dropped with copies under way.
            for _ in range(2):
                trained(**batch_of(2, 3))
                hook = sparse_backbone(trained).layers[0].self_attn.q_proj.register_full_backward_pre_hook(fails)
                loss = trained(**batch_of(4, 5)).loss
                with pytest.raises(RuntimeError, match="in the middle"):
                    loss.backward()
                del loss
                hook.remove()
            found += steps(trained, offload)[0]
        for got in found:
            assert_same_bits(got, wanted)


class WatchedCopies(PlainCopies):
    """Notes what is on the device whenever a copy begins, of what layers saved."""

    def __init__(self):
        super().__init__()
        self.offload, self.most = None, 0

    def look(self, *_):
        def there(storage):
            whole = storage._original is not None or storage._back is not None
            return storage.size if whole else storage.size - storage.moved

        self.most = max(self.most, sum(map(there, list(self.offload._storages.values()))))

    def copy(self, targets, sources):
        self.look()
        return super().copy(targets, sources)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("late", [False, True])
def test_a_wider_window_changes_no_bit_and_holds_what_its_accounting_says(window, late):
    def step(offload=None):
        model.zero_grad()
        model(torch.ones(16, 8)).sum().backward()
        return gradients(model)

    model = Stack([Aliases() for _ in range(6)])
    wanted = step()
    copies = LateCopies() if late else WatchedCopies()
    for budgets in ([math.inf] * 6, [90.0, 0.0, 200.0, 33.0, 150.0, 50.0]):
        if not late:  # as a layer ends, before the offload's own hook
            handles = [layer.register_forward_hook(copies.look) for layer in model.layers]
        with SensitiveOffload(model, OffloadSettings(smallest=1, link=LINK), copies=copies) as offload:
            offload.budgets, offload.window, copies.offload, copies.most = budgets, window, offload, 0
            begin, begun = offload._begin_backward, []

            def noted(run, kept, begin=begin, begun=begun):
                begin(run, kept)
                there = [all(storage._back is not None for storage in one.living()) for one in run.downwards(6)]
                begun.append((run.layer, there.index(False) if False in there else len(there)))

            offload._begin_backward = noted
            for _ in range(2):
                assert_same_bits(step(), wanted)
            # As a layer begins its backward, its own bytes and those of as many layers below are on their way.
            if budgets[0] == math.inf:
                assert begun[6:] == [(layer, min(layer, window) + 1) for layer in range(5, -1, -1)]
        report = offload.report()
        assert (offload.host_bytes, offload.device_bytes, report.window) == (0, 0, window)
        assert sum(report.moved_bytes) > 0
        if not late:
            assert copies.most == peak_on_device(report.saved_bytes, report.moved_bytes, window)
            for handle in handles:
                handle.remove()


def test_the_window_is_planned_from_what_was_timed():
    """Layers by turns short of time and with too much of it; the last forward's window is in the report."""
    model = Stack([Aliases() for _ in range(6)])
    seconds = [(9e-5, 9e-5) if layer % 2 else (1e-6, 1e-6) for layer in range(6)]
    with SensitiveOffload(model, OffloadSettings(smallest=1, link=LINK, seconds=seconds)) as offload:
        windows = []
        for _ in range(3):
            model(torch.ones(64, 8)).sum().backward()
            windows.append(offload.report().window)
    report = offload.report()
    assert windows == [1, 2, 2]
    loads = [LayerLoad(saved, *times) for saved, times in zip(report.saved_bytes, seconds, strict=True)]
    assert report.moved_bytes == pytest.approx(plan_bytes("sensitive", loads, HostLink(9e8, 9e8)).moved, abs=64)


def test_accumulated_repeated_and_crossed_passes_have_the_same_bits():
    def accumulated(model):
        for samples in ((0, 1), (2,), (3, 4, 5)):
            model(**batch_of(*samples)).loss.backward()
        first, second = (model(**batch_of(*samples)).loss for samples in ((6,), (7, 8)))
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        with torch.no_grad():
            model(**batch_of(9))
        model.eval()(**batch_of(9))
        model.train()
        return gradients(model)

    wanted = accumulated(tiny_lemo_model(**STEADY).train())
    model = tiny_lemo_model(**STEADY).train()
    with SensitiveOffload(sparse_backbone(model), EVERYTHING) as offload:
        assert_same_bits(accumulated(model), wanted)
    gc.collect()
    assert (offload.host_bytes, offload.device_bytes) == (0, 0)


class Written(nn.Module):
    """A layer that changes in place what it computed, in one of two ways."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.weight, self.apart = nn.Parameter(torch.randn(8, 8)), apart

    def forward(self, hidden_states):
        whole = hidden_states @ self.weight
        if self.apart:  # each part counts its own changes
            return torch.cat([part.mul_(factor) * part for factor, part in enumerate(torch.unsafe_chunk(whole, 2, -1), 2)], -1)
        square = whole * whole
        return square + whole.mul_(2)


def written(apart, smallest=1, copies=None):
    torch.manual_seed(0)
    model = Stack([Written(apart) for _ in range(2)])
    with SensitiveOffload(model, OffloadSettings(budget=math.inf, smallest=smallest), copies=copies):
        model(torch.randn(16, 8)).sum().backward()
    return gradients(model)


@pytest.mark.parametrize("late", [False, True])
def test_parts_of_a_storage_that_count_their_changes_apart_are_told_apart(late):
    assert_same_bits(written(True, copies=LateCopies() if late else None), written(True, smallest=2**40))


@pytest.mark.parametrize("smallest", [1, 2**40])
def test_what_is_changed_in_place_after_it_was_saved_is_refused_as_autograd_does(smallest):
    with pytest.raises(RuntimeError, match="modified by an inplace operation; it is at version 1, saved at 0"):
        written(False, smallest)


def test_views_move_once_and_weights_never():
    def run(offload=None):
        model = Stack()
        rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with ActivationMemory(model) as memory:
            result = model(rows)
        alone = memory.saved.by("layer")
        if offload is not None:
            with SensitiveOffload(model, offload) as moving, ActivationMemory(model) as memory:
                result = model(rows)
            left = memory.saved.by("layer")
            moved = moving.report().moved_bytes
            assert moved == moving.report().saved_bytes
            # Each storage once and whole, as it is counted where nothing is moved; the weight's stays, and is no saved byte.
            assert [left.get(layer, 0) + moved[layer] for layer in range(3)] == [alone[layer] for layer in range(3)]
            assert all(left.get(layer, 0) == 0 for layer in range(3))
        result.square().sum().backward()
        return gradients(model) | {"rows": rows.grad}

    assert_same_bits(run(EVERYTHING), run())


@pytest.mark.parametrize("budget", [math.inf, 150_000.0])
@pytest.mark.parametrize("form", ["exact", "kept keys", "sparse", "kept rows"])
def test_device_memory_held_is_what_the_accounting_says(form, budget):
    def alive_after_forward(model, offload=None):
        with LiveBytes(model) as live:
            loss = model(**batch_of(0, 1)).loss
            if offload is not None:
                live.label(offload.memory._chunks, "host")
        now = sum(one.size for one in live.allocations if one.died is None and one.label != "host")
        loss.backward()
        return now

    model = tiny_lemo_model(**{**STEADY, **FORMS[form]}).train()
    alone = alive_after_forward(model)
    chosen = OffloadSettings(budget=budget, smallest=256, link=LINK, seconds=[(1, 1)] * 2)
    with SensitiveOffload(sparse_backbone(model), chosen) as offload:
        steps(model, offload)
        loss = model(**batch_of(0, 1)).loss
        held, host, report = offload.device_bytes, offload.host_bytes, offload.report()
        del loss
        found = alive_after_forward(model, offload)
    assert host == sum(report.moved_bytes) > 0
    assert held == sum(report.saved_bytes) - host
    assert alone - found == pytest.approx(host, rel=0.02)


# A run.


def test_a_run_offloads_through_its_phases_and_changes_no_bit(tmp_path):
    lemo = {"selection": "threshold", "attention_forward": "sparse", "keep_ratio": 0.4}
    changes = {"max_steps": 4, "dense_tail_share": 0.3, "gradient_accumulation_steps": 2, "probe_steps": 2, "recall_drop": -1}
    plain = tiny_trainer(tmp_path / "plain", lemo, **changes)
    plain.train()
    offload = {"offload": "sensitive", "offload_budget": "40KiB"}
    moved = tiny_trainer(tmp_path / "moved", lemo | offload, **changes, offload_min_bytes=64, offload_bandwidth=1e9)
    moved.train()
    assert curve(moved) == curve(plain)
    assert_same_bits(predictor_tensors(moved.lemo_run.backbone), predictor_tensors(plain.lemo_run.backbone))
    logged = [logs for logs in moved.state.log_history if "offloaded_bytes" in logs]
    assert len(logged) == 4
    for logs in logged:
        assert 0 < logs["offloaded_bytes"] <= 40 * 1024
        assert logs["offloaded_bytes"] == logs["offloaded_bytes/layer_0"] + logs["offloaded_bytes/layer_1"]
        assert logs["offload/host_peak_bytes"] <= 40 * 1024
        assert logs["offload/overlap"] == 0, "plain copies hide nothing"
        assert logs["offload/transfer_seconds"] == logs["offload/stall_seconds"] > 0
    assert not any("offload" in name for logs in plain.state.log_history for name in logs)
    layers = moved.lemo_run.backbone.layers
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_a_run_is_resumed_with_another_offload(tmp_path):
    def trainer(folder, **lemo):
        args = tiny_arguments(tmp_path / folder, max_steps=2, save_strategy="steps", save_steps=1, predictor_documents=0)
        return LemoTrainer(model=tiny_lemo_model(**STEADY, **lemo), args=args, train_dataset=RandomText())

    trainer("run").train()
    resumed = trainer("run", offload="uniform", offload_budget="all")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    whole = trainer("whole")
    whole.train()
    assert curve(resumed)[-1] == curve(whole)[-1]
