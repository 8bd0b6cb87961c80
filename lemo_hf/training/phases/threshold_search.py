"""Thresholds of informativeness by layer under a budget of kept blocks (LeMo paper, Algorithm 1; the budget is ours).

T_l starts as the mean predicted I of layer l over a profile set, or where `keep_ratio` lists the layers as what keeps l's share. A
round takes central differences of acc, the negative loss of the sparse forward on the profile set, moves every threshold and
renormalises:

    G_l = (acc(T_l + epsilon s_l) - acc(T_l - epsilon s_l)) / (2 epsilon)
    T_l += eta * s_l * G_l / max_k |G_k|,     then     T_l += c * s_l,  c such that the mean kept share is the budget

s_l is the standard deviation of layer l's I, so epsilon and eta mean the same in every layer; dividing by the largest |G| makes
eta the largest move of a round whatever the scale of the loss. Without the budget "keep more" would always win: G says only which
layers pay most, c takes the blocks back evenly. Cost: 1 forward a document, and 2 * layers more in every round.

In the exact form the loss is the dense one whatever T is, so there is nothing to differentiate: every layer's threshold is the
quantile of its I that keeps its own ratio of blocks.

Several processes share the profile set: each runs its part of the documents, and what they found is put together in the order of
the documents, so that thresholds are the same bits on all of them, and the same as of one process alone.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...errors import LemoError
from ...evaluation.layer_scores import backbone_inputs, evaluation_mode
from ...models.lemo_config import shown
from ...models.segmented_loss import shift_labels
from ...models.sparse_decoder import sparse_evaluation
from ..scale_out.processes import Processes

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BISECTIONS = 60
# First and last block of a document always stay.
_ALWAYS_KEPT = 2


def kept_share(informativeness: list[Tensor], threshold: float) -> float:
    """Share of blocks with I >= `threshold`, first and last of each document counted as kept; in [0, 1].

    Args:
        informativeness: I of each document's blocks.
        threshold: The layer's threshold.
    """
    kept = total = 0
    for values in informativeness:
        marks = values >= threshold
        marks[0] = marks[-1] = True
        kept += int(marks.sum())
        total += marks.numel()
    return kept / max(total, 1)


class ThresholdSearch:
    """The search over one model; `thresholds` go into the model's config after every round.

    Args:
        model: The model with its head, wrapped or not; used in evaluation mode without autograd.
        backbone: Its backbone with LeMo.
        batches: The profile set: collated batches with labels.
        eta: Largest move of a threshold in a round, in standard deviations of the layer's I.
        epsilon: Half width of the central difference, in the same unit.
        processes: Those that search together.
    """

    def __init__(
        self,
        model: Any,
        backbone: Any,
        batches: Iterable[dict[str, Any]],
        eta: float,
        epsilon: float,
        processes: Processes | None = None,
    ) -> None:
        self.processes = Processes() if processes is None else processes
        self.model = model
        self.backbone = backbone
        self.batches = list(batches)
        self.eta = eta
        self.epsilon = epsilon
        self.round = 0
        self.forward_passes = 0
        # Called after each document, by all processes alike: a round is long.
        self.after_document: Callable[[], None] = lambda: None
        # Thresholds in units of s_l around the layer's mean, and what the last round found of dacc / dT in the same unit.
        self.offsets: list[float] = []
        self.gradients: list[float] = []
        layers = len(backbone.layers)
        lemo = backbone.config.lemo
        self.searched = [layer for layer in range(layers) if not lemo.is_dense(layer, layers)]
        self._profile: dict[int, list[Tensor]] = {}
        self._scale: dict[int, tuple[float, float]] = {}

    @property
    def differentiates(self) -> bool:
        """Whether the loss depends on the thresholds: in every form but the exact one."""
        return self.backbone.config.lemo.attention_forward != "exact"

    @property
    def thresholds(self) -> list[float]:
        """One threshold per layer; 0 for layers that keep everything."""
        values = [0.0] * len(self.backbone.layers)
        for layer, offset in zip(self.searched, self.offsets, strict=True):
            mean, deviation = self._scale[layer]
            values[layer] = mean + deviation * offset
        return values

    def kept_shares(self) -> list[float]:
        """Kept share of every searched layer over the profile set, by its dense informativeness."""
        return [kept_share(self._profile[layer], self.thresholds[layer]) for layer in self.searched]

    def require_choice(self) -> None:
        """Refuses thresholds that choose nothing on the profile set; `begin` must have run.

        Raises:
            LemoError: On every process alike, if every searched layer keeps everything, or only what always stays.
        """
        documents = next(iter(self._profile.values()), [])
        longest = max(map(len, documents), default=0)
        if not self.searched:
            return
        if longest <= _ALWAYS_KEPT:
            raise LemoError(
                f"calibration text is too short; the longest of {len(documents)} documents has {longest} blocks (block_size="
                f"{self.backbone.config.lemo.block_size}), and the first and last always stay; lower block_size or use longer samples"
            )
        shares, thresholds = self.kept_shares(), shown([round(value, 4) for value in self.thresholds])
        least = sum(min(len(values), _ALWAYS_KEPT) for values in documents) / sum(map(len, documents))
        if min(shares) >= 1:
            raise LemoError(
                f"thresholds keep every block of {len(documents)} documents; {thresholds}; raise them, or set thresholds=None for "
                "calibration to find them"
            )
        if max(shares) <= least:
            raise LemoError(
                f"thresholds keep no block of {len(documents)} documents but first and last; {thresholds}; lower them, or set "
                f"thresholds=None and keep_ratio above {least:.2g} for calibration to find them"
            )

    def begin(self, keep_thresholds: bool = False) -> None:
        """Profiles the predicted informativeness and sets the first thresholds, already within the budget.

        Args:
            keep_thresholds: Leaves the model's thresholds as they are, to look at what they keep.
        """
        profile: dict[int, list[list[float]]] = {layer: [] for layer in self.searched}
        lemo = self.backbone.config.lemo

        def watch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = kwargs.get("sparse_batch")  # none where all is padding
            if batch is not None and module.layer_idx in profile:
                residual = args[0].flatten(0, 1)
                values = module.informativeness(residual, batch.flat_rotary(module.position_embeddings(kwargs)), batch)
                profile[module.layer_idx] += [part.float().tolist() for part in values]

        def of_document(batch: dict[str, Any]) -> dict[int, list[list[float]]]:
            for values in profile.values():
                values.clear()
            self._sum_of_losses(batch)
            return {layer: list(values) for layer, values in profile.items()}

        # Every layer kept whole: informativeness is profiled on the dense model.
        chosen = lemo.dense_layers
        hooks = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in self.backbone.layers]
        try:
            lemo.update(dense_layers=list(range(len(self.backbone.layers))))
            found = self._of_all(of_document, self.batches)
        finally:
            lemo.update(dense_layers=chosen)
            for hook in hooks:
                hook.remove()
        self._profile = {
            layer: [torch.tensor(values) for document in found for values in document[layer]] for layer in self.searched
        }
        for layer, parts in self._profile.items():
            together = torch.cat(parts)
            deviation = together.std().item() if together.numel() > 1 else 0.0
            self._scale[layer] = (together.mean().item(), max(deviation, 1e-12))
        if keep_thresholds and lemo.thresholds is not None:
            self.offsets = [(lemo.thresholds[layer] - mean) / deviation for layer, (mean, deviation) in self._scale.items()]
            return
        self.offsets = [0.0] * len(self.searched)
        if not self.differentiates:
            logger.info(
                "exact form: the loss does not depend on the thresholds, so every layer's is the quantile of its informativeness "
                "that keeps its keep_ratio"
            )
        if not self.differentiates or isinstance(lemo.keep_ratio, list):
            self.keep_shares([lemo.ratio_of(layer) for layer in self.searched])
        if self.differentiates:
            self._renormalise()
        lemo.update(thresholds=self.thresholds)

    def keep_shares(self, shares: list[float]) -> None:
        """Sets the thresholds that keep given shares of the searched layers' blocks."""
        self.offsets = [self._shift([place], [0.0] * len(self.searched), share) for place, share in enumerate(shares)]
        self.backbone.config.lemo.update(thresholds=self.thresholds)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from what `state` gave after some round; `begin` must have run, and what it set is overwritten."""
        self.round, self.forward_passes = state["round"], state["forward_passes"]
        self.offsets = list(state["offsets"])
        self.backbone.config.lemo.update(thresholds=self.thresholds)

    def state(self) -> dict[str, Any]:
        """What the next round needs, as JSON types."""
        return {"round": self.round, "forward_passes": self.forward_passes, "offsets": self.offsets}

    def step(self) -> None:
        """One round of Algorithm 1; nothing to do in the exact form."""
        self.round += 1
        if not self.differentiates:
            return
        start = list(self.offsets)
        self.gradients = []
        for place in range(len(self.searched)):
            ahead, behind = (self._loss_at(start, place, side * self.epsilon) for side in (1, -1))
            self.gradients.append((behind - ahead) / (2 * self.epsilon))
        largest = max(map(abs, self.gradients), default=0.0)
        if largest > 0:
            moves = [self.eta * gradient / largest for gradient in self.gradients]
            self.offsets = [offset + move for offset, move in zip(start, moves, strict=True)]
        self._renormalise()
        self.backbone.config.lemo.update(thresholds=self.thresholds)

    def _loss_at(self, start: list[float], place: int, move: float) -> float:
        self.offsets = [*start[:place], start[place] + move, *start[place + 1 :]]
        self.backbone.config.lemo.update(thresholds=self.thresholds)
        try:
            return self.loss(self.batches)
        finally:
            self.offsets = start

    def loss(self, batches: list[dict[str, Any]]) -> float:
        """Mean loss a token of the sparse forward on `batches`; a forward pass of each is counted."""
        sums = self._of_all(self._sum_of_losses, batches)
        return sum(total for total, _ in sums) / max(sum(count for _, count in sums), 1)

    def _of_all(self, measure: Callable[[dict[str, Any]], T], batches: list[dict[str, Any]]) -> list[T]:
        """What `measure` finds on every batch, in their order, each looked at by one process."""
        total = len(batches)
        found: list[T] = []
        for first in range(0, total, self.processes.count):
            place, together, _ = self.processes.turn(first, total)
            # All processes measure, so that all run the same layers; in the last round some do for nothing.
            found += self.processes.gather(measure(batches[place]))[:together]
            self.after_document()
        self.forward_passes += total
        return found

    @torch.no_grad()
    def _sum_of_losses(self, batch: dict[str, Any]) -> tuple[float, int]:
        """Summed loss of the sparse forward on a batch, and its labelled tokens."""
        total = 0.0
        device = next(self.backbone.parameters()).device
        head = _head_of(self.model)
        with evaluation_mode(self.model), sparse_evaluation(self.backbone):
            inputs = backbone_inputs(batch, device)
            hidden = self.backbone(**inputs).last_hidden_state.flatten(0, 1)
            targets = shift_labels(batch["labels"]).flatten().to(device)
            size = self.backbone.config.lemo.segment_size
            for rows, labels in zip(hidden.split(size), targets.split(size), strict=True):
                total += torch.nn.functional.cross_entropy(head(rows).float(), labels, reduction="sum").item()
        return total, int((targets != -100).sum())

    def _renormalise(self) -> None:
        lemo = self.backbone.config.lemo
        budget = sum(lemo.ratio_of(layer) for layer in self.searched) / max(len(self.searched), 1)
        places = list(range(len(self.searched)))
        shift = self._shift(places, self.offsets, budget)
        self.offsets = [offset + shift for offset in self.offsets]

    def _shift(self, places: list[int], offsets: list[float], budget: float) -> float:
        """The shift c that brings the mean kept share of some layers to the budget: the largest one that keeps no less."""

        def share(shift: float) -> float:
            shares = []
            for place in places:
                layer = self.searched[place]
                mean, deviation = self._scale[layer]
                shares.append(kept_share(self._profile[layer], mean + deviation * (offsets[place] + shift)))
            return sum(shares) / max(len(shares), 1)

        low, high = -64.0, 64.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) >= budget else (low, middle)
        return low


def _head_of(model: Any) -> Any:
    """The language-model head, through PEFT's and other wrappers."""
    return getattr(model, "get_base_model", lambda: model)().get_output_embeddings()
