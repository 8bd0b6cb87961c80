"""Rotary positions on kept rows (LeMo paper, section 4.1: kept tokens stay at their original positions).

    q'_t = q_t * cos[p_t] + rotate_half(q_t) * sin[p_t],   rotate_half(x) = (-x2, x1) of the halves x1, x2; k' alike

Queries and keys in one launch; cos and sin are read at each row's own position, so neither is gathered for kept rows nor
repeated over the batch. Backward is the transposed rotation by the same tables: nothing is saved but references to them.

Bytes that must move, for K rows of (heads + key_value_heads) * head_dim numbers: read K, write K, each way; the tables
(2 * head_dim numbers a row) stay in the cache. With gathered tables it would be 2 K * head_dim more to write and to read.

Products are rounded to the result's dtype before they are added, as PyTorch's separate operators do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .host import DTYPES, launch_on, operator, optional, require, require_device, require_index, require_rows, unit_stride


@triton.jit
def _rotate(
    heads_in, heads_out, first_cos, second_cos, first_sin, second_sin, place, row_mask,
    heads, half, in_row_stride, in_head_stride, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[None, :, None]
    entry = tl.arange(0, HALF)[None, None, :]
    mask = row_mask & (head < heads) & (entry < half)
    dtype = heads_out.dtype.element_ty
    source = heads_in + place * in_row_stride + head * in_head_stride + entry
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    a, d = (first * first_cos).to(dtype).to(tl.float32), (second * second_cos).to(dtype).to(tl.float32)
    if INVERSE:
        b, c = (second * second_sin).to(dtype).to(tl.float32), -(first * first_sin).to(dtype).to(tl.float32)
    else:
        b, c = -(second * first_sin).to(dtype).to(tl.float32), (first * second_sin).to(dtype).to(tl.float32)
    target = heads_out + (place * heads + head) * (2 * half) + entry
    tl.store(target, (a + b).to(dtype), mask=mask)
    tl.store(target + half, (c + d).to(dtype), mask=mask)


@triton.jit
def _rotary_kernel(
    query, key, cos, sin, rows, query_out, key_out,
    count, positions, query_heads, key_heads, half,
    query_row_stride, query_head_stride, key_row_stride, key_head_stride, cos_stride, sin_stride,
    HAS_ROWS: tl.constexpr, INVERSE: tl.constexpr,
    ROWS: tl.constexpr, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    entry = tl.arange(0, HALF)[None, None, :]
    inside = place < count
    if HAS_ROWS:
        row = tl.load(rows + place, mask=inside, other=0)
    else:
        row = place
    # A table of one sequence serves every sample of the batch. A negative row reads NaN.
    position = row % positions
    mask = inside & (row >= 0) & (entry < half)
    first_cos = tl.load(cos + position * cos_stride + entry, mask=mask, other=float("nan")).to(tl.float32)
    second_cos = tl.load(cos + position * cos_stride + half + entry, mask=mask, other=float("nan")).to(tl.float32)
    first_sin = tl.load(sin + position * sin_stride + entry, mask=mask, other=float("nan")).to(tl.float32)
    second_sin = tl.load(sin + position * sin_stride + half + entry, mask=mask, other=float("nan")).to(tl.float32)
    _rotate(query, query_out, first_cos, second_cos, first_sin, second_sin, place, inside,
            query_heads, half, query_row_stride, query_head_stride, INVERSE, QUERY_HEADS, HALF)  # fmt: skip
    _rotate(key, key_out, first_cos, second_cos, first_sin, second_sin, place, inside,
            key_heads, half, key_row_stride, key_head_stride, INVERSE, KEY_HEADS, HALF)  # fmt: skip


@operator("apply_rotary")
def rotary_operator(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, inverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys in `dtype`, or with `inverse` the transposed rotation of their gradients."""
    query, key, cos, sin = unit_stride(query), unit_stride(key), unit_stride(cos), unit_stride(sin)
    outputs = _results(query, key, dtype)
    count, query_heads, head_dim = query.shape
    if count:
        half = head_dim // 2
        sizes = [triton.next_power_of_2(size) for size in (query_heads, key.shape[1], half)]
        tile_rows = max(1, 2048 // (sizes[0] * sizes[2]))
        with launch_on(query):
            _rotary_kernel[(triton.cdiv(count, tile_rows),)](
                query, key, cos, sin, optional(rows, cos).contiguous(), *outputs,
                count, cos.shape[0], query_heads, key.shape[1], half,
                query.stride(0), query.stride(1), key.stride(0), key.stride(1), cos.stride(0), sin.stride(0),
                HAS_ROWS=rows is not None, INVERSE=inverse,
                ROWS=tile_rows, QUERY_HEADS=sizes[0], KEY_HEADS=sizes[1], HALF=sizes[2], num_warps=4,
            )  # fmt: skip
    return outputs


def _results(query: Tensor, key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(query.shape, dtype=dtype, device=query.device),
        torch.empty(key.shape, dtype=dtype, device=key.device),
    )


@rotary_operator.register_fake
def _(query, key, cos, sin, rows, inverse, dtype):
    return _results(query, key, dtype)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, rows)
        ctx.dtype = query.dtype
        return rotary_operator(query, key, cos, sin, rows, False, torch.promote_types(query.dtype, cos.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, rows = ctx.saved_tensors
        return *rotary_operator(grad_query, grad_key, cos, sin, rows, True, ctx.dtype), None, None, None


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys of chosen rows by their own positions, as transformers' `apply_rotary_pos_emb` does.

    Args:
        query: `(kept, heads, head_dim)`.
        key: `(kept, key_value_heads, head_dim)`, of the same dtype.
        cos, sin: Tables by flat row, `(positions, head_dim)`: of the whole batch, or of one sequence that all samples share.
        rows: Each row's flat number, `(kept,)` int64, taken modulo `positions`; `None` if the tables have one entry per row.

    Returns:
        Rotated queries and keys in the wider dtype of heads and tables.

    Raises:
        KernelInputError: If shapes, dtypes or devices do not fit.
    """
    for name, heads in (("query", query), ("key", key)):
        require(heads.dim() == 3, f"{name} must be (rows, heads, head_dim)", f"shape {tuple(heads.shape)}", "view it so")
        require(heads.dtype in DTYPES, f"{name} must be float32, float16 or bfloat16", heads.dtype, "use the PyTorch reference")
    count, _, head_dim = query.shape
    same = key.shape[0] == count and key.shape[2] == head_dim and key.dtype == query.dtype
    require(
        same,
        "query and key must agree in rows, head_dim and dtype",
        f"{tuple(query.shape)} {query.dtype} and {tuple(key.shape)} {key.dtype}",
        "project both alike",
    )
    require(head_dim % 2 == 0, "rotary needs an even head_dim", head_dim, "use the PyTorch reference")
    require_device("key", key, query)
    require_rows("cos", cos, head_dim, query)
    require_rows("sin", sin, head_dim, query, cos.shape[0])
    require(sin.dtype == cos.dtype, "cos and sin must have one dtype", f"{cos.dtype} and {sin.dtype}", "convert one")
    if rows is None:
        require(cos.shape[0] == count, "without rows the tables need one entry per row", cos.shape[0], "pass rows")
    else:
        require(rows.shape == (count,), f"rows must be ({count},)", tuple(rows.shape), "pass one row number per query")
        require_index("rows", rows, 2**62, query)  # any row has a position: it is taken modulo the table
        require(cos.shape[0] > 0 or count == 0, "the tables hold no position", 0, "pass cos and sin of the batch")
    return _Rotary.apply(query, key, cos, sin, rows)


def probe(device: torch.device, dtype: torch.dtype, heads: int, key_value_heads: int, head_dim: int) -> None:
    """Rotates heads of these numbers and this size, and their gradients."""
    query = torch.zeros(1, heads, head_dim, dtype=dtype, device=device, requires_grad=True)
    key, table = query.detach()[:, :key_value_heads].clone(), torch.zeros(2, head_dim, dtype=dtype, device=device)
    apply_rotary(query, key, table, table, torch.tensor([1], device=device))[0].sum().backward()
