"""Permutation-free token movement (LeMo paper, section 5.1): kept rows out of the residual stream, results back into it.

With N rows of H numbers of e bytes, K kept rows, R rest rows (the other real tokens), bytes that must move, in rows of H * e:

    take rows                     read K, write K
    merge, forward                read K + R (+ K + R with their updates) + padding, write N
    merge and take, backward      K + K to take the kept rows' gradient, read N and write N to put it back
    scatter-add, in place         read 2 K, write K

A layer takes its kept rows once and merges once. The naive pair (index, zeros, scatter, add) moves 2 K forward and
(N + 2 K) + 3 N for the way back, and as much again in backward, where autograd sums two N-row gradients of which each row has
one zero. Here the pair shares the stream's gradient: `merge_rows` hands it on untouched and `take_rows` replaces the kept rows
in it. That is why `take_rows` returns the stream, and `merge_rows` must be given that one.

Every merge writes a new stream. In place would move no byte less, since every real row changes in every layer, and it would
save one stream for a moment, not one a layer; while who else holds the old value (a leaf, a checkpoint's stored input, recorded
hidden states, hooks) cannot be known here. `scatter_add_rows(in_place=True)` is for callers who do know.

`row_slots` inverts the selection once a layer, 4 bytes a row: each program of a merge owns whole rows of the result, so nothing
is written twice, nothing is summed atomically, and the same input gives the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .host import launch_on, movement_tile, operator, optional, require, require_index, require_rows, unit_stride

# Slots of rows that no kept or rest row replaces, and of the first rest row; the next one counts down from there.
PADDING_SLOT = -1
FIRST_REST_SLOT = -2


@triton.jit
def _take_kernel(
    stream, rows, taken, count, num_rows, hidden, stream_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    written = (place < count)[:, None] & (column < hidden)[None, :]
    row = tl.load(rows + place, mask=place < count, other=-1)
    readable = written & ((row >= 0) & (row < num_rows))[:, None]
    values = tl.load(stream + row[:, None] * stream_stride + column[None, :], mask=readable, other=float("nan"))
    tl.store(taken + place[:, None] * hidden + column[None, :], values, mask=written)


@triton.jit
def _merge_kernel(
    stream, slots, kept, kept_update, rest, rest_update, merged,
    num_rows, num_kept, num_rest, hidden,
    stream_stride, kept_stride, kept_update_stride, rest_stride, rest_update_stride,
    HAS_STREAM: tl.constexpr, HAS_KEPT_UPDATE: tl.constexpr, HAS_REST: tl.constexpr, HAS_REST_UPDATE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    across = column[None, :]
    in_row = (column < hidden)[None, :]
    slot = tl.load(slots + row, mask=row < num_rows, other=-1).to(tl.int64)
    is_kept = slot >= 0
    is_rest = slot <= -2
    rest_at = -2 - slot
    dtype = merged.dtype.element_ty
    # A slot out of range reads NaN: visible in the result, never an illegal access.
    value = tl.load(
        kept + slot[:, None] * kept_stride + across, mask=(is_kept & (slot < num_kept))[:, None] & in_row, other=float("nan")
    ).to(dtype)
    if HAS_KEPT_UPDATE:
        update = tl.load(
            kept_update + slot[:, None] * kept_update_stride + across,
            mask=(is_kept & (slot < num_kept))[:, None] & in_row,
            other=0.0,
        )
        value = (value.to(tl.float32) + update.to(tl.float32)).to(dtype)
    from_rest = (is_rest & (rest_at < num_rest))[:, None] & in_row
    from_stream = ~is_kept & (row < num_rows)
    if HAS_REST:
        others = tl.load(rest + rest_at[:, None] * rest_stride + across, mask=from_rest, other=float("nan")).to(dtype)
        from_stream = from_stream & ~is_rest
        value = tl.where(is_rest[:, None], others, value)
    if HAS_STREAM:
        passing = tl.load(stream + row[:, None] * stream_stride + across, mask=from_stream[:, None] & in_row, other=0.0).to(dtype)
        value = tl.where(from_stream[:, None], passing, value)
    else:
        value = tl.where(from_stream[:, None], 0.0, value.to(tl.float32)).to(dtype)
    if HAS_REST_UPDATE:
        update = tl.load(rest_update + rest_at[:, None] * rest_update_stride + across, mask=from_rest, other=float("nan"))
        value = tl.where(is_rest[:, None], (value.to(tl.float32) + update.to(tl.float32)).to(dtype), value)
    tl.store(merged + row[:, None] * hidden + across, value, mask=(row < num_rows)[:, None] & in_row)


@triton.jit
def _scatter_add_kernel(
    stream, rows, update, count, num_rows, hidden, stream_stride, update_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(rows + place, mask=place < count, other=-1)
    mask = ((row >= 0) & (row < num_rows))[:, None] & (column < hidden)[None, :]
    here = stream + row[:, None] * stream_stride + column[None, :]
    old = tl.load(here, mask=mask)
    added = tl.load(update + place[:, None] * update_stride + column[None, :], mask=mask)
    tl.store(here, (old.to(tl.float32) + added.to(tl.float32)).to(old.dtype), mask=mask)


@operator("take_rows")
def take_rows_operator(stream: Tensor, rows: Tensor) -> Tensor:
    """Copies rows: `(count, hidden)` from `(num_rows, hidden)`."""
    stream = unit_stride(stream)
    count, hidden = rows.shape[0], stream.shape[1]
    taken = torch.empty(count, hidden, dtype=stream.dtype, device=stream.device)
    if taken.numel():
        tile_rows, columns = movement_tile(hidden)
        grid = (triton.cdiv(count, tile_rows), triton.cdiv(hidden, columns))
        with launch_on(stream):
            _take_kernel[grid](
                stream, rows.contiguous(), taken, count, stream.shape[0], hidden, stream.stride(0),
                ROWS=tile_rows, COLUMNS=columns, num_warps=8,
            )  # fmt: skip
    return taken


@take_rows_operator.register_fake
def _(stream, rows):
    return stream.new_empty(rows.shape[0], stream.shape[1])


@operator("merge_rows")
def merge_rows_operator(
    stream: Tensor | None,
    slots: Tensor,
    kept: Tensor,
    kept_update: Tensor | None,
    rest: Tensor | None,
    rest_update: Tensor | None,
) -> Tensor:
    """A new stream in the dtype of `stream` (of `kept`, with zeros between, if there is none); arguments as in `merge_rows`."""
    like = kept if stream is None else stream
    num_rows, hidden = slots.shape[0], kept.shape[1]
    merged = torch.empty(num_rows, hidden, dtype=like.dtype, device=like.device)
    if merged.numel():
        kept = unit_stride(kept)
        parts = [unit_stride(optional(part, kept)) for part in (stream, kept_update, rest, rest_update)]
        source, kept_more, rest_rows, rest_more = parts
        num_rest = next((part.shape[0] for part in (rest, rest_update) if part is not None), 0)
        tile_rows, columns = movement_tile(hidden)
        grid = (triton.cdiv(num_rows, tile_rows), triton.cdiv(hidden, columns))
        with launch_on(like):
            _merge_kernel[grid](
                source, slots.contiguous(), kept, kept_more, rest_rows, rest_more, merged,
                num_rows, kept.shape[0], num_rest, hidden,
                source.stride(0), kept.stride(0), kept_more.stride(0), rest_rows.stride(0), rest_more.stride(0),
                HAS_STREAM=stream is not None, HAS_KEPT_UPDATE=kept_update is not None, HAS_REST=rest is not None,
                HAS_REST_UPDATE=rest_update is not None, ROWS=tile_rows, COLUMNS=columns, num_warps=8,
            )  # fmt: skip
    return merged


@merge_rows_operator.register_fake
def _(stream, slots, kept, kept_update, rest, rest_update):
    return (kept if stream is None else stream).new_empty(slots.shape[0], kept.shape[1])


@operator("scatter_add_rows", writes=("stream",))
def scatter_add_rows_operator(stream: Tensor, rows: Tensor, update: Tensor) -> None:
    """Adds `update` to rows of `stream`, in place; arguments as in `scatter_add_rows`."""
    if update.numel():
        update = unit_stride(update)
        tile_rows, columns = movement_tile(stream.shape[1])
        grid = (triton.cdiv(rows.shape[0], tile_rows), triton.cdiv(stream.shape[1], columns))
        with launch_on(stream):
            _scatter_add_kernel[grid](
                stream, rows.contiguous(), update, rows.shape[0], stream.shape[0], stream.shape[1], stream.stride(0),
                update.stride(0), ROWS=tile_rows, COLUMNS=columns, num_warps=8,
            )  # fmt: skip


@scatter_add_rows_operator.register_fake
def _(stream, rows, update):
    return None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slots)
        ctx.set_materialize_grads(False)
        ctx.hidden, ctx.dtype = stream.shape[1], stream.dtype
        return take_rows_operator(stream, rows), stream.view_as(stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_taken: Tensor | None, grad_stream: Tensor | None) -> tuple[Tensor | None, None, None]:
        (slots,) = ctx.saved_tensors
        if grad_taken is None:
            # Nothing came back for the kept rows, whose places in the stream's gradient hold what merge_rows left there.
            grad_taken = slots.new_zeros(1, ctx.hidden, dtype=ctx.dtype).expand(slots.shape[0], -1)
        return merge_rows_operator(grad_stream, slots, grad_taken, None, None, None), None, None


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        rows: Tensor,
        slots: Tensor,
        kept: Tensor,
        kept_update: Tensor | None,
        rest: Tensor | None,
        rest_update: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.dtypes = kept.dtype, None if kept_update is None else kept_update.dtype
        return merge_rows_operator(stream, slots, kept, kept_update, rest, rest_update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        dtype, update_dtype = ctx.dtypes
        taken = take_rows_operator(grad, rows)
        grad_update = None if update_dtype is None else taken.to(update_dtype)
        # The stream's gradient goes on as it is: take_rows replaces the kept rows in it.
        return grad, None, None, taken.to(dtype), grad_update, None, None


def row_slots(kept_rows: Tensor, rest_rows: Tensor, num_rows: int) -> Tensor:
    """Where each row's new value stands: the inverse of a selection.

    Args:
        kept_rows, rest_rows: Distinct row numbers, `(kept,)` and `(rest,)` int64.
        num_rows: Rows of the stream.

    Returns:
        `(num_rows,)` int32: i for the i-th kept row, -2 - j for the j-th rest row, -1 for a row in neither (padding).
    """
    require_index("kept_rows", kept_rows, num_rows, kept_rows)
    require_index("rest_rows", rest_rows, num_rows, kept_rows)
    slots = torch.full((num_rows,), PADDING_SLOT, dtype=torch.int32, device=kept_rows.device)
    slots[kept_rows] = torch.arange(kept_rows.shape[0], dtype=torch.int32, device=kept_rows.device)
    slots[rest_rows] = FIRST_REST_SLOT - torch.arange(rest_rows.shape[0], dtype=torch.int32, device=kept_rows.device)
    return slots


def take_rows(stream: Tensor, rows: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copies kept rows out of the residual stream.

    Args:
        stream: `(num_rows, hidden)`, rows dense.
        rows: Kept rows, `(kept,)` int64, distinct.
        slots: `row_slots` of the selection, which backward reads; `None` where the stream requires no gradient.

    Returns:
        The kept rows `(kept, hidden)`, and the stream to be given to `merge_rows` and used for nothing else that carries
        gradient: in its gradient the kept rows' places are replaced.

    Raises:
        KernelInputError: If shapes, dtypes, devices or (on the CPU) row numbers do not fit.
    """
    require_rows("stream", stream)
    require_index("rows", rows, stream.shape[0], stream)
    require_slots(slots, stream, stream)
    return _TakeRows.apply(stream, rows, slots)


def merge_rows(
    stream: Tensor,
    rows: Tensor,
    slots: Tensor,
    kept: Tensor,
    kept_update: Tensor | None = None,
    rest: Tensor | None = None,
    rest_update: Tensor | None = None,
) -> Tensor:
    """Writes a layer's results into a new residual stream, adding the last sublayer's output on the way.

    Args:
        stream: The layer's input `(num_rows, hidden)`, as `take_rows` or `gather_norm` returned it; not modified.
        rows, slots: The kept rows and `row_slots` of the selection.
        kept: Kept rows, `(kept, hidden)`; they carry gradient.
        kept_update: What is added to them, likewise; `None` for nothing.
        rest: New values of the rest rows `(rest, hidden)`, without gradient; `None` if these are the stream's.
        rest_update: What is added to those, without gradient.

    Returns:
        `(num_rows, hidden)` in the stream's dtype; sums are rounded to it once. Padding rows are the stream's.

    Raises:
        KernelInputError: If shapes, dtypes or devices do not fit.
    """
    require_rows("stream", stream)
    require_index("rows", rows, stream.shape[0], stream)
    require_slots(slots, stream)
    hidden = stream.shape[1]
    require_rows("kept", kept, hidden, stream, rows.shape[0])
    if kept_update is not None:
        require_rows("kept_update", kept_update, hidden, stream, rows.shape[0])
    for name, part in (("rest", rest), ("rest_update", rest_update)):
        if part is not None:
            require_rows(name, part, hidden, stream, None if rest is None else rest.shape[0])
            require(not part.requires_grad, f"{name} carries no gradient", "a tensor that requires it", "detach it")
    return _MergeRows.apply(stream, rows, slots, kept, kept_update, rest, rest_update)


def replace_rows(stream: Tensor, slots: Tensor, kept: Tensor) -> Tensor:
    """A copy of the stream with its kept rows replaced, without autograd: `(num_rows, hidden)`; arguments as in `merge_rows`."""
    require_rows("stream", stream)
    require_slots(slots, stream)
    require_rows("kept", kept, stream.shape[1], stream)
    return merge_rows_operator(stream.detach(), slots, kept.detach(), None, None, None)


def lay_out_rows(kept: Tensor, rest: Tensor, slots: Tensor) -> Tensor:
    """Kept and rest rows in the order of the stream, zeros between, without autograd: `(num_rows, ...)`.

    Args:
        kept, rest: `(kept, ...)` and `(rest, ...)`, alike but for their number.
        slots: `row_slots` of the selection.
    """
    require(kept.shape[1:] == rest.shape[1:], "kept and rest rows must be alike", f"{kept.shape} and {rest.shape}", "project both alike")  # fmt: skip
    flat = kept.detach().flatten(1), rest.detach().flatten(1)
    require_rows("kept", flat[0])
    require_rows("rest", flat[1], like=kept)
    require_slots(slots, slots[:, None])
    return merge_rows_operator(None, slots, flat[0], None, flat[1], None).unflatten(1, kept.shape[1:])


@torch.no_grad()
def scatter_add_rows(stream: Tensor, rows: Tensor, update: Tensor, in_place: bool = False) -> Tensor:
    """Adds rows to the residual stream, without autograd: `stream[rows] += update`.

    Args:
        stream: `(num_rows, hidden)`, rows dense.
        rows: `(count,)` int64, distinct: a row that is named twice would race.
        update: `(count, hidden)`.
        in_place: Modify `stream`, which moves 3 * count rows instead of 2 * num_rows + 3 * count. For callers who know that
            nothing else holds its old value; an operation that has saved it for its backward raises there.

    Returns:
        The stream, or a new one.

    Raises:
        KernelInputError: If shapes, dtypes, devices or (on the CPU) row numbers do not fit.
    """
    require_rows("stream", stream)
    require_index("rows", rows, stream.shape[0], stream)
    require_rows("update", update, stream.shape[1], stream, rows.shape[0])
    require(not in_place or stream.stride(1) == 1, "a stream must have dense rows", f"strides {stream.stride()}", "copy it")
    result = stream if in_place else stream.clone(memory_format=torch.contiguous_format)
    scatter_add_rows_operator(result, rows, update)
    return result


def require_slots(slots: Tensor | None, stream: Tensor, *differentiated: Tensor | None) -> None:
    """Checks that there is one slot per row; none is needed if nothing of `differentiated` requires gradients."""
    if slots is None:
        needed = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiated)
        require(len(differentiated) > 0 and not needed, "backward needs slots", "slots=None", "make them with row_slots")
        return
    fits = slots.shape == stream.shape[:1] and slots.dtype == torch.int32 and slots.device == stream.device
    got = f"{tuple(slots.shape)} {slots.dtype} on {slots.device}"
    require(fits, f"slots must be ({stream.shape[0]},) int32 on {stream.device}", got, "make them with row_slots")


def probe(device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    """Takes and merges rows of width `hidden` and their gradients."""
    stream = torch.zeros(3, hidden, dtype=dtype, device=device, requires_grad=True)
    kept_rows, rest_rows = torch.tensor([1], device=device), torch.tensor([2], device=device)
    slots = row_slots(kept_rows, rest_rows, 3)
    rest = stream.detach()[:1]
    for replaced in (rest, None):
        kept, passed_on = take_rows(stream, kept_rows, slots)
        merge_rows(passed_on, kept_rows, slots, kept, rest, replaced, rest).sum().backward()
    scatter_add_rows(stream.detach(), kept_rows, rest, in_place=True)
