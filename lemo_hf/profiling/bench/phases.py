"""Seconds of a training step by phase: every operator is timed and put down to the part of the model that it serves, forward and
backward.

| phase | parts (breakdown.py) |
| --- | --- |
| select, predict | pattern predictors, scores, the choice of blocks |
| attention | q, k, v and output projections, rotary positions, attention |
| mlp | the MLP |
| norm | norms, residual adds |
| movement | what LeMo's layers do to take rows, put them back and know where they stand |
| loss | head and loss |
| optimizer | the optimizer's step |
| other | embeddings, masks, what fits none |
| between | the rest of the step's time: Python, launches, copies that nobody waits for |

A kernel that takes rows and normalises them in one pass, or adds while it puts them back, counts as movement: with kernels that phase is
an upper bound.

Timing every operator makes a step slower: the sum is this step's own, not the one that is quoted as its time. On CUDA operators are
timed by events on the stream. An operator that is done sooner than the next is launched then has a share of that launch in its time,
unless the device is kept busy in the meantime (`launched_ahead`).
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..breakdown import RunningOwners
from ..flops import is_attention

PHASES = ("select, predict", "attention", "mlp", "norm", "movement", "loss", "optimizer", "other", "between")
_PHASE_OF_PART = {
    "predictor": "select, predict",
    "selection": "select, predict",
    "q,k,v": "attention",
    "attention": "attention",
    "o_proj": "attention",
    "mlp": "mlp",
    "norm": "norm",
    "loss": "loss",
}
# A layer that calls functions on rows leaves the backward of these to the layer itself: where the function that runs there is not known
# (breakdown.py), the autograd node's name tells them apart.
_PART_OF_NODE = (
    (re.compile(r"gated_?activation", re.I), "mlp"),
    (re.compile(r"rotary|attend|KeptRowGradient|RestKeys|SelectedAttention", re.I), "attention"),
    (re.compile(r"PrunedMLP"), "mlp"),
    (re.compile(r"SegmentedLoss|cross_entropy", re.I), "loss"),
    (re.compile(r"RMSNorm"), "norm"),
)
# Of the layer's own operators those that are no movement: rotary positions, residual adds, and a kernel's norm of rows that lie together.
_ROTARY = ("apply_rotary", "mul", "neg", "slice_backward")
_ADDS = ("add", "add_")
_NORMS = ("row_norm", "row_norm_backward")
# Cycles of a device between an operator's turn and its start: 0.3 ms at 2 GHz, more than a launch from Python takes.
_HEAD_START = 600_000


class PhaseTimer(TorchDispatchMode):
    """Context manager that times the operators of what runs within it.

    ```python
    with PhaseTimer(model, device) as timer:
        model(**batch).loss.backward()
        with timer.phase("optimizer"):
            optimizer.step()
    timer.seconds()     # {"attention": 0.2, ...}
    ```

    Args:
        model: Its modules are those of the phases.
        device: Where it runs.
        launched_ahead: Whether, on CUDA, the device is kept busy before each operator, so that this is launched by the time it begins
            and no launch is in its time, as in a step that keeps the device busy by itself. "between" says nothing then: it is 0.
    """

    def __init__(self, model: nn.Module, device: torch.device, launched_ahead: bool = False) -> None:
        super().__init__()
        self._owners = RunningOwners(model)
        self._cuda = device.type == "cuda"
        self._launched_ahead = launched_ahead and self._cuda
        self._named: str | None = None
        self._spans: list[tuple[str, Any, Any]] = []
        self._whole: tuple[Any, Any] = (None, None)

    def __enter__(self) -> "PhaseTimer":
        # Backward in this thread, where the modules of its nodes are known; it is so from the object's making on.
        self._one_thread = torch.autograd.set_multithreading_enabled(False)
        self._owners.__enter__()
        super().__enter__()
        self._whole = (self._now(), None)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._whole = (self._whole[0], self._now())
        super().__exit__(*exception)
        self._owners.__exit__(*exception)
        self._one_thread.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        phase = self._named or self._phase(func, args)
        if self._launched_ahead and not func.is_view:
            torch.cuda._sleep(_HEAD_START)
        start = self._now()
        result = func(*args, **(kwargs or {}))
        self._spans.append((phase, start, self._now()))
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Puts what runs within its block down to one phase."""
        self._named = name
        try:
            yield
        finally:
            self._named = None

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, after the context has ended."""
        if self._cuda:
            torch.cuda.synchronize()
        found = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in self._spans:
            found[phase] += self._between(start, end)
        if not self._launched_ahead:
            found["between"] = max(0.0, self._between(*self._whole) - sum(found.values()))
        return found

    def _phase(self, func: Any, args: Any) -> str:
        if is_attention(func._overloadpacket):
            return "attention"
        part = self._owners.owner().part
        node = torch._C._current_autograd_node()
        if node is not None and part in ("residual", "other", "norm"):
            part = next((found for pattern, found in _PART_OF_NODE if pattern.search(node.name())), part)
        return _phase_of_layer(func, args) if part == "residual" else _PHASE_OF_PART.get(part, "other")

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start


def _phase_of_layer(func: Any, args: Any) -> str:
    """The phase of an operator that a layer runs itself, in none of its modules."""
    name = func._schema.name.rpartition("::")[2]
    if name.endswith(_NORMS):
        # Which rows of a stream, or where in it their gradients go; neither for rows that lie together.
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        return "norm" if given.get("rows") is None and given.get("slots") is None else "movement"
    return "attention" if name.endswith(_ROTARY) else "norm" if name in _ADDS else "movement"


def phase_seconds(
    model: nn.Module, device: torch.device, step: Callable[[Callable[..., Any]], None], launched_ahead: bool = False
) -> dict[str, float]:
    """Seconds of one step by phase.

    Args:
        model: The model.
        device: Where it runs.
        step: Runs one step; calls the context manager it is given, `named("optimizer")`, around the optimizer's part.
        launched_ahead: As [`PhaseTimer`] takes it.
    """
    with PhaseTimer(model, device, launched_ahead) as timer:
        step(timer.phase)
    return timer.seconds()
