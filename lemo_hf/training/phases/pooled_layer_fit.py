"""Fitting of one layer's predictor of signed means (`block_reduction="mean"`, models/pooled_predictor.py).

It need not be learned from nothing: the scores are products of the layer's own pooled queries and keys. So it starts at the layer's
projections, read off by least squares through the modules (weights may be quantised or adapted), cut down to the pairs of
dimensions that vary informativeness most; the optimizer corrects what the cut and the positions within a block cost.

Elastic size: pairs of features leave that together make up less of the variance of informativeness than `1 - prune_share`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...evaluation.layer_scores import LayerScores
from ...models.pooled_predictor import PooledPredictor
from .layer_fit import START_ROWS, LayerFit

# Weight of probing every input dimension by itself beside the text: a short or monotonous text leaves many directions out.
_PROBE_WEIGHT = 1e-3
# Of a weight's own size, for a learning rate of 1: steps are corrections of a start that is nearly right (docs/experiments/predictors.md).
_STEP = 0.1


class PooledLayerFit(LayerFit):
    """As its base, for a `PooledPredictor`; `zeros` holds the variance that each pair of features gives informativeness, times tokens."""

    predictor: PooledPredictor

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._count_anew()

    def weights(self) -> list[nn.Parameter]:
        """The matrices and the profile: which rotation turns a pair is no number to move."""
        return [*self.predictor.query.parameters(), *self.predictor.key.parameters(), *self.predictor.distance.parameters()]

    def unit(self, weight: Tensor) -> float:
        """A part of their own size: projections of some models are a hundred times those of others."""
        return _STEP * weight.square().mean().sqrt().clamp_min(1e-8).item()

    @torch.no_grad()
    def counted(self, found: LayerScores) -> list[Tensor]:
        """The variance of informativeness within documents that each pair of features is worth, times tokens."""
        shares = torch.zeros(self.predictor.sizes[0] // 2)
        of_blocks = (found.documents.split_blocks(part) for part in self.features(found))
        for query, key, length in zip(*of_blocks, found.documents.lengths, strict=True):
            if len(query) > 3:
                shares += length * informativeness_by_pair(query, key)[1:-1].var(0).cpu()
        return [shares]

    @torch.no_grad()
    def _start_from(self, found: LayerScores) -> None:
        longest = max(range(len(found.scores)), key=lambda document: len(found.scores[document]))
        scores = found.scores[longest]
        wide, frequencies = self._all_pairs(found)
        query, key = (
            found.documents.split_blocks(part)[longest] for part in wide(found.hidden, found.documents, found.block_rotary)
        )
        worth = informativeness_by_pair(query, key)[1:-1].var(0)
        chosen = worth.sort(descending=True, stable=True).indices[: self.predictor.sizes[0] // 2].sort().values
        columns = torch.cat((chosen, chosen + len(worth)))
        for mine, theirs in ((self.predictor.query, wide.query), (self.predictor.key, wide.key)):
            # Pairs that the layer does not have stay empty.
            mine.matrices[0].zero_()
            half = mine.matrices[0].shape[1] // 2
            taken = theirs.matrices[0][:, columns].chunk(2, 1)
            for part, values in enumerate(taken):
                mine.matrices[0][:, part * half : part * half + len(chosen)] = values
        self.predictor.rotary.reset_parameters()
        self.predictor.rotary[0][: len(chosen)] = frequencies[chosen]
        query, key = (found.documents.split_blocks(part)[longest] for part in self.features(found))
        rest = scores - query @ key.T
        self.predictor.distance.fit(torch.stack([rest.diagonal(-distance).mean() for distance in range(1, len(scores))]))

    def _all_pairs(self, found: LayerScores) -> tuple[PooledPredictor, Tensor]:
        """The predictor with every pair of dimensions of every key head, and the rotary frequency of each pair."""
        module: Any = found.module
        attention = module.self_attn
        dtype = next((weight.dtype for weight in attention.parameters() if weight.is_floating_point()), found.hidden.dtype)
        inputs = found.hidden[:START_ROWS].to(dtype)
        # Beside the text's rows a row of zeros, which shows a bias, and each dimension alone, as large as the text's.
        axes = torch.eye(inputs.shape[1], device=inputs.device, dtype=dtype) * inputs.float().square().mean().sqrt().to(dtype)
        rows, size = torch.cat((inputs, torch.zeros_like(axes[:1]), axes)), attention.head_dim
        still = rows.new_ones(len(rows), size), rows.new_zeros(len(rows), size)
        query, key, _ = module.project_heads(rows, still if found.block_rotary else ())
        heads, key_heads, pairs = query.shape[1], key.shape[1], size // 2
        # Query heads that share a key head add up.
        outputs = query.float().view(len(rows), key_heads, -1, size).sum(2), key.float()
        inputs, axes, count = inputs.float(), axes.float(), len(inputs)
        covariance = inputs.T @ inputs / count + _PROBE_WEIGHT * axes.T @ axes
        wide = PooledPredictor(inputs.shape[1], 2 * key_heads * pairs).to(inputs.device)
        wide.reset_parameters()
        for network, output in zip((wide.query, wide.key), outputs, strict=True):
            # First halves of all heads, then second halves: feature c and c + p / 2 are a pair.
            laid_out = output.view(len(rows), key_heads, 2, pairs).transpose(1, 2).flatten(1)
            probed = laid_out[count + 1 :] - laid_out[count]
            products = inputs.T @ laid_out[:count] / count + _PROBE_WEIGHT * axes.T @ probed
            network.matrices[0].copy_(torch.linalg.solve(covariance, products))
        frequencies = torch.arange(pairs, device=inputs.device).repeat(key_heads).float()
        if found.block_rotary:
            wide.rotary[0].copy_(frequencies)
        # Both sides of a pair alike, so that one relative step serves them.
        wide_query, wide_key = wide.query.matrices[0], wide.key.matrices[0]
        lengths = [weight.view(len(weight), 2, -1).square().sum((0, 1)).clamp_min(1e-20) for weight in (wide_query, wide_key)]
        balance = (lengths[1] / lengths[0]).pow(0.25) * (module.attention_scale / heads) ** 0.5
        wide_query *= balance.repeat(2)
        wide_key *= module.attention_scale / heads / balance.repeat(2)
        return wide, frequencies if found.block_rotary else torch.full_like(frequencies, -1)

    def prune(self, share: float) -> int:
        """Removes the pairs that give informativeness less than `1 - share` of its variance together; returns how many features."""
        worth = (self.zeros[0] / self.running[0].clamp_min(1)).clamp_min(0).double()
        order = worth.sort(stable=True).indices
        # However they vary together, the variance of a sum is at most the square of the summed deviations.
        lost = worth[order].sqrt().cumsum(0).square()
        leaving = int((lost <= (1 - share) * self.running[2]).sum()) if self.running[2] > 0 else 0
        kept = order[min(leaving, len(order) - 1) :].sort().values
        self._keep_pairs(kept)
        self._count_anew()
        return 2 * (len(order) - len(kept))

    def _keep_pairs(self, kept: Tensor) -> None:
        predictor = self.predictor
        rotary: Any = predictor.rotary
        columns = torch.cat((kept, kept + predictor.sizes[0] // 2)).to(rotary[0].device)
        rotary[0] = nn.Parameter(rotary[0].data[columns[: len(kept)]], requires_grad=False)
        for place, network in enumerate((predictor.query, predictor.key)):
            matrices: Any = network.matrices
            matrices[0] = nn.Parameter(matrices[0].data[:, columns].contiguous(), requires_grad=False)
            for moments in (self.first, self.second):
                moments[place] = moments[place][:, columns].contiguous()

    def _count_anew(self) -> None:
        self.zeros = [torch.zeros(self.predictor.sizes[0] // 2)]
        self.running[0] = 0


def informativeness_by_pair(query: Tensor, key: Tensor) -> Tensor:
    """What each pair of features adds to a document's predicted I, `(blocks, p / 2)`, from block features `(blocks, p)`."""
    later_queries = query.sum(0) - query.cumsum(0)
    earlier_keys = key.cumsum(0) - key
    parts = key * later_queries + query * earlier_keys
    return parts.view(len(query), 2, -1).sum(1) / max(len(query) - 1, 1)
