"""Block scores by tiles, and block informativeness (LeMo paper, sections 4.1 and 5.1).

For key position j <= query position i of one document (and i - j < window where there is one),

    s_ij = (scale / heads) * sum over heads of max(0, q_i . k_j),        S_mn = max of s_ij over block pair (m, n)
    I_n  = (sum_{m > n} S_mn + sum_{m < n} S_nm) / (blocks - 1)

A program holds one tile of s: it walks the heads, each key head's tile loaded once for all query heads that share it, and
keeps the maxima of the block pairs within. Tiles above the diagonal or outside the window are not computed; all documents of a
batch go in one launch. Sums over heads are float32 in a fixed order and nothing is added atomically: the same bits every time.

Memory: 4 bytes for each block pair of each document (4 MiB for 64K tokens in blocks of 64) and no matrix of tokens x tokens.
Arithmetic: the QK half of a causal attention forward, without its exponentials.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import launch_on, on_device, operator, require, require_heads, unit_stride


@triton.jit
def _block_score_kernel(
    query_ptr, key_ptr, tiles_ptr, scores_ptr, q_row, q_head, k_row, k_head, heads, group, block_size, window, factor,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, SLOTS: tl.constexpr, SLOT: tl.constexpr, CHUNKS: tl.constexpr,
    WINDOWED: tl.constexpr
):  # fmt: skip
    """Maxima of one tile of SLOTS x SLOTS slots; a slot is a block, or the part of a longer block that fits into a tile."""
    place = tiles_ptr + tl.program_id(0) * 4
    # Of the tile's document: first row, rows, number of the tile of queries within it, where its maxima begin.
    start, output = tl.load(place), tl.load(place + 3)
    length, query_tile = tl.load(place + 1).to(tl.int32), tl.load(place + 2).to(tl.int32)
    key_tile = tl.program_id(1)
    within = tl.arange(0, SLOTS * SLOT) % SLOT
    slot = tl.arange(0, SLOTS * SLOT) // SLOT
    # The row of a place in the tile, in its document; places beyond a block's end belong to nobody.
    query_slot = query_tile * SLOTS + slot
    key_slot = key_tile * SLOTS + slot
    query_at = query_slot % CHUNKS * SLOT + within
    key_at = key_slot % CHUNKS * SLOT + within
    query_row = query_slot // CHUNKS * block_size + query_at
    key_row = key_slot // CHUNKS * block_size + key_at
    query_real = (query_at < block_size) & (query_row < length)
    key_real = (key_at < block_size) & (key_row < length)
    first_query = tl.min(tl.where(query_real, query_row, length), 0)
    last_query = tl.max(tl.where(query_real, query_row, 0), 0)
    first_key = tl.min(tl.where(key_real, key_row, length), 0)
    last_key = tl.max(tl.where(key_real, key_row, 0), 0)
    needed = (first_key < length) & (first_key <= last_query)
    if WINDOWED:
        needed = needed & (first_query - last_key < window)
    if needed:
        dims = tl.arange(0, PADDED)
        query_mask = query_real[:, None] & (dims < HEAD_DIM)[None, :]
        key_mask = key_real[:, None] & (dims < HEAD_DIM)[None, :]
        queries = query_ptr + (start + query_row)[:, None] * q_row + dims[None, :]
        keys = key_ptr + (start + key_row)[:, None] * k_row + dims[None, :]
        query_step, key_step = tl.zeros((), tl.int64) + q_head, tl.zeros((), tl.int64) + k_head
        total = tl.zeros((SLOTS * SLOT, SLOTS * SLOT), tl.float32)
        for key_head in range(heads // group):
            key = tl.load(keys + key_head * key_step, mask=key_mask, other=0.0)
            for member in range(group):
                query = tl.load(queries + (key_head * group + member) * query_step, mask=query_mask, other=0.0)
                total += tl.maximum(tl.dot(query, tl.trans(key), input_precision="ieee"), 0.0)
        seen = key_row[None, :] <= query_row[:, None]
        if WINDOWED:
            seen = seen & (query_row[:, None] - key_row[None, :] < window)
        # Rows beyond an end were read as zeros, which no maximum of numbers >= 0 notices.
        total = tl.where(seen, total * factor, 0.0)
        maxima = tl.max(tl.max(tl.reshape(total, (SLOTS, SLOT, SLOTS, SLOT)), 3), 1)
        slots = tl.cdiv(length, block_size) * CHUNKS
        row = query_tile * SLOTS + tl.arange(0, SLOTS)
        column = key_tile * SLOTS + tl.arange(0, SLOTS)
        inside = (row < slots)[:, None] & (column < slots)[None, :]
        tl.store(scores_ptr + output + row.to(tl.int64)[:, None] * slots + column[None, :], maxima, mask=inside)


@triton.jit(do_not_specialize=["most_blocks"])
def _informativeness_kernel(scores_ptr, documents_ptr, result_ptr, most_blocks, WIDTH: tl.constexpr):
    """I of one block: the sum of its row left of the diagonal and of its column below it."""
    place = documents_ptr + tl.program_id(0) // most_blocks * 3
    scores, blocks, result = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    block = (tl.program_id(0) % most_blocks).to(tl.int64)
    if block < blocks:
        total = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, blocks, WIDTH):
            other = start + tl.arange(0, WIDTH)
            total += tl.load(scores_ptr + scores + block * blocks + other, mask=other < block, other=0.0)
            total += tl.load(scores_ptr + scores + other * blocks + block, mask=(other > block) & (other < blocks), other=0.0)
        tl.store(result_ptr + result + block, tl.sum(total, 0) / tl.maximum(blocks - 1, 1).to(tl.float32))


def _block_counts(lengths: list[int], block_size: int) -> list[int]:
    return [-(-length // block_size) for length in lengths]


@lru_cache(maxsize=64)
def _tile_table(lengths: tuple[int, ...], block_size: int, chunks: int, slots: int) -> tuple[Tensor, int]:
    """What each row of tiles must know, `(tiles, 4)`, and the most tiles of a document; layers of one batch ask for the same."""
    rows: list[tuple[int, int, int, int]] = []
    start = output = widest = 0
    for length, blocks in zip(lengths, _block_counts(list(lengths), block_size), strict=True):
        tiles = -(-blocks * chunks // slots)
        rows += [(start, length, tile, output) for tile in range(tiles)]
        start, output, widest = start + length, output + (blocks * chunks) ** 2, max(widest, tiles)
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4), widest


@operator("block_scores", reads_host=True)
def block_scores_operator(
    query: Tensor, key: Tensor, lengths: list[int], block_size: int, scale: float, window: int | None
) -> Tensor:
    """S of each document, flat, one after the other."""
    query, key = unit_stride(query), unit_stride(key)
    _, heads, head_dim = query.shape
    padded = max(16, triton.next_power_of_2(head_dim))
    tile = 64 if padded > 128 and query.element_size() > 2 else 128  # two tiles in shared memory
    slot = min(tile, triton.next_power_of_2(block_size))
    chunks = -(-block_size // tile)
    counts = _block_counts(lengths, block_size)
    # Tiles above the diagonal and outside the window write nothing.
    scores = torch.zeros(sum((blocks * chunks) ** 2 for blocks in counts), dtype=torch.float32, device=query.device)
    table, widest = _tile_table(tuple(lengths), block_size, chunks, tile // slot)
    if widest:
        with launch_on(query):
            _block_score_kernel[(table.shape[0], widest)](
                query, key, on_device(table, query.device), scores, *query.stride()[:2], *key.stride()[:2],
                heads, heads // key.shape[1], block_size, window or 0, scale / heads,
                HEAD_DIM=head_dim, PADDED=padded, SLOTS=tile // slot, SLOT=slot, CHUNKS=chunks, WINDOWED=window is not None,
                num_warps=8, num_stages=1 if padded > 128 else 2,  # the larger heads' second stage would not fit the registers
            )  # fmt: skip
    if chunks == 1:
        return scores
    parts = scores.split([(blocks * chunks) ** 2 for blocks in counts])
    pooled = [part.view(blocks, chunks, blocks, chunks).amax((1, 3)).view(-1) for part, blocks in zip(parts, counts, strict=True)]
    return torch.cat(pooled)


@block_scores_operator.register_fake
def _(query: Tensor, key: Tensor, lengths: list[int], block_size: int, *_: Any) -> Tensor:
    return query.new_empty(sum(blocks**2 for blocks in _block_counts(lengths, block_size)), dtype=torch.float32)


@operator("block_informativeness", reads_host=True)
def block_informativeness_operator(scores: Tensor, counts: list[int]) -> Tensor:
    """I of all documents' blocks from S as `block_scores_operator` lays it out; `counts` are the documents' blocks."""
    result = torch.empty(sum(counts), dtype=torch.float32, device=scores.device)
    if sum(counts):
        offsets = [0, *accumulate(blocks**2 for blocks in counts)]
        places = [0, *accumulate(counts)]
        table = torch.tensor([*zip(offsets[:-1], counts, places[:-1], strict=True)], dtype=torch.int64)
        most = max(counts)
        # One dimension: CUDA's others end at 65535, which is 4M tokens in blocks of 64 but 512K in blocks of 8.
        with launch_on(scores):
            _informativeness_kernel[(len(counts) * most,)](scores, on_device(table, scores.device), result, most, WIDTH=256)
    return result


@block_informativeness_operator.register_fake
def _(scores: Tensor, counts: list[int]) -> Tensor:
    return scores.new_empty(sum(counts))


def _check(query: Tensor, key: Tensor, lengths: list[int], block_size: int, window: int | None) -> None:
    tokens = query.shape[0]
    require_heads(query, {"keys": key}, tokens)
    fits = sum(lengths) == tokens and min(lengths, default=0) >= 0
    require(fits, f"document lengths must add up to the {tokens} tokens", lengths, "pass the lengths of these rows")
    require(block_size > 0, "a block has at least one token", f"block_size={block_size}", "pass the model's block size")
    require(window is None or window > 0, "a window counts the row itself", f"window={window}", "pass at least 1, or None")


@torch.no_grad()
def block_scores(query: Tensor, key: Tensor, block_size: int, scale: float, window: int | None = None) -> Tensor:
    """Maximum mean positive attention score of every causal block pair of one document.

    Args:
        query: Queries with positions applied, `(tokens, heads, head_dim)`, `head_dim` up to 256.
        key: Keys likewise, `(tokens, key_value_heads, head_dim)`.
        block_size: Tokens per block; the last block may be shorter.
        scale: Positive factor on the dot products.
        window: Only keys less than `window` positions before a query count; `None` for all earlier ones.

    Returns:
        S, `(blocks, blocks)` in float32; entries above the diagonal are 0.

    Raises:
        KernelInputError: If shapes, dtypes, devices or sizes do not fit.
    """
    _check(query, key, [query.shape[0]], block_size, window)
    blocks = -(-query.shape[0] // block_size)
    return block_scores_operator(query, key, [query.shape[0]], block_size, scale, window).view(blocks, blocks)


@torch.no_grad()
def informativeness_by_document(
    query: Tensor, key: Tensor, lengths: list[int], block_size: int, scale: float, window: int | None = None
) -> list[Tensor]:
    """True informativeness of every document's blocks, all documents in two launches.

    Args:
        query, key, block_size, scale, window: As in `block_scores`, the documents' tokens one after the other.
        lengths: Tokens of each document; their sum is `tokens`.

    Returns:
        I of each document, `(blocks,)` in float32; 0 for a document of one block.

    Raises:
        KernelInputError: As in `block_scores`.
    """
    _check(query, key, lengths, block_size, window)
    counts = _block_counts(lengths, block_size)
    scores = block_scores_operator(query, key, lengths, block_size, scale, window)
    return list(block_informativeness_operator(scores, counts).split(counts))


def probe(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    """Scores and informativeness with heads and blocks of these sizes."""
    # Grouped: triton would compile a loop over one head away, and with it what the loop needs.
    query, key = (torch.zeros(2, heads, head_dim, dtype=dtype, device=device) for heads in (4, 2))
    informativeness_by_document(query, key, [2], block_size, 1.0)
