"""Block scores and block informativeness, by their definition (LeMo paper, section 4.1).

For key position j <= query position i of one document, with rotary-applied queries and keys,

    s_ij = (1 / heads) * sum over heads of max(0, q_i . k_j * scale),        S_mn = max of s_ij over block pair (m, n)
    I_n  = (sum_{m > n} S_mn + sum_{m < n} S_nm) / (blocks - 1)

Only positive scores count: after a softmax a negative one is negligible, yet it would cancel a positive one in the mean over
heads. I_n counts block n as keys for later queries and as queries for earlier keys, divided by its number of partners, so
neither its place nor the document's length changes the scale.

Under a sliding window only pairs with j > i - window count: others never attend, so their s_ij is 0, and so is the S of block
pairs that lie wholly outside it. The divisor stays: a block's partners are all other blocks of its document.

Memory: one strip of `chunk_size` queries against all earlier keys (within the window) at a time, `chunk_size * tokens`
float32, never the quadratic matrix; the result is (blocks, blocks).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_switch import kernel


@torch.no_grad()
def block_scores(
    query: Tensor, key: Tensor, block_size: int, scale: float, window: int | None = None, chunk_size: int = 128
) -> Tensor:
    """Maximum mean positive attention score of every causal block pair of one document.

    Args:
        query: Rotary-applied queries, `(tokens, heads, head_dim)`.
        key: Rotary-applied keys, `(tokens, key_value_heads, head_dim)`; heads must be a multiple of key_value_heads.
        block_size: Tokens per block; the last block may be shorter.
        scale: Factor on the dot products, usually head_dim ** -0.5.
        window: Only keys less than `window` positions before a query count, as a sliding window lets it see; `None` for all.
        chunk_size: Queries per strip, rounded up to whole blocks.

    Returns:
        S, `(blocks, blocks)` in float32 (float64 for float64 inputs); entries above the diagonal are 0, and those of pairs
        outside the window.
    """
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
