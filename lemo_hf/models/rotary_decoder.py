"""Decoder layers with rotary positions, norms before the sublayers and a gated MLP: Llama, Mistral, Qwen and their kin.

Their stock files name the same modules alike: `input_layernorm`, `self_attn.{q,k,v,o}_proj`, `post_attention_layernorm`,
`mlp.{gate,up,down}_proj`, and where a family has them `self_attn.q_norm` and `k_norm` over each head.
"""

from typing import Any

from torch import Tensor, nn

from .row_operations import apply_rotary, gated_activation, rms_norm, shared_adapter_input, unpatched
from .sparse_decoder import SparseDecoderLayer


class RotaryDecoderLayer(SparseDecoderLayer):
    """Mixin of such a stock layer (before it in the bases). All it calls are modules, so adapters, quantised weights and hooks
    on them work.
    """

    # The family's own norm: y = weight * x / rms(x), statistics in float32.
    norm_class: type[nn.Module]
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def position_embeddings(self, layer_arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        return layer_arguments["position_embeddings"]

    @property
    def attention_scale(self) -> float:
        return self.self_attn.scaling

    @property
    def attention_window(self) -> int | None:
        # Families whose layers differ in it note it in their attention module.
        return getattr(self.self_attn, "sliding_window", None)

    def attention_norm(self, rows: Tensor) -> Tensor:
        return self._norm(self.input_layernorm, rows)

    def mlp_norm(self, rows: Tensor) -> Tensor:
        return self._norm(self.post_attention_layernorm, rows)

    def project_heads(self, rows: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.self_attn
        with shared_adapter_input(attention.q_proj, attention.k_proj, attention.v_proj):
            projected = attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows)
        query, key, value = (part.view(rows.shape[0], -1, attention.head_dim) for part in projected)
        if hasattr(attention, "q_norm"):
            query, key = self._norm(attention.q_norm, query), self._norm(attention.k_norm, key)
        query, key = apply_rotary(query, key, *rotary)
        return query, key, value

    def project_output(self, attended: Tensor) -> Tensor:
        with shared_adapter_input(self.self_attn.o_proj):
            return self.self_attn.o_proj(attended.flatten(1))

    def feed_forward(self, rows: Tensor) -> Tensor:
        return gated_feed_forward(self.mlp, rows)

    @property
    def plain_norms(self) -> tuple[nn.Module | None, nn.Module | None]:
        return self._plain(self.input_layernorm), self._plain(self.post_attention_layernorm)

    def _plain(self, module: nn.Module) -> nn.Module | None:
        # A norm that something has replaced, patched or hooked (a trained copy, a fused kernel, offloading) is called as it is.
        return module if type(module) is self.norm_class and unpatched(module) else None

    def _norm(self, module: nn.Module, rows: Tensor) -> Tensor:
        if self._plain(module) is None:
            return module(rows)
        return rms_norm(rows, module.weight, module.variance_epsilon)  # type: ignore[arg-type]


def gated_feed_forward(mlp: Any, rows: Tensor) -> Tensor:
    """A gated MLP (gate_proj, up_proj, down_proj, act_fn) that saves gate and up of its rows only.

    Args:
        mlp: The stock module; its projections are called, so adapters and quantised weights on them work.
        rows: Normalised rows, `(rows, hidden)`.
    """
    with shared_adapter_input(mlp.gate_proj, mlp.up_proj):
        gate, up = mlp.gate_proj(rows), mlp.up_proj(rows)
    product = gated_activation(gate, up, mlp.act_fn)
    with shared_adapter_input(mlp.down_proj):
        return mlp.down_proj(product)
