"""Local attention of the rows that a layer drops, in the sparse form (ours; LeMo paper, section 4, gives them none).

A dropped row sees the keys of its document from width - 1 places before it up to its own: an interval, so this is the forward
of interval_attention.py with queries that are fewer than the keys. It carries no gradient.

A program's queries lie next to each other among the dropped rows, not among the keys: it walks all keys from its first query's
first to its last query's own. Over a head these stretches overlap by width - 1 keys only, so with R dropped rows of N

    key rows walked <= N + R / BLOCK_M * (width + 2 * BLOCK_N)          each by BLOCK_M queries

linear in tokens, whatever was dropped, and never more than a sliding window of this width over all N rows would walk.

Memory: R * heads * (head_dim * e + 4) bytes for output and log-sum-exp at e bytes a number, 8 bytes a row for the intervals. No
key is copied; the reference gathers block_size + width keys and values for each dropped block.
"""

import torch
from torch import Tensor

from .host import operator, require, require_heads, require_index, unit_stride
from .interval_attention import interval_attention


@operator("attend_nearby")
def attend_nearby_operator(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, places: Tensor, scale: float, width: int
) -> Tensor:
    """The output; arguments as in `attend_nearby`."""
    if not query.shape[0]:
        return query.new_empty(query.shape)
    query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
    # Wrong numbers, which are not read before the launch, must not become keys that are not there, before 32 bits cut them or after.
    rows = rows.clamp(0, key.shape[0] - 1)
    first_key = (rows - places.clamp(0, width - 1)).clamp_min(0)
    return interval_attention(query, key, value, first_key.int(), scale, rows.int())[0]


@attend_nearby_operator.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.no_grad()
def attend_nearby(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, places: Tensor, scale: float, width: int) -> Tensor:
    """Attention of some rows to the keys just before each and its own.

    Args:
        query: `(rest, heads, head_dim)`, positions applied, `head_dim` up to 256.
        key, value: Those of all rows, `(all_rows, key_value_heads, head_dim)`.
        rows: Row of each query among the keys, `(rest,)` int64, increasing. On a GPU, where they are not read before the launch, wrong
            numbers give wrong keys, never other memory.
        places: Place of each of these rows in its document, from 0, `(rest,)` int64.
        scale: Factor on the dot products.
        width: Keys that a query sees, its own included, where its document has as many before it.

    Returns:
        `(rest, heads, head_dim)`.

    Raises:
        KernelInputError: If shapes, dtypes, devices, the width or (on the CPU) row numbers do not fit.
    """
    rest = query.shape[0]
    require_heads(query, {"keys": key, "values": value}, key.shape[0])
    require_index("rows", rows, key.shape[0], query)
    require_index("places", places, key.shape[0], query)
    same = rows.shape == places.shape == (rest,)
    require(same, f"rows and places must be {rest} each", f"{len(rows)} and {len(places)}", "pass one of each per query")
    require(width > 0, "a width counts the row itself", f"width={width}", "pass at least 1")
    return attend_nearby_operator(query, key, value, rows, places, scale, width)


def probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Two rows of three with heads of this size."""
    # Grouped: triton would compile a loop over one head away, and with it what the loop needs.
    query, key, value = (
        torch.zeros(count, heads, head_dim, dtype=dtype, device=device) for count, heads in ((2, 4), (3, 2), (3, 2))
    )
    rows = torch.arange(1, 3, device=device)
    attend_nearby(query, key, value, rows, rows, 1.0, 2)
