"""One LeMo layer on one document, slowly: dense matrices, and a `.detach()` wherever the gradient is cut."""

import torch
from torch import Tensor


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = rows.shape[-1] // 2
    turned = torch.cat((-rows[..., half:], rows[..., :half]), dim=-1)
    return rows * cos[:, None] + turned * sin[:, None]


def normalise(norm, rows: Tensor) -> Tensor:
    """RMSNorm, or LayerNorm where the module has a bias."""
    if not hasattr(norm, "bias"):
        return norm.weight * rows * (rows.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    centred = rows - rows.mean(-1, keepdim=True)
    return norm.weight * centred * (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt() + norm.bias


def hidden_pairs(places: Tensor, window: int | None) -> Tensor:
    """Which keys `(rows, rows)` a query must not see: later ones, and those `window` places or more before it."""
    distance = places[:, None] - places[None, :]
    return (distance < 0) | (distance >= (torch.inf if window is None else window))


def heads_of(attention, rows: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """`(heads, rows, head_dim)` each; keys and values repeated for their query heads."""
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    query, key, value = (projection(rows).view(rows.shape[0], -1, attention.head_dim) for projection in projections)
    if hasattr(attention, "q_norm"):
        query, key = normalise(attention.q_norm, query), normalise(attention.k_norm, key)
    if rotary:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    repeats = query.shape[1] // key.shape[1]
    return tuple(
        part.repeat_interleave(times, 1).transpose(0, 1) for part, times in ((query, 1), (key, repeats), (value, repeats))
    )


def project_output(attention, rows: Tensor) -> Tensor:
    return (attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj)(rows)


def feed_forward(layer, rows: Tensor) -> Tensor:
    """The MLP with its norm: gated, or OPT's two matrices."""
    if hasattr(layer, "fc1"):
        return layer.fc2(layer.fc1(normalise(layer.final_layer_norm, rows)).clamp_min(0))
    return layer.mlp(normalise(layer.post_attention_layernorm, rows))


def lemo_layer(
    layer,
    hidden: Tensor,
    rotary: tuple[Tensor, ...],
    kept: Tensor,
    form: str,
    window: int | None = None,
    nearby: int = 0,
    sees: Tensor | None = None,
) -> Tensor:
    """The layer's output `(tokens, hidden)` for one document; dropout is left out.

    Args:
        layer: A decoder layer with rotary positions or OPT's, its projections possibly wrapped by adapters.
        hidden: `(tokens, hidden)`.
        rotary: cos and sin, `(tokens, head_dim)` each, or nothing.
        kept: Whether each token is kept, `(tokens,)` bool.
        form: "sparse", "exact" or "kept_keys".
        window: Places that a token sees, itself included.
        nearby: Latest places that a token sees though they are not kept, itself included: with "kept_keys" every token, in the
            sparse form one that is not kept.
        sees: Which kept tokens a kept token sees in the sparse form, `(heads or 1, kept, kept)` bool; all earlier ones without.
    """
    attention, scale = layer.self_attn, layer.self_attn.head_dim**-0.5
    norm = layer.self_attn_layer_norm if hasattr(layer, "self_attn_layer_norm") else layer.input_layernorm
    places = torch.arange(len(hidden))
    if form == "sparse":
        query, key, value = heads_of(attention, normalise(norm, hidden[kept]), tuple(part[kept] for part in rotary))
        unseen = hidden_pairs(places[kept], window)
        scores = (query @ key.mT * scale).masked_fill(unseen if sees is None else unseen | ~sees, -torch.inf)
        mixed = scores.softmax(-1) @ value
        update = torch.zeros_like(hidden).index_put((kept,), project_output(attention, mixed.transpose(0, 1).flatten(1)))
        if nearby:
            query, key, value = heads_of(attention, normalise(norm, hidden), rotary)
            unseen = hidden_pairs(places, nearby) | hidden_pairs(places, window)
            mixed = (query @ key.mT * scale).masked_fill(unseen, -torch.inf).softmax(-1) @ value
            local = project_output(attention, mixed.transpose(0, 1).flatten(1)).detach()
            update = torch.where(kept[:, None], update, local)
    else:
        query, key, value = heads_of(attention, normalise(norm, hidden), rotary)
        # Keys and values that are not kept are constants, to the queries too.
        scores = query @ torch.where(kept[None, :, None], key, key.detach()).mT * scale
        value = torch.where(kept[None, :, None], value, value.detach())
        unseen = hidden_pairs(places, window)
        if form == "kept_keys":
            unseen |= hidden_pairs(places, nearby) & ~kept
        mixed = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ value
        mixed = torch.where(kept[None, :, None], mixed, mixed.detach()).transpose(0, 1).flatten(1)
        projected = project_output(attention, mixed)
        update = torch.where(kept[:, None], projected, projected.detach())
    middle = hidden + update
    after = feed_forward(layer, middle)
    return middle + torch.where(kept[:, None], after, after.detach())
