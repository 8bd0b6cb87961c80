"""Bytes that a forward pass saves for its backward pass, exactly: unique storages that autograd keeps alive.

Every tensor that an operator, a `torch.autograd.Function` (`ctx.save_for_backward`) or activation checkpointing (its inputs)
saves passes `torch.autograd.graph.saved_tensors_hooks`. What counts is the storage: views and repeated saves of one storage
count once and in full, as the allocator sees it. Parameters and buffers live anyway and do not count. Under other such hooks, an
offload's, what counts is what they leave on the tensor's device. Not seen, since autograd does not see it either: tensors kept as
attributes of `ctx` or of modules.

Works on fake tensors (`torch._subclasses.fake_tensor.FakeTensorMode` with CPU tensors), so shapes of an 8B model cost nothing.
On the meta device attention would take the math path and save N x N scores.

What a stock Llama layer saves per token with LoRA on q, k, v and o, in rows of H in bf16 (Llama-3-8B: H = 4096, so 8192 bytes,
MLP width 3.5 H, 8 of 32 heads hold keys and values; SDPA attention):

| what | bf16 adapters | PEFT's float32 adapters |
| --- | --- | --- |
| 2 norms: the float32 copy of the input each | 4 | 4 |
| input of q, k, v | 1 | 3 x 2, a float32 copy for each adapter |
| q, k, v for attention | 1 + 2 x 0.25 | 1.5 |
| attention output, which is the input of o | 1 | 1 + 2, the adapter's float32 copy |
| MLP: gate, silu(gate), up | 3 x 3.5 | 10.5 |
| sum, without float32 adapters' own small rows | 18 | 25 |

To it come 4 adapter rows of r numbers, the log-sum-exp (4 bytes a head) and 2 norm statistics: 0.02 to 0.04 H at r = 8.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from .breakdown import Breakdown, Owner, RunningModules, storage_of

FIELDS = ("module", "layer", "part", "dtype")
_LAYER_PATH = re.compile(r".*?\blayers\.\d+")


class ActivationMemory:
    """Context manager around a forward pass that measures what it saves for backward.

    ```python
    with ActivationMemory(model) as memory:
        loss = model(**batch).loss
    memory.saved.total                  # bytes alive when the context ended
    memory.saved.by("layer", "part")    # {(0, "mlp"): bytes, ...}
    loss.backward()
    ```

    Around forward and backward together `peak_bytes` is the most that was saved at one time, recomputation of checkpointed
    layers without `torch.utils.checkpoint` included (that one hides the insides of its regions, forward and backward).

    A storage belongs to the module that saved it first and still counts while any later save of it lives. Keep the loss (or
    another output) alive until the context ends: without it the graph is gone and nothing is saved.

    Args:
        model: Its parameters and buffers do not count; its module names are those of the breakdown.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = RunningModules(model)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._ledger = _Ledger()
        self._excluded: frozenset[int] = frozenset()
        self._is_sharded = False
        self._outer: Any = None
        self._looked_at: set[str] = set()
        self._finished: Breakdown | None = None

    def __enter__(self) -> "ActivationMemory":
        residents = [*self._model.parameters(), *self._model.buffers()]
        self._excluded = _storages(residents)
        self._is_sharded = any(isinstance(tensor, DTensor) for tensor in residents)
        self._looked_at = set()
        self._ledger = _Ledger()
        self._finished = None
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._modules.__enter__()
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._modules.__exit__(kind, error, trace)
        self._finished = self._ledger.breakdown()

    @property
    def saved(self) -> Breakdown:
        """What is saved now, or was when the context ended: bytes by module, layer, part and dtype."""
        return self._finished if self._finished is not None else self._ledger.breakdown()

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were saved at one time within the context."""
        return self._ledger.peak

    def _pack(self, tensor: Tensor) -> "_Saved":
        if not tensor.is_leaf:
            tensor = tensor.detach()  # an operator's saved result points to the operator's node, and the node to it
        if self._is_sharded:
            self._exclude_gathered()
        # Only the innermost hooks act: those around these (offloading) must not stand still while something is measured.
        held = tensor if self._outer is None else self._outer[0](tensor)
        storages = {storage_of(part): part.dtype for each in _on(tensor.device, held) for part in plain_tensors(each)}
        counted = {key: (size, dtype) for (key, size), dtype in storages.items() if key not in self._excluded}
        return _Saved(held, self._ledger, counted, self._modules.owner() if counted else None)

    def _exclude_gathered(self) -> None:
        """Has the weights of the running layer not count: FSDP2 has just gathered them, and frees them after the layer."""
        layer = _LAYER_PATH.match(self._modules.owner().module)
        if layer is not None and layer[0] not in self._looked_at:
            self._looked_at.add(layer[0])
            self._excluded |= _storages(self._model.get_submodule(layer[0]).parameters())

    def _unpack(self, saved: "_Saved") -> Tensor:
        tensor: Tensor = saved.held if self._outer is None else self._outer[1](saved.held)
        return tensor


def _on(device: torch.device, held: Any) -> list[Tensor]:
    """The tensors that hooks hold on a device; their copies elsewhere take no memory there."""
    return [part for part in tree_leaves(held) if isinstance(part, Tensor) and part.device == device]


def _storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    return frozenset(storage_of(part)[0] for tensor in tensors for part in plain_tensors(tensor))


class _Ledger:
    """Live storages, how many saves hold each, and their sum."""

    def __init__(self) -> None:
        self.peak = 0
        self._current = 0
        self._holders: Counter[int] = Counter()
        self._entries: dict[int, tuple[int, tuple[str, int | None, str, str]]] = {}

    def add(self, key: int, size: int, dtype: torch.dtype, owner: Owner) -> None:
        if key not in self._entries:
            self._entries[key] = size, (*owner, str(dtype).removeprefix("torch."))
            self._current += size
            self.peak = max(self.peak, self._current)
        self._holders[key] += 1

    def remove(self, key: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._current -= self._entries.pop(key)[0]

    def breakdown(self) -> Breakdown:
        amounts: Counter[tuple[str, int | None, str, str]] = Counter()
        for size, entry in list(self._entries.values()):
            amounts[entry] += size
        return Breakdown(FIELDS, amounts)


class _Saved:
    """What autograd keeps instead of a tensor. It holds the tensor's storage, so no address is used again while it counts."""

    def __init__(self, held: Any, ledger: _Ledger, storages: dict[int, tuple[int, torch.dtype]], owner: Owner | None) -> None:
        self.held = held
        self._ledger = ledger
        self._keys = list(storages)
        if owner is not None:
            for key, (size, dtype) in storages.items():
                ledger.add(key, size, dtype, owner)

    def __del__(self) -> None:
        for key in self._keys:
            self._ledger.remove(key)


def plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """The tensors that hold a wrapper subclass's data (sharded or quantised tensors), or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if isinstance(inner, Tensor):  # a sharded tensor also names its devices
            yield from plain_tensors(inner)
