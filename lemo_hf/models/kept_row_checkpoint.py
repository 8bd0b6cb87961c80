"""Kept-row checkpointing: a layer stores its kept rows and computes the rest of what backward needs again (ours).

Stored per layer: the kept residual rows, and where kept and rest rows share an attention (exact form, kept keys) the kept rows'
output and log-sum-exp and the rest rows' keys and values. Neither that attention's forward nor a rest row is ever run again, so
backward costs one more pass over the kept rows only.

`torch.compile` gets the same by torch's own checkpointing around the part that is run again: it can trace neither a gradient within
a backward nor random states. What reads rest rows runs before that part, on queries and keys of its own; where an adapter's
dropout would make these others than those that are run again, the graph breaks instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .row_movement import TakenRows, merge, replace_rows
from .token_elimination import Selection, gather_rows


class SplitLayer(Protocol):
    """A layer's run over kept and rest rows, as kept_and_rest_rows.py makes it."""

    selection: Selection
    finished: tuple[Tensor, ...] | None

    def take(self, residual: Tensor, *, and_norm: bool = True) -> TakenRows:
        """The kept rows of the residual stream."""

    def forward(self, residual: Tensor, taken: TakenRows) -> Tensor:
        """The layer on all real rows."""

    @property
    def can_attend_ahead(self) -> bool:
        """Whether attention may run twice."""

    def attend_ahead(self, kept: Tensor) -> tuple[Tensor, ...] | None:
        """What of attention reads rest rows."""

    def rest_forward(self, residual: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The layer on rest rows."""

    def kept_forward(
        self, kept: Tensor, finished: tuple[Tensor, ...] | None = None, *, for_backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The layer on kept rows."""


class _KeptRowCheckpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, split: SplitLayer, *weights: Tensor) -> Tensor:
        taken = split.take(residual)
        device = residual.device.type
        ctx.random_state = random_state(residual.device)
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        merged = split.forward(residual, taken)
        stored = split.finished or ()  # where kept and rest rows share an attention
        split.finished = None
        ctx.save_for_backward(taken.kept, *stored)
        # As they are, not as saved tensors: hooks that pack those (offloading) would return copies that autograd does not know.
        ctx.weights = weights
        ctx.split = split
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *finished = ctx.saved_tensors
        split, rows = ctx.split, ctx.split.selection.kept_rows
        enabled, dtype = ctx.autocast
        with (
            torch.enable_grad(),
            torch.autocast(grad.device.type, dtype=dtype, enabled=enabled),
            random_state_restored(ctx.random_state, grad.device),
        ):
            leaf = kept.detach().requires_grad_(ctx.needs_input_grad[0])
            again = torch.add(*split.kept_forward(leaf, tuple(finished) or None, for_backward=True))
        inputs = [*([leaf] if leaf.requires_grad else []), *ctx.weights]
        grads = list(torch.autograd.grad(again, inputs, gather_rows(grad, rows), allow_unused=True))
        if not leaf.requires_grad:
            return None, None, *grads
        # The layer's result may be wider than its input.
        return replace_rows(grad.to(leaf.dtype), split.selection, grads[0]), None, *grads[1:]


def checkpoint_kept_rows(residual: Tensor, split: SplitLayer, weights: list[Tensor]) -> Tensor:
    """Runs a layer, storing its kept rows only.

    Args:
        residual: The layer's input, `(all_rows, hidden)`.
        split: The layer's run.
        weights: Its trainable weights. They are inputs, so their gradients leave through autograd: a layer whose input needs
            no gradient still trains, and hooks on the weights (gradient reduction) fire once.
    """
    if torch.compiler.is_compiling() and split.can_attend_ahead:
        return _traced(residual, split)
    return _KeptRowCheckpoint.apply(residual, split, *weights)


def _traced(residual: Tensor, split: SplitLayer) -> Tensor:
    # The first norm belongs to what is run again: computed with the taking its result would be saved.
    taken = split.take(residual, and_norm=False)
    finished = split.attend_ahead(taken.kept)
    kept, update = checkpoint(split.kept_forward, taken.kept, finished, use_reentrant=False)
    return merge(taken, kept, update, *split.rest_forward(residual), split.selection)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random states that dropout on `device` reads."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def random_state_restored(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Runs its block from `state` and leaves the present state as it was: dropout draws again what it drew before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
