"""Qwen2 (and Qwen2.5) with LeMo: as Llama, with biased query, key and value projections and a window in some layers."""

from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
)

from .configuration_lemo_qwen2 import LemoQwen2Config
from .rotary_decoder import RotaryDecoderLayer
from .sparse_causal_lm import SparseCausalLM, SparsePreTrainedModel, with_segmented_loss
from .sparse_decoder import SparseBackbone


class LemoQwen2DecoderLayer(RotaryDecoderLayer, Qwen2DecoderLayer):
    """`Qwen2DecoderLayer` that runs on kept rows when a `SparseBatch` comes with the call."""

    norm_class = Qwen2RMSNorm


class LemoQwen2PreTrainedModel(SparsePreTrainedModel, Qwen2PreTrainedModel):
    """`Qwen2PreTrainedModel` whose weights may include predictors."""

    config: LemoQwen2Config
    config_class = LemoQwen2Config
    _no_split_modules = ["LemoQwen2DecoderLayer"]


class LemoQwen2Model(SparseBackbone, LemoQwen2PreTrainedModel, Qwen2Model):
    """`Qwen2Model` whose training forward runs on kept rows."""

    layer_class = LemoQwen2DecoderLayer


class LemoQwen2ForCausalLM(SparseCausalLM, LemoQwen2PreTrainedModel, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with token elimination and a segmented loss in training; stock in evaluation and generation."""

    base_model_class = LemoQwen2Model
    forward = with_segmented_loss(Qwen2ForCausalLM.forward)
