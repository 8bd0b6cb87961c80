"""The life of every tensor storage of a step, forward and backward: when its bytes came, when they went, who made them.

`activation_memory.py` counts what autograd saves; a step's peak also holds what lives between two operators: the layer that is
run again under checkpointing, a shared attention's buffer of all queries, keys and values, a rest row's MLP, one segment's logits,
gradients on their way down. Here every operator's results are seen by a dispatch mode, and a weak reference to each storage tells
when PyTorch frees it. Real and fake tensors (`torch._subclasses.fake_tensor`) live and die alike, so shapes of an 8B model cost
nothing and the sum at any moment is what an allocator without rounding would hold.

Not seen: what an operator allocates and frees within itself (`workspace` may state it), the allocator's rounding and cache.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .activation_memory import plain_tensors
from .breakdown import Owner, RunningModules, storage_of


@dataclass
class Allocation:
    """A storage's life.

    Args:
        size: Bytes.
        owner: Who ran when it came: module, layer, part.
        in_backward: Whether it came during a backward pass.
        born: Time of its coming; times count comings and goings.
        died: Time of its going, or `None` while it lives.
        label: What `LiveBytes.label` called it, or "".
    """

    size: int
    owner: Owner
    in_backward: bool
    born: int
    died: int | None = None
    label: str = ""


class LiveBytes(TorchDispatchMode):
    """Context manager that follows the storages of what runs within it.

    ```python
    with LiveBytes(model) as live:          # under FakeTensorMode: enter that first
        model(**batch).loss.backward()
    live.peak_bytes                         # most bytes alive at one time, parameters included
    ```

    Args:
        model: Its parameters and buffers are alive from the start; its module names are those of the owners.
        on_operator: Called with operator, arguments, keyword arguments and result of everything that runs.
        workspace: Bytes that an operator holds while it runs, from its operator, arguments and keyword arguments. They count as
            an allocation that dies at once.
    """

    def __init__(
        self,
        model: nn.Module,
        on_operator: Callable[[Any, Any, Any, Any], None] | None = None,
        workspace: Callable[[Any, Any, Any], int] | None = None,
    ) -> None:
        super().__init__()
        self.allocations: list[Allocation] = []
        self.time = 0
        self._modules = RunningModules(model)
        self._on_operator = on_operator
        self._workspace = workspace
        # The weak reference keeps no storage alive; its callback is the storage's end.
        self._living: dict[int, tuple[Allocation, weakref.ref[Any]]] = {}
        self._see([*model.parameters(), *model.buffers()])

    def __enter__(self) -> "LiveBytes":
        self._modules.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._modules.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # While an operator works, its result is there already.
        self._see(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if self._workspace is not None and (size := self._workspace(func, args, kwargs)):
            self.allocations.append(self._allocation(size))
            self.allocations[-1].died = self._tick()
        if self._on_operator is not None:
            self._on_operator(func, args, kwargs, result)
        return result

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Calls the storages of `tensors` `name` in `Allocation.label`; what was not seen yet is alive from now on."""
        tensors = list(tensors)
        self._see(tensors)
        for tensor in tensors:
            for part in plain_tensors(tensor):
                self._living[storage_of(part)[0]][0].label = name

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at one time."""
        changes = [(one.born, one.size) for one in self.allocations]
        changes += [(one.died, -one.size) for one in self.allocations if one.died is not None]
        now = peak = 0
        for _, change in sorted(changes):
            now += change
            peak = max(peak, now)
        return peak

    def _see(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            for part in plain_tensors(tensor):
                key, size = storage_of(part)
                if key not in self._living:
                    allocation = self._allocation(size)
                    self.allocations.append(allocation)
                    self._living[key] = allocation, weakref.ref(part.untyped_storage(), self._end_of(key))

    def _allocation(self, size: int) -> Allocation:
        in_backward = torch._C._current_graph_task_id() != -1
        return Allocation(size, self._modules.owner(), in_backward, born=self._tick())

    def _end_of(self, key: int) -> Callable[[Any], None]:
        def end(_: Any) -> None:
            allocation, _ = self._living.pop(key)
            allocation.died = self._tick()

        return end

    def _tick(self) -> int:
        self.time += 1
        return self.time
