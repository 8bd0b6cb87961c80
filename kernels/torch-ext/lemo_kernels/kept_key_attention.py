"""Attention of every row to the kept rows and to the rows just before it, in the form `"kept_keys"` (ours).

The nearby keys of a row are an interval of all rows, and the kept keys before these an interval of the kept ones, so this is the
forward of interval_attention.py with two intervals in one softmax. Its backward is that of the kept rows alone, with the output
and log-sum-exp of this forward (document_attention.py), and for the kept queries' gradient the nearby dropped keys besides: an
interval of the dropped rows. The exact form takes that part too, with a width beyond its documents: all dropped keys before a query.

Over a head, with K kept rows of N in one document and `width` nearby keys,

    key rows walked <= N / BLOCK_M * (BLOCK_M + width + 2 BLOCK_N)  nearby,  and about K / 2 * N / BLOCK_M  far,     by BLOCK_M queries each

Memory: N * heads * (head_dim * e + 4) bytes for output and log-sum-exp at e bytes a number, 12 bytes a row for the intervals. No
key is copied: kept keys are read as their projection left them.
"""

import torch
from torch import Tensor

from .host import operator, require, require_attended, require_heads, require_index, unit_stride
from .interval_attention import FarKeys, interval_attention, interval_query_gradient


@operator("attend_kept_keys")
def attend_kept_keys_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    kept_rows: Tensor,
    places: Tensor,
    lengths: list[int],
    scale: float,
    width: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as in `attend_kept_keys`."""
    num_rows = query.shape[0]
    if not num_rows:
        return query.new_empty(query.shape), query.new_empty(0, query.shape[1], 1, dtype=torch.float32)
    query, key, value, kept_key, kept_value = (unit_stride(part) for part in (query, key, value, kept_key, kept_value))
    rows = torch.arange(num_rows, device=query.device)
    # Wrong places, which are not read before the launch, must not become rows that are not there.
    near = width if window is None else min(width, window)
    first_key = (rows - places.clamp(0, near - 1)).clamp_min(0)
    oldest = rows - (places if window is None else places.clamp_max(window - 1))
    far_first = torch.searchsorted(kept_rows, oldest.clamp_min(0))
    far_last = torch.searchsorted(kept_rows, first_key) - 1
    far = FarKeys(kept_key, kept_value, far_first.int(), far_last.int())
    return interval_attention(query, key, value, first_key.int(), scale, far=far)


@attend_kept_keys_operator.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(*query.shape[:2], 1, dtype=torch.float32)


@torch.no_grad()
def attend_kept_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    kept_rows: Tensor,
    places: Tensor,
    lengths: list[int],
    scale: float,
    width: int,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all rows to the nearby keys of their documents, and to the kept ones before these.

    Args:
        query: `(rows, heads, head_dim)`, positions applied, `head_dim` up to 256.
        key, value: `(rows, key_value_heads, head_dim)`.
        kept_key, kept_value: Those of kept rows, `(kept, key_value_heads, head_dim)`.
        kept_rows: Their rows, `(kept,)` int64, increasing.
        places: Place of each row in its document, from 0, `(rows,)` int64. On a GPU, where neither is read before the launch, wrong
            numbers give wrong keys, never other memory.
        lengths: Rows of each document, which FLOPs are counted by.
        scale: Factor on the dot products.
        width: Nearby keys that a row sees, its own included.
        window: Keys of its document that a row sees at all, its own included; `None` for all before it.

    Returns:
        The output `(rows, heads, head_dim)` and the float32 log-sum-exp of the scores `(rows, heads, 1)`.

    Raises:
        KernelInputError: If shapes, dtypes, devices, widths or (on the CPU) row numbers do not fit.
    """
    rows, kept = query.shape[0], kept_rows.shape[0]
    require_heads(query, {"keys": key, "values": value}, rows)
    require_heads(query, {"kept keys": kept_key, "kept values": kept_value}, kept)
    require(kept_key.shape[1] == key.shape[1], "kept keys must have the keys' heads", kept_key.shape[1], "pass rows of the keys")
    require_index("kept_rows", kept_rows, rows, query)
    require_index("places", places, rows, query)
    require(places.shape == (rows,), f"places must be {rows}", len(places), "pass one of each row")
    require(sum(lengths) == rows, f"documents must have {rows} rows", sum(lengths), "pass the rows of each")
    require(width > 0, "a width counts the row itself", f"width={width}", "pass at least 1")
    require(window is None or window > 0, "a window counts the row itself", f"window={window}", "pass at least 1, or None")
    return attend_kept_keys_operator(query, key, value, kept_key, kept_value, kept_rows, places, lengths, scale, width, window)


@operator("rest_query_gradient")
def rest_query_gradient_operator(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    rest_key: Tensor,
    rest_value: Tensor,
    kept_rows: Tensor,
    rest_rows: Tensor,
    places: Tensor,
    lengths: list[int],
    scale: float,
    width: int,
) -> Tensor:
    """The gradient; arguments as in `rest_query_gradient`."""
    if not query.shape[0] or not rest_key.shape[0]:
        return query.new_zeros(query.shape)
    query, rest_key, rest_value = (unit_stride(part) for part in (query, rest_key, rest_value))
    first_row = (kept_rows - places.clamp(0, width - 1)).clamp_min(0)
    first = torch.searchsorted(rest_rows, first_row).int()
    last = (torch.searchsorted(rest_rows, kept_rows) - 1).int()
    parts = grad.contiguous(), query, rest_key, rest_value, output.contiguous(), lse.contiguous()
    return interval_query_gradient(*parts, first, scale, last)[0]


@rest_query_gradient_operator.register_fake
def _(grad: Tensor, query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.no_grad()
def rest_query_gradient(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    rest_key: Tensor,
    rest_value: Tensor,
    kept_rows: Tensor,
    rest_rows: Tensor,
    places: Tensor,
    lengths: list[int],
    scale: float,
    width: int,
    window: int | None = None,
) -> Tensor:
    """What the dropped keys that kept queries see add to these queries' gradient.

    Args:
        grad, query, output: Of kept rows, `(kept, heads, head_dim)` of one dtype; the first is the gradient of `output`.
        lse: `(kept, heads, 1)` float32.
        rest_key, rest_value: Those of dropped rows, `(rest, key_value_heads, head_dim)`.
        kept_rows, rest_rows: Rows of both, `(kept,)` and `(rest,)` int64, increasing; no row is in both.
        places: Place of each kept row in its document, from 0, `(kept,)` int64. Wrong numbers as in `attend_kept_keys`.
        lengths, scale, width, window: As there; `lengths` count kept and dropped rows.

    Returns:
        `(kept, heads, head_dim)`.

    Raises:
        KernelInputError: If shapes, dtypes, devices, widths or (on the CPU) row numbers do not fit.
    """
    kept, rest = query.shape[0], rest_rows.shape[0]
    require_heads(query, {"dropped keys": rest_key, "dropped values": rest_value}, rest)
    require_attended(query, lse, grad=grad, output=output)
    for name, index in (("kept_rows", kept_rows), ("rest_rows", rest_rows), ("places", places)):
        require_index(name, index, kept + rest, query)
    same = kept_rows.shape == places.shape == (kept,)
    require(
        same, f"kept_rows and places must be {kept} each", f"{len(kept_rows)} and {len(places)}", "pass one of each per query"
    )
    require(width > 0, "a width counts the row itself", f"width={width}", "pass at least 1")
    require(window is None or window > 0, "a window counts the row itself", f"window={window}", "pass at least 1, or None")
    require(sum(lengths) == kept + rest, f"documents must have {kept + rest} rows", sum(lengths), "pass the rows of each")
    near = width if window is None else min(width, window)
    rows = kept_rows, rest_rows, places
    return rest_query_gradient_operator(grad, query, output, lse, rest_key, rest_value, *rows, lengths, scale, near)


def probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Three rows of which two are kept, with heads of this size, forward and back."""
    # Grouped: triton would compile a loop over one head away, and with it what the loop needs.
    query, key, value = (torch.zeros(3, heads, head_dim, dtype=dtype, device=device) for heads in (4, 2, 2))
    rows = torch.arange(3, device=device)
    output, lse = attend_kept_keys(query, key, value, key[1:], value[1:], rows[1:], rows, [3], 1.0, 2)
    kept = output[1:], query[1:], output[1:], lse[1:]
    rest_query_gradient(*kept, key[:1], value[:1], rows[1:], rows[:1], rows[1:], [3], 1.0, 2)
