"""Saved-tensor hooks that are in force while a layer runs, inside of those that were before: of nested ones autograd asks the innermost only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_hooks = torch._C._autograd
_Pack = Callable[[Tensor], Any]
_Unpack = Callable[[Any], Tensor]


class LayerHooks:
    """Hooks between `enter` and `leave`, which no `with` block can surround: a module's own hooks call them.

    A module calls its hooks after an `Exception` in its forward, and not after KeyboardInterrupt or SystemExit. So these may be found on
    the stack later, under hooks that were pushed since, or be gone with the end of a context outside that took them for its own:
    `leave` takes them off wherever they are, or what that context left in their stead. Hooks that were pushed in between go on
    calling them: they let tensors pass by then. Of several contexts around one step the innermost alone is known here: an interrupt that ends
    them all leaves the hooks of the outermost on the stack, as PyTorch itself does.
    """

    def __init__(self) -> None:
        self._pushed: _Pack | None = None
        self._outer: tuple[_Pack, _Unpack] | None = None

    def enter(self, pack: _Pack, unpack: Callable[[Any, _Unpack], Tensor]) -> None:
        """Pushes hooks, and takes those of an earlier call off if they are still there.

        Args:
            pack: What is called with a tensor to be saved; returns what autograd keeps.
            unpack: What is called with that, and with a function that undoes `keep`; returns the tensor.
        """
        self.leave()
        outer = self._outer = _hooks._top_saved_tensors_default_hooks(True)

        def pushed(tensor: Tensor) -> tuple[bool, Any]:
            ours = self._pushed is pushed
            return ours, pack(tensor) if ours else _held(tensor, outer)

        def kept(held: Any) -> Tensor:
            tensor: Tensor = held if outer is None else outer[1](held)
            return tensor

        def taken_back(saved: tuple[bool, Any]) -> Tensor:
            ours, held = saved
            return unpack(held, kept) if ours else kept(held)

        self._pushed = pushed
        _hooks._push_saved_tensors_default_hooks(pushed, taken_back)

    def leave(self) -> None:
        """Takes the hooks off; does nothing if there are none."""
        if self._pushed is None:
            return
        own, self._pushed = (self._pushed, *(self._outer or ())[:1]), None
        above = []
        while (top := _hooks._top_saved_tensors_default_hooks(True)) is not None:
            _hooks._pop_saved_tensors_default_hooks()
            if any(top[0] is pack for pack in own):
                break
            above.append(top)
        for hooks in reversed(above):
            _hooks._push_saved_tensors_default_hooks(*hooks)

    def keep(self, tensor: Tensor) -> Any:
        """What is held of a tensor that stays: what the hooks outside make of it, or the tensor itself."""
        return _held(tensor, self._outer)


def _held(tensor: Tensor, outer: tuple[_Pack, _Unpack] | None) -> Any:
    if not tensor.is_leaf:
        tensor = tensor.detach()  # an operator's saved result points to the operator's node, and the node to it
    return tensor if outer is None else outer[0](tensor)
