"""Qwen3 with LeMo: as Llama, with norms over each head's queries and keys and a window in some layers."""

from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
)

from .configuration_lemo_qwen3 import LemoQwen3Config
from .rotary_decoder import RotaryDecoderLayer
from .sparse_causal_lm import SparseCausalLM, SparsePreTrainedModel, with_segmented_loss
from .sparse_decoder import SparseBackbone


class LemoQwen3DecoderLayer(RotaryDecoderLayer, Qwen3DecoderLayer):
    """`Qwen3DecoderLayer` that runs on kept rows when a `SparseBatch` comes with the call."""

    norm_class = Qwen3RMSNorm


class LemoQwen3PreTrainedModel(SparsePreTrainedModel, Qwen3PreTrainedModel):
    """`Qwen3PreTrainedModel` whose weights may include predictors."""

    config: LemoQwen3Config
    config_class = LemoQwen3Config
    _no_split_modules = ["LemoQwen3DecoderLayer"]


class LemoQwen3Model(SparseBackbone, LemoQwen3PreTrainedModel, Qwen3Model):
    """`Qwen3Model` whose training forward runs on kept rows."""

    layer_class = LemoQwen3DecoderLayer


class LemoQwen3ForCausalLM(SparseCausalLM, LemoQwen3PreTrainedModel, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with token elimination and a segmented loss in training; stock in evaluation and generation."""

    base_model_class = LemoQwen3Model
    forward = with_segmented_loss(Qwen3ForCausalLM.forward)
