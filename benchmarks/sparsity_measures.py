"""What the paper's Table 3 and Figures 4, 7, 16 and 17 show, measured on a model: one window of text at a time, dense forward, no autograd.

The paper's Table 3 is the share of attention scores below 0.3 of the maximum; which scores, and the maximum of what, is not on
record. So each reading is measured, s_ij, S_mn and I_n being those of the score's definition (`lemo_hf/models/token_informativeness.py`):

- `token_scores`: s_ij over causal token pairs, against the largest of the layer's map.
- `block_scores`: S_mn over causal block pairs, against the largest of the layer's map.
- `probabilities`: each head's softmax probabilities, against the largest of their query; one query in `QUERY_STRIDE`.
- `tokens`: a token's informativeness, the mean of s over its partners as key and as query, against the document's largest.
- `blocks`: block informativeness I_n, against the document's largest.

Of windows longer than `ALL_QUERIES` tokens only every second, third, ... strip of `STRIP` queries is read for `token_scores` and
`tokens`, whose sums as keys are then those of the strips read, times as many. Memory: a strip of queries against all earlier keys;
never a quadratic matrix.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo_hf.evaluation.layer_scores import LayerScores, visit_layers
from lemo_hf.models.pattern_predictor import predicted_block_scores

CRITERION = 0.3
READINGS = ("token_scores", "block_scores", "probabilities", "tokens", "blocks")
STRIP, QUERY_STRIDE, ALL_QUERIES = 256, 16, 4096
KEYS = 512  # at a time: they and their scores stay in the processor's cache


@dataclass
class LayerWindow:
    """What one layer showed on one window.

    Args:
        below: Share below the criterion by reading.
        token_informativeness: Mean s of each token over its partners, `(tokens,)`; of a longer window, of the tokens that were read.
        token_peak: The largest s of each token with another one, likewise.
        informativeness: True I, `(blocks,)`.
        scores: True S, `(blocks, blocks)`.
        predicted_informativeness, predicted_scores: The same by the layer's predictor, if it was asked for.
    """

    below: dict[str, float]
    token_informativeness: Tensor
    token_peak: Tensor
    informativeness: Tensor
    scores: Tensor
    predicted_informativeness: Tensor | None = None
    predicted_scores: Tensor | None = None


def token_scores(query: Tensor, key: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """s_ij of the queries `start` to `stop` against keys 0 to `stop`, `(stop - start, stop)`; 0 where the key comes later."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    mean = query.new_zeros(stop - start, stop)
    for first in range(0, stop, KEYS):
        last = min(first + KEYS, stop)
        for head in range(heads):
            mean[:, first:last] += (query[start:stop, head] @ key[first:last, head // groups].T).relu_()
    return mean.mul_(scale / heads).tril_(start)


def share_of_probabilities_below(query: Tensor, key: Tensor, scale: float, share: float) -> float:
    """Share of causal softmax probabilities, all heads, that are below `share` of the largest of their query.

    p_ij / p_max = exp(q_i . k_j - max), so no softmax is needed.
    """
    rows = torch.arange(QUERY_STRIDE - 1, len(query), QUERY_STRIDE)
    groups, below, pairs = query.shape[1] // key.shape[1], 0, 0
    for part in rows.split(STRIP):
        later = torch.arange(int(part[-1]) + 1) > part[:, None]
        for head in range(query.shape[1]):
            logits = query[part, head] @ key[: int(part[-1]) + 1, head // groups].T * scale
            logits.masked_fill_(later, -math.inf)
            under = logits < logits.amax(1, keepdim=True) + math.log(share)
            below += int((under & ~later).sum())
            pairs += int((~later).sum())
    return below / pairs


def measure_layer(found: LayerScores, rotary: tuple[Tensor, Tensor], with_predictor: bool) -> LayerWindow:
    """One layer on one window.

    Args:
        found: The layer's inputs and block scores; one document, no padding.
        rotary: Cosines and sines of its positions, `(tokens, head_dim)`.
        with_predictor: Whether the layer's predictor is asked too.
    """
    query, key, _ = found.module.project_heads(found.hidden, rotary)
    tokens, scale, scores = len(query), found.module.attention_scale, found.scores[0]
    largest = float(scores.max())  # S is the maximum of s over a pair of blocks: that of the map is its own
    stride = max(1, tokens // ALL_QUERIES)
    below, as_key, as_query, peak = 0, *(query.new_zeros(tokens) for _ in range(3))
    read = torch.zeros(tokens, dtype=torch.bool)
    for start in range(stride // 2 * STRIP, tokens, stride * STRIP):
        stop = min(start + STRIP, tokens)
        strip = token_scores(query, key, scale, start, stop)
        read[start:stop] = True
        # What stands above the diagonal is 0, which is below the criterion, and no pair.
        below += int((strip < CRITERION * largest).sum()) - sum(stop - 1 - row for row in range(start, stop))
        strip[:, start:].fill_diagonal_(0)
        as_key[:stop] += strip.sum(0)
        as_query[start:stop] = strip.sum(1)
        peak[:stop] = torch.maximum(peak[:stop], strip.amax(0))
        peak[start:stop] = torch.maximum(peak[start:stop], strip.amax(1))
    by_token = (stride * as_key + as_query)[read] / (tokens - 1)
    pairs = int((torch.arange(tokens) + 1)[read].sum())
    informativeness = found.informativeness()[0]
    causal = torch.ones_like(scores, dtype=torch.bool).tril()
    shares = {
        "token_scores": below / pairs,
        "block_scores": share_below(scores[causal]),
        "probabilities": share_of_probabilities_below(query, key, scale, CRITERION),
        "tokens": share_below(by_token),
        "blocks": share_below(informativeness),
    }
    result = LayerWindow(shares, by_token, peak[read], informativeness, scores)
    if with_predictor:
        predictor: Any = found.module.lemo_predictor
        features = (found.documents.split_blocks(part)[0] for part in found.features())
        result.predicted_scores = predicted_block_scores(*features, predictor.distance.by_distance(len(scores)))
        result.predicted_informativeness = found.predicted()[0]
    return result


def share_below(values: Tensor) -> float:
    """Share of values below the criterion times their maximum."""
    return (values < CRITERION * values.max()).float().mean().item()


@torch.no_grad()
def measure_window(backbone: Any, tokens: Tensor, with_predictors: bool = False) -> list[LayerWindow]:
    """Every layer of the dense forward pass on one window of tokens, `(tokens,)`."""
    positions = torch.arange(len(tokens), device=tokens.device)
    parts = backbone.rotary_emb(torch.zeros(1, len(tokens), 1, device=tokens.device), positions[None])
    rotary = (parts[0][0], parts[1][0])
    layers: list[LayerWindow] = []
    visit_layers(
        backbone,
        {"input_ids": tokens[None]},
        lambda found: layers.append(measure_layer(found, rotary, with_predictors)),
    )
    return layers


def blocks_without(important: Tensor, block_size: int) -> float:
    """Share of blocks in which no token is important, `(tokens,)` bool; a shorter last block counts as one."""
    return 1 - torch.stack([part.any() for part in important.split(block_size)]).float().mean().item()


def blocks_without_by_chance(tokens: int, important: int, block_size: int) -> float:
    """The same for as many important tokens thrown anywhere, expected: without putting back, whole blocks."""
    return math.exp(
        math.lgamma(tokens - block_size + 1) - math.lgamma(tokens - block_size - important + 1)
        - math.lgamma(tokens + 1) + math.lgamma(tokens - important + 1)
    ) if important <= tokens - block_size else 0.0  # fmt: skip


def best(values: Tensor, count: int) -> Tensor:
    """Bool, true at the `count` largest; ties to the earlier one, as the selection's."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.sort(descending=True, stable=True).indices[:count]] = True
    return chosen


def overlap(one: Tensor, other: Tensor) -> float:
    """Share of the free blocks that `one` keeps which `other` keeps too; both keep half of them, first and last left out."""
    count = (len(one) - 2) // 2
    first, second = best(one[1:-1], count), best(other[1:-1], count)
    return (first & second).sum().item() / count


def relative_spread(informativeness: Tensor) -> float:
    """Standard deviation of I within a document over its mean, first and last block left out."""
    free = informativeness[1:-1]
    return (free.std() / free.mean()).item()
