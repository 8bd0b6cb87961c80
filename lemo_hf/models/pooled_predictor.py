"""Predictor of block informativeness by signed means, `block_reduction="mean"` (ours; the paper's is in pattern_predictor.py).

S_mn is then a product of pooled queries and keys, so a layer's own projections predict it, cut down to the directions that
informativeness varies with:

    Q_m = R(m) (mean of x_t over tokens t of block m) Wq       (K_n alike)
    S_mn ~ Q_m . K_n + f(m - n)

R(m) turns pairs of features as the model's own rotary positions turn its queries and keys, on average over the tokens of block m:
fast rotations average out, as they do in the block's mean query, and whatever RoPE scaling the model has, the features follow it.
That what a token says and where in its block it stands are independent is all that is assumed. Models without rotary positions
have R = 1.

Pooling comes before the matrices: one pass over the rows, then 2 * hidden * p multiply-adds a block. Per layer 2 * hidden * p + p / 2
+ 48 parameters.
"""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .documents import Documents
from .lemo_config import LemoConfig, LemoConfigError
from .pattern_predictor import DistanceProfile, LowRankMatrices, PatternPredictor, PredictorParameters, predicted_informativeness


class RotaryPairs(PredictorParameters):
    """Which of the model's rotary frequencies turns each pair of features, as whole numbers; below 0 it is not turned."""

    def __init__(self, pairs: int) -> None:
        super().__init__((pairs,))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """No pair is turned."""
        self[0].fill_(-1)


class _PooledFeatures(nn.Module):
    def __init__(self, hidden_size: int, features: int) -> None:
        super().__init__()
        self.matrices = LowRankMatrices((hidden_size, features))


class PooledPredictor(nn.Module):
    """The query and key matrices, the rotary pairs and the distance profile of one layer; it takes the place of a `PatternPredictor`.

    Args:
        hidden_size: Width of the layer's attention input.
        features: Length p of a block's features, an even number; feature c and feature c + p / 2 are a pair.
    """

    def __init__(self, hidden_size: int, features: int) -> None:
        super().__init__()
        self.query = _PooledFeatures(hidden_size, features)
        self.key = _PooledFeatures(hidden_size, features)
        self.rotary = RotaryPairs(features // 2)
        self.distance = DistanceProfile()
        self._turns_nothing: tuple[int, int | None] | None = None  # which state of the pairs is known to turn none

    @property
    def sizes(self) -> list[int]:
        """`[p]` as it is now."""
        return [self.query.matrices[0].shape[1]]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the matrices anew, turns no pair and flattens the profile."""
        for part in (self.query.matrices, self.key.matrices, self.rotary, self.distance):
            part.reset_parameters(generator)

    def forward(self, hidden_states: Tensor, documents: Documents, rotary: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
        """Block features of all documents.

        Args:
            hidden_states: Attention input of all real rows, `(real_rows, hidden)`, any float dtype.
            documents: The batch's documents.
            rotary: Mean cosines and sines of every block, `(blocks, head_dim)` each, or nothing for a model without.

        Returns:
            Q and K, `(blocks, p)` float32 each, over all documents.

        Raises:
            LemoConfigError: If pairs are to be turned and there are no rotary positions.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.of_blocks(pooled_rows(hidden_states, documents), rotary)

    def of_blocks(self, pooled: Tensor, rotary: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
        """The same from `pooled_rows`."""
        query, key = (pooled @ network.matrices[0] for network in (self.query, self.key))
        if not rotary:
            self._refuse_turned_pairs()
            return query, key
        index = self.rotary[0].long()
        cosine, sine = (part.float()[:, index.clamp_min(0)] for part in rotary)
        turned = index >= 0
        cosine, sine = torch.where(turned, cosine, 1.0), torch.where(turned, sine, 0.0)
        return _turned(query, cosine, sine), _turned(key, cosine, sine)

    def _refuse_turned_pairs(self) -> None:
        # The device is asked once, not at every forward: in ratio mode nothing in a layer waits for it. While torch.compile
        # traces, and on shapes alone, nothing can be asked.
        pairs = self.rotary[0]
        if torch.compiler.is_compiling() or isinstance(pairs, FakeTensor):
            return
        # Tensors made in inference mode do not say whether they have changed.
        version = None if pairs.is_inference() else pairs._version
        if version is not None and self._turns_nothing == (id(pairs), version):
            return
        if turned := int((pairs >= 0).sum()):
            raise LemoConfigError(
                f"the predictor turns {turned} pairs of features by rotary positions; got none; pass those of the model"
            )
        self._turns_nothing = id(pairs), version

    def informativeness(self, hidden_states: Tensor, documents: Documents, rotary: tuple[Tensor, ...] = ()) -> list[Tensor]:
        """Predicted I of each document's blocks, `(blocks_of_document,)` each; arguments as in `forward`."""
        query, key = self(hidden_states, documents, rotary)
        return self.informativeness_of(query, key, documents)

    def informativeness_of(self, query: Tensor, key: Tensor, documents: Documents) -> list[Tensor]:
        """The same from the block features of all documents, `(blocks, p)` each."""
        pairs = zip(documents.split_blocks(query), documents.split_blocks(key), strict=True)
        return [predicted_informativeness(q, k, self.distance.by_distance(len(q))) for q, k in pairs]


def pooled_rows(rows: Tensor, documents: Documents) -> Tensor:
    """Mean of each block's rows, `(blocks, hidden)` float32, from all real rows."""
    size, pooled = documents.block_size, []
    for part in rows.split(documents.lengths):
        whole = part.shape[0] // size * size
        # Read where they stand: padding the last block would copy all rows.
        pooled.append(part[:whole].unflatten(0, (-1, size)).mean(1, dtype=torch.float32))
        if whole < part.shape[0]:
            pooled.append(part[whole:].mean(0, keepdim=True, dtype=torch.float32))
    return torch.cat(pooled)


def block_rotary(rotary: tuple[Tensor, ...], documents: Documents) -> tuple[Tensor, ...]:
    """Mean position tensors of every block, `(blocks, dim)` float32 each, from those by flat row: where a rotation is fast they are
    small, as a block's mean query is.
    """
    rows = rotary if documents.has_no_padding else tuple(part.index_select(0, documents.rows) for part in rotary)
    return tuple(pooled_rows(part, documents) for part in rows)


def _turned(features: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = features.chunk(2, 1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), 1)


LayerPredictor = PatternPredictor | PooledPredictor


def layer_predictor(config: LemoConfig, hidden_size: int, layer: int) -> LayerPredictor:
    """The predictor of a layer, of the kind that `block_reduction` asks for.

    Raises:
        LemoConfigError: If it would be wider than the model; nothing is allocated then.
    """
    if config.block_reduction == "max":
        return PatternPredictor.from_config(config, hidden_size, layer)
    config.validate_widths(hidden_size)
    features = config.predictor_sizes[layer][0] if config.predictor_sizes else config.predictor_features
    return PooledPredictor(hidden_size, features)
