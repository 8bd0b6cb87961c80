"""Fits every layer's pattern predictor on the frozen model (LeMo paper, section 4.2).

Text runs through the model densely, without autograd. At each layer the attention input and the true scores are at hand: that
layer's predictor takes its optimizer steps at once and the forward goes on, so one layer's inputs live at a time and nothing
backpropagates through the model. With predicted scores S^ and informativeness I^, the loss of a document is

    0.1 |S^ - S|^2 / variance of S  +  |c(I^) - c(I)|^2 / variance of I,          c(.) centred within the document,

over causal pairs of blocks m > n, and over the blocks that are not kept anyway. The first term ties features to scores, the
second is what selection reads: only differences within a document choose blocks. The variances are the layer's running ones, so
one learning rate serves every layer.

Elastic size: hidden units that are zero after ReLU for almost every token are removed together with their Adam moments, so the
matrices really shrink (layer_fit.py; pooled_layer_fit.py for predictors without hidden units). Cost of a document and layer: its dense forward, its block scores, `3 * steps + 1` predictor forwards.

Several processes read a round of documents together, one each, and take the optimizer steps on its mean loss: statistics and
gradients are exchanged, in sizes that depend on the predictors' alone, so the phase takes 1 / processes of the time and ends in the
same predictors on all of them. A round of 8 documents with the steps of one gave the same recall as 8 by themselves
(docs/experiments/predictors.md).
"""

from typing import Any

import torch
from torch import Tensor

from ...evaluation.block_recall import PositionProfile
from ...evaluation.layer_scores import LayerScores, visit_layers
from ...hub.lemo_files import predictor_tensors, record_predictor_sizes
from ..faults.sample_checks import without_uniform_documents
from ..scale_out.processes import Processes
from .layer_fit import LayerFit
from .pooled_layer_fit import PooledLayerFit

_WARMUP_SHARE = 0.05


class PredictorTraining:
    """Training of all predictors of a model, document by document; it can be saved and continued between any two.

    Args:
        backbone: A model with `SparseBackbone` among its bases.
        documents: Documents in all, passes counted; the learning rate falls linearly to 0 over them after a short warmup.
        steps: Optimizer steps of every layer on each document.
        learning_rate: Peak learning rate.
        prune_documents: Documents between two prunings; 0 never prunes.
        prune_share: Share of tokens for which a removed unit was zero.
        fresh: Whether the predictors are as drawn: their scale and distance profile are then set by the first document.
            Predictors that learned something keep it.
        processes: Those that fit together; the model of each must hold the same predictors.
    """

    def __init__(
        self,
        backbone: Any,
        documents: int,
        steps: int,
        learning_rate: float,
        prune_documents: int = 0,
        prune_share: float = 0.999,
        fresh: bool = True,
        processes: Processes | None = None,
    ) -> None:
        self.processes = Processes() if processes is None else processes
        self.backbone = backbone
        self.documents = documents
        self.steps = steps
        self.learning_rate = learning_rate
        self.prune_documents = prune_documents
        self.prune_share = prune_share
        self.done = 0
        # Optimizer steps of every layer: as many as documents times `steps` where one process fits alone.
        self.taken = 0
        self.positions = PositionProfile(len(backbone.layers))
        # What this process has read of a round; alone, it is all there is.
        self._read = PositionProfile(len(backbone.layers)) if self.processes else self.positions
        kind = LayerFit if backbone.config.lemo.block_reduction == "max" else PooledLayerFit
        self._fits = [kind(layer.lemo_predictor, fresh, self.processes) for layer in backbone.layers]

    def fit(self, batch: dict[str, Any], together: int = 1, counted: bool = True) -> list[float]:
        """Takes the optimizer steps on one batch, or on the batches of all processes.

        Args:
            batch: This process' batch.
            together: Documents of the round, over all processes.
            counted: Whether `batch` is one of them; if not, this process only runs along.

        Returns:
            The layers' mean losses after all but the last of the steps; NaN where there was nothing to learn from.
        """
        losses: list[float] = []
        visit_layers(self.backbone, batch, lambda found: losses.append(self._learn(found, together, counted)))
        self._finish_round(together)
        return losses

    def fit_recorded(self, layers: list[LayerScores]) -> list[float]:
        """The same on a batch whose layers were recorded, for several passes over text that fits in memory."""
        losses = [self._learn(found, 1, True) for found in layers]
        self._finish_round(1)
        return losses

    def _learn(self, found: LayerScores, together: int, counted: bool) -> float:
        fit = self._fits[found.layer]
        whole, found = found, without_uniform_documents(found)
        fit.observe(found, counted)
        for informativeness in whole.informativeness() if counted else ():
            self._read.add(found.layer, informativeness)
        # The learning rate follows the documents, Adam's corrections the steps.
        losses = [
            fit.step(found, self.taken + step, self._rate(self.done * self.steps + (step - 1) * together + 1), counted)
            for step in range(1, self.steps + 1)
        ]
        return losses[-1]

    def _finish_round(self, together: int) -> None:
        if self.processes:
            self.processes.sum([self._read.sums, self._read.counts])
            self.positions.sums += self._read.sums
            self.positions.counts += self._read.counts
            self._read = PositionProfile(len(self._fits))
        before, self.done, self.taken = self.done, self.done + together, self.taken + self.steps
        if self.prune_documents and self.done // self.prune_documents > before // self.prune_documents:
            for fit in self._fits:
                fit.prune(self.prune_share)
            record_predictor_sizes(self.backbone)

    def _rate(self, number: int) -> float:
        total = self.documents * self.steps
        warmup = max(1.0, _WARMUP_SHARE * total)
        return self.learning_rate * min(number / warmup, max(0.0, 1 - (number - 1) / total))

    def tensors(self) -> dict[str, Tensor]:
        """Optimizer state and statistics; the matrices themselves are the model's."""
        tensors = {f"fit.{index}.{name}": value for index, fit in enumerate(self._fits) for name, value in fit.tensors().items()}
        taken = torch.tensor(self.taken)
        return tensors | {"positions.sums": self.positions.sums, "positions.counts": self.positions.counts, "taken": taken}

    def restore(self, tensors: dict[str, Tensor], done: int) -> None:
        """Continues after `done` documents with what `tensors` gave then; the model's predictors must be those of then.

        As many processes may go on as there are now.
        """
        for index, fit in enumerate(self._fits):
            prefix = f"fit.{index}."
            fit.restore({name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)})
        self.positions.sums, self.positions.counts = tensors["positions.sums"], tensors["positions.counts"]
        if not self.processes:
            self._read = self.positions
        self.done, self.taken = done, int(tensors["taken"])


def parameter_share(backbone: Any) -> float:
    """Predictor parameters over the other parameters of the layers, in [0, 1]; adapters are counted with neither."""
    predictors = sum(weight.numel() for weight in predictor_tensors(backbone).values())
    others = sum(
        weight.numel()
        for name, weight in backbone.layers.named_parameters()
        if ".lemo_predictor." not in name and ".lora_" not in name
    )
    return predictors / others
