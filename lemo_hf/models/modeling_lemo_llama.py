"""Llama with LeMo: the stock classes, with layers that can run on kept rows and a segmented training loss."""

from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
)

from .configuration_lemo_llama import LemoLlamaConfig
from .rotary_decoder import RotaryDecoderLayer
from .sparse_causal_lm import SparseCausalLM, SparsePreTrainedModel, with_segmented_loss
from .sparse_decoder import SparseBackbone


class LemoLlamaDecoderLayer(RotaryDecoderLayer, LlamaDecoderLayer):
    """`LlamaDecoderLayer` that runs on kept rows when a `SparseBatch` comes with the call."""

    norm_class = LlamaRMSNorm


class LemoLlamaPreTrainedModel(SparsePreTrainedModel, LlamaPreTrainedModel):
    """`LlamaPreTrainedModel` whose weights may include predictors."""

    config: LemoLlamaConfig
    config_class = LemoLlamaConfig
    _no_split_modules = ["LemoLlamaDecoderLayer"]


class LemoLlamaModel(SparseBackbone, LemoLlamaPreTrainedModel, LlamaModel):
    """`LlamaModel` whose training forward runs on kept rows."""

    layer_class = LemoLlamaDecoderLayer


class LemoLlamaForCausalLM(SparseCausalLM, LemoLlamaPreTrainedModel, LlamaForCausalLM):
    """`LlamaForCausalLM` with token elimination and a segmented loss in training; stock in evaluation and generation."""

    base_model_class = LemoLlamaModel
    forward = with_segmented_loss(LlamaForCausalLM.forward)
