"""Attention in which row i sees the keys [first_key[i], i]: the Triton forward and backward (LeMo paper, section 5.1).

Causality, documents and a sliding window by original positions are that one interval, because kept rows stay in order. The
forward also serves queries of some rows alone, each with the row of its own key (nearby_attention.py), and a second interval of
other keys for every row, in the same softmax (kept_key_attention.py). With
p_ij = exp(q_i . k_j * scale - lse_i), o the attention output and D_i = do_i . o_i:

    dv_j = sum_i p_ij do_i,    ds_ij = p_ij (do_i . v_j - D_i),    dq_i = scale * sum_j ds_ij k_j,    dk_j = scale * sum_i ds_ij q_i

One kernel for the forward, one for dq (it also writes D) and one for dk and dv, in which one program sums over all query heads
that share a key head: no atomic additions, so the same inputs give the same bits. Sums are float32, row offsets 64-bit.

Memory: rows * heads * (head_dim * e + 4) bytes for output and log-sum-exp at e bytes a number, as much again for the gradient's
dq and 4 bytes a row and head for D; no matrix of rows x rows, no repeated keys.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import launch_on, optional


@triton.jit
def _load_rows(base, rows, row_stride, dims, num_rows, HEAD_DIM: tl.constexpr, CHECKED: tl.constexpr):
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    if CHECKED:
        return tl.load(pointers, mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store_rows(base, rows, row_stride, dims, num_rows, tile, HEAD_DIM: tl.constexpr):
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + dims[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _tile_of_queries(num_rows, heads, BLOCK: tl.constexpr):
    """A program's head, its first row and the one beyond its last."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    # The last tiles see most keys: they start first, so that no long one is left over at the end.
    begin = (tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads) * BLOCK
    return head, begin, tl.minimum(begin + BLOCK, num_rows)


@triton.jit
def _bounds_of_keys(first_key_ptr, begin, end, nearest, BLOCK: tl.constexpr):
    """The first key that a tile of queries sees, and where the keys that all its rows see begin and end, in whole tiles of keys.

    first_key never decreases; `nearest` is the last key that the tile's first row sees, and no other row's comes before it.
    """
    low = tl.load(first_key_ptr + begin)
    all_see = low + tl.cdiv(tl.load(first_key_ptr + end - 1) - low, BLOCK) * BLOCK
    return low, all_see, all_see + tl.maximum(nearest - all_see, 0) // BLOCK * BLOCK


@triton.jit
def _visible(columns, first, last):
    """Which of a tile's keys each of its queries sees, (queries, keys)."""
    return (columns[None, :] <= last[:, None]) & (columns[None, :] >= first[:, None])


@triton.jit
def _add_keys(
    peak, total, mixed, query, first, last, k_base, v_base, k_stride, v_stride, low, high, num_keys, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Online softmax over the keys [low, high): running maximum, sum and weighted values of a tile of queries."""
    dims = tl.arange(0, PADDED)
    for start in range(low, high, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = _load_rows(k_base, columns, k_stride, dims, num_keys, HEAD_DIM, MASKED or HEAD_DIM != PADDED)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if MASKED:
            scores = tl.where(_visible(columns, first, last), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing of this tile was visible to the row
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(peak - shift)
        value = _load_rows(v_base, columns, v_stride, dims, num_keys, HEAD_DIM, MASKED or HEAD_DIM != PADDED)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, mixed


@triton.jit(do_not_specialize=["num_rows", "num_keys", "num_far"])
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, first_key_ptr, last_key_ptr, output_ptr, lse_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, num_rows, heads, group, num_keys, scale_log2,
    far_key_ptr, far_value_ptr, far_first_ptr, far_last_ptr, fk_row, fk_head, fv_row, fv_head, num_far,
    HAS_LAST_KEY: tl.constexpr, HAS_FAR: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    head, begin, end = _tile_of_queries(num_rows, heads, BLOCK_M)
    rows = begin + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED)
    first = tl.load(first_key_ptr + rows, mask=rows < num_rows, other=0)
    last, nearest, high = rows, begin, end
    if HAS_LAST_KEY:
        # Rows beyond the end see what is there: a softmax of nothing would be no number.
        last = tl.load(last_key_ptr + rows, mask=rows < num_rows, other=2147483647)
        nearest = tl.minimum(tl.load(last_key_ptr + begin), num_keys - 1)
        high = tl.minimum(tl.load(last_key_ptr + end - 1) + 1, num_keys)
    query = _load_rows(query_ptr + head * q_head, rows, q_row, dims, num_rows, HEAD_DIM, True)
    k_base = key_ptr + (head // group) * k_head
    v_base = value_ptr + (head // group) * v_head
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, PADDED), tl.float32)
    # Keys that only some rows of the tile see, keys that all see, keys around the diagonal.
    low, all_see, diagonal = _bounds_of_keys(first_key_ptr, begin, end, nearest, BLOCK_N)
    peak, total, mixed = _add_keys(
        peak, total, mixed, query, first, last, k_base, v_base, k_row, v_row, low, tl.minimum(all_see, high), num_keys,
        scale_log2, HEAD_DIM, PADDED, BLOCK_N, True
    )  # fmt: skip
    peak, total, mixed = _add_keys(
        peak, total, mixed, query, first, last, k_base, v_base, k_row, v_row, all_see, diagonal, num_keys,
        scale_log2, HEAD_DIM, PADDED, BLOCK_N, False
    )  # fmt: skip
    peak, total, mixed = _add_keys(
        peak, total, mixed, query, first, last, k_base, v_base, k_row, v_row, diagonal, high, num_keys,
        scale_log2, HEAD_DIM, PADDED, BLOCK_N, True
    )  # fmt: skip
    if HAS_FAR:
        # Every row has seen a key by now, so rows that see nothing here keep what they have.
        first = tl.load(far_first_ptr + rows, mask=rows < num_rows, other=0)
        last = tl.load(far_last_ptr + rows, mask=rows < num_rows, other=-1)
        k_base = far_key_ptr + (head // group) * fk_head
        v_base = far_value_ptr + (head // group) * fv_head
        high = tl.minimum(tl.load(far_last_ptr + end - 1) + 1, num_far)
        nearest = tl.minimum(tl.load(far_last_ptr + begin), num_far - 1)
        low, all_see, diagonal = _bounds_of_keys(far_first_ptr, begin, end, nearest, BLOCK_N)
        peak, total, mixed = _add_keys(
            peak, total, mixed, query, first, last, k_base, v_base, fk_row, fv_row, low, tl.minimum(all_see, high), num_far,
            scale_log2, HEAD_DIM, PADDED, BLOCK_N, True
        )  # fmt: skip
        peak, total, mixed = _add_keys(
            peak, total, mixed, query, first, last, k_base, v_base, fk_row, fv_row, all_see, diagonal, num_far,
            scale_log2, HEAD_DIM, PADDED, BLOCK_N, False
        )  # fmt: skip
        peak, total, mixed = _add_keys(
            peak, total, mixed, query, first, last, k_base, v_base, fk_row, fv_row, diagonal, high, num_far,
            scale_log2, HEAD_DIM, PADDED, BLOCK_N, True
        )  # fmt: skip
    _store_rows(output_ptr + head * HEAD_DIM, rows, heads * HEAD_DIM, dims, num_rows, mixed / total[:, None], HEAD_DIM)
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + rows.to(tl.int64) * heads + head, lse, mask=rows < num_rows)


@triton.jit
def _add_query_gradient(
    grad_query, query, grad, lse_log2, along, first, last, k_base, v_base, k_stride, v_stride, low, high, num_keys, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    dims = tl.arange(0, PADDED)
    for start in range(low, high, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        key = _load_rows(k_base, columns, k_stride, dims, num_keys, HEAD_DIM, MASKED or HEAD_DIM != PADDED)
        value = _load_rows(v_base, columns, v_stride, dims, num_keys, HEAD_DIM, MASKED or HEAD_DIM != PADDED)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        weights = tl.exp2(scores - lse_log2[:, None])
        if MASKED:
            weights = tl.where(_visible(columns, first, last), weights, 0.0)
        grad_scores = weights * (tl.dot(grad, tl.trans(value), input_precision="ieee") - along[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision="ieee")
    return grad_query


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def _query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, grad_ptr, lse_ptr, along_ptr, first_key_ptr, last_key_ptr, grad_query_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, num_rows, heads, group, num_keys, scale, scale_log2,
    HAS_LAST_KEY: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Gradient dq of a tile of queries, and their D for the other kernel. output and grad are contiguous."""
    head, begin, end = _tile_of_queries(num_rows, heads, BLOCK_M)
    rows = begin + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED)
    first = tl.load(first_key_ptr + rows, mask=rows < num_rows, other=0)
    last, nearest, high = rows, begin, end
    if HAS_LAST_KEY:
        last = tl.load(last_key_ptr + rows, mask=rows < num_rows, other=-1)
        nearest = tl.minimum(tl.load(last_key_ptr + begin), num_keys - 1)
        high = tl.minimum(tl.load(last_key_ptr + end - 1) + 1, num_keys)
    query = _load_rows(query_ptr + head * q_head, rows, q_row, dims, num_rows, HEAD_DIM, True)
    grad = _load_rows(grad_ptr + head * HEAD_DIM, rows, heads * HEAD_DIM, dims, num_rows, HEAD_DIM, True)
    output = _load_rows(output_ptr + head * HEAD_DIM, rows, heads * HEAD_DIM, dims, num_rows, HEAD_DIM, True)
    along = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    at = rows.to(tl.int64) * heads + head
    tl.store(along_ptr + at, along, mask=rows < num_rows)
    lse_log2 = tl.load(lse_ptr + at, mask=rows < num_rows, other=0.0) * 1.4426950408889634
    k_base = key_ptr + (head // group) * k_head
    v_base = value_ptr + (head // group) * v_head
    low, all_see, diagonal = _bounds_of_keys(first_key_ptr, begin, end, nearest, BLOCK_N)
    grad_query = tl.zeros((BLOCK_M, PADDED), tl.float32)
    grad_query = _add_query_gradient(
        grad_query, query, grad, lse_log2, along, first, last, k_base, v_base, k_row, v_row, low, tl.minimum(all_see, high),
        num_keys, scale_log2, HEAD_DIM, PADDED, BLOCK_N, True
    )  # fmt: skip
    grad_query = _add_query_gradient(
        grad_query, query, grad, lse_log2, along, first, last, k_base, v_base, k_row, v_row, all_see, diagonal,
        num_keys, scale_log2, HEAD_DIM, PADDED, BLOCK_N, False
    )  # fmt: skip
    grad_query = _add_query_gradient(
        grad_query, query, grad, lse_log2, along, first, last, k_base, v_base, k_row, v_row, diagonal, high,
        num_keys, scale_log2, HEAD_DIM, PADDED, BLOCK_N, True
    )  # fmt: skip
    _store_rows(grad_query_ptr + head * HEAD_DIM, rows, heads * HEAD_DIM, dims, num_rows, grad_query * scale, HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def _key_gradient_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, lse_ptr, along_ptr, first_key_ptr, end_query_ptr, grad_key_ptr, grad_value_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, num_rows, heads, group, scale, scale_log2,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Gradients dk and dv of a tile of keys: one program sums over all queries of all heads that share them, in a fixed order."""
    key_heads = heads // group
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    begin = (tl.program_id(0) // key_heads) * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, num_rows)
    columns = begin + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, PADDED)
    key = _load_rows(key_ptr + key_head * k_head, columns, k_row, dims, num_rows, HEAD_DIM, True)
    value = _load_rows(value_ptr + key_head * v_head, columns, v_row, dims, num_rows, HEAD_DIM, True)
    # Every tile of queries is masked: loops without masks between two with them cost more registers than there are.
    high = tl.load(end_query_ptr + end - 1)
    grad_key = tl.zeros((BLOCK_N, PADDED), tl.float32)
    grad_value = tl.zeros((BLOCK_N, PADDED), tl.float32)
    for member in range(group):
        head = key_head * group + member
        for start in range(begin, high, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            query = _load_rows(query_ptr + head * q_head, rows, q_row, dims, num_rows, HEAD_DIM, True)
            grad = _load_rows(grad_ptr + head * HEAD_DIM, rows, heads * HEAD_DIM, dims, num_rows, HEAD_DIM, True)
            at = rows.to(tl.int64) * heads + head
            lse_log2 = tl.load(lse_ptr + at, mask=rows < num_rows, other=0.0) * 1.4426950408889634
            along = tl.load(along_ptr + at, mask=rows < num_rows, other=0.0)
            first = tl.load(first_key_ptr + rows, mask=rows < num_rows, other=2147483647)
            # Transposed, (keys, queries): both results are then plain products of it.
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
            visible = (columns[:, None] <= rows[None, :]) & (columns[:, None] >= first[None, :])
            weights = tl.where(visible, tl.exp2(scores - lse_log2[None, :]), 0.0)
            grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision="ieee")
            grad_scores = weights * (tl.dot(value, tl.trans(grad), input_precision="ieee") - along[None, :])
            grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    row = key_heads * HEAD_DIM
    _store_rows(grad_key_ptr + key_head * HEAD_DIM, columns, row, dims, num_rows, grad_key * scale, HEAD_DIM)
    _store_rows(grad_value_ptr + key_head * HEAD_DIM, columns, row, dims, num_rows, grad_value, HEAD_DIM)


def _tiles(kernel: str, padded: int, itemsize: int) -> dict[str, int]:
    """Queries and keys per tile, warps and stages, for 227 KiB of shared memory; a fixed table, so that results do not depend
    on which tiles were fastest today.
    """
    if itemsize > 2:
        wide, narrow = (32, 32) if padded <= 128 else (32, 16)
        sizes, warps, stages = (narrow, wide) if kernel == "key_gradient" else (wide, narrow), 4, 1
    elif kernel == "key_gradient":  # two sums per program: registers are what is scarce
        sizes, warps, stages = ((64, 128), 8, 2) if padded <= 128 else ((32, 32), 4, 1)
    elif padded <= 128:
        sizes, warps, stages = (128, 64), 8, 3 if kernel == "forward" else 2
    else:
        sizes, warps, stages = ((128, 64), 8, 1) if kernel == "forward" else ((64, 16), 8, 2)
    return {"BLOCK_M": sizes[0], "BLOCK_N": sizes[1], "num_warps": warps, "num_stages": stages}


def _launch(kernel: Any, name: str, programs: int, rows_per_tile: str, query: Tensor, arguments: tuple[Any, ...]) -> None:
    head_dim = query.shape[2]
    padded = max(16, triton.next_power_of_2(head_dim))
    tiles = _tiles(name, padded, query.element_size())
    grid = (triton.cdiv(query.shape[0], tiles[rows_per_tile]) * programs,)
    with launch_on(query):
        kernel[grid](*arguments, HEAD_DIM=head_dim, PADDED=padded, **tiles)


def _layout(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    strides = (stride for tensor in (query, key, value) for stride in tensor.stride()[:2])
    return *strides, query.shape[0], query.shape[1], query.shape[1] // key.shape[1]


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


_LOG2_E = 1.4426950408889634  # the kernels' exponentials are powers of two


class FarKeys(NamedTuple):
    """Keys beyond a row's interval of the others, and which of them each row sees.

    Args:
        key, value: `(far, key_value_heads, head_dim)`, the last dimension contiguous.
        first, last: The first and the last far key that each row sees, `(rows,)` int32 both, never decreasing; none where the last
            is before the first.
    """

    key: Tensor
    value: Tensor
    first: Tensor
    last: Tensor


def interval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_key: Tensor,
    scale: float,
    last_key: Tensor | None = None,
    far: FarKeys | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each row over the keys from `first_key` to the row itself, without autograd.

    Args:
        query: `(rows, heads, head_dim)`, at least one row; the last dimension of all three is contiguous.
        key, value: `(rows, key_value_heads, head_dim)`; with `last_key` of any number of rows.
        first_key: `(rows,)` int32, never decreasing and never above the row's own number, or its `last_key`.
        scale: Factor on the dot products.
        last_key: `(rows,)` int32, never decreasing: the last key that each row sees, if that is not the row's own number. A tile
            of queries walks all keys from its first row's first to its last row's last.
        far: Keys that each row sees besides.

    Returns:
        The output `(rows, heads, head_dim)` and the float32 log-sum-exp `(rows, heads, 1)`, both contiguous.
    """
    output = _empty(query)
    lse = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device=query.device)
    last_keys = optional(last_key, first_key)
    sizes = (*_layout(query, key, value), key.shape[0], scale * _LOG2_E)
    beyond = far or FarKeys(key, value, first_key, first_key)
    strides = (stride for tensor in (beyond.key, beyond.value) for stride in tensor.stride()[:2])
    arguments = (query, key, value, first_key, last_keys, output, lse, *sizes, *beyond, *strides, beyond.key.shape[0])
    arguments = (*arguments, last_key is not None, far is not None)
    _launch(_forward_kernel, "forward", query.shape[1], "BLOCK_M", query, arguments)
    return output, lse


def interval_query_gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    first_key: Tensor,
    scale: float,
    last_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What an interval of keys adds to the queries' gradient.

    Args:
        grad, output: `(rows, heads, head_dim)`, contiguous.
        query, key, value, first_key, scale: As in `interval_attention`.
        lse: `(rows, heads, 1)` float32, contiguous.
        last_key: As there; a row sees nothing where its last key comes before its first.

    Returns:
        The gradient, like `query`, and D of the formulas above, float32 like `lse`.
    """
    grad_query = _empty(query)
    along = torch.empty(*query.shape[:2], 1, dtype=torch.float32, device=query.device)
    sizes = (*_layout(query, key, value), key.shape[0], scale, scale * _LOG2_E, last_key is not None)
    arguments = (query, key, value, output, grad, lse, along, first_key, optional(last_key, first_key), grad_query, *sizes)
    _launch(_query_gradient_kernel, "query_gradient", query.shape[1], "BLOCK_M", query, arguments)
    return grad_query, along


def interval_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    first_key: Tensor,
    end_query: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by the formulas above, whatever forward pass `output` and `lse` came from.

    Args:
        grad, output: `(rows, heads, head_dim)`, contiguous.
        query, key, value, first_key, scale: As in `interval_attention`.
        lse: `(rows, heads, 1)` float32, contiguous.
        end_query: `(rows,)` int32, one beyond the last row that sees each key.
    """
    grad_query, along = interval_query_gradient(grad, query, key, value, output, lse, first_key, scale)
    grad_key, grad_value = (_empty(tensor) for tensor in (key, value))
    sizes = (*_layout(query, key, value), scale, scale * _LOG2_E)
    arguments = (query, key, value, grad, lse, along, first_key, end_query, grad_key, grad_value, *sizes)
    _launch(_key_gradient_kernel, "key_gradient", key.shape[1], "BLOCK_N", query, arguments)
    return grad_query, grad_key, grad_value
