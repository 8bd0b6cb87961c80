"""Budgets of an offload hide what can be hidden, and host memory is bounded and said."""

import json
import math
from contextlib import contextmanager

import pytest
import sensitive_offload as simulation
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_models import LINK, STEADY, Stack, batch_of, steps
from training_runs import tiny_arguments, tiny_lemo_model, tiny_trainer

from lemo_hf.errors import LemoError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.estimate.offload_plan import (
    HostLink,
    LayerLoad,
    hidden_bytes,
    peak_on_device,
    plan_bytes,
    sensitive_bytes,
    simulate,
    uniform_bytes,
)
from lemo_hf.training import offload_saved
from lemo_hf.training.host_copies import HostMemory, StreamCopies, available_host_memory, measured_link
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

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
    assert hidden_bytes([], LINK) == []
    # With the time of two layers: the first's 100 leave in 2 s, while both others run; then the second's have no time left.
    assert hidden_bytes(layers, HostLink(50, 1000), 2) == [100, 0, 0]
    wide = simulate(layers, [100, 0, 0], HostLink(50, 1000), head_seconds=4, window=2)
    assert (wide.seconds, wide.stall_seconds, wide.peak_bytes) == (13, 0, 300)
    assert peak_on_device([100, 100, 100, 100], [100, 50, 25, 0], 2) == 300


LOADS = st.lists(st.builds(LayerLoad, st.integers(0, 500), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(LOADS, st.integers(1, 60), st.integers(1, 60), st.integers(1, 5))
def test_what_hides_is_as_much_of_the_lower_layers_as_can_be(loads, out, back, window):
    """Against its definition, the sums of all stretches of layers; and no transfer is waited for."""
    link = HostLink(out, back)
    found = hidden_bytes(loads, link, window)

    def room(first, last):
        beside = loads[first + 1 : last + window + 1]
        return min(out * sum(load.forward_seconds for load in beside), back * sum(load.backward_seconds for load in beside))

    for last, load in enumerate(loads):
        left = min(room(first, last) - sum(found[first : last + 1]) for first in range(last + 1))
        assert left >= -1e-6
        assert found[last] == pytest.approx(load.saved_bytes) or left == pytest.approx(0, abs=1e-6), "room is used in order"
    assert found[-1] == 0
    assert simulate(loads, found, link, 1.0, window).stall_seconds == pytest.approx(0, abs=1e-6)


def test_layers_by_turns_get_a_wider_window_and_even_ones_do_not():
    link = HostLink(200, 200)
    turns = [LayerLoad(1000 * share, 6 * share, 12 * share) for share in (0.9, 0.1) * 8]
    wide, narrow = plan_bytes("sensitive", turns, link), sensitive_bytes([1e9] * 16, hidden_bytes(turns, link))
    assert wide.window == 2
    assert sum(wide.moved) > 2 * sum(narrow)
    assert simulate(turns, wide.moved, link, 0.0, 2).stall_seconds == pytest.approx(0, abs=1e-6)
    # Everything at once: the window in which the least comes too late, at the price of its peak.
    assert plan_bytes("sensitive", turns, link, math.inf).window == 2
    assert plan_bytes("uniform", turns, link).window == 1
    even = [LayerLoad(1000, 3, 6)] * 16
    for total in (None, math.inf):
        assert plan_bytes("sensitive", even, link, total).window == 1
    assert plan_bytes("sensitive", even, link).moved == [600] * 15 + [0]


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
            assert again["faster_than_uniform_same_window"] > 1 - 1e-9
            assert again["peak_saved"] >= again["peak_saved_one_layer"]


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
    with SensitiveOffload(sparse_backbone(model), OffloadSettings(smallest=1, link=LINK, seconds=[(1e-5, 1e-4)] * 2)) as offload:
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
