"""What the baselines need of a stock decoder: its layers, their norms and heads, and rows chosen along the sequence."""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ...errors import LemoError

Positions = tuple[Tensor, ...]  # cos and sin, `(batch or 1, seq_len, head_dim)`; none where positions are in the rows already


def decoder_layers(model: Any) -> nn.ModuleList:
    """The layers of a stock causal language model without adapters."""
    return getattr(model.model, "decoder", model.model).layers


def norms(layer: Any) -> tuple[nn.Module, nn.Module]:
    """The norms before attention and before the MLP."""
    if hasattr(layer, "input_layernorm"):
        return layer.input_layernorm, layer.post_attention_layernorm
    return layer.self_attn_layer_norm, layer.final_layer_norm


def feed_forward(layer: Any, rows: Tensor) -> Tensor:
    """The MLP, without norm, dropout and residual."""
    return layer.mlp(rows) if hasattr(layer, "mlp") else layer.fc2(layer.activation_fn(layer.fc1(rows)))


def heads(layer: Any, rows: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(batch, rows, heads, head_dim)` of normalised rows `(batch, rows, hidden)`, positions applied.

    OPT scales its queries here: see [`attention_scale`].
    """
    attention = layer.self_attn
    projected = attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows)
    query, key, value = (part.unflatten(-1, (-1, attention.head_dim)) for part in projected)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if positions:
        return *apply_rotary_pos_emb(query, key, *positions, unsqueeze_dim=2), value
    return query * attention.scaling, key, value


def attention_scale(layer: Any, positions: Positions) -> float:
    """Factor on the dot products of [`heads`]."""
    return layer.self_attn.scaling if positions else 1.0


def project_output(layer: Any, attended: Tensor) -> Tensor:
    """Attention's output projection of `(batch, rows, heads, head_dim)`."""
    attention = layer.self_attn
    return (attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)(attended.flatten(-2))


def positions_of(arguments: dict[str, Any], rows: Tensor | None = None) -> Positions:
    """The position tensors in a layer's keyword arguments, of some places of the sequence, `(rows,)`, or of all."""
    positions = arguments.get("position_embeddings") or ()
    return tuple(positions) if rows is None else tuple(part.index_select(1, rows) for part in positions)


def refuse_unsupported(config: Any, name: str) -> None:
    """Raises `LemoError` where a baseline's layer would leave out what the stock one does.

    Args:
        config: The stock model's config.
        name: The baseline.
    """
    found = {
        "dropout": getattr(config, "dropout", 0.0),
        "attention_dropout": getattr(config, "attention_dropout", 0.0),
        "sliding_window": getattr(config, "sliding_window", None),
        "do_layer_norm_before": not getattr(config, "do_layer_norm_before", True),
    }
    for field, value in found.items():
        if value:
            shown = getattr(config, field)
            raise LemoError(f"the baseline {name} does not know {field}; the config has {shown}; use a config without it")
