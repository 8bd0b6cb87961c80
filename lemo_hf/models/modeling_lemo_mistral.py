"""Mistral with LeMo: as Llama, with a sliding window in every layer where the config has one."""

from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
    MistralRMSNorm,
)

from .configuration_lemo_mistral import LemoMistralConfig
from .rotary_decoder import RotaryDecoderLayer
from .sparse_causal_lm import SparseCausalLM, SparsePreTrainedModel, with_segmented_loss
from .sparse_decoder import SparseBackbone


class LemoMistralDecoderLayer(RotaryDecoderLayer, MistralDecoderLayer):
    """`MistralDecoderLayer` that runs on kept rows when a `SparseBatch` comes with the call."""

    norm_class = MistralRMSNorm

    @property
    def attention_window(self) -> int | None:
        return self.self_attn.config.sliding_window


class LemoMistralPreTrainedModel(SparsePreTrainedModel, MistralPreTrainedModel):
    """`MistralPreTrainedModel` whose weights may include predictors."""

    config: LemoMistralConfig
    config_class = LemoMistralConfig
    _no_split_modules = ["LemoMistralDecoderLayer"]


class LemoMistralModel(SparseBackbone, LemoMistralPreTrainedModel, MistralModel):
    """`MistralModel` whose training forward runs on kept rows."""

    layer_class = LemoMistralDecoderLayer


class LemoMistralForCausalLM(SparseCausalLM, LemoMistralPreTrainedModel, MistralForCausalLM):
    """`MistralForCausalLM` with token elimination and a segmented loss in training; stock in evaluation and generation."""

    base_model_class = LemoMistralModel
    forward = with_segmented_loss(MistralForCausalLM.forward)
