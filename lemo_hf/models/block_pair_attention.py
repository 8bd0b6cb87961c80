"""Attention among kept blocks that see some of the earlier kept blocks only (ours; LeMo paper, "two-dimensional sparsity").

A document's kept rows are full blocks but for the last one, so its kept blocks lie on a grid of their own: compact block i
holds its rows [i b, (i + 1) b). With C_i the kept blocks that block i sees, itself always among them, a row sees the rows of
C_i that do not come after it. Pairs are chosen in two_dimensional_sparsity.py.

CPU: the blocks of a document that see equally many others, which is known without asking for values, are one call of ATen's flash
operator: their keys are gathered, blocks in order, so that the mask is the same for all of them: everything but the later rows
of the last block, which is their own. Backward gathers keys again and adds their gradients up in float32 at least. Of a call
exist |C_i| b gathered keys a block and a mask of b |C_i| b entries: never more than a strip of b queries against the document.

CUDA: `flex_attention` with a block mask, compiled: the diagonal pairs are masked row by row, all others are computed as they
are. Documents whose kept rows end within a block are laid out on whole blocks first. With n kept blocks in the batch the mask holds
four tables of n x n block numbers (int32), which backward keeps; no row-by-row matrix is formed.

Pairs that are computed: b^2 sum over i of |C_i|, the later rows of the diagonal blocks included.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import _disable_current_modes

from .document_attention import AttentionScope
from .lemo_config import LemoConfigError

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Of a kernel's tile; a block has to be made of whole ones.
_SMALLEST_TILE, _LARGEST_TILE = 16, 64


@dataclass(frozen=True)
class BlockPairs:
    """Which kept blocks each kept block of a batch sees.

    Args:
        marks: `(blocks, blocks)` bool over the kept blocks of all documents, one document after the other: whether the block of
            the row sees that of the column. Each sees itself and none of another document, or later.
        counts: How many each sees, by document, on the host.
        lengths: Kept rows of each document.
        block_size: Tokens per block.
    """

    marks: Tensor
    counts: list[list[int]]
    lengths: list[int]
    block_size: int


class _Tile(NamedTuple):
    """Kept blocks of one document that see equally many others: their rows, those of their keys, and the mask to add."""

    rows: slice
    shape: tuple[int, int]  # blocks, rows of each
    keys: Tensor  # (blocks, keys of each)
    mask: Tensor  # (blocks or 1, 1, rows, keys)


def _tiles(pairs: BlockPairs, scope: AttentionScope, dtype: torch.dtype) -> Iterator[_Tile]:
    size, device = pairs.block_size, pairs.marks.device
    within = torch.arange(size, device=device)
    columns = torch.nonzero_static(pairs.marks, size=sum(map(sum, pairs.counts)))[:, 1]
    first_row = first_block = pair = 0
    for counts, length in zip(pairs.counts, pairs.lengths, strict=True):
        block = 0
        # The last block may be shorter, and is a tile of its own then.
        heights = [min(size, length - place * size) for place in range(len(counts))]
        for (count, height), run in groupby(zip(counts, heights, strict=True)):
            blocks = len(list(run))
            seen = columns[pair : pair + blocks * count].view(blocks, count, 1) - first_block
            keys = (first_row + seen * size + within).flatten(1)[:, : (count - 1) * size + height]
            rows = slice(first_row + block * size, first_row + block * size + blocks * height)
            if scope.window is None:
                hidden = torch.ones(1, 1, height, keys.shape[1], dtype=torch.bool, device=device)
                hidden = hidden.triu_(keys.shape[1] - height + 1)
            else:
                assert scope.positions is not None, "a window is measured between positions"
                distance = scope.positions[rows].view(blocks, 1, height, 1) - scope.positions[keys].view(blocks, 1, 1, -1)
                hidden = (distance < 0) | (distance >= scope.window)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            yield _Tile(rows, (blocks, height), keys, mask)
            block, pair = block + blocks, pair + blocks * count
        first_row, first_block = first_row + length, first_block + len(counts)


def _queries(rows: Tensor, tile: _Tile) -> Tensor:
    """A tile's rows of `(rows, heads, d)` as `(blocks, heads, height, d)`."""
    return rows[tile.rows].unflatten(0, tile.shape).transpose(1, 2)


def _keys(rows: Tensor, tile: _Tile) -> Tensor:
    """The rows that a tile sees, `(blocks, heads, keys, d)`."""
    return rows.index_select(0, tile.keys.flatten()).unflatten(0, tile.keys.shape).transpose(1, 2)


def _rows(blocks: Tensor) -> Tensor:
    """`(blocks, heads, rows, d)` as `(blocks * rows, heads, d)`."""
    return blocks.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def attend_block_pairs(
    query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope, pairs: BlockPairs
) -> tuple[Tensor, Tensor]:
    """Attention of kept rows to those of the blocks that theirs sees, without autograd, on the CPU.

    Args:
        query: `(kept, heads, head_dim)`, positions applied.
        key, value: `(kept, key_value_heads, head_dim)`.
        scope: The kept rows' documents, scale and window.
        pairs: What sees what.

    Returns:
        The attention output `(kept, heads, head_dim)` and the log-sum-exp of the scores `(kept, heads, 1)`.
    """
    outputs, sums = [], []
    for tile in _tiles(pairs, scope, query.dtype):
        seen = _keys(key, tile), _keys(value, tile)
        output, lse = _flash(_queries(query, tile), *seen, 0.0, False, attn_mask=tile.mask, scale=scope.scale)
        outputs.append(_rows(output))
        sums.append(_rows(lse.unsqueeze(-1)))
    return torch.cat(outputs), torch.cat(sums)


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scope: AttentionScope, pairs: BlockPairs
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query = torch.empty_like(query)
    wide = torch.promote_types(key.dtype, torch.float32)
    grad_key, grad_value = (torch.zeros(part.shape, dtype=wide, device=part.device) for part in (key, value))
    for tile in _tiles(pairs, scope, query.dtype):
        given, queries, finished, sums = (_queries(part, tile) for part in (grad, query, output, lse))
        seen = _keys(key, tile), _keys(value, tile)
        parts = _flash_backward(
            given, queries, *seen, finished, sums.squeeze(-1), 0.0, False, attn_mask=tile.mask, scale=scope.scale
        )
        grad_query[tile.rows] = _rows(parts[0])
        places = tile.keys.flatten()
        grad_key.index_add_(0, places, _rows(parts[1]).to(wide))
        grad_value.index_add_(0, places, _rows(parts[2]).to(wide))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


class PatternBackward(Protocol):
    """What is needed to run attention in a pattern backward, tensors apart."""

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, marks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of queries, keys and values."""


class PatternKeptRowGradient(torch.autograd.Function):
    """Attention of kept rows in a pattern, whose result is known: the whole output is saved once, which the output projection saves too."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        lse: Tensor,
        marks: Tensor | None,
        pattern: PatternBackward,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse, marks)
        ctx.pattern = pattern
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.pattern.backward(grad, *ctx.saved_tensors), *(None,) * 4


@dataclass(frozen=True)
class _PairsBackward:
    """Block pairs without their marks, which autograd saves."""

    scope: AttentionScope
    counts: list[list[int]]
    lengths: list[int]
    block_size: int

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, marks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert marks is not None, "pairs are saved with their marks"
        pairs = BlockPairs(marks, self.counts, self.lengths, self.block_size)
        return _backward(grad.contiguous(), query, key, value, output, lse, self.scope, pairs)


def among_block_pairs(query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope, pairs: BlockPairs) -> Tensor:
    """Differentiable attention of kept rows to those of the blocks that theirs sees; arguments as in `attend_block_pairs`.

    Returns:
        `(kept, heads, head_dim)`. Saved for backward: queries, keys, values, output, log-sum-exps and the marks.

    Raises:
        LemoConfigError: On CUDA, if `flex_attention` cannot tile the blocks.
    """
    if query.device.type != "cpu":
        return with_flex_attention(query, key, value, scope, pairs)
    output, lse = attend_block_pairs(query, key, value, scope, pairs)
    backward = _PairsBackward(scope, pairs.counts, pairs.lengths, pairs.block_size)
    return PatternKeptRowGradient.apply(query, key, value, output, lse, pairs.marks, backward)


_MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _mask_mod(marks: Tensor, size: int, positions: Tensor | None, window: int | None) -> _MaskMod:
    """Whether a row sees another; complete, since where flex attention runs uncompiled it looks at nothing else."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & marks[query // size, key // size]

    if window is None:
        return sees
    assert positions is not None, "a window is measured between positions"

    def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(batch, head, query, key) & (positions[query] - positions[key] < window)

    return sees_near


def flex_block_mask(pairs: BlockPairs, scope: AttentionScope, positions: Tensor | None = None) -> BlockMask:
    """The pairs as `flex_attention` reads them: rows of all documents, each laid out on whole blocks, the last one apart.

    Args:
        pairs: What sees what.
        scope: The kept rows' documents and window.
        positions: Original position of every row that is laid out, for a window.

    Returns:
        A block mask of one batch and one head. Diagonal pairs are masked row by row, under a window all of them; kernels compute
        the others as they are.
    """
    marks, last = pairs.marks.int(), len(pairs.counts) - 1
    masked = marks if scope.window is not None else torch.eye(len(marks), dtype=torch.int32, device=marks.device)
    rows = (len(marks) - len(pairs.counts[last])) * pairs.block_size + pairs.lengths[last]
    return BlockMask.from_kv_blocks(
        *_numbers_of(masked),
        *_numbers_of(marks - masked),
        BLOCK_SIZE=pairs.block_size,
        mask_mod=_mask_mod(pairs.marks, pairs.block_size, positions, scope.window),
        seq_lengths=(rows, rows),
    )


def _numbers_of(marks: Tensor) -> tuple[Tensor, Tensor]:
    """Of marks `(blocks, blocks)` how many each row has, `(1, 1, blocks)`, and their columns first, `(1, 1, blocks, blocks)`."""
    order = marks.argsort(dim=1, descending=True, stable=True)
    return marks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


_flex: Any = flex_attention


@cache
def _compiled_flex() -> Any:
    # Made at its first use: torch.compile imports the whole compiler.
    return torch.compile(flex_attention)


def with_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope, pairs: BlockPairs, flex: Any = None
) -> Tensor:
    """The same as `among_block_pairs` by `flex_attention`, which has a backward pass on GPUs.

    Args:
        query, key, value, scope, pairs: As there.
        flex: The function to call; `flex_attention` compiled, if not given: as it is, it forms the matrix of all scores.

    Raises:
        LemoConfigError: If blocks are not made of whole tiles.
    """
    tile = min(_LARGEST_TILE, pairs.block_size & -pairs.block_size)
    if tile < _SMALLEST_TILE:
        raise LemoConfigError(
            f"block_sparse attention on {query.device.type} takes blocks of a multiple of {_SMALLEST_TILE} tokens; "
            f"got block_size={pairs.block_size}; set block_size to 64, or attention_pattern to 'shifted_groups' or 'full'"
        )
    places = _places_on_blocks(pairs)
    positions = scope.positions
    if places is not None:
        query, key, value = (part.index_select(0, places) for part in (query, key, value))
        positions = None if positions is None else positions[places]
    mask = flex_block_mask(pairs, scope, positions)
    half = max(_SMALLEST_TILE, tile // 2)
    tiles = {"BLOCK_M": tile, "BLOCK_N": tile, "BLOCK_M1": half, "BLOCK_N1": tile, "BLOCK_M2": tile, "BLOCK_N2": half}
    inputs = [part.transpose(0, 1).unsqueeze(0) for part in (query, key, value)]
    settings: dict[str, Any] = {
        "block_mask": mask, "scale": scope.scale, "enable_gqa": True, "kernel_options": {**tiles, "BACKEND": "TRITON"}
    }  # fmt: skip
    if flex is not None or torch.compiler.is_compiling():
        output = (_flex if flex is None else flex)(*inputs, **settings)
    else:
        # Under a mode that looks at operators torch.compile compiles nothing, and what runs instead forms all scores.
        with _disable_current_modes():
            output = _compiled_flex()(*inputs, **settings)
    output = output.squeeze(0).transpose(0, 1)
    if places is None:
        return output
    # Every row stands in the layout once, those that fill a last block up come after their document's own.
    return output.index_select(0, _places_of_rows(pairs))


def _places_on_blocks(pairs: BlockPairs) -> Tensor | None:
    """For each row of the layout on whole blocks the kept row that fills it; `None` where the kept rows lie so already."""
    size = pairs.block_size
    if all(length % size == 0 for length in pairs.lengths[:-1]):
        return None
    spans, first = [], 0
    for place, length in enumerate(pairs.lengths):
        rows = torch.arange(first, first + length)
        last = place == len(pairs.lengths) - 1
        # Its own last row again: no row of the document sees it, all come before.
        filling = 0 if last else -length % size
        spans += [rows, rows[-1:].expand(filling)]
        first += length
    return torch.cat(spans).to(pairs.marks.device)


def _places_of_rows(pairs: BlockPairs) -> Tensor:
    """For each kept row its place in the layout on whole blocks."""
    size, spans, first = pairs.block_size, [], 0
    for length in pairs.lengths:
        spans.append(torch.arange(first, first + length))
        first += -(-length // size) * size
    return torch.cat(spans).to(pairs.marks.device)
