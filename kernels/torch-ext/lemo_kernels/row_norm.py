"""Norms of kept rows, read straight from the residual stream (LeMo paper, section 5.1).

    RMSNorm     y = w * x / sqrt(mean(x^2) + eps)
    LayerNorm   y = w * (x - mean(x)) / sqrt(var(x) + eps) + b          statistics in float32

Bytes that must move, in rows of the stream for K rows of N:

    gather and norm    read K, write K normalised, write K gathered (the layer adds its output to them)
    add and norm       read 2 K, write K sums, write K normalised
    backward of gather and norm     read K gradients, K saved rows, K gradients of the gathered rows, N of the stream's; write N

The last line is the norm's backward, the sum with the residual path and the scatter into the stream's gradient in one pass.

Saved for backward: one float32 a row, and either the rows that went in, or the result. The result is what the projections behind
the norm save anyway where they carry adapters in its dtype: one row less per norm then, 2 of the 11.5 of a Llama-3-8B layer; without
such adapters it costs what the rows would. x / rms is y / w, or (y - b) / w, as exact as y itself unless a weight is near zero or
a bias large against its weight: `output_determines_input` says so, once, for frozen weights. Otherwise the rows are saved.
(The paper recovers a norm's input by subtraction.)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .host import (
    launch_on,
    operator,
    optional,
    require,
    require_index,
    require_rows,
    require_vector,
    unit_stride,
    whole_row_tile,
)
from .token_movement import require_slots, row_slots


@triton.jit
def _norm_kernel(
    stream, rows, update, weight, bias, gathered, normed, inverse, mean,
    count, num_rows, hidden, stream_stride, update_stride, epsilon,
    HAS_ROWS: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr,
    WRITE_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_row = column < hidden
    inside = place < count
    row = tl.load(rows + place, mask=inside, other=-1) if HAS_ROWS else place
    readable = inside & (row >= 0) & (row < num_rows)
    row_type = gathered.dtype.element_ty
    x = tl.load(stream + row[:, None] * stream_stride + column, mask=readable[:, None] & in_row, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        x += tl.load(update + place[:, None] * update_stride + column, mask=inside[:, None] & in_row, other=0.0).to(tl.float32)
        x = x.to(row_type).to(tl.float32)  # the sum is a row of the stream: its norm is that of the rounded row
    # A row number out of range gives a NaN row, never an illegal access.
    x = tl.where(inside[:, None] & ~readable[:, None], float("nan"), x)
    at = place[:, None] * hidden + column
    written = inside[:, None] & in_row
    if WRITE_ROWS:
        tl.store(gathered + at, x.to(row_type), mask=written)
    if CENTRED:
        centre = tl.sum(x, 1) / hidden
        x = tl.where(in_row, x - centre[:, None], 0.0)
        tl.store(mean + place, centre, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / hidden + epsilon)
    tl.store(inverse + place, scale, mask=inside)
    w = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    y = x * scale[:, None]
    if CENTRED:
        y = y * w
        if HAS_BIAS:
            y += tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    else:
        y = y.to(row_type).to(tl.float32) * w  # rounded before the weight, as the stock RMSNorm does
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=written)


@triton.jit
def _norm_backward_kernel(
    grad_normed, source, weight, bias, inverse, mean, grad_rows, grad_stream, slots, grad,
    count, num_kept, hidden, grad_normed_stride, source_stride, grad_rows_stride, grad_stream_stride,
    FROM_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTRED: tl.constexpr, HAS_ROW_GRAD: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_STREAM_GRAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_row = column < hidden
    if HAS_SLOTS:
        slot = tl.load(slots + place, mask=place < count, other=-1).to(tl.int64)
    else:
        slot = place
    is_kept = (slot >= 0) & (slot < num_kept) & (place < count)
    mask = is_kept[:, None] & in_row
    g = tl.load(grad_normed + slot[:, None] * grad_normed_stride + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(source + slot[:, None] * source_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(inverse + slot, mask=is_kept, other=0.0)[:, None]
    # The 1 beyond the row keeps the division below defined there.
    w = tl.load(weight + column, mask=in_row, other=1.0).to(tl.float32)
    if FROM_OUTPUT:
        if HAS_BIAS:
            value -= tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
        unit = tl.where(mask, value / w, 0.0)
    else:
        if CENTRED:
            value -= tl.load(mean + slot, mask=is_kept, other=0.0)[:, None]
        unit = tl.where(mask, value * scale, 0.0)
    g *= w
    result = g - unit * (tl.sum(g * unit, 1) / hidden)[:, None]
    if CENTRED:
        result -= (tl.sum(g, 1) / hidden)[:, None]
    result *= scale
    if HAS_ROW_GRAD:
        result += tl.load(grad_rows + slot[:, None] * grad_rows_stride + column, mask=mask, other=0.0).to(tl.float32)
    written = (place < count)[:, None] & in_row
    if HAS_SLOTS:
        if HAS_STREAM_GRAD:
            others = tl.load(
                grad_stream + place[:, None] * grad_stream_stride + column, mask=written & ~is_kept[:, None], other=0.0
            )
            result = tl.where(is_kept[:, None], result, others.to(tl.float32))
        else:
            result = tl.where(is_kept[:, None], result, 0.0)
    tl.store(grad + place[:, None] * hidden + column, result.to(grad.dtype.element_ty), mask=written)


@operator("row_norm")
def norm_operator(
    stream: Tensor,
    rows: Tensor | None,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centred: bool,
    write_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gathered rows (empty unless `write_rows`), normalised rows, inverse deviation and mean (empty unless `centred`)."""
    stream = unit_stride(stream)
    hidden, count = stream.shape[1], stream.shape[0] if rows is None else rows.shape[0]
    gathered, normed, inverse, mean = results = _norm_results(stream, count, update, weight, centred, write_rows)
    if count and hidden:
        more = unit_stride(optional(update, stream))
        tile_rows, columns, warps = whole_row_tile(hidden)
        with launch_on(stream):
            _norm_kernel[(triton.cdiv(count, tile_rows),)](
                stream, inverse if rows is None else rows.contiguous(), more, weight.contiguous(),
                optional(bias, weight).contiguous(), gathered, normed, inverse, mean,
                count, stream.shape[0], hidden, stream.stride(0), more.stride(0), epsilon,
                HAS_ROWS=rows is not None, HAS_UPDATE=update is not None, HAS_BIAS=bias is not None, CENTRED=centred,
                WRITE_ROWS=write_rows, ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return results


def _norm_results(
    stream: Tensor, count: int, update: Tensor | None, weight: Tensor, centred: bool, write_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # As PyTorch's own operators promote them.
    row_dtype = stream.dtype if update is None else torch.promote_types(stream.dtype, update.dtype)
    result_dtype = row_dtype if centred else torch.promote_types(row_dtype, weight.dtype)
    hidden, device = stream.shape[1], stream.device
    return (
        torch.empty(count if write_rows else 0, hidden, dtype=row_dtype, device=device),
        torch.empty(count, hidden, dtype=result_dtype, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count if centred else 0, dtype=torch.float32, device=device),
    )


@norm_operator.register_fake
def _(stream, rows, update, weight, bias, epsilon, centred, write_rows):
    count = stream.shape[0] if rows is None else rows.shape[0]
    return _norm_results(stream, count, update, weight, centred, write_rows)


@operator("row_norm_backward")
def norm_backward_operator(
    grad_normed: Tensor,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inverse: Tensor,
    mean: Tensor,
    grad_rows: Tensor | None,
    grad_stream: Tensor | None,
    slots: Tensor | None,
    from_output: bool,
    centred: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the rows in `dtype`: compact `(kept, hidden)`, or with `slots` laid into the stream's `(num_rows, hidden)`.

    `source` is what was saved: the result if `from_output`, else the rows.
    """
    kept, hidden = source.shape
    count = kept if slots is None else slots.shape[0]
    grad = torch.empty(count, hidden, dtype=dtype, device=source.device)
    if grad.numel():
        grad_normed, source = unit_stride(grad_normed), unit_stride(source)
        row_grad, stream_grad = (unit_stride(optional(part, source)) for part in (grad_rows, grad_stream))
        tile_rows, columns, warps = whole_row_tile(hidden)
        with launch_on(source):
            _norm_backward_kernel[(triton.cdiv(count, tile_rows),)](
                grad_normed, source, weight.contiguous(), optional(bias, weight).contiguous(), inverse, mean, row_grad,
                stream_grad, inverse if slots is None else slots.contiguous(), grad,
                count, kept, hidden, grad_normed.stride(0), source.stride(0), row_grad.stride(0), stream_grad.stride(0),
                FROM_OUTPUT=from_output, HAS_BIAS=bias is not None, CENTRED=centred, HAS_ROW_GRAD=grad_rows is not None,
                HAS_SLOTS=slots is not None, HAS_STREAM_GRAD=grad_stream is not None,
                ROWS=tile_rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
    return grad


@norm_backward_operator.register_fake
def _(grad_normed, source, weight, bias, inverse, mean, grad_rows, grad_stream, slots, from_output, centred, dtype):
    count = source.shape[0] if slots is None else slots.shape[0]
    return source.new_empty(count, source.shape[1], dtype=dtype)


class _RowNorm(torch.autograd.Function):
    """Returns gathered rows (or sums), normalised rows, and the stream where rows were taken from it."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        rows: Tensor | None,
        slots: Tensor | None,
        update: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        epsilon: float,
        centred: bool,
        from_output: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        write_rows = rows is not None or update is not None
        gathered, normed, inverse, mean = norm_operator(stream, rows, update, weight, bias, epsilon, centred, write_rows)
        saved = normed if from_output else gathered if write_rows else stream
        ctx.save_for_backward(saved, weight, bias, inverse, mean, slots)
        ctx.set_materialize_grads(False)
        ctx.centred, ctx.from_output = centred, from_output
        ctx.dtypes = stream.dtype, None if update is None else update.dtype
        if rows is None:
            return gathered if write_rows else stream.view_as(stream), normed, None
        return gathered, normed, stream.view_as(stream)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows: Tensor | None, grad_normed: Tensor | None, grad_stream: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        source, weight, bias, inverse, mean, slots = ctx.saved_tensors
        grad_normed = torch.zeros_like(source) if grad_normed is None else grad_normed
        stream_dtype, update_dtype = ctx.dtypes
        grad = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            grad = norm_backward_operator(
                grad_normed, source, weight, bias, inverse, mean, grad_rows, grad_stream, slots,
                ctx.from_output, ctx.centred, stream_dtype,
            )  # fmt: skip
        grad_update = grad.to(update_dtype) if grad is not None and ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[4]:
            # Norms are frozen under LoRA; where they train, PyTorch's own sums over rows do.
            deviation = source if mean.numel() == 0 else source - mean[:, None]
            grad_weight = (grad_normed * (deviation * inverse[:, None])).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = grad_normed.sum(0, dtype=torch.float32).to(bias.dtype)
        return grad, None, None, grad_update, grad_weight, grad_bias, None, None, None


def _require_norm(stream: Tensor, weight: Tensor, bias: Tensor | None, centred: bool, from_output: bool) -> None:
    require_rows("stream", stream)
    require_vector("weight", weight, stream.shape[1], stream)
    if bias is not None:
        require_vector("bias", bias, stream.shape[1], stream)
    require(centred or bias is None, "a bias belongs to the centred norm", "centred=False with a bias", "set centred=True")
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    fact = "backward from the result needs a frozen weight and bias"
    require(frozen or not from_output, fact, "one that requires gradients", "set from_output=False")


def gather_norm(
    stream: Tensor,
    rows: Tensor,
    slots: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float,
    centred: bool = False,
    from_output: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes kept rows out of the residual stream and normalises them, in one pass each way.

    Args:
        stream: `(num_rows, hidden)`, rows dense.
        rows: Kept rows, `(kept,)` int64, distinct.
        slots: `row_slots` of the selection, which backward reads; `None` where none of the inputs requires gradients.
        weight: `(hidden,)`.
        bias: `(hidden,)`, for the centred norm.
        epsilon: Added to the mean square.
        centred: LayerNorm instead of RMSNorm.
        from_output: Work backward from the normalised rows. Only where `output_determines_input(weight, bias, ...)`.

    Returns:
        The kept rows and the normalised rows, `(kept, hidden)` each, and the stream for `merge_rows` as in `take_rows`.

    Raises:
        KernelInputError: If shapes, dtypes, devices or (on the CPU) row numbers do not fit.
    """
    _require_norm(stream, weight, bias, centred, from_output)
    require_index("rows", rows, stream.shape[0], stream)
    require_slots(slots, stream, stream, weight, bias)
    return _RowNorm.apply(stream, rows, slots, None, weight, bias, epsilon, centred, from_output)


def add_norm(
    rows: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float,
    centred: bool = False,
    from_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adds a sublayer's output to compact rows and normalises the sum, in one pass each way.

    Args:
        rows: `(rows, hidden)`.
        update: `(rows, hidden)`, or `None` to normalise the rows themselves.
        weight, bias, epsilon, centred, from_output: As in `gather_norm`.

    Returns:
        The sums (the rows, without an update) and the normalised sums, `(rows, hidden)` each.

    Raises:
        KernelInputError: If shapes, dtypes or devices do not fit.
    """
    _require_norm(rows, weight, bias, centred, from_output)
    if update is not None:
        require_rows("update", update, rows.shape[1], rows, rows.shape[0])
    return _RowNorm.apply(rows, None, None, update, weight, bias, epsilon, centred, from_output)[:2]


def rest_norm(
    stream: Tensor, rows: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool
) -> tuple[Tensor | None, Tensor]:
    """The rest rows' side: norm of `stream[rows]` (+ `update`), without autograd and without a copy of the rows themselves.

    Returns:
        The sums `(rows, hidden)`, `None` without an update (the stream still holds the rows), and the normalised rows.
    """
    _require_norm(stream.detach(), weight.detach(), None if bias is None else bias.detach(), centred, False)
    require_index("rows", rows, stream.shape[0], stream)
    if update is not None:
        require_rows("update", update, stream.shape[1], stream, rows.shape[0])
    sums, normed, *_ = norm_operator(stream, rows, update, weight, bias, epsilon, centred, update is not None)
    return (None if update is None else sums), normed


@torch.no_grad()
def output_determines_input(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether backward may work from a norm's result: costs a synchronisation, so ask once per frozen norm, not per step.

    A result y of relative precision u gives x / rms = (y - b) / w with an error of u * |y / w|, at most u * (|x| / rms + |b / w|):
    as good as the saved row while |b / w| is at most 1. Of a weight, y must not leave the dtype's normal numbers: those of
    float16 end at 6e-5, so its weights have to stay above 2^-7 to carry entries of x / rms down to 2^-7 in full.

    Args:
        weight, bias: The norm's.
        dtype: Of its result.
    """
    magnitude = weight.detach().abs().float()
    least = 2.0**-7 if dtype == torch.float16 else 2.0**-60
    exact = (magnitude >= least).all()
    if bias is not None:
        exact &= (bias.detach().abs().float() <= magnitude).all()
    return bool(exact)


def probe(device: torch.device, dtype: torch.dtype, hidden: int, kind: str) -> None:
    """Norms of rows of width `hidden` and their gradients; `kind` is "centred" or "plain"."""
    stream = torch.ones(3, hidden, dtype=dtype, device=device, requires_grad=True)
    weight, rows = torch.ones(hidden, dtype=dtype, device=device), torch.tensor([1], device=device)
    bias = weight if kind == "centred" else None
    for from_output in (False, True):
        options = {"epsilon": 1e-6, "centred": kind == "centred", "from_output": from_output}
        kept, normed, _ = gather_norm(stream, rows, row_slots(rows, rows[:0], 3), weight, bias, **options)
        sums, normed = add_norm(kept, normed, weight, bias, **options)
        (sums + normed).sum().backward()
