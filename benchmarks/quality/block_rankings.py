"""Rankings of blocks: for each layer and document, scores whose best blocks are kept.

Random ones read a generator that is seeded by the document's tokens, the number of the draw and the run's seed, as the
package's own draws are; `benchmarks/quality/choices.py` gives them names.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lemo_hf.models.document_attention import AttentionScope, attend
from lemo_hf.models.documents import Documents
from lemo_hf.models.kept_and_rest_rows import rows_of
from lemo_hf.models.sparse_decoder import SparseBatch
from lemo_hf.models.token_elimination import kept_block_count
from lemo_hf.models.token_informativeness import block_informativeness

# Blocks in a run of `random_runs`.
RUN = 4


class Situation:
    """What a choice may look at: one layer, before it runs, on one batch of whole rows.

    Args:
        layer: The LeMo layer.
        residual: Its input, `(rows, hidden)`.
        rotary: Position tensors by flat row.
        batch: Documents, config and the number of this draw.
        oracle: Gradient norm of each row at each layer's `"attention"` and `"mlp"` output, for choices that may know it.
    """

    def __init__(
        self, layer: Any, residual: Tensor, rotary: tuple[Tensor, ...], batch: SparseBatch, oracle: dict[str, list[Tensor]]
    ) -> None:
        self.layer, self.residual, self.batch, self.oracle = layer, residual, batch, oracle
        self.documents: Documents = batch.documents
        self.config = batch.config
        self.number: int = layer.layer_idx
        self.rotary = rotary

    @cached_property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all real rows."""
        rows = self.documents.rows
        return self.layer.project_heads(self.layer.attention_norm(self.residual[rows]), rows_of(self.rotary, rows))

    @cached_property
    def attended(self) -> tuple[Tensor, Tensor]:
        """The finished dense forward: attention output and log-sum-exp of all real rows."""
        return attend(*self.heads, AttentionScope(self.documents.lengths, self.layer.attention_scale))

    @cached_property
    def true_scores(self) -> list[Tensor]:
        """S of each document."""
        lengths = self.documents.lengths
        pairs = zip(self.heads[0].split(lengths), self.heads[1].split(lengths), strict=True)
        return [self.layer.block_scores(query, key, self.config.block_size) for query, key in pairs]

    def block_means(self, of_row: Tensor) -> list[Tensor]:
        """Mean over each block of `(real_rows,)`, by document."""
        blocks = sum(self.documents.block_counts)
        sums = torch.zeros(blocks, dtype=torch.float64).index_add_(0, self.documents.block_of_row, of_row.double())
        return self.documents.split_blocks(sums / torch.bincount(self.documents.block_of_row, minlength=blocks))

    def generator(self, document: int, *counters: int) -> torch.Generator:
        """Random numbers of a document and the counters: its tokens, not its place in the batch, seed them."""
        seed = int(self.documents.keys[document]) & (2**31 - 1)
        for counter in (self.config.seed, *counters):
            seed = (seed * 1_000_003 + counter + 12_345) % (2**61 - 1)
        return torch.Generator().manual_seed(seed)

    def count(self, blocks: int) -> int:
        """Inner blocks to keep of a document of `blocks`, besides its first and last one."""
        return kept_block_count(blocks, self.config.ratio_of(self.number)) - min(blocks, 2)


Ranking = Callable[[Situation], list[Tensor]]


def marked(blocks: int, inner: Tensor) -> Tensor:
    """Scores of 1 for the inner blocks numbered from 0 by `inner`, 0 for the others, `(blocks,)`."""
    return torch.zeros(blocks).index_fill_(0, inner + 1, 1.0)


def column_sum(at: Situation) -> list[Tensor]:
    """The paper's: a block counts as keys of later queries only."""
    return [scores.tril(-1).sum(0) for scores in at.true_scores]


def mean_over_block(at: Situation) -> list[Tensor]:
    """Mirrored sum of the mean of s_ij over a block pair, instead of its maximum."""
    size, lengths = at.config.block_size, at.documents.lengths
    found = []
    for query, key in zip(at.heads[0].split(lengths), at.heads[1].split(lengths), strict=True):
        # Blocks of one token: S is then s itself.
        scores = at.layer.block_scores(query, key, 1)
        blocks = -(-len(query) // size)
        member = torch.zeros(blocks, len(query)).index_put_(
            (torch.arange(len(query)) // size, torch.arange(len(query))), torch.ones(())
        )
        sizes = member.sum(1)
        found.append(block_informativeness(member @ scores @ member.T / (sizes[:, None] * sizes)))
    return found


def key_norm(at: Situation) -> list[Tensor]:
    """Mean norm of a block's keys."""
    return at.block_means(at.heads[1].float().norm(dim=-1).mean(1))


def output_norm(at: Situation) -> list[Tensor]:
    """Mean norm of what attention adds to a block's rows, from the finished forward."""
    return at.block_means(at.layer.project_output(at.attended[0]).float().norm(dim=-1))


def attention_mass(at: Situation) -> list[Tensor]:
    """Mean attention that a block's keys get from each query that sees them, from the finished forward's log-sum-exp."""
    (query, key, _), lse = at.heads, at.attended[1]
    received = []
    for q, k, normaliser in zip(*(part.split(at.documents.lengths) for part in (query, key, lse)), strict=True):
        mass = torch.zeros(len(k))
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head * k.shape[1] // q.shape[1]].T * at.layer.attention_scale
            mass += (scores - normaliser[:, head]).exp().tril().sum(0)
        received.append(mass / q.shape[1] / torch.arange(len(k), 0, -1))
    return at.block_means(torch.cat(received))


def strided(at: Situation) -> list[Tensor]:
    """Inner blocks at equal distances, the same in every step."""
    found = []
    for blocks in at.documents.block_counts:
        count = at.count(blocks)
        found.append(marked(blocks, torch.arange(count) * (blocks - 2) // max(count, 1)))
    return found


def local_and_sink(at: Situation) -> list[Tensor]:
    """The last blocks and the first."""
    return [torch.arange(blocks).float() for blocks in at.documents.block_counts]


def drawn_by_pairs_of_layers(at: Situation) -> list[Tensor]:
    """Uniform; layers 0 and 1 draw the same blocks, layers 2 and 3, and so on."""
    counters = (at.batch.draw, at.number // 2)
    return [torch.rand(n, generator=at.generator(i, *counters)) for i, n in enumerate(at.documents.block_counts)]


def stratified(at: Situation) -> list[Tensor]:
    """Inner blocks are cut into as many stretches as are kept, equal up to one block, and one of each is drawn; all layers the same."""
    found = []
    for document, blocks in enumerate(at.documents.block_counts):
        count = at.count(blocks)
        edges = torch.arange(count + 1) * (blocks - 2) // max(count, 1)
        places = torch.rand(count, dtype=torch.float64, generator=at.generator(document, at.batch.draw))
        found.append(marked(blocks, edges[:-1] + (places * edges.diff()).long()))
    return found


def balanced(at: Situation) -> list[Tensor]:
    """Blocks that were not drawn in the last steps come first: every place is drawn equally often; all layers the same.

    Inner blocks lie shuffled in a circle, and each step takes the next ones; after as many steps as deal all equally often they
    are shuffled anew. Places are dealt, not texts: the documents of other steps are other texts.
    """
    found = []
    for blocks in at.documents.block_counts:
        count, inner = at.count(blocks), blocks - 2
        if count < 1:
            found.append(torch.zeros(blocks))
            continue
        circle, step = divmod(at.batch.draw, inner // math.gcd(inner, count))
        seed = (at.config.seed * 1_000_003 + circle) % (2**61 - 1)
        order = torch.randperm(inner, generator=torch.Generator().manual_seed(seed))
        found.append(marked(blocks, order[(step * count + torch.arange(count)) % inner]))
    return found


def one_stretch(at: Situation) -> list[Tensor]:
    """Inner blocks that follow each other, from a drawn place on; all layers the same."""
    found = []
    for document, blocks in enumerate(at.documents.block_counts):
        count = at.count(blocks)
        room = max(blocks - 2 - count, 0) + 1
        start = int(torch.randint(room, (), generator=at.generator(document, at.batch.draw)))
        found.append(marked(blocks, start + torch.arange(count)))
    return found


def in_runs(at: Situation) -> list[Tensor]:
    """Uniform, in runs of `RUN` blocks as if these were one; all layers the same."""
    found = []
    for document, blocks in enumerate(at.documents.block_counts):
        runs = torch.rand(-(-blocks // RUN), generator=at.generator(document, at.batch.draw))
        found.append(runs.repeat_interleave(RUN)[:blocks])
    return found


def inclusion_chances(weights: Tensor, count: int) -> Tensor:
    """Chances proportional to `weights` `(n,)`, none above 1, that sum to `count`."""
    chances = torch.zeros_like(weights, dtype=torch.float64)
    sure = torch.zeros(len(weights), dtype=torch.bool)
    while True:
        rest = weights.double().masked_fill(sure, 0)
        chances = (rest * ((count - int(sure.sum())) / rest.sum().clamp_min(1e-300))).masked_fill(sure, 1)
        over = (chances >= 1) & ~sure
        if not over.any():
            return chances
        sure |= over


def informative_draw(at: Situation) -> tuple[list[Tensor], list[Tensor]]:
    """Inner blocks drawn with a chance that is proportional to their true informativeness, exactly: systematic sampling.

    Returns:
        Scores as of a ranking, and each block's chance to be kept, `(blocks,)` by document.
    """
    found, chances = [], []
    for document, scores in enumerate(at.true_scores):
        count = at.count(len(scores))
        chance = torch.ones(len(scores), dtype=torch.float64)
        if len(scores) > 2:
            chance[1:-1] = inclusion_chances(block_informativeness(scores)[1:-1].clamp_min(1e-12), count)
        # The same random numbers in all layers: these draw alike where their scores are alike. In a shuffled order, or equal
        # chances would draw equally spaced blocks.
        generator = at.generator(document, at.batch.draw)
        start = torch.rand((), dtype=torch.float64, generator=generator)
        order = torch.randperm(max(len(scores) - 2, 0), generator=generator)
        ends = chance[1:-1][order].cumsum(0).add(start)
        ends[-1:] = count + start  # what rounding left of it
        inner = order[ends.floor().diff(prepend=torch.zeros(1, dtype=torch.float64)).nonzero()[:, 0]]
        found.append(marked(len(scores), inner))
        chances.append(chance)
    return found, chances


def gradient_norm(at: Situation) -> list[Tensor]:
    """Mean norm of the dense gradient that reaches a block's rows at the MLP's output: what no training step can know."""
    return at.block_means(at.oracle["mlp"][at.number])


def activation_norm(at: Situation, residual: Tensor) -> Tensor:
    """Norm of each row's intermediate activation, `(rows,)`, for the MLP (the paper's choice).

    Args:
        at: The layer.
        residual: The residual stream after attention, `(rows, hidden)`.
    """
    mlp = at.layer.mlp
    rows = at.layer.mlp_norm(residual)
    return (mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows)).float().norm(dim=-1)
