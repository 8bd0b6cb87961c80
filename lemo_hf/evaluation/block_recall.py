"""Recall of the pattern predictors: of the blocks that the true scores keep, how many the predicted ones keep at the same count.

The first and last block of a document are kept whatever their scores are, so they are left out on both sides. Beside recall stand
chance (the share kept: what a random choice finds) and a predictor that knows positions only (mean I by place in the document).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.token_elimination import kept_block_count
from .layer_scores import LayerScores, visit_layers


def document_recall(true: Tensor, predicted: Tensor, keep_ratio: float) -> tuple[float, float]:
    """Recall within one document.

    Args:
        true, predicted: I of the document's blocks, `(blocks,)`.
        keep_ratio: Share of blocks kept, in (0, 1].

    Returns:
        Recall in [0, 1] and chance; both NaN if the choice leaves no freedom (every free block is kept, or none).
    """
    blocks = true.numel()
    free, count = blocks - 2, kept_block_count(blocks, keep_ratio) - 2
    if count <= 0 or count >= free:
        return math.nan, math.nan
    # A stable sort, as the selection's: ties resolve to the earlier block.
    kept_true = true[1:-1].sort(descending=True, stable=True).indices[:count]
    kept_predicted = predicted[1:-1].sort(descending=True, stable=True).indices[:count]
    return torch.isin(kept_predicted, kept_true).float().mean().item(), count / free


class PositionProfile:
    """Mean true I by layer and relative place in the document: the predictor that has read nothing.

    Args:
        num_layers: Layers of the model.
        places: Resolution over a document.
    """

    def __init__(self, num_layers: int, places: int = 64) -> None:
        self.sums = torch.zeros(num_layers, places, dtype=torch.float64)
        self.counts = torch.zeros(num_layers, places, dtype=torch.float64)

    def _place(self, blocks: int) -> Tensor:
        return torch.arange(blocks) * self.sums.shape[1] // blocks

    def add(self, layer: int, informativeness: Tensor) -> None:
        """Counts one document's true I."""
        place = self._place(informativeness.numel())
        self.sums[layer].index_add_(0, place, informativeness.double().cpu())
        self.counts[layer].index_add_(0, place, torch.ones_like(place, dtype=torch.float64))

    def predict(self, layer: int, blocks: int) -> Tensor:
        """Mean I at the places of a document of `blocks` blocks; the layer's mean where no document had a block."""
        mean = self.sums[layer].sum() / self.counts[layer].sum().clamp_min(1)
        profile = torch.where(self.counts[layer] > 0, self.sums[layer] / self.counts[layer].clamp_min(1), mean)
        return profile[self._place(blocks)]


def positions_of_others(informativeness: list[list[Tensor]], ratios: list[float]) -> list[float]:
    """Recall of a position-only predictor on a few documents, for each of them by the mean I of the others.

    Args:
        informativeness: By layer, true I of each document.
        ratios: Keep ratio by layer.

    Returns:
        Recall by layer, NaN where there are no others or no freedom.
    """
    found = []
    for documents, ratio in zip(informativeness, ratios, strict=True):
        recalls = []
        for index, true in enumerate(documents):
            others = PositionProfile(1)
            for other in documents[:index] + documents[index + 1 :]:
                others.add(0, other)
            if len(documents) > 1:
                recalls.append(document_recall(true, others.predict(0, true.numel()).to(true.device), ratio)[0])
        found.append(_mean(recalls))
    return found


@dataclass(frozen=True)
class RecallReport:
    """Recall of every layer, mean over documents; fractions in [0, 1], NaN where the choice leaves no freedom.

    Args:
        layers: Recall by layer.
        positions: Recall of the position-only predictor by layer; empty if none was given.
        chance: The share that a random choice finds.
    """

    layers: list[float]
    positions: list[float]
    chance: float

    @property
    def mean(self) -> float:
        """Mean over layers."""
        return _mean(self.layers)

    @property
    def position_mean(self) -> float:
        """Mean over layers of the position-only predictor."""
        return _mean(self.positions)


def measure_recall(
    backbone: Any,
    batches: Iterable[dict[str, Any]],
    positions: PositionProfile | None = None,
    also: Callable[[LayerScores], None] | None = None,
) -> RecallReport:
    """Recall of a model's predictors at the keep ratio of its config, by a dense forward without autograd.

    Args:
        backbone: A model with `SparseBackbone` among its bases.
        batches: Collated batches of text that the predictors were not fitted on.
        positions: A fitted position profile to compare with.
        also: Is shown every layer of every document on the way.
    """
    num_layers = len(backbone.layers)
    recalls: list[list[float]] = [[] for _ in range(num_layers)]
    by_position: list[list[float]] = [[] for _ in range(num_layers)]
    chances: list[float] = []

    def visit(found: LayerScores) -> None:
        if also is not None and found.scores:
            also(found)
        ratio = backbone.config.lemo.ratio_of(found.layer)
        for true, predicted in zip(found.informativeness(), found.predicted(), strict=True):
            recall, chance = document_recall(true, predicted, ratio)
            recalls[found.layer].append(recall)
            chances.append(chance)
            if positions is not None:
                guess = positions.predict(found.layer, true.numel()).to(true.device)
                by_position[found.layer].append(document_recall(true, guess, ratio)[0])

    for batch in batches:
        visit_layers(backbone, batch, visit)
    layers = [_mean(values) for values in recalls]
    return RecallReport(layers, [_mean(values) for values in by_position] if positions is not None else [], _mean(chances))


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
