"""Llama with LeMo: the stock classes, with layers that can run on kept rows and a segmented training loss."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import can_return_tuple

from .configuration_lemo_llama import LemoLlamaConfig
from .pattern_predictor import PatternPredictor, PredictorParameters
from .row_operations import rms_norm, shared_adapter_input
from .segmented_loss import segmented_causal_lm_loss
from .sparse_decoder import SparseBackbone, SparseBatch, SparseDecoderLayer, gated_feed_forward


def _norm(module: nn.Module, rows: Tensor) -> Tensor:
    # A norm that something has replaced, patched or hooked (a trained copy, a fused kernel, offloading) is called as it is.
    patched = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    if type(module) is LlamaRMSNorm and not patched:
        return rms_norm(rows, module.weight, module.variance_epsilon)
    return module(rows)


class LemoLlamaDecoderLayer(SparseDecoderLayer, LlamaDecoderLayer):
    """`LlamaDecoderLayer` that runs on kept rows when a `SparseBatch` comes with the call."""

    def __init__(self, config: LemoLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.lemo_predictor = PatternPredictor.from_config(config.lemo, config.hidden_size, layer_idx)

    def forward(self, hidden_states: Tensor, *args: Any, sparse_batch: SparseBatch | None = None, **kwargs: Any) -> Tensor:
        if sparse_batch is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.sparse_forward(hidden_states, kwargs["position_embeddings"], sparse_batch)

    @property
    def attention_scale(self) -> float:
        return self.self_attn.scaling

    def attention_norm(self, rows: Tensor) -> Tensor:
        return _norm(self.input_layernorm, rows)

    def project_heads(self, rows: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.self_attn
        with shared_adapter_input(attention.q_proj, attention.k_proj, attention.v_proj):
            projected = attention.q_proj(rows), attention.k_proj(rows), attention.v_proj(rows)
        query, key, value = (part.view(rows.shape[0], -1, attention.head_dim) for part in projected)
        query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=1)
        return query, key, value

    def project_output(self, attended: Tensor) -> Tensor:
        with shared_adapter_input(self.self_attn.o_proj):
            return self.self_attn.o_proj(attended.flatten(1))

    def feed_forward(self, rows: Tensor) -> Tensor:
        return gated_feed_forward(self.mlp, _norm(self.post_attention_layernorm, rows))


class LemoLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the LeMo classes share: how predictors are initialised, loaded and kept in float32."""

    config: LemoLlamaConfig
    config_class = LemoLlamaConfig
    _no_split_modules = ["LemoLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": LemoLlamaDecoderLayer, "attentions": LlamaAttention}
    # A stock checkpoint has no predictors: they are initialised and trained by the first phase of a run.
    _keys_to_ignore_on_load_missing = [r"lemo_predictor"]
    _keep_in_fp32_modules_strict = ["lemo_predictor"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PredictorParameters):
            module.reset_parameters()


class LemoLlamaModel(SparseBackbone, LemoLlamaPreTrainedModel, LlamaModel):
    """`LlamaModel` whose training forward runs on kept rows."""

    def __init__(self, config: LemoLlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LemoLlamaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.post_init()


class LemoLlamaForCausalLM(LemoLlamaPreTrainedModel, LlamaForCausalLM):
    """`LlamaForCausalLM` with token elimination and a segmented loss in training; stock in evaluation and generation."""

    def __init__(self, config: LemoLlamaConfig) -> None:
        super().__init__(config)
        self.model = LemoLlamaModel(config)
        self.post_init()

    # The stock signature: generate and Trainer read its names to decide what they pass on and which columns they drop.
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As in `LlamaForCausalLM`. In training with labels the result carries the loss and no logits."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        next_labels = kwargs.get("shift_labels")
        if not (self.training and self.config.lemo.enabled) or (labels is None and next_labels is None):
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("shift_labels", None)
        outputs = self.model(**inputs, **kwargs, return_dict=True)
        loss = segmented_causal_lm_loss(
            outputs.last_hidden_state, labels, self.lm_head, self.config.lemo.segment_size, num_items_in_batch, next_labels
        )
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
