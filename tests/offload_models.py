"""What is offloaded in tests: batches, settings, steps, layers that save views of one storage, copies as a side stream makes them."""

import math
import weakref
from collections import deque

import torch
from torch import nn
from training_runs import RandomText

from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.estimate.offload_plan import HostLink
from lemo_hf.training.host_copies import PlainCopies
from lemo_hf.training.sensitive_offload import OffloadSettings

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


def fails(*_):
    raise RuntimeError("in the middle of a step")


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
