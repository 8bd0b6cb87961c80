"""Offload changes no bit of a gradient, holds what its accounting says, leaks nothing, and its budgets hide what can be hidden."""

import gc
import json
import math
import weakref
from collections import deque
from contextlib import contextmanager

import pytest
import sensitive_offload as simulation
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.tiny_models import checkpoint_stock_layers
from torch import nn
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer

from lemo_hf import LemoTrainer
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import predictor_tensors
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.live_bytes import LiveBytes
from lemo_hf.profiling.offload_plan import (
    HostLink,
    LayerLoad,
    hidden_bytes,
    peak_on_device,
    sensitive_bytes,
    simulate,
    uniform_bytes,
)
from lemo_hf.training import offload_saved
from lemo_hf.training.host_copies import HostMemory, PlainCopies, StreamCopies, available_host_memory, measured_link
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

EVERYTHING = OffloadSettings(budget=math.inf, smallest=1)
LINK = HostLink(1e9, 1e9)
STEADY = {"selection": "ratio", "keep_ratio": [0.25, 0.75]}


def batch_of(*samples: int) -> dict[str, torch.Tensor]:
    data = RandomText()
    return {name: torch.stack([data[sample][name] for sample in samples]) for name in ("input_ids", "labels")}


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    assert len(wanted) > 0
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name


def steps(model, offload=None, count=1, batch=None):
    """Gradients of `count` equal steps, and what was offloaded in each."""
    batch, found, reports = batch or batch_of(0, 1), [], []
    for _ in range(count):
        model.zero_grad()
        sparse_backbone(model).lemo_draw = 0
        model(**batch).loss.backward()
        found.append(gradients(model))
        if offload is not None:
            reports.append(offload.report())
            assert (offload.host_bytes, offload.device_bytes) == (0, 0)
    return found, reports


class LateCopies(PlainCopies):
    """A side stream that copies nothing before it must, and reads memory as it is by then."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.begun, self.done = deque(), 0, 0

    def copy(self, targets, sources):
        self.begun += 1
        for target, source in zip(targets, sources, strict=True):
            parts = [(weakref.ref(one.untyped_storage()), one.storage_offset(), one.numel()) for one in (target, source)]
            self.queue.append((self.begun, *parts))
        return self.begun

    def wait(self, done):
        self.follow(done)

    def follow(self, done):
        while self.queue and self.queue[0][0] <= done:
            _, target, source = self.queue.popleft()
            into, read = (self.bytes_of(*part) for part in (target, source))
            assert into is not None, "memory was let go while a copy into it was under way"
            # What was let go may hold anything.
            into.fill_(255) if read is None else into.copy_(read)

    def bytes_of(self, reference, offset, count):
        storage = reference()
        return None if storage is None else torch.empty(0, dtype=torch.uint8).set_(storage, offset, (count,), (1,))

    def moment(self):
        return self.begun

    def transferred(self):
        return 0.0


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
    "kept rows": {"checkpoint": "kept_rows"},
    "sparse kept rows": {"checkpoint": "kept_rows", "attention_forward": "sparse"},
    "checkpointing": {},
    "stock": {"enabled": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_offload_changes_no_bit_of_any_gradient(form):
    def model():
        made = tiny_lemo_model(**{**STEADY, **FORMS[form]}).train()
        if form == "checkpointing":
            checkpoint_stock_layers(made)
        return made

    ((wanted,), _) = steps(model())
    for name, chosen in BUDGETS.items():
        with SensitiveOffload(sparse_backbone(trained := model()), chosen) as offload:
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


@pytest.mark.parametrize("form", ["exact", "kept rows", "checkpointing"])
def test_copies_that_come_as_late_as_they_may_change_no_bit(form):
    def model():
        made = tiny_lemo_model(**{**STEADY, **FORMS[form]}).train()
        if form == "checkpointing":
            checkpoint_stock_layers(made)
        return made

    ((wanted,), _) = steps(model())
    for chosen in (EVERYTHING, BUDGETS["a part"]):
        with SensitiveOffload(sparse_backbone(trained := model()), chosen, copies=LateCopies()) as offload:
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


def fails(*_):
    raise RuntimeError("in the middle of a step")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_in_the_middle_of_a_step_leaves_nothing(where):
    model = tiny_lemo_model(**STEADY).train()
    ((wanted,), _) = steps(model)
    layer = sparse_backbone(model).layers[1]
    with SensitiveOffload(sparse_backbone(model), EVERYTHING) as offload:
        if where == "forward":
            hook = layer.mlp.down_proj.register_forward_pre_hook(fails)
        else:
            hook = sparse_backbone(model).layers[0].self_attn.q_proj.register_full_backward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(**batch_of(0, 1)).loss.backward()
        hook.remove()
        gc.collect()  # the traceback is a cycle
        assert (offload.host_bytes, offload.device_bytes) == (0, 0)
        (got,), (report,) = steps(model, offload)
        assert_same_bits(got, wanted)
        assert report.host_peak_bytes <= 2 * sum(report.saved_bytes)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in sparse_backbone(model).layers)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


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


class Aliases(nn.Module):
    """A layer that saves views of one storage, overlapping and turned ones too, of its weight, and of what is expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, hidden_states):
        whole = hidden_states.repeat(1, 3) * 1.5
        first, second, third = whole.split(8, 1)
        mixed = first * second + second * third + (third * whole[:, 4:12]).exp().tanh()
        turned = whole.t() * whole.t()
        row = mixed.mean(0, keepdim=True).expand(len(mixed), -1)
        return (mixed + row * mixed.sin()) @ self.weight.t() @ self.weight + turned.sum() * 1e-3 + hidden_states


class Stack(nn.Module):
    def __init__(self, layers=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layers or [Aliases() for _ in range(3)])

    def forward(self, rows):
        for layer in self.layers:
            rows = layer(rows).tanh()
        return rows


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
@pytest.mark.parametrize("form", ["exact", "sparse", "kept rows"])
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


# Budgets.

AMOUNTS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(AMOUNTS, st.integers(0, 9000), st.integers(0, 3000))
def test_budgets(amounts, total, more):
    saved, hidden = (list(column) for column in zip(*amounts, strict=True))
    count, there = len(saved), sum(saved)
    most_hidden = sum(map(min, saved, hidden))
    for solve in (sensitive_bytes, uniform_bytes):
        given_bytes = solve(saved, hidden, total)
        assert all(0 <= amount <= one for amount, one in zip(given_bytes, saved, strict=True))
        assert min(total, there) - count <= sum(given_bytes) <= total
        larger = solve(saved, hidden, total + more)
        assert all(first <= second + 1e-9 for first, second in zip(given_bytes, larger, strict=True)), "monotone"
        freely = solve(saved, hidden)
        assert all(amount <= most for amount, most in zip(freely, hidden, strict=True)), "hides"
    exceeding = sum(max(0, amount - most) for amount, most in zip(sensitive_bytes(saved, hidden, total), hidden, strict=True))
    assert exceeding <= max(0, total - most_hidden) + count, "no stall that another choice would avoid"
    assert sum(sensitive_bytes(saved, hidden)) >= sum(uniform_bytes(saved, hidden))
    alike = [saved[0]] * count, [hidden[0] or 1] * count
    assert sensitive_bytes(*alike, total) == pytest.approx(uniform_bytes(*alike, total), abs=1)
    assert len(set(sensitive_bytes(*alike, total))) == 1


def test_a_timeline_by_hand():
    layers = [LayerLoad(100, 1.0, 2.0), LayerLoad(100, 1.0, 2.0), LayerLoad(100, 1.0, 2.0)]
    assert hidden_bytes(layers, HostLink(50, 30)) == [50, 50, 0]
    # 50 bytes take 1 s to leave and 2 s to come back at 50 and 25 bytes a second.
    assert simulate(layers, [0, 0, 0], HostLink(50, 25)).seconds == 9
    calm = simulate(layers, [50, 50, 0], HostLink(50, 25), head_seconds=4)
    assert (calm.seconds, calm.stall_seconds, calm.overlap, calm.moved_bytes) == (13, 0, 1, 100)
    assert calm.transfer_seconds == 2 + 4
    # The second of 100 ends 1 s after the last layer, before the head; back at 25 the first is 2 s late.
    full = simulate(layers, [100, 50, 0], HostLink(50, 25), head_seconds=4)
    assert full.stall_seconds == pytest.approx(1 + 2)
    # The last layer's own bytes hide behind nothing.
    assert simulate(layers, [0, 0, 25], HostLink(50, 25)).stall_seconds == pytest.approx(0.5 + 1)
    assert peak_on_device([100, 100, 100], [100, 50, 0]) == 200
    assert simulate([], [], LINK).seconds == 0


def test_sensitive_beats_uniform_at_equal_peak_where_kept_shares_differ():
    loads = [LayerLoad(1000 * share, 0.5 + share, 2 * share) for share in (1.0, 1.0, 1.0, 0.3, 0.3, 0.3, 0.3, 0.3)]
    link = HostLink(600, 600)
    saved, hidden = [load.saved_bytes for load in loads], hidden_bytes(loads, link)
    chosen = sensitive_bytes(saved, hidden)
    sensitive = simulate(loads, chosen, link)
    uniform = next(
        timeline
        for total in range(0, int(sum(saved)) + 1, 5)
        if (timeline := simulate(loads, uniform_bytes(saved, hidden, total), link)).peak_bytes <= sensitive.peak_bytes
    )
    assert sensitive.stall_seconds == 0
    assert sensitive.seconds * 1.05 < uniform.seconds
    equal = [LayerLoad(1000, 1, 2)] * 8
    saved, hidden = [1000.0] * 8, hidden_bytes(equal, link)
    assert simulate(equal, sensitive_bytes(saved, hidden, 5000), link) == simulate(
        equal, uniform_bytes(saved, hidden, 5000), link
    )


def test_the_committed_simulation_is_that_of_its_loads():
    document = json.loads(simulation.RESULT.read_text())
    assert {row["profile"] for row in document["rows"]} == set(simulation.PROFILES)
    for row in document["rows"]:
        loads = [LayerLoad(*load) for load in row["layers"]]
        for name, bandwidth in simulation.LINKS.items():
            again = json.loads(json.dumps(simulation.compared(loads, row["head_seconds"], bandwidth)))
            assert again == row["links"][name]
            assert again["sensitive"]["stall_seconds"] == pytest.approx(0, abs=1e-6)
            assert again["faster_than_uniform"] > 1 - 1e-9


def test_budgets_are_set_from_what_was_timed_and_anew_when_settings_change():
    model = tiny_lemo_model(**STEADY).train()
    backbone = sparse_backbone(model)
    with SensitiveOffload(backbone, OffloadSettings(smallest=1), signature=model.config.lemo.to_dict) as offload:
        _, reports = steps(model, offload, 3)
        assert offload._link is not None
        assert offload.budgets is not None
        assert all(report.moved_bytes == report.saved_bytes for report in reports[:2])
        assert reports[2].moved_bytes[1] == 0, "the last layer's backward comes first"
        model.config.lemo.update(keep_ratio=0.5)
        _, reports = steps(model, offload, 1)
        assert offload.budgets is None
        assert reports[0].moved_bytes == reports[0].saved_bytes


def test_budgets_are_set_where_lower_layers_save_nothing():
    model = Stack()
    model.layers[0].requires_grad_(False)
    with SensitiveOffload(model, OffloadSettings(budget=3000, smallest=1, link=LINK, seconds=[(1, 1)] * 3)) as offload:
        for _ in range(3):
            model(torch.ones(16, 8)).sum().backward()
    assert offload.budgets is not None
    assert offload.report().saved_bytes[0] == 0
    assert sum(offload.report().moved_bytes) == 3000


def test_budgets_follow_the_rows_of_a_batch():
    model = tiny_lemo_model(**STEADY).train()
    with SensitiveOffload(sparse_backbone(model), BUDGETS["what hides"]) as offload:
        steps(model, offload, 2)
        _, (twice,) = steps(model, offload, batch=batch_of(0, 1, 2, 3))
        _, (once,) = steps(model, offload, batch=batch_of(0, 1))
        assert (once.moved_bytes[0], twice.moved_bytes[0]) == (9000, 18000)


# Host memory.


def test_host_memory_is_handed_out_in_exact_sizes_and_used_again():
    memory = HostMemory(limit=1000, pinned=False, chunk=256)
    first, second = memory.take(300), memory.take(500)
    assert [sum(piece.numel() for piece in pieces) for pieces in (first, second)] == [300, 500]
    first[0].fill_(1), second[0].fill_(2)
    assert all((piece == 1).all() for piece in first[:1])
    assert memory.take(201) is None
    third = memory.take(200)
    assert (memory.used_bytes, memory.peak_bytes, memory.reserved_bytes, memory.room_bytes) == (1000, 1000, 1000, 0)
    memory.give_back(second)
    assert memory.held_bytes == 500
    for _ in range(20):
        memory.give_back(memory.take(499))
    memory.give_back(first)
    memory.give_back(third)
    whole = memory.take(1000)
    assert len({piece.data_ptr() for piece in whole}) == len(whole)
    assert (memory.peak_bytes, memory.reserved_bytes) == (1000, 1000)


def test_bandwidth_and_host_memory_are_measured():
    link = measured_link(torch.device("cpu"))
    assert 1e7 < link.to_host < 1e13
    assert 1e7 < link.to_device < 1e13
    assert available_host_memory() > 2**20


class NotedStream:
    """A stream of no device, which notes what it is asked."""

    device = None

    def __init__(self, asked, name):
        self.asked, self.name = asked, name

    def wait_stream(self, other):
        self.asked.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.asked.append(f"{self.name} waits for event {event.number}")


class NotedModule:
    """What `torch.cuda` has of streams and events."""

    def __init__(self):
        self.asked, self.events = [], 0
        self.now = self.compute = NotedStream(self.asked, "compute")

    def Stream(self, device):
        return NotedStream(self.asked, "side")

    def Event(self, enable_timing):
        self.events += 1
        return NotedEvent(self, self.events)

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, side):
        self.now = side
        yield
        self.now = self.compute


class NotedEvent:
    def __init__(self, module, number):
        self.module, self.number = module, number

    def record(self):
        self.module.asked.append(f"event {self.number} on {self.module.now.name}")

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000.0 * (other.number - self.number)


def test_a_stream_is_given_copies_in_order(monkeypatch):
    """The accelerator's path, where there is no accelerator."""
    module = NotedModule()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    copies = StreamCopies(torch.device("cpu"))
    target = torch.zeros(3)
    done = copies.copy([target], [torch.ones(3)])
    copies.wait(done)
    assert target.tolist() == [1, 1, 1]
    assert module.asked == [
        *("side waits for compute", "event 1 on side", "event 2 on side"),
        *("event 3 on compute", "compute waits for event 2", "event 4 on compute"),
    ]
    assert (copies.transferred(), copies.stalled(), copies.stalls) == (1.0, 1.0, 1)
    copies.follow(done)
    assert copies.stalls == 1


def test_the_names_of_the_accelerators_module_are_there():
    for name in ("Stream", "Event", "current_stream", "stream"):
        assert hasattr(torch.cuda, name)
    for name in ("wait_stream", "wait_event"):
        assert hasattr(torch.cuda.Stream, name)
    for name in ("record", "synchronize", "elapsed_time"):
        assert hasattr(torch.cuda.Event, name)


@pytest.mark.parametrize(
    ("lemo", "free", "says"),
    [
        (
            {"offload_budget": "4GiB"},
            2**32,
            "offload_budget is above host memory; '4GiB', 3.6 GiB are free; set offload_budget='3GiB'",
        ),
        (
            {"offload_budget": "all"},
            2**16,
            "offload_budget='all' is expected to need 0.0 GiB, 0.0 GiB are free; set offload_budget='0MiB'",
        ),
    ],
)
def test_too_little_host_memory_is_refused_at_start(lemo, free, says, tmp_path, monkeypatch):
    monkeypatch.setattr(offload_saved, "available_host_memory", lambda: free)
    trainer = tiny_trainer(tmp_path, {**STEADY, "offload": "sensitive", **lemo})
    with pytest.raises(LemoError) as error:
        trainer.train()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_processes_of_a_machine_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(offload_saved, "available_host_memory", lambda: 2**32)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    trainer = tiny_trainer(tmp_path, {**STEADY, "offload": "uniform", "offload_budget": "1GiB"})
    with pytest.raises(LemoError, match=r"'1GiB', 0.9 GiB are free for each of 4 processes; set offload_budget='921MiB'"):
        trainer.train()


@pytest.mark.parametrize("change", [{"offload_bandwidth": 0.0}, {"offload_bandwidth": -1.0}, {"offload_min_bytes": 0}], ids=str)
def test_arguments_outside_their_domain_are_refused(change, tmp_path):
    with pytest.raises(LemoError, match=next(iter(change))):
        tiny_arguments(tmp_path, **change)


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
