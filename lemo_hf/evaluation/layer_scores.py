"""What the predictors are fitted to and judged by: every layer's attention input and true block scores on one batch.

The frozen model runs densely, in evaluation mode and without autograd; a hook in front of each layer hands the layer's inputs on
while the forward stands there. So the inputs of one layer live at a time, never a model's worth (64K tokens of an 8B: 17 GB).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.documents import Documents, find_documents
from ..models.pooled_predictor import block_rotary
from ..models.sparse_decoder import SparseBatch, SparseDecoderLayer
from ..models.token_elimination import gather_rows
from ..models.token_informativeness import block_informativeness

# Arguments of the backbone that say where documents lie; everything else of a batch (labels, counts) belongs to the head.
_BACKBONE_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class LayerScores:
    """One layer on one batch.

    Args:
        layer: Layer index.
        module: The layer.
        hidden: Its attention input (norm output) for all real rows, `(real_rows, hidden)`.
        scores: True S of each document, `(blocks, blocks)`.
        documents: The batch's documents.
        block_rotary: The model's position tensors, mean of every block.
    """

    layer: int
    module: SparseDecoderLayer
    hidden: Tensor
    scores: list[Tensor]
    documents: Documents
    block_rotary: tuple[Tensor, ...] = ()

    def informativeness(self) -> list[Tensor]:
        """True I of each document's blocks."""
        return [block_informativeness(scores) for scores in self.scores]

    @torch.no_grad()
    def predicted(self) -> list[Tensor]:
        """The same as this layer's predictor sees it."""
        if not self.scores:
            return []
        return self.module.lemo_predictor.informativeness_of(*self.features(), self.documents)

    def features(self) -> tuple[Tensor, Tensor]:
        """The predictor's query and key features of all blocks, `(blocks, p)` each."""
        return self.module.lemo_predictor(self.hidden, self.documents, self.block_rotary)


def backbone_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The part of a collated batch that the backbone takes, on `device`."""
    return {name: batch[name].to(device) for name in _BACKBONE_INPUTS if batch.get(name) is not None}


def documents_of(inputs: dict[str, Any], block_size: int) -> Documents:
    """The documents of a batch, from what `backbone_inputs` gave."""
    tokens = inputs["inputs_embeds" if "input_ids" not in inputs else "input_ids"]
    batch_size, seq_len = tokens.shape[:2]
    return find_documents(
        batch_size,
        seq_len,
        block_size,
        tokens.device,
        input_ids=inputs.get("input_ids"),
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        seq_idx=inputs.get("seq_idx"),
        cu_seq_lens=inputs.get("cu_seq_lens_q"),
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Runs `model` in evaluation mode and leaves every submodule as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def visit_layers(backbone: Any, batch: dict[str, Any], visit: Callable[[LayerScores], None]) -> None:
    """Runs the dense forward on a batch and calls `visit` at every layer, in order.

    Args:
        backbone: A model with `SparseBackbone` among its bases.
        batch: A collated batch with `input_ids` (or `inputs_embeds`) and, where there are any, mask and positions.
        visit: Receives the layer's scores, none of a batch that is padding alone; it may train that layer's predictor under
            `torch.enable_grad()`, together with other processes, which are at the same layer then.
    """
    lemo = backbone.config.lemo
    inputs = backbone_inputs(batch, next(backbone.parameters()).device)
    documents = documents_of(inputs, lemo.block_size)
    shared = SparseBatch(documents, lemo, len(backbone.layers), draw=0)

    def before_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1)
        if not documents.lengths:
            visit(LayerScores(module.layer_idx, module, residual[:0], [], documents))
            return
        hidden = module.attention_norm(gather_rows(residual, documents.rows))
        rotary = shared.flat_rotary(module.position_embeddings(kwargs))
        of_blocks = block_rotary(rotary, documents) if lemo.block_reduction == "mean" else ()
        rotary = tuple(part.index_select(0, documents.rows) for part in rotary)
        query, key, _ = module.project_heads(hidden, rotary)
        pairs = zip(query.split(documents.lengths), key.split(documents.lengths), strict=True)
        # Autocast would take the scores, and whatever is fitted to them, back to 16 bits.
        with torch.autocast(hidden.device.type, enabled=False):
            scores = [module.block_scores(q, k, lemo.block_size, lemo.block_reduction) for q, k in pairs]
            visit(LayerScores(module.layer_idx, module, hidden, scores, documents, of_blocks))

    hooks = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in backbone.layers]
    try:
        with evaluation_mode(backbone):
            backbone(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
