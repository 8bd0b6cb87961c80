"""Two-dimensional sparsity: a sparse attention pattern among the tokens that a layer keeps (LeMo paper, the first extension).

Token elimination leaves r N rows of a document's N and r^2 of its attention's pairs; a pattern leaves out pairs among these.
Positions stay the original ones, and so does causality. Two patterns:

    shifted_groups   LongLoRA's (arXiv 2309.12307, section 3.2). A document's kept rows are cut into groups of G; half of the
                     heads attend within them, the other half in groups that begin G / 2 rows later. The ends of the document,
                     which the published code's roll joins, are groups of their own:
                         [0, G) [G, 2 G) ...      [0, G / 2) [G / 2, 3 G / 2) ...
    block_sparse     kept block m sees the ceil(p (m + 1)) kept blocks n <= m of its document with the largest S_mn, predicted
                     (or true) as for the selection, among them always itself and the first one.

Groups are counted in kept rows, not in original distance: every group then costs the same whatever was kept, its bounds are known
without asking the device, and the fewer rows a layer keeps the further a group of them reaches, as attention among kept rows
does as a whole. So a document attends alike alone, padded, packed or batched.

Pairs of a document of L kept rows, as a share of its L^2 / 2: G / L for the unshifted heads and G / L - G^2 / (4 L^2) or so for
the shifted ones, G = L / 4 unless it is set; p + O(b / L) for block_sparse. Saved for backward: nothing beyond plain attention's, but
n^2 marks for n kept blocks.

Training only, in the sparse form: in the others dropped rows are keys too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .block_pair_attention import BlockPairs, PatternKeptRowGradient, among_block_pairs
from .document_attention import AttentionScope, attend, attend_backward
from .documents import Documents
from .lemo_config import LemoConfig, LemoConfigError
from .token_elimination import Selection, kept_block_count

# LongLoRA's groups are a quarter of the sequence.
_GROUPS = 4


@dataclass(frozen=True)
class ShiftedGroups:
    """Attention in groups of kept rows, shifted by half a group for half of the heads.

    Args:
        group_size: Kept rows of a group; `None` for a quarter of each document's.
    """

    group_size: int | None = None

    def lengths(self, lengths: list[int], shifted: bool) -> list[int]:
        """Rows of every group of every document, in order.

        Args:
            lengths: Kept rows of each document.
            shifted: Whether the first group of each ends half a group earlier.
        """
        groups = []
        for length in lengths:
            size = self.group_size or max(2, -(-length // _GROUPS))
            # A document that fills no group is one, for the shifted heads too.
            first = length if length <= size else size // 2 if shifted else size
            whole, rest = divmod(length - first, size)
            groups += [first, *[size] * whole, *[rest] * (rest > 0)]
        return groups


AttentionPattern = ShiftedGroups | BlockPairs


def kept_for_groups(config: LemoConfig, tokens: int, num_layers: int) -> int | None:
    """The most rows that a layer in groups of a set size keeps of a document; `None` if there is no such layer.

    A document that keeps fewer than `group_size` is one group: plain attention, no mistake. If every document is, the pattern is none.

    Args:
        config: The model's `LemoConfig`.
        tokens: The document's.
        num_layers: Layers of the model.
    """
    layers = [layer for layer in range(num_layers) if config.pattern_of(layer, num_layers) == "shifted_groups"]
    if config.group_size is None or not layers:
        return None
    # What thresholds keep depends on the text.
    share = 1.0 if config.selection == "threshold" else max(map(config.ratio_of, layers))
    blocks = -(-tokens // config.block_size)
    return tokens - (blocks - kept_block_count(blocks, share)) * config.block_size


def group_beyond(config: LemoConfig, lengths: list[int], num_layers: int) -> str | None:
    """What to say of a group that none of the documents fills; `None` if one does, or groups have no set size.

    Args:
        config: The model's `LemoConfig`.
        lengths: Tokens of the documents.
        num_layers: Layers of the model.
    """
    # Of two documents the longer one may keep fewer rows: its last block is kept, however short.
    most, tokens = max(((kept_for_groups(config, length, num_layers) or 0, length) for length in lengths), default=(0, 0))
    if config.group_size is None or not most or config.group_size <= most:
        return None
    return (
        f"no document fills a group: of {len(lengths)} looked at a layer keeps {most} tokens at most, of one with {tokens}; "
        f"got group_size={config.group_size}; set it to {max(2, -(-most // _GROUPS))}, or leave it out for a quarter of each document"
    )


def pair_counts(blocks: int, share: float) -> list[int]:
    """How many kept blocks each of a document's `blocks` kept blocks sees: ceil(share * earlier ones and itself), itself and the first."""
    return [kept_block_count(place + 1, share) for place in range(blocks)]


def _limits(place: Tensor, share: float) -> Tensor:
    """`pair_counts` of places 0 to n - 1, written by the device itself: numbers that are copied there make the host wait."""
    wanted = ((place + 1).double() * share * 2**20).round().long()
    wanted = -((-wanted) >> 20)
    return torch.minimum(torch.maximum(wanted, (place + 1).clamp_max(2)), place + 1)


def choose_pairs(
    scores: list[Tensor],
    selection: Selection,
    documents: Documents,
    share: float,
    window: int | None = None,
) -> BlockPairs:
    """The pairs of kept blocks with the largest scores.

    Args:
        scores: S of each document, `(blocks_of_document, blocks_of_document)`.
        selection: What the layer keeps.
        documents: The batch's documents.
        share: Share of the earlier kept blocks that a block sees, in (0, 1].
        window: Positions that a token sees; blocks that lie wholly outside come last, the first one too.
    """
    size = documents.block_size
    kept_counts = [-(-length // size) for length in selection.kept_lengths]
    total = sum(kept_counts)
    marks = torch.zeros(total, total, dtype=torch.bool, device=documents.device)
    counts, first = [], 0
    for of_document, kept, blocks in zip(scores, documents.split_blocks(selection.kept_blocks), kept_counts, strict=True):
        numbers = torch.nonzero_static(kept, size=blocks).squeeze(1)
        ranked = of_document[numbers][:, numbers].float()
        place = torch.arange(blocks, device=documents.device)
        ranked[:, 0] = torch.inf
        if window is not None:
            # Of the nearest rows of two blocks, the later one's first and the earlier one's last.
            nearest = (numbers[:, None] - numbers) * size - (size - 1)
            ranked.masked_fill_(nearest >= window, -torch.inf)
        ranked.masked_fill_(place > place[:, None], -torch.inf)
        ranked.fill_diagonal_(torch.inf)
        # A stable sort, as for the selection: tied blocks resolve to the earlier one.
        order = ranked.sort(dim=1, descending=True, stable=True).indices
        counts.append(pair_counts(blocks, share))
        seen = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order, place < _limits(place, share)[:, None])
        marks[first : first + blocks, first : first + blocks] = seen
        first += blocks
    return BlockPairs(marks, counts, selection.kept_lengths, size)


def attend_in_pattern(query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope, pattern: AttentionPattern) -> Tensor:
    """Differentiable attention of kept rows among themselves, by document, in a pattern.

    Args:
        query: `(kept, heads, head_dim)`, positions applied.
        key, value: `(kept, key_value_heads, head_dim)`.
        scope: The kept rows' documents, scale and window. A window and a pattern leave what both let see.
        pattern: The pattern.

    Returns:
        The attention output, `(kept, heads, head_dim)`.

    Raises:
        LemoConfigError: If heads cannot be halved, or no operator serves the pattern here.
    """
    if isinstance(pattern, BlockPairs):
        return among_block_pairs(query, key, value, scope, pattern)
    halves = _Halves(query.shape[1], key.shape[1])
    scopes = tuple(
        AttentionScope(pattern.lengths(scope.lengths, shifted), scope.scale, scope.window, scope.positions)
        for shifted in (False, True)
    )
    with torch.no_grad():
        split = zip(halves.of_queries(query), halves.of_keys(key), halves.of_keys(value), scopes, strict=True)
        outputs, sums = zip(*(attend(*half) for half in split), strict=True)
        output, lse = halves.joined_queries(*outputs), halves.joined_queries(*sums)
    return PatternKeptRowGradient.apply(query, key, value, output, lse, None, _HalvesBackward(halves, scopes))


@dataclass(frozen=True)
class _Halves:
    """The two halves of the heads: of the key heads with their queries or, if these are odd in number, of each one's queries."""

    heads: int
    key_heads: int

    def __post_init__(self) -> None:
        if self.heads % 2:
            raise LemoConfigError(
                f"shifted_groups shifts half of the heads; the model has {self.heads} query heads; "
                "set attention_pattern to 'block_sparse' or 'full'"
            )

    def of_queries(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Both halves of `(rows, heads, d)`."""
        if self.key_heads % 2 == 0:
            return rows.chunk(2, 1)
        return tuple(half.flatten(1, 2) for half in rows.unflatten(1, (self.key_heads, -1)).chunk(2, 2))

    def of_keys(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What the halves read of `(rows, key_value_heads, d)`."""
        return rows.chunk(2, 1) if self.key_heads % 2 == 0 else (rows, rows)

    def joined_queries(self, first: Tensor, second: Tensor) -> Tensor:
        """Undoes `of_queries`."""
        if self.key_heads % 2 == 0:
            return torch.cat((first, second), 1)
        return torch.cat([half.unflatten(1, (self.key_heads, -1)) for half in (first, second)], 2).flatten(1, 2)

    def joined_keys(self, first: Tensor, second: Tensor) -> Tensor:
        """The gradient of what `of_keys` reads."""
        return torch.cat((first, second), 1) if self.key_heads % 2 == 0 else first + second


@dataclass(frozen=True)
class _HalvesBackward:
    """Both halves' groups."""

    halves: _Halves
    scopes: tuple[AttentionScope, ...]

    def backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, marks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        halves = self.halves
        rows = [halves.of_queries(part) for part in (grad, query)]
        seen = [halves.of_keys(part) for part in (key, value)]
        finished = [halves.of_queries(part) for part in (output, lse)]
        grads = [attend_backward(*half) for half in zip(*rows, *seen, *finished, self.scopes, strict=True)]
        queries, keys, values = zip(*grads, strict=True)
        return halves.joined_queries(*queries), halves.joined_keys(*keys), halves.joined_keys(*values)
