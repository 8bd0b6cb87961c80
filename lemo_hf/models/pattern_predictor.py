"""Pattern predictor: block informativeness without the quadratic scores (LeMo paper, section 4.2).

Each layer has two small networks, one for queries and one for keys. A network is three low-rank matrices with ReLU between
them, applied to the tokens of the layer's attention input one by one and pooled over the block, half of the features by their
maximum (S is a maximum over token pairs) and half by their mean:

    Q_m = pool over tokens t of block m of relu(relu(x_t W1) W2) W3         (K_n alike)
    S_mn ~ Q_m . K_n + f(m - n)
    I_n ~ (K_n . sum_{m > n} Q_m + Q_n . sum_{m < n} K_m + sum_{m != n} f(|m - n|)) / (blocks - 1)

The distance profile f is ours: rotary positions make scores depend on distance, which no network sees that reads tokens one by
one; most of the variance of S on a small Llama is the profile's (docs/experiments/predictors.md).
f is a table over the logarithm of the distance, so it reaches any length.

I takes O(blocks * p) by prefix sums and the (blocks, blocks) matrix is never formed; sizes do not depend on the number of
tokens. Per layer 2 * (hidden * h1 + h1 * h2 + h2 * p) + 48 parameters; every multiply runs once per token.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents import Documents
from .lemo_config import LemoConfig

# Entries of a distance profile, four to a doubling: the last one begins at 3444 blocks.
_DISTANCES = 48


class PredictorParameters(nn.ParameterList):
    """Parameters of a predictor: frozen, and float32 whatever the model is cast to.

    Plain parameters, not `nn.Linear`: "all-linear" adapters and 4-bit loaders wrap every `nn.Linear` they find. A module that
    holds them directly, because `transformers` has only such modules of a custom model initialised.
    """

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__(nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False) for shape in shapes)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the parameters anew."""
        raise NotImplementedError

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # `from_pretrained` puts a new parameter in every place, and has it require a gradient.
        if param is not None:
            param.requires_grad_(False)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PredictorParameters":
        # `model.to(torch.bfloat16)` moves them to the model's device at most.
        def moved(parameter: Tensor) -> Tensor:
            result = fn(parameter)
            return result if result.dtype == parameter.dtype else parameter.to(result.device)

        return super()._apply(moved, recurse)


class LowRankMatrices(PredictorParameters):
    """The matrices of one feature network, between `widths`."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__(*pairwise(widths))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """He initialisation, as ReLU follows."""
        for matrix in self:
            matrix.normal_(0.0, (2.0 / matrix.shape[0]) ** 0.5, generator=generator)


class DistanceProfile(PredictorParameters):
    """The table of f over the logarithm of the distance between blocks."""

    def __init__(self) -> None:
        super().__init__((_DISTANCES,))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """All zero: no profile."""
        self[0].zero_()

    def by_distance(self, blocks: int) -> Tensor:
        """F at distances 0 to `blocks` - 1, `(blocks,)`; 0 at distance 0, which is no pair."""
        return F.pad(self[0][self._entries(blocks)], (1, 0))

    @torch.no_grad()
    def fit(self, by_distance: Tensor) -> None:
        """Takes on given values of f at distances 1 to `len(by_distance)`; beyond them f stays at the last one."""
        entries = self._entries(len(by_distance) + 1)
        counts = torch.bincount(entries, minlength=_DISTANCES)
        means = torch.zeros_like(self[0]).index_add_(0, entries, by_distance) / counts.clamp_min(1)
        # An entry that no distance rounds to takes the value of the one before it.
        filled = torch.where(counts > 0, torch.arange(_DISTANCES, device=counts.device), 0).cummax(0).values
        self[0].copy_(means[filled])

    def _entries(self, blocks: int) -> Tensor:
        distance = torch.arange(1, blocks, device=self[0].device)
        return (4 * distance.log2()).round().long().clamp_max(_DISTANCES - 1)


class _FeatureNetwork(nn.Module):
    def __init__(self, hidden_size: int, sizes: tuple[int, int], features: int) -> None:
        super().__init__()
        widths = (hidden_size, *sizes, features)
        self.matrices = LowRankMatrices(widths)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token features `(rows, p)` and the two hidden activations, which elastic pruning counts."""
        first, second, third = self.matrices
        inner = torch.relu(hidden_states.float() @ first)
        outer = torch.relu(inner @ second)
        return outer @ third, inner, outer


class PatternPredictor(nn.Module):
    """The query and key networks and the distance profile of one layer.

    Args:
        hidden_size: Width of the layer's attention input.
        sizes: `[query h1, query h2, key h1, key h2]`, hidden widths.
        features: Length p of a block's features.
    """

    def __init__(self, hidden_size: int, sizes: list[int], features: int) -> None:
        super().__init__()
        self.query = _FeatureNetwork(hidden_size, (sizes[0], sizes[1]), features)
        self.key = _FeatureNetwork(hidden_size, (sizes[2], sizes[3]), features)
        self.distance = DistanceProfile()

    @classmethod
    def from_config(cls, config: LemoConfig, hidden_size: int, layer: int) -> "PatternPredictor":
        """The predictor of `layer`, with the sizes that pruning left if the config records them.

        Raises:
            LemoConfigError: If it would be wider than the model; nothing is allocated then.
        """
        config.validate_widths(hidden_size)
        sizes = config.predictor_sizes[layer] if config.predictor_sizes else [config.predictor_rank] * 4
        return cls(hidden_size, sizes, config.predictor_features)

    @property
    def sizes(self) -> list[int]:
        """`[query h1, query h2, key h1, key h2]` as they are now."""
        return [size for network in (self.query, self.key) for size in (network.matrices[1].shape)]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all matrices anew and flattens the profile."""
        for part in (self.query.matrices, self.key.matrices, self.distance):
            part.reset_parameters(generator)

    def forward(self, hidden_states: Tensor, documents: Documents, rotary: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
        """Block features of all documents.

        Args:
            hidden_states: Attention input of all real rows, `(real_rows, hidden)`, any float dtype.
            documents: The batch's documents.
            rotary: Not read: the networks know no positions, the profile does.

        Returns:
            Q and K, `(blocks, p)` float32 each, over all documents.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            query, _, _ = self.query(hidden_states)
            key, _, _ = self.key(hidden_states)
        return _pool_blocks(query, documents), _pool_blocks(key, documents)

    def informativeness(self, hidden_states: Tensor, documents: Documents) -> list[Tensor]:
        """Predicted I of each document's blocks, `(blocks_of_document,)` each."""
        query, key = self(hidden_states, documents)
        return self.informativeness_of(query, key, documents)

    def informativeness_of(self, query: Tensor, key: Tensor, documents: Documents) -> list[Tensor]:
        """The same from the block features of all documents, `(blocks, p)` each."""
        pairs = zip(documents.split_blocks(query), documents.split_blocks(key), strict=True)
        return [predicted_informativeness(q, k, self.distance.by_distance(len(q))) for q, k in pairs]


def _pool_blocks(features: Tensor, documents: Documents) -> Tensor:
    size, half = documents.block_size, features.shape[1] // 2
    pooled = []
    for part, blocks in zip(features.split(documents.lengths), documents.block_counts, strict=True):
        missing = blocks * size - part.shape[0]
        largest = F.pad(part[:, half:], (0, 0, 0, missing), value=-torch.inf).view(blocks, size, -1).amax(1)
        total = F.pad(part[:, :half], (0, 0, 0, missing)).view(blocks, size, -1).sum(1)
        tokens = features.new_full((blocks, 1), size)
        tokens[-1] -= missing
        pooled.append(torch.cat((total / tokens, largest), 1))
    return torch.cat(pooled)


def predicted_block_scores(query: Tensor, key: Tensor, profile: Tensor) -> Tensor:
    """S of one document: `(blocks, blocks)`, 0 above the diagonal.

    Args:
        query, key: The document's block features, `(blocks, p)`.
        profile: f by distance, `(blocks,)`.
    """
    place = torch.arange(len(query), device=query.device)
    return (query @ key.T + profile[(place[:, None] - place).abs()]).tril()


def predicted_informativeness(query: Tensor, key: Tensor, profile: Tensor) -> Tensor:
    """I of one document in O(blocks * p), `(blocks,)`; arguments as in `predicted_block_scores`."""
    later_queries = query.sum(0) - query.cumsum(0)
    earlier_keys = key.cumsum(0) - key
    # Of block n, partners lie at distances 1 to n before it and 1 to blocks - 1 - n after it.
    up_to = profile.cumsum(0)
    by_distance = up_to + up_to.flip(0)
    return ((key * later_queries).sum(1) + (query * earlier_keys).sum(1) + by_distance) / max(query.shape[0] - 1, 1)
