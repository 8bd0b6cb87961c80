"""Local attention of the tokens that a layer drops, in the sparse form (ours; LeMo paper, section 4, gives them none).

A dropped token attends to the `width` tokens of its document that end with itself, kept ones included, at their original
positions, without gradient. It is linear in tokens and nothing of it is saved. In the form of kept keys every token has nearby
tokens, in one softmax with the kept ones: kept_key_attention.py.

On a GPU a kernel reads the keys where they stand. Elsewhere: dropped rows come in blocks, so a block of b queries reads one
stretch of b + width - 1 keys, and one mask `(b, b + width - 1)` serves all blocks but those at a document's start. Blocks are
batched up to a number of gathered keys, whatever the batch's length; grouped queries stand side by side, so that no key is
repeated for them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Documents
from .kernel_switch import kernel
from .token_elimination import Selection

# Rows of keys, and as many of values, gathered at one time.
_KEYS_AT_ONCE = 16384
# Stretches of keys are a multiple of this long with blocks that are: masks of other lengths are copied on CUDA.
_ALIGNMENT = 8


@dataclass(frozen=True)
class NearbyScope:
    """What attention of the dropped rows needs to know.

    Args:
        selection: Which rows are dropped.
        documents: The batch's documents.
        scale: Factor on the dot products.
        width: Tokens that a row sees, itself included.
    """

    selection: Selection
    documents: Documents
    scale: float
    width: int


@torch.no_grad()
def attend_nearby(query: Tensor, key: Tensor, value: Tensor, scope: NearbyScope) -> Tensor:
    """Attention of dropped rows to the tokens just before them.

    Args:
        query: The dropped rows' queries, `(rest, heads, head_dim)`, positions applied.
        key, value: Those of all real rows, `(real_rows, key_value_heads, head_dim)`.
        scope: Rows, scale and width.

    Returns:
        `(rest, heads, head_dim)`.
    """
    documents, at = scope.documents, scope.selection.real_rest
    size, width = documents.block_size, min(scope.width, max(documents.lengths))
    if (fast := kernel("attend_nearby", query, query.shape[2])) is not None:
        return fast(query, key, value, at, documents.place_of_row[at], scope.scale, width)
    # Known on the host without asking the device: of a document's dropped blocks only the last can be short.
    spans = zip(documents.lengths, scope.selection.kept_lengths, strict=True)
    count = sum(-(-(length - kept) // size) for length, kept in spans)
    rank = (~scope.selection.kept_blocks).cumsum(0) - 1
    number, offset = rank[documents.block_of_row[at]], documents.place_of_row[at] % size
    slots = number * size + offset
    # Rows of one block write the same number.
    firsts = at.new_zeros(count).scatter_(0, number, at - offset)

    rows, groups, dim = query.shape[0], key.shape[1], query.shape[2]
    queries = query.new_zeros(count * size, *query.shape[1:]).index_copy_(0, slots, query)
    # (blocks, groups, queries of a group * rows, head_dim)
    queries = queries.view(count, size, groups, -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    before = -(-(width - 1) // _ALIGNMENT) * _ALIGNMENT
    steps = torch.arange(-before, size, device=at.device)
    distance = steps[before:, None] - steps
    in_band = ((distance >= 0) & (distance < width)).repeat(queries.shape[2] // size, 1)
    parts = []
    at_once = max(1, _KEYS_AT_ONCE // len(steps))
    for some, first in zip(queries.split(at_once), firsts.split(at_once), strict=True):
        stretch = (first[:, None] + steps).clamp_(0, key.shape[0] - 1)
        keys, values = (part[stretch].transpose(1, 2) for part in (key, value))
        in_document = documents.place_of_row[first][:, None] + steps >= 0
        mask = in_band & in_document[:, None, None, :]
        parts.append(F.scaled_dot_product_attention(some, keys, values, attn_mask=mask, scale=scope.scale))
    attended = torch.cat(parts).unflatten(2, (-1, size)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return attended.reshape(-1, *query.shape[1:]).index_select(0, slots).view(rows, -1, dim)
