"""One LeMo layer on one document, slowly: dense matrices, and a `.detach()` wherever the gradient is cut."""

import torch
from torch import Tensor


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = rows.shape[-1] // 2
    turned = torch.cat((-rows[..., half:], rows[..., :half]), dim=-1)
    return rows * cos[:, None] + turned * sin[:, None]


def normalise(norm, rows: Tensor) -> Tensor:
    return norm.weight * rows * (rows.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def probabilities(scores: Tensor) -> Tensor:
    """Causal softmax of `(heads, rows, rows)`."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def heads_of(attention, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(heads, rows, head_dim)` each; keys and values repeated for their query heads."""
    split = (
        part.view(rows.shape[0], -1, attention.head_dim)
        for part in (attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows))
    )
    query, key, value = split
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    repeats = query.shape[1] // key.shape[1]
    return tuple(
        part.repeat_interleave(times, 1).transpose(0, 1) for part, times in ((query, 1), (key, repeats), (value, repeats))
    )


def lemo_layer(layer, hidden: Tensor, cos: Tensor, sin: Tensor, kept: Tensor, form: str) -> Tensor:
    """The layer's output `(tokens, hidden)` for one document.

    Args:
        layer: A Llama decoder layer, its projections possibly wrapped by adapters.
        hidden: `(tokens, hidden)`.
        cos, sin: `(tokens, head_dim)`.
        kept: Whether each token is kept, `(tokens,)` bool.
        form: "sparse" or "exact".
    """
    attention = layer.self_attn
    if form == "sparse":
        query, key, value = heads_of(attention, normalise(layer.input_layernorm, hidden[kept]), cos[kept], sin[kept])
        mixed = probabilities(query @ key.mT * attention.scaling) @ value
        update = torch.zeros_like(hidden).index_put((kept,), attention.o_proj(mixed.transpose(0, 1).flatten(1)))
    else:
        query, key, value = heads_of(attention, normalise(layer.input_layernorm, hidden), cos, sin)
        scores = query @ key.mT * attention.scaling
        # Pairs with a key that is not kept: their probabilities are right, but nothing flows back through them.
        scores = torch.where(kept[None, None, :], scores, scores.detach())
        value = torch.where(kept[None, :, None], value, value.detach())
        mixed = probabilities(scores) @ value
        mixed = torch.where(kept[None, :, None], mixed, mixed.detach()).transpose(0, 1).flatten(1)
        update = torch.where(kept[:, None], attention.o_proj(mixed), attention.o_proj(mixed).detach())
    middle = hidden + update
    feed_forward = layer.mlp(normalise(layer.post_attention_layernorm, middle))
    return middle + torch.where(kept[:, None], feed_forward, feed_forward.detach())
