"""OPT with LeMo: learned positions, LayerNorm with bias, an MLP of two matrices with ReLU, and dropout after each sublayer.

Saved per kept row in rows of H, adapters on q, k, v and o: norms 2, shared input of q, k, v 1, attention 4, MLP I / H (the ReLU's
output, by which its backward knows where it was zero and which the second matrix reads), and with dropout two masks.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.opt.modeling_opt import (
    OPTDecoder,
    OPTDecoderLayer,
    OPTForCausalLM,
    OPTModel,
    OPTPreTrainedModel,
)

from .configuration_lemo_opt import LemoOPTConfig
from .documents import Documents
from .lemo_config import LemoConfigError
from .row_operations import shared_adapter_input, unpatched
from .sparse_causal_lm import SparseCausalLM, SparsePreTrainedModel, with_segmented_loss
from .sparse_decoder import SparseBackbone, SparseDecoderLayer


class LemoOPTDecoderLayer(SparseDecoderLayer, OPTDecoderLayer):
    """`OPTDecoderLayer` that runs on kept rows when a `SparseBatch` comes with the call."""

    def position_embeddings(self, layer_arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        return ()  # learned positions are in the residual stream already

    @property
    def attention_scale(self) -> float:
        return 1.0  # queries come scaled, in the stock order, which decides the last bit

    def attention_norm(self, rows: Tensor) -> Tensor:
        return self.self_attn_layer_norm(rows)

    def mlp_norm(self, rows: Tensor) -> Tensor:
        return self.final_layer_norm(rows)

    @property
    def plain_norms(self) -> tuple[nn.Module | None, nn.Module | None]:
        norms = self.self_attn_layer_norm, self.final_layer_norm
        first, second = (norm if type(norm) is nn.LayerNorm and unpatched(norm) else None for norm in norms)
        return first, second

    def project_heads(self, rows: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.self_attn
        with shared_adapter_input(attention.q_proj, attention.k_proj, attention.v_proj):
            projected = attention.q_proj(rows) * attention.scaling, attention.k_proj(rows), attention.v_proj(rows)
        query, key, value = (part.view(rows.shape[0], -1, attention.head_dim) for part in projected)
        return query, key, value

    def project_output(self, attended: Tensor) -> Tensor:
        with shared_adapter_input(self.self_attn.out_proj):
            projected = self.self_attn.out_proj(attended.flatten(1))
        return F.dropout(projected, self.dropout, self.training)

    def feed_forward(self, rows: Tensor) -> Tensor:
        with shared_adapter_input(self.fc1, self.fc2):
            activated = self.activation_fn(self.fc1(rows))
            return F.dropout(self.fc2(activated), self.dropout, self.training)


class LemoOPTPreTrainedModel(SparsePreTrainedModel, OPTPreTrainedModel):
    """`OPTPreTrainedModel` whose weights may include predictors."""

    config: LemoOPTConfig
    config_class = LemoOPTConfig
    _no_split_modules = ["LemoOPTDecoderLayer"]


class LemoOPTDecoder(SparseBackbone, LemoOPTPreTrainedModel, OPTDecoder):
    """`OPTDecoder` whose training forward runs on kept rows."""

    layer_class = LemoOPTDecoderLayer

    def sparse_position_ids(self, documents: Documents, batch_size: int, given: Tensor | None) -> Tensor | None:
        longest, reach = max(documents.lengths), self.config.max_position_embeddings
        if longest > reach:
            raise LemoConfigError(
                f"a document is longer than the model's {reach} learned positions; it has {longest} tokens; use shorter samples"
            )
        if given is not None:
            return given
        # Stock code would count the padding mask's ones, and count on through packed documents.
        return documents.positions(padding=-1).view(batch_size, -1)  # where stock code places padding


class LemoOPTModel(LemoOPTPreTrainedModel, OPTModel):
    """`OPTModel` around a `LemoOPTDecoder`."""

    def __init__(self, config: LemoOPTConfig) -> None:
        super().__init__(config)
        self.decoder = LemoOPTDecoder(config)
        self.post_init()


class LemoOPTForCausalLM(SparseCausalLM, LemoOPTPreTrainedModel, OPTForCausalLM):
    """`OPTForCausalLM` with token elimination and a segmented loss in training; stock in evaluation and generation."""

    base_model_class = LemoOPTModel
    forward = with_segmented_loss(OPTForCausalLM.forward)
