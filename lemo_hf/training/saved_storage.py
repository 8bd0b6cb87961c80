"""A storage that a layer saved for backward, and where its bytes are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef

from .host_copies import HostMemory, Moment, PlainCopies


class SavedStorage:
    """A storage that a layer saved: on the device, in host memory, or its first bytes there and the others here.

    Args:
        tensor: A tensor on the storage; the storage is held from `send` until `let_go` only.
        copies: How bytes are copied.
        memory: Where to.
    """

    def __init__(self, tensor: Tensor, copies: PlainCopies, memory: HostMemory) -> None:
        storage = tensor.untyped_storage()
        self.size = storage.nbytes()
        self.moved = 0
        # Counts in-place changes as `tensor` does, and holds no byte.
        self.counter = tensor.detach()
        self.counter.data = tensor.new_empty(0)
        # While it is there no other storage gets this address.
        self.reference = StorageWeakRef(storage)
        self._copies, self._memory = copies, memory
        self._device = storage.device
        self._original: Tensor | None = None  # until it has been copied
        self._pieces: list[Tensor] = []
        self._rest: Any = None
        self._back: Tensor | None = None
        self._arrival: Moment | None = None

    def counts_for(self, tensor: Tensor) -> bool:
        """Whether in-place changes of `tensor` are counted here: parts of a storage that `unsafe_chunk` makes count apart."""
        version = tensor._version
        with _unsafe_preserve_version_counter(self.counter):
            increment_version(self.counter)
            return tensor._version != version

    def send(self, storage: Any, pieces: list[Tensor], keep: Callable[[Tensor], Any]) -> Moment:
        """Begins to move the first bytes to `pieces`; the others are handed to `keep`."""
        self._pieces, self.moved = pieces, sum(piece.numel() for piece in pieces)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._original = whole
        if self.moved < self.size:
            self._rest = keep(whole[self.moved :].clone())
        return self._copies.copy(pieces, whole[: self.moved].split([piece.numel() for piece in pieces]))

    def let_go(self) -> None:
        """Frees the device's memory; what is computed from now on must come after the copy."""
        self._original = None

    def fetch(self, kept: Callable[[Any], Tensor]) -> None:
        """Begins to bring it back; `kept` undoes `keep`."""
        if self._original is not None or self._back is not None:
            return
        back = torch.empty(self.size, dtype=torch.uint8, device=self._device)
        self._arrival = self._copies.copy(back[: self.moved].split([piece.numel() for piece in self._pieces]), self._pieces)
        if self._rest is not None:
            back[self.moved :].copy_(kept(self._rest))
            self._rest = None
        self._back = back
        self._return()

    def read(self, kept: Callable[[Any], Tensor]) -> Tensor:
        """Its bytes, on the device."""
        if self._original is not None:
            return self._original
        self.fetch(kept)
        if self._arrival is not None:
            self._copies.wait(self._arrival)
            self._arrival = None
        assert self._back is not None
        return self._back

    def _return(self) -> None:
        if self._pieces:
            self._memory.give_back(self._pieces)
        self._pieces = []

    def __del__(self) -> None:
        if self._arrival is not None:  # nobody has read it: its memory is used again, and not before the copy has come
            self._copies.follow(self._arrival)
        self._return()


class SavedVersion:
    """The version of what is saved: under hooks autograd no longer sees that it is changed in place.

    Args:
        counter: What counts the changes; anything but a tensor has none.
    """

    __slots__ = ("counter", "version")

    def __init__(self, counter: Any) -> None:
        self.counter = counter if isinstance(counter, Tensor) else None
        self.version = 0 if self.counter is None else self.counter._version

    def require_unchanged(self) -> None:
        """Raises what autograd would: RuntimeError if it was changed in place."""
        if self.counter is not None and self.counter._version != self.version:
            raise RuntimeError(
                "a tensor that a layer saved for backward has been modified by an inplace operation; it is at version "
                f"{self.counter._version}, saved at {self.version}; compute out of place in the layer"
            )
