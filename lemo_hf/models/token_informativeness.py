"""Block scores and block informativeness, by their definition (LeMo paper, section 4.1).

For key position j <= query position i of one document, with rotary-applied queries and keys,

    s_ij = (1 / heads) * sum over heads of max(0, q_i . k_j * scale),        S_mn = max of s_ij over block pair (m, n)
    I_n  = (sum_{m > n} S_mn + sum_{m < n} S_nm) / (blocks - 1)

Only positive scores count: after a softmax a negative one is negligible, yet it would cancel a positive one in the mean over
heads. I_n counts block n as keys for later queries and as queries for earlier keys, divided by its number of partners, so
neither its place nor the document's length changes the scale.

That is `reduction="max"`, the paper's. `reduction="mean"` is ours: s_ij keeps its sign and S_mn is its mean over block pair (m, n), so

    S_mn = scale / heads * sum over heads of (mean of q over m) . (mean of k over n)      for m > n,

a product of pooled queries and keys. It takes O(tokens) instead of O(tokens ** 2), and a low-rank predictor can follow it
(docs/experiments/predictors.md). It may be negative: a block that the others' queries point away from.

Under a sliding window only pairs with j > i - window count: others never attend, so their s_ij is 0, and so is the S of block
pairs that lie wholly outside it. The divisor stays: a block's partners are all other blocks of its document.

Memory of the maximum: one strip of `chunk_size` queries against all earlier keys (within the window) at a time, `chunk_size * tokens`
float32, never the quadratic matrix; the result is (blocks, blocks).
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_switch import kernel
from .lemo_config import BlockReduction, LemoConfigError


@torch.no_grad()
def block_scores(
    query: Tensor,
    key: Tensor,
    block_size: int,
    scale: float,
    window: int | None = None,
    chunk_size: int = 128,
    reduction: BlockReduction = "max",
) -> Tensor:
    """Attention score of every causal block pair of one document: the largest or the mean one of its token pairs.

    Args:
        query: Rotary-applied queries, `(tokens, heads, head_dim)`.
        key: Rotary-applied keys, `(tokens, key_value_heads, head_dim)`; heads must be a multiple of key_value_heads.
        block_size: Tokens per block; the last block may be shorter.
        scale: Factor on the dot products, usually head_dim ** -0.5.
        window: Only keys less than `window` positions before a query count, as a sliding window lets it see; `None` for all.
        chunk_size: Queries per strip, rounded up to whole blocks; for the maximum.
        reduction: `"max"` of the mean over heads of positive scores (paper), or `"mean"` of the signed scores.

    Returns:
        S, `(blocks, blocks)` in float32 (float64 for float64 inputs); entries above the diagonal are 0, and those of pairs
        outside the window.

    Raises:
        LemoConfigError: If there is no such reduction.
    """
    if reduction not in get_args(BlockReduction):
        raise LemoConfigError(
            f"reduction must be one of {', '.join(get_args(BlockReduction))}; got {reduction!r}; choose one of these"
        )
    if reduction == "mean":
        return _mean_scores(query, key, block_size, scale, window)
    tokens, heads, head_dim = query.shape
    if (fast := kernel("block_scores", query, head_dim, block_size)) is not None:
        return fast(query, key, block_size, scale, window)
    groups = heads // key.shape[1]
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    blocks = -(-tokens // block_size)
    strip = max(1, -(-chunk_size // block_size)) * block_size
    # (key_value_heads, groups * tokens-of-strip, head_dim) against (key_value_heads, head_dim, tokens): keys are not repeated.
    keys = key.to(compute_dtype).permute(1, 2, 0) * scale
    scores = query.new_zeros(blocks, blocks, dtype=compute_dtype)
    for start in range(0, tokens, strip):
        stop = min(start + strip, tokens)
        # The first key of the first block that any query of the strip sees.
        first = 0 if window is None else max(0, start - window + 1) // block_size * block_size
        queries = query[start:stop].to(compute_dtype).view(stop - start, -1, groups, head_dim)
        mean = query.new_zeros(stop - start, stop - first, dtype=compute_dtype)
        for kv_head in range(key.shape[1]):
            for group in range(groups):
                mean += (queries[:, kv_head, group] @ keys[kv_head, :, first:stop]).relu_()
        mean /= heads
        # Only the strip's own columns cross the diagonal.
        mean[:, start - first :].tril_()
        if window is not None:
            mean.triu_(start - first - window + 1)
        rows = -(-(stop - start) // block_size)
        columns = -(-(stop - first) // block_size)
        padded = F.pad(mean, (0, columns * block_size - (stop - first), 0, rows * block_size - (stop - start)))
        tiles = padded.view(rows, block_size, columns, block_size)
        row, column = start // block_size, first // block_size
        scores[row : row + rows, column : column + columns] = tiles.amax(dim=(1, 3))
    return scores


def _mean_scores(query: Tensor, key: Tensor, block_size: int, scale: float, window: int | None) -> Tensor:
    """S by means, from pooled queries and keys; token pairs are formed only in blocks that the diagonal or the window cuts."""
    tokens, heads, head_dim = query.shape
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    blocks = -(-tokens // block_size)
    # Query heads that share a key head add up before anything else does, so that no wide copy of all queries is made.
    parts = query.view(tokens, -1, heads // key.shape[1], head_dim).sum(2, dtype=compute_dtype), key.to(compute_dtype)
    flat, missing = [part.flatten(1) for part in parts], blocks * block_size - tokens
    by_block = [(F.pad(part, (0, 0, 0, missing)) if missing else part).view(blocks, block_size, -1) for part in flat]
    counts = query.new_full((blocks, 1), block_size, dtype=compute_dtype)
    counts[-1] -= missing
    queries, keys = (part.sum(1) / counts for part in by_block)
    scores = (queries @ keys.T * (scale / heads)).tril(-1)
    place = torch.arange(block_size, device=query.device)
    limit = tokens if window is None else window
    for distance in range(blocks):
        # Tokens of two blocks at this distance are so far apart, at least and at most.
        nearest, farthest = (distance - 1) * block_size + 1, (distance + 1) * block_size - 1
        if nearest >= limit:
            return scores.triu(1 - distance)
        if distance and (farthest < limit or window is None):
            continue
        apart = distance * block_size + place[:, None] - place
        later, earlier = by_block[0][distance:], by_block[1][: blocks - distance]
        total = ((later @ earlier.transpose(1, 2)) * ((apart >= 0) & (apart < limit))).sum((1, 2)) * (scale / heads)
        scores.diagonal(-distance).copy_(total / (counts[distance:] * counts[: blocks - distance])[:, 0])
    return scores


def block_informativeness(scores: Tensor) -> Tensor:
    """Informativeness I of every block of one document from its block scores.

    Args:
        scores: S, `(blocks, blocks)`; entries above the diagonal are ignored.

    Returns:
        I, `(blocks,)`; a document of one block has I = 0 and is kept whatever the threshold.
    """
    blocks = scores.shape[0]
    partners = scores.tril(-1)
    return (partners.sum(0) + partners.sum(1)) / max(blocks - 1, 1)
