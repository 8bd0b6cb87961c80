"""Sparsity-sensitive offload (LeMo paper, section 6): saved activations lie in pinned host memory between forward and backward.

What a layer's operators save passes `torch.autograd.graph.saved_tensors_hooks`. A storage above a size is copied to the host on a side stream
while the next k layers run forward, and back while as many above it run backward. How much of each layer is moved is a budget in bytes,
from what the layer saves, which follows its kept share, from measured bandwidth and from measured times; these decide on the window k
too, 1 to 4 (profiling/estimate/offload_plan.py).

- A storage is moved once, however many views of it are saved; parameters, buffers, row numbers and what is sharded or quantised stay. Where a
  budget ends within a storage, its first bytes move and the others stay, in a copy of their own, so budgets hold to the byte.
- A storage's record is owned by the graph: when backward has used it, or an exception has dropped the graph, host memory, device memory and
  counters are free again, whatever happened between.
- On the device are, of layer l's x_l bytes: all until layer l + k has ended, none until layer l + k begins its backward.
- The first forwards move everything that there is host memory for, with k = 1, which is safe for the device's, and are timed; then budgets
  and window are set, and anew when settings change.

`save_on_cpu` and trl's `OffloadActivations` are such hooks too. The first copies everything at once on the stream that computes. The second has a
side stream and moves every tensor above a size: a tensor is where it decides, by its size alone, with a limit of five tensors under way, no layer is
known to it, nothing is fetched before it is asked for, and what lies in host memory has no bound. A budget of bytes per layer needs all of these, so
this builds on the hooks themselves.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..profiling.activation_memory import plain_tensors
from ..profiling.breakdown import storage_of
from ..profiling.estimate.offload_plan import HostLink, LayerLoad, plan_bytes
from .host_copies import HostMemory, Moment, PlainCopies, copies_for, measured_link
from .layer_hooks import LayerHooks
from .saved_storage import SavedStorage, SavedVersion

# Of a storage that is moved.
SMALLEST = 2**20
# Of the measured bandwidth, since times scatter.
_MARGIN = 0.9
# Forwards until budgets are set. The first also compiles kernels; the second is timed.
TIMED_FORWARDS = 2


@dataclass(frozen=True)
class OffloadSettings:
    """What is moved.

    Args:
        mode: `"sensitive"`: budgets by what hides behind each layer; `"uniform"`: the same bytes for every layer.
        budget: Sum of the budgets, bytes; infinite: everything; `None`: the most that hides.
        host_bytes: Most host memory.
        smallest: Bytes of a storage from which on it is moved.
        link: Bandwidth; measured if `None`.
        seconds: By layer forward and backward seconds; measured if `None`.
    """

    mode: Literal["uniform", "sensitive"] = "sensitive"
    budget: float | None = None
    host_bytes: float = math.inf
    smallest: int = SMALLEST
    link: HostLink | None = None
    seconds: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class OffloadReport:
    """The last forward's offload, and its backward's as far as it has come.

    Args:
        saved_bytes, moved_bytes: By layer: what could be moved, and what was.
        host_peak_bytes: The most host memory used at one time so far.
        host_reserved_bytes: Host memory taken from the system.
        unmoved_bytes: What a budget asked for and host memory had no room for.
        transfer_seconds: Time of the copies, both ways.
        stall_seconds: Time that computation waited for them; all of it on a CPU.
        window: Layers whose time a transfer had.
    """

    saved_bytes: list[int]
    moved_bytes: list[int]
    host_peak_bytes: int
    host_reserved_bytes: int
    unmoved_bytes: int
    transfer_seconds: float
    stall_seconds: float
    window: int

    @property
    def overlap(self) -> float:
        """Share of the transfers' time that hid behind computation, in [0, 1]; 1 without transfers."""
        return max(0.0, 1 - self.stall_seconds / self.transfer_seconds) if self.transfer_seconds else 1.0


class _Forward:
    """What one forward of the layers has saved and moved, and when; and its backward's times."""

    def __init__(self, layers: int, window: int) -> None:
        self.window = window
        self.place, self.rows = -1, 0  # the last layer that ran, and rows of its input
        self.saved, self.moved = [0] * layers, [0] * layers
        self.unmoved = 0
        self.saving: set[int] = set()  # layers that saved anything: those below the lowest trained one do not
        # By layer: begin, end, and the number of waits at each.
        self.forward: dict[int, tuple[Moment, Moment, int, int]] = {}
        self.backward: dict[int, tuple[Moment, int]] = {}


class _LayerRun:
    """One layer's forward, and its backward: what it saved. Owned by what it saved."""

    def __init__(self, layer: int, forward: _Forward, budget: float, before: "_LayerRun | None") -> None:
        self.layer, self.forward, self.budget = layer, forward, budget
        self.storages: list[weakref.ref[SavedStorage]] = []
        self._below = weakref.ref(before) if before is not None and before.forward is forward else lambda: None
        self.sent: Moment | None = None
        self.in_backward = False

    def living(self) -> list["SavedStorage"]:
        return [storage for ref in self.storages if (storage := ref()) is not None]

    def downwards(self, count: int) -> "Iterator[_LayerRun]":
        """It, and the `count` layers below it."""
        run: _LayerRun | None = self
        for _ in range(count + 1):
            if run is None:
                return
            yield run
            run = run._below()


class _Saved:
    """What autograd keeps instead of a tensor: a view of a storage that was moved, or what stays as it is."""

    __slots__ = ("held", "run", "storage", "version", "view")

    def __init__(self, run: _LayerRun, storage: SavedStorage | None, view: tuple[Any, ...] | None, held: Any) -> None:
        self.run, self.storage, self.view, self.held = run, storage, view, held
        self.version = SavedVersion(storage.counter if storage is not None else held)


class SensitiveOffload:
    """Context manager under which what the layers save lies in host memory until their backward.

    ```python
    with SensitiveOffload(backbone, OffloadSettings(budget=40 * 2**30)) as offload:
        for batch in batches:
            model(**batch).loss.backward()
    offload.report().moved_bytes
    ```

    Backward may run after the context has ended. Layers that run without autograd, in evaluation mode or within backward
    (activation checkpointing in some releases) are left alone. Of stock activation checkpointing it moves a layer's stored input, of
    kept-row checkpointing its stored kept rows.

    Args:
        backbone: A module with `layers`, which run one after the other.
        settings: What is moved.
        signature: What the budgets depend on besides the batch: when its value changes they are set anew.
        copies: How bytes are copied; by the device if `None`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        settings: OffloadSettings,
        signature: Callable[[], Any] = lambda: None,
        copies: PlainCopies | None = None,
    ) -> None:
        self.settings = settings
        self.device: torch.device = next(backbone.parameters()).device
        # By layer, per row of its input; `None` while everything is moved and timed.
        self.budgets: list[float] | None = None
        self.window = 1
        most = math.inf if settings.budget is None else settings.budget
        self.memory = HostMemory(min(settings.host_bytes, most), pinned=self.device.type != "cpu")
        self._backbone = backbone
        self._layers: list[nn.Module] = list(backbone.layers)  # type: ignore[arg-type]
        self._copies = copies or copies_for(self.device)
        self._link = settings.link
        self._signature, self._signed = signature, signature()
        self._handles: list[Any] = []
        self._hooks = LayerHooks()
        self._weights: set[int] = set()
        self._run: _LayerRun | None = None
        self._last: weakref.ref[_LayerRun] | Callable[[], None] = lambda: None
        self._leaving: list[_LayerRun] = []  # whose copies computation has not waited for yet
        self._storages: weakref.WeakValueDictionary[tuple[int, int, int], SavedStorage] = weakref.WeakValueDictionary()
        self._timed = 0  # forwards since the budgets were unset
        self._began: tuple[Moment, int] = (None, 0)
        self._forward = _Forward(len(self._layers), self.window)

    def __enter__(self) -> "SensitiveOffload":
        if self._link is None:
            self._link = measured_link(self.device)
        for place, layer in enumerate(self._layers):
            before = layer.register_forward_pre_hook(self._before(place), with_kwargs=True)
            self._handles += [before, layer.register_forward_hook(self._after(place), always_call=True)]
        self._handles.append(self._backbone.register_forward_hook(lambda *_: self._let_go_but(0)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._leave()
        self._leaving = []

    @property
    def device_bytes(self) -> int:
        """Bytes of all saved storages above the size that are on the device, once copies have left it."""
        return sum(storage.size - storage.moved for storage in list(self._storages.values()))

    @property
    def host_bytes(self) -> int:
        """Host memory in use."""
        return self.memory.held_bytes

    def report(self) -> OffloadReport:
        """What the last forward has moved; waits until the device is done with it."""
        peak, reserved = self.memory.peak_bytes, self.memory.reserved_bytes
        times = self._copies.transferred(), self._copies.stalled()
        now = self._forward
        return OffloadReport(list(now.saved), list(now.moved), peak, reserved, now.unmoved, *times, now.window)

    # A layer's forward.

    def _before(self, place: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._leave()  # a layer that ended without its hook
            if layer.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self._enter(place, layer, args[0] if args else kwargs["hidden_states"])

        return hook

    def _enter(self, place: int, layer: nn.Module, rows: Tensor) -> None:
        if place <= self._forward.place:
            self._begin_forward()
        self._forward.place, self._forward.rows = place, rows.numel() // rows.shape[-1]
        # Looked at anew in each forward: FSDP2 has just gathered them.
        residents = (*layer.parameters(), *layer.buffers())
        self._weights = {storage_of(part)[0] for weight in residents for part in plain_tensors(weight)}
        budget = math.inf if self.budgets is None else self.budgets[place] * self._forward.rows
        self._run = _LayerRun(place, self._forward, budget, self._last())
        self._last = weakref.ref(self._run)
        self._began = self._copies.moment(), self._copies.stalls
        self._hooks.enter(self._pack, self._unpack)

    def _after(self, place: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            run = self._run
            self._leave()
            if run is None:
                return
            began, stalls = self._began
            run.forward.forward[place] = (began, self._copies.moment(), stalls, self._copies.stalls)
            self._leaving.append(run)
            self._let_go_but(run.forward.window)

        return hook

    def _leave(self) -> None:
        self._hooks.leave()
        self._run = None

    def _let_go_but(self, last: int) -> None:
        """Frees what the layers have moved, but for the `last` of them; waits until it has left."""
        while len(self._leaving) > last:
            run = self._leaving.pop(0)
            if run.sent is not None:
                self._copies.wait(run.sent)
            for storage in run.living():
                storage.let_go()

    # What is saved, and what backward asks for.

    def _pack(self, tensor: Tensor) -> _Saved:
        run, keep = self._run, self._hooks.keep
        assert run is not None
        run.forward.saving.add(run.layer)
        if not self._may_move(tensor):
            return _Saved(run, None, None, keep(tensor))
        found = self._record_of(tensor, run)
        if not found.moved:
            return _Saved(run, found, None, keep(tensor))
        return _Saved(run, found, (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()), None)

    def _record_of(self, tensor: Tensor, run: _LayerRun) -> SavedStorage:
        """The record of the tensor's storage with the content that it has now."""
        storage = tensor.untyped_storage()
        for other in count():
            key = storage._cdata, tensor._version, other
            found = self._storages.get(key)
            if found is None:
                break
            if found.counts_for(tensor):
                return found
        found = self._storages[key] = SavedStorage(tensor, self._copies, self.memory)
        run.forward.saved[run.layer] += found.size
        self._move(found, storage, run)
        return found

    def _may_move(self, tensor: Tensor) -> bool:
        is_plain = next(plain_tensors(tensor)) is tensor
        if not (is_plain and tensor.is_floating_point() and tensor.device == self.device):
            return False
        key, size = storage_of(tensor)
        return size >= max(1, self.settings.smallest) and key not in self._weights

    def _move(self, found: SavedStorage, storage: Any, run: _LayerRun) -> None:
        forward, layer = run.forward, run.layer
        wanted = int(min(found.size, max(0, run.budget - forward.moved[layer])))
        size = int(min(wanted, self.memory.room_bytes))
        pieces = self.memory.take(size) if size >= max(1, self.settings.smallest) else None
        if pieces is None:
            forward.unmoved += wanted if size < wanted else 0
            return
        run.sent = found.send(storage, pieces, self._hooks.keep)
        forward.moved[layer] += size
        forward.unmoved += wanted - size
        run.storages.append(weakref.ref(found))

    def _unpack(self, saved: _Saved, kept: Callable[[Any], Tensor]) -> Tensor:
        if not saved.run.in_backward:
            self._begin_backward(saved.run, kept)
        saved.version.require_unchanged()
        if saved.view is None or saved.storage is None:
            return kept(saved.held)
        dtype, offset, shape, stride = saved.view
        whole = saved.storage.read(kept)
        return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage(), offset, shape, stride)

    def _begin_backward(self, run: _LayerRun, kept: Callable[[Any], Tensor]) -> None:
        run.in_backward = True
        run.forward.backward[run.layer] = (self._copies.moment(), self._copies.stalls)
        for one in run.downwards(run.forward.window):
            # What was saved last is asked for first.
            for storage in reversed(one.living()):
                storage.fetch(kept)

    # Budgets.

    def _begin_forward(self) -> None:
        self._leaving = []  # of a forward that was cut short
        if self._signed != self._signature():
            self._signed, self.budgets, self.window, self._timed = self._signature(), None, 1, 0
        elif self.budgets is None:
            self._set_budgets()
        self._forward = _Forward(len(self._layers), self.window)
        self._copies.begin()

    def _set_budgets(self) -> None:
        loads = self._loads()
        if loads is None:
            return
        self._timed += 1
        if self._timed < TIMED_FORWARDS and self.settings.seconds is None:
            return
        assert self._link is not None
        total, most = self.settings.budget, self.settings.host_bytes
        link = HostLink(_MARGIN * self._link.to_host, _MARGIN * self._link.to_device)
        plan = plan_bytes(self.settings.mode, loads, link, total)
        if sum(plan.moved) > most:
            plan = plan_bytes(self.settings.mode, loads, link, most)
        self.budgets = [math.inf if total == math.inf else size / self._forward.rows for size in plan.moved]
        self.window = plan.window

    def _loads(self) -> list[LayerLoad] | None:
        """The last forward's layers, or `None` if they did not all run forward, and backward where they saved anything."""
        places, now = range(len(self._layers)), self._forward
        if len(now.forward) < len(places) or not now.backward or now.backward.keys() < now.saving:
            return None
        if self.settings.seconds is not None:
            return [LayerLoad(now.saved[place], *self.settings.seconds[place]) for place in places]
        loads = []
        for place in places:
            began, ended, first, last = now.forward[place]
            forward = self._copies.seconds(began, ended) - self._copies.stalled(first, last)
            backward = 0.0  # of the lowest layer that has one nobody asks: nothing comes back behind it
            if {place, place - 1} <= now.backward.keys():
                (began, first), (ended, last) = now.backward[place], now.backward[place - 1]
                backward = self._copies.seconds(began, ended) - self._copies.stalled(first, last)
            loads.append(LayerLoad(now.saved[place], max(forward, 0.0), max(backward, 0.0)))
        return loads
