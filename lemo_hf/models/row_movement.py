"""Kept and rest rows on their way through a layer: taken from the residual stream, normalised, added, merged back.

Each function is the reference's composition of plain steps, or one Triton kernel for all of them (kernel_switch.py). The
kernels write no permuted copy of the stream: a rest row is read where it stands, and the last sum of a layer is made while the
new stream is written.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .documents import Documents
from .kernel_switch import kernel
from .pattern_predictor import PatternPredictor
from .token_elimination import Selection, gather_rows, merge_rows

Norm = Callable[[Tensor], Tensor]


class TakenRows(NamedTuple):
    """A layer's kept rows, and what merging them back needs.

    Args:
        kept: Kept rows, `(kept, hidden)`.
        normed: The same normalised, where that came in the same pass.
        stream: The residual stream `(all_rows, hidden)` to be merged into. With kernels its gradient and that of the kept rows
            are one tensor, so it is good for `merge` alone.
        slots: Where each row's new value will stand, with kernels.
    """

    kept: Tensor
    normed: Tensor | None
    stream: Tensor
    slots: Tensor | None


def take(residual: Tensor, selection: Selection, norm: nn.Module | None) -> TakenRows:
    """Takes the kept rows out of the residual stream.

    Args:
        residual: `(all_rows, hidden)`.
        selection: The rows.
        norm: The norm that follows, if it is a plain one.
    """
    take_rows = kernel("take_rows", residual, residual.shape[1])
    if take_rows is None:
        return TakenRows(gather_rows(residual, selection.kept_rows), None, residual, None)
    slots = _slots(residual, selection)
    gather_norm = _norm_kernel("gather_norm", residual, norm)
    if norm is None or gather_norm is None:
        kept, stream = take_rows(residual, selection.kept_rows, slots)
        return TakenRows(kept, None, stream, slots)
    kept, normed, stream = gather_norm(residual, selection.kept_rows, slots, **_norm_arguments(norm, residual.dtype))
    return TakenRows(kept, normed, stream, slots)


def merge(
    taken: TakenRows, kept: Tensor, kept_update: Tensor, rest: Tensor | None, rest_update: Tensor | None, selection: Selection
) -> Tensor:
    """Writes a layer's results into a new residual stream.

    Args:
        taken: What `take` gave.
        kept, kept_update: `(kept, hidden)`; their sum is the kept rows' new value and carries gradient.
        rest, rest_update: Likewise `(rest, hidden)`, without gradient; the first is `None` if it is the stream's rows, both are
            if there are no rest rows.
        selection: The rows.

    Returns:
        `(all_rows, hidden)`, in the widest dtype of all. A rest row's gradient is that of the residual alone, as if its update
        were a constant.
    """
    stream, slots = taken.stream, taken.slots
    # Float32 norms over 16-bit embeddings widen the first layer's updates: the stream is then as wide, as stock sums make it.
    stream = stream.to(torch.promote_types(stream.dtype, torch.promote_types(kept.dtype, kept_update.dtype)))
    if slots is not None:  # as `take` did: the two go together
        merge_rows_kernel = kernel("merge_rows", stream, stream.shape[1])
        assert merge_rows_kernel is not None
        return merge_rows_kernel(stream, selection.kept_rows, slots, kept, kept_update, rest, rest_update)
    merged_rest = None
    if rest_update is not None:
        with torch.no_grad():
            merged_rest = (gather_rows(stream, selection.rest_rows) if rest is None else rest) + rest_update
    return merge_rows(stream, kept + kept_update, merged_rest, selection)


def replace_rows(stream: Tensor, selection: Selection, kept: Tensor) -> Tensor:
    """A copy of `stream` `(all_rows, hidden)` with the kept rows replaced by `kept` `(kept, hidden)`, without autograd."""
    replace = kernel("replace_rows", stream, stream.shape[1])
    if replace is None:
        return stream.index_copy(0, selection.kept_rows, kept)
    return replace(stream, _slots(stream, selection), kept)


def add_and_norm(rows: Tensor, update: Tensor, norm: Norm, plain: nn.Module | None) -> tuple[Tensor, Tensor]:
    """`rows + update`, `(rows, hidden)`, and the same normalised.

    Args:
        rows, update: `(rows, hidden)` each.
        norm: The layer's norm.
        plain: Its module, if that is a plain one.
    """
    add_norm = _norm_kernel("add_norm", rows, plain)
    if plain is None or add_norm is None:
        middle = rows + update
        return middle, norm(middle)
    dtype = torch.promote_types(rows.dtype, update.dtype)
    return add_norm(rows, update, **_norm_arguments(plain, dtype))


def rest_norm(
    residual: Tensor, rows: Tensor, update: Tensor | None, norm: Norm, plain: nn.Module | None
) -> tuple[Tensor | None, Tensor]:
    """Rest rows of the residual stream, normalised, without autograd.

    Args:
        residual: `(all_rows, hidden)`.
        rows: Their numbers, `(rest,)`.
        update: What is added to them first, `(rest, hidden)`, if anything.
        norm, plain: As in `add_and_norm`.

    Returns:
        The sums `(rest, hidden)`, `None` without an update where a kernel had no need to copy the rows, and the normalised rows.
    """
    fused = _norm_kernel("rest_norm", residual, plain)
    if plain is None or fused is None:
        rest = gather_rows(residual, rows)
        rest = rest if update is None else rest + update
        return rest, norm(rest)
    arguments = _norm_arguments(plain, residual.dtype)
    return fused(residual, rows, update, arguments["weight"], arguments["bias"], arguments["epsilon"], arguments["centred"])


def interleave(kept: tuple[Tensor, ...], rest: tuple[Tensor, ...], kept_at: Tensor, rest_at: Tensor) -> tuple[Tensor, ...]:
    """Kept and rest rows of each pair laid into one buffer, without autograd: `(kept + rest, ...)`, at the given places."""
    count = kept[0].shape[0] + rest[0].shape[0]
    lay_out = kernel("lay_out_rows", kept[0], kept[0][:1].numel())
    row_slots = kernel("row_slots", kept[0], kept[0][:1].numel())
    if lay_out is not None and row_slots is not None:
        slots = row_slots(kept_at, rest_at, count)
        return tuple(lay_out(*pair, slots) for pair in zip(kept, rest, strict=True))
    merged = []
    for one, other in zip(kept, rest, strict=True):
        buffer = one.new_empty(count, *one.shape[1:]).index_copy_(0, kept_at, one)
        merged.append(buffer.index_copy_(0, rest_at, other))
    return tuple(merged)


class _LaidAmong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor, rows_at: Tensor, others_at: Tensor) -> Tensor:
        ctx.save_for_backward(rows_at)
        return interleave((rows,), (others,), rows_at, others_at)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None, None


def lay_among(rows: Tensor, others: Tensor, rows_at: Tensor, others_at: Tensor) -> Tensor:
    """`rows` and `others`, which are constants, laid into one buffer `(rows + others, hidden)`, at the given places."""
    return _LaidAmong.apply(rows, others, rows_at, others_at)


def predicted_features(
    residual: Tensor, documents: Documents, norm: nn.Module | None, predictor: PatternPredictor
) -> tuple[Tensor, Tensor] | None:
    """Query and key features of all blocks, `(blocks, p)` each, straight from the residual stream; `None` without the kernel.

    Args:
        residual: `(all_rows, hidden)`.
        documents: The batch's documents.
        norm: The norm before attention, if it is a plain one.
        predictor: The layer's.
    """
    if norm is None:
        return None
    query, key = list(predictor.query.matrices), list(predictor.key.matrices)
    sizes = (documents.block_size, _kind(norm), *predictor.sizes, query[2].shape[1])
    features = _norm_kernel("block_features", residual, norm, sizes)
    if features is None:
        return None
    arguments = _norm_arguments(norm, residual.dtype)
    del arguments["from_output"]
    first_rows, lengths = documents.block_spans
    return features(
        residual,
        first_rows,
        lengths,
        query_matrices=query,
        key_matrices=key,
        block_size=documents.block_size,
        **arguments,
    )


def _slots(stream: Tensor, selection: Selection) -> Tensor:
    row_slots = kernel("row_slots", stream, stream.shape[1])
    assert row_slots is not None
    return row_slots(selection.kept_rows, selection.rest_rows, stream.shape[0])


def _kind(norm: nn.Module) -> str:
    return "centred" if isinstance(norm, nn.LayerNorm) else "plain"


def _norm_kernel(name: str, rows: Tensor, norm: nn.Module | None, sizes: tuple[int | str, ...] = ()) -> Callable[..., Any] | None:
    if norm is None or norm.weight is None:
        return None
    # Autocast runs LayerNorm in float32 and gives a float32 result, which the kernel does not.
    if _kind(norm) == "centred" and torch.is_autocast_enabled(rows.device.type):
        return None
    return kernel(name, rows, rows.shape[1], *(sizes or (_kind(norm),)))


def _norm_arguments(norm: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    centred = _kind(norm) == "centred"
    return {
        "weight": norm.weight,
        "bias": norm.bias if centred else None,
        "epsilon": norm.eps if centred else norm.variance_epsilon,
        "centred": centred,
        "from_output": _output_determines_input(norm, dtype),
    }


def _output_determines_input(norm: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the norm's backward may work from its result, which the projections save anyway; otherwise the rows are saved.

    Asks the device once per frozen norm and remembers the answer on the module, until its weights change. Within a graph that
    torch.compile traces nothing can be asked: there the rows are saved unless the answer is known.
    """
    known: tuple[Any, bool] | None = getattr(norm, "lemo_output_determines_input", None)
    weight: Any = norm.weight
    bias: Any = getattr(norm, "bias", None)
    parts = [weight] if bias is None else [weight, bias]
    if any(part.requires_grad for part in parts):
        return False
    if torch.promote_types(weight.dtype, dtype) != dtype:
        return False  # the result is wider than the rows
    if torch.compiler.is_compiling():
        return known is not None and known[0][0] == dtype and known[1]
    if any(type(part) is not nn.Parameter for part in parts):
        return False  # a view of something sharded, whose changes do not show
    key = (dtype, *((id(part), part._version) for part in parts))
    if known is None or known[0] != key:
        determines = kernel("output_determines_input", weight, weight.shape[0], _kind(norm))
        known = key, determines is not None and determines(weight, bias, dtype)
        norm.lemo_output_determines_input = known  # type: ignore[assignment]
    return known[1]
