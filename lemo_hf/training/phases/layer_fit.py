"""One layer's predictor while it is being fitted: its start, its optimizer and its pruning (predictor_training.py has the loop)."""

from typing import Any

import torch
from torch import Tensor, nn

from ...evaluation.layer_scores import LayerScores
from ...models.pattern_predictor import predicted_block_scores, predicted_informativeness
from ...models.pooled_predictor import LayerPredictor
from ...models.token_informativeness import block_informativeness
from ..scale_out.processes import Processes

_BETAS = (0.9, 0.99)
_EPSILON = 1e-8
# Weight of the first term: a weight of 1 gave lower recall in one short trial; without the term features need not follow S.
_SCORE_WEIGHT = 0.1
# Spread of the drawn features' products at the start, over that of the scores.
_START_SPREAD = 0.02
# Tokens of the first batch that the directions of its queries and keys are taken from.
START_ROWS = 16384
# Weight of a document in the running variances.
_VARIANCE_WEIGHT = 0.1


class LayerFit:
    """One layer's predictor with its Adam moments, zero counts and running variances, all of them tensors to be saved."""

    def __init__(self, predictor: LayerPredictor, fresh: bool, processes: Processes) -> None:
        self.predictor = predictor
        self.fresh = fresh
        self.processes = processes
        self.first = [torch.zeros_like(weight) for weight in self.weights()]
        self.second = [torch.zeros_like(weight) for weight in self.weights()]
        self.zeros = [torch.zeros(size) for size in predictor.sizes]
        # Tokens counted, variance of S, variance of I.
        self.running = torch.zeros(3, dtype=torch.float64)

    def weights(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return list(self.predictor.parameters())

    def observe(self, found: LayerScores, counted: bool = True) -> None:
        """Counts zero activations and follows the variances of one batch, or of the batches of all processes.

        Args:
            found: The layer on this process' batch.
            counted: Whether that batch belongs to the round.
        """
        zeros = self.counted(found)
        if self.fresh and not self.running[1:].any():
            self._start(found)
        variances = [
            (causal_pairs(scores).var().item(), block_informativeness(scores)[1:-1].var().item())
            for scores in found.scores
            if len(scores) > 3
        ]
        rows = found.hidden.shape[0]
        if self.processes:
            zeros, rows, variances = self._of_all(zeros, rows, variances, counted)
        for count, found_zero in zip(self.zeros, zeros, strict=True):
            count += found_zero
        for of_scores, of_informativeness in variances:
            fresh = torch.tensor([of_scores, of_informativeness], dtype=torch.float64).clamp_min(1e-12)
            weight = 1.0 if self.running[1] == 0 else _VARIANCE_WEIGHT
            self.running[1:] += weight * (fresh - self.running[1:])
        self.running[0] += rows

    @torch.no_grad()
    def counted(self, found: LayerScores) -> list[Tensor]:
        """What pruning goes by, summed over documents: for every hidden unit the tokens for which it is zero."""
        hidden_units = [units for network in self._networks() for units in network(found.hidden)[1:]]
        return [(units == 0).sum(0).cpu() for units in hidden_units]

    def _of_all(
        self, zeros: list[Tensor], rows: int, variances: list[tuple[float, float]], counted: bool
    ) -> tuple[list[Tensor], int, list[tuple[float, float]]]:
        """Sums over the processes of zeros and rows, and the mean of all their documents' variances, which counts as one."""
        of_scores, of_informativeness = (sum(values) for values in zip(*variances, strict=True)) if variances else (0.0, 0.0)
        numbers = torch.tensor([rows, of_scores, of_informativeness, len(variances)], dtype=torch.float64)
        shared = [numbers, *(zero.double() for zero in zeros)]
        for tensor in shared:
            tensor *= counted
        self.processes.sum(shared)
        rows, of_scores, of_informativeness, documents = numbers.tolist()
        means = [(of_scores / documents, of_informativeness / documents)] if documents else []
        return shared[1:], int(rows), means

    def _start(self, found: LayerScores) -> None:
        """Starts from the longest document of the first batch, whichever process read it."""
        blocks = self.processes.gather(max(map(len, found.scores), default=0))
        source = blocks.index(max(blocks))
        if blocks[source] <= 3:
            return
        if self.processes.rank == source:
            self._start_from(found)
        self.processes.copy_from(source, self.predictor.parameters())

    @torch.no_grad()
    def _start_from(self, found: LayerScores) -> None:
        """Starts at the scores that distance alone explains on the first batch, products of features adding almost nothing.

        Products of drawn features are many times too large, and even at the spread of the scores they are noise that training
        does not get rid of (docs/experiments/predictors.md); and the profile is a mean that steps of an even size would take long to reach.
        """
        longest = max(range(len(found.scores)), key=lambda document: len(found.scores[document]))
        scores = found.scores[longest]
        self._read_projections(found)
        query, key = (found.documents.split_blocks(part)[longest] for part in self.features(found))
        products = query @ key.T
        factor = (_START_SPREAD * causal_pairs(scores).std() / causal_pairs(products).std().clamp_min(1e-12)).item()
        for network in self._networks():
            matrices: Any = network.matrices
            matrices[2].mul_(factor**0.5)
        products *= factor
        by_distance = [(scores - products).diagonal(-distance).mean() for distance in range(1, len(scores))]
        self.predictor.distance.fit(torch.stack(by_distance))

    def _read_projections(self, found: LayerScores) -> None:
        """Lays the first matrices along the directions of the input that the layer's queries (keys) vary most with.

        By least squares on the batch, through the modules: weights may be quantised or adapted. Positions are left out, as the
        networks do not see them.
        """
        module: Any = found.module
        attention = module.self_attn
        dtype = next((weight.dtype for weight in attention.parameters() if weight.is_floating_point()), found.hidden.dtype)
        rows = found.hidden[:START_ROWS].to(dtype)
        still = rows.new_ones(len(rows), attention.head_dim), rows.new_zeros(len(rows), attention.head_dim)
        projected = module.project_heads(rows, still)
        inputs = rows.float()
        covariance = inputs.T @ inputs / len(inputs)
        # Above the rounding of float32 sums, also where a few wide dimensions hold most of the variance.
        ridge = 1e-2 * covariance.diagonal().mean()
        factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), device=inputs.device))
        for network, outputs in zip(self._networks(), projected[:2], strict=True):
            products = inputs.T @ outputs.flatten(1).float() / len(inputs)
            whitened = torch.linalg.solve_triangular(factor, products, upper=False)
            directions, strength, _ = torch.linalg.svd(whitened, full_matrices=False)
            matrices: Any = network.matrices
            # Where a layer has more hidden units than such directions, the rest stay as drawn.
            count = min(matrices[0].shape[1], len(strength))
            along = torch.linalg.solve_triangular(factor.T, directions[:, :count], upper=True)
            matrices[0][:, :count] = along * strength[:count] / strength[:count].mean()

    def features(self, found: LayerScores) -> tuple[Tensor, Tensor]:
        """Query and key features of all blocks, `(blocks, p)` each."""
        return self.predictor(found.hidden, found.documents, found.block_rotary)

    def loss(self, found: LayerScores) -> Tensor | None:
        """Mean loss of the batch's documents; `None` if none has blocks to choose among."""
        if all(len(scores) <= 3 for scores in found.scores):
            return None
        query, key = self.features(found)
        _, of_scores, of_informativeness = self.running.tolist()
        losses = []
        for q, k, scores in zip(
            found.documents.split_blocks(query), found.documents.split_blocks(key), found.scores, strict=True
        ):
            if len(scores) <= 3:
                continue
            profile = self.predictor.distance.by_distance(len(q))
            score_error = causal_pairs(predicted_block_scores(q, k, profile) - scores).square().mean()
            difference = (predicted_informativeness(q, k, profile) - block_informativeness(scores))[1:-1]
            losses.append(_SCORE_WEIGHT * score_error / of_scores + difference.var(correction=0) / of_informativeness)
        return torch.stack(losses).mean()

    def step(self, found: LayerScores, number: int, rate: float, counted: bool) -> float:
        """One Adam step on the mean loss of all processes, the `number`-th from 1 at learning rate `rate`.

        Returns:
            This loss before the step; NaN if there was nothing to learn from.
        """
        weights = self.weights()
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            loss = self.loss(found) if counted else None
            grads = torch.autograd.grad(loss, weights) if loss is not None else None
            for weight in weights:
                weight.requires_grad_(False)
        value, grads = self._mean_of_all(None if loss is None else loss.item(), grads)
        if grads is None:
            return float("nan")
        corrections = [1 - beta**number for beta in _BETAS]
        for weight, grad, first, second in zip(weights, grads, self.first, self.second, strict=True):
            first.lerp_(grad, 1 - _BETAS[0])
            second.lerp_(grad.square(), 1 - _BETAS[1])
            weight.sub_(rate * self.unit(weight) * (first / corrections[0]) / ((second / corrections[1]).sqrt() + _EPSILON))
        return value

    def unit(self, weight: Tensor) -> float:
        """Of the learning rate for a weight."""
        return 1.0

    def _mean_of_all(self, loss: float | None, grads: tuple[Tensor, ...] | None) -> tuple[float, Any]:
        """Mean loss and gradients over the processes that have one."""
        if not self.processes:
            return float("nan") if loss is None else loss, grads
        shared = [grad.clone() for grad in grads] if grads else [torch.zeros_like(weight) for weight in self.weights()]
        numbers = torch.tensor([0.0, 0.0] if loss is None else [loss, 1.0], device=shared[0].device)
        self.processes.sum([*shared, numbers])
        total, having = numbers.tolist()
        if not having:
            return float("nan"), None
        return total / having, [grad / having for grad in shared]

    def prune(self, share: float) -> int:
        """Removes hidden units that were zero for more than `share` of the tokens since the last call; returns how many."""
        tokens, removed = self.running[0].item(), 0
        for index, network in enumerate(self._networks()):
            for hidden in (0, 1):
                zeros = self.zeros[2 * index + hidden]
                alive = zeros <= share * tokens
                if not alive.any():
                    alive[zeros.argmin()] = True
                removed += int((~alive).sum())
                self._keep_units(network, index, hidden, alive.nonzero().squeeze(1))
        self.zeros = [torch.zeros(size) for size in self.predictor.sizes]
        self.running[0] = 0
        return removed

    def _keep_units(self, network: nn.Module, index: int, hidden: int, units: Tensor) -> None:
        matrices: Any = network.matrices
        units = units.to(matrices[0].device)
        # A unit is a column of the matrix before it and a row of the one after it.
        for place, dim in ((hidden, 1), (hidden + 1, 0)):
            matrices[place] = nn.Parameter(matrices[place].data.index_select(dim, units), requires_grad=False)
            for moments in (self.first, self.second):
                moments[3 * index + place] = moments[3 * index + place].index_select(dim, units)

    def _networks(self) -> list[nn.Module]:
        return [self.predictor.query, self.predictor.key]

    def tensors(self) -> dict[str, Tensor]:
        lists = {"first": self.first, "second": self.second, "zeros": self.zeros}
        return {f"{name}.{index}": value for name, values in lists.items() for index, value in enumerate(values)} | {
            "running": self.running
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, values in (("first", self.first), ("second", self.second), ("zeros", self.zeros)):
            values[:] = [tensors[f"{name}.{index}"].to(value.device) for index, value in enumerate(values)]
        self.running = tensors["running"]


def causal_pairs(scores: Tensor) -> Tensor:
    """Entries below the diagonal, `(blocks * (blocks - 1) / 2,)`."""
    blocks = len(scores)
    rows, columns = torch.tril_indices(blocks, blocks, offset=-1, device=scores.device)
    return scores[rows, columns]
