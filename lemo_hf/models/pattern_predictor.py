"""Pattern predictor: block informativeness without the quadratic scores (LeMo paper, section 4.2).

Each layer has two small networks, one for queries and one for keys. A network is three low-rank matrices with ReLU between
them, applied to the tokens of the layer's attention input one by one and pooled over the block by their maximum, as S is a
maximum over token pairs:

    Q_m = max over tokens t of block m of relu(relu(x_t W1) W2) W3          (K_n alike)
    S_mn ~ Q_m . K_n,     I_n ~ (K_n . sum_{m > n} Q_m + Q_n . sum_{m < n} K_m) / (blocks - 1)

so I takes O(blocks * p) by prefix sums and the (blocks, blocks) matrix is never formed; sizes do not depend on the number of
tokens. Per layer 2 * (hidden * h1 + h1 * h2 + h2 * p) parameters; every multiply runs once per token.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lemo_config import LemoConfig, LemoConfigError
from .token_elimination import Documents


class LowRankMatrices(nn.ParameterList):
    """The matrices of one feature network: frozen, and float32 whatever the model is cast to.

    Plain parameters, not `nn.Linear`: "all-linear" adapters and 4-bit loaders wrap every `nn.Linear` they find. A module that
    holds them directly, because `transformers` has only such modules of a custom model initialised.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        shapes = pairwise(widths)
        super().__init__(nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False) for shape in shapes)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """He initialisation, as ReLU follows."""
        for matrix in self:
            matrix.normal_(0.0, (2.0 / matrix.shape[0]) ** 0.5, generator=generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRankMatrices":
        # `model.to(torch.bfloat16)` moves them to the model's device at most.
        def moved(matrix: Tensor) -> Tensor:
            result = fn(matrix)
            return result if result.dtype == matrix.dtype else matrix.to(result.device)

        return super()._apply(moved, recurse)


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
    """The query and key networks of one layer.

    Args:
        hidden_size: Width of the layer's attention input.
        sizes: `[query h1, query h2, key h1, key h2]`, hidden widths.
        features: Length p of a block's features.
    """

    def __init__(self, hidden_size: int, sizes: list[int], features: int) -> None:
        super().__init__()
        self.query = _FeatureNetwork(hidden_size, (sizes[0], sizes[1]), features)
        self.key = _FeatureNetwork(hidden_size, (sizes[2], sizes[3]), features)

    @classmethod
    def from_config(cls, config: LemoConfig, hidden_size: int, layer: int) -> "PatternPredictor":
        """The predictor of `layer`, with the sizes that pruning left if the config records them."""
        rank = config.predictor_rank
        sizes = config.predictor_sizes[layer] if config.predictor_sizes else [rank] * 4
        if len(sizes) != 4 or not all(isinstance(size, int) and 0 < size <= hidden_size for size in sizes):
            raise LemoConfigError(
                f"predictor_sizes of layer {layer} must be four widths between 1 and hidden_size {hidden_size}; got {sizes}; retrain the predictors"
            )
        return cls(hidden_size, sizes, config.predictor_features)

    @property
    def sizes(self) -> list[int]:
        """`[query h1, query h2, key h1, key h2]` as they are now."""
        return [size for network in (self.query, self.key) for size in (network.matrices[1].shape)]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws all matrices anew."""
        for network in (self.query, self.key):
            network.matrices.reset_parameters(generator)

    def forward(self, hidden_states: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """Block features of all documents.

        Args:
            hidden_states: Attention input of all real rows, `(real_rows, hidden)`, any float dtype.
            documents: The batch's documents.

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
        pairs = zip(documents.split_blocks(query), documents.split_blocks(key), strict=True)
        return [predicted_informativeness(q, k) for q, k in pairs]


def _pool_blocks(features: Tensor, documents: Documents) -> Tensor:
    size = documents.block_size
    pooled = []
    for part, blocks in zip(features.split(documents.lengths), documents.block_counts, strict=True):
        padded = F.pad(part, (0, 0, 0, blocks * size - part.shape[0]), value=-torch.inf)
        pooled.append(padded.view(blocks, size, -1).amax(1))
    return torch.cat(pooled)


def predicted_block_scores(query: Tensor, key: Tensor) -> Tensor:
    """S of one document from its block features: `(blocks, blocks)`, 0 above the diagonal."""
    return (query @ key.T).tril()


def predicted_informativeness(query: Tensor, key: Tensor) -> Tensor:
    """I of one document from its block features `(blocks, p)` in O(blocks * p): `(blocks,)`."""
    later_queries = query.sum(0) - query.cumsum(0)
    earlier_keys = key.cumsum(0) - key
    return ((key * later_queries).sum(1) + (query * earlier_keys).sum(1)) / max(query.shape[0] - 1, 1)
