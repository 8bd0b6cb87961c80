"""One LeMo layer apart from its model: with a selection of its own, and what autograd saves while it runs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lemo_hf.models.documents import find_documents
from lemo_hf.models.sparse_decoder import SparseBatch, SparseDecoderLayer, sparse_backbone
from lemo_hf.models.token_elimination import selection_of_blocks

from .decoder_layer import lemo_layer
from .tiny_models import lemo_model, stock_model, with_varied_vectors


def rotary_of(backbone: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """cos and sin of positions counted along the rows, or nothing where positions are learned."""
    if not hasattr(backbone, "rotary_emb"):
        return ()
    return backbone.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])


def layer_under_test(
    lora: dict | None,
    form: str,
    checkpoint: str,
    architecture: str = "llama",
    lengths: tuple[int, ...] = (17, 1, 31, 8),
    block_size: int = 4,
    **lemo: Any,
) -> tuple[SparseDecoderLayer, Tensor, tuple[Tensor, ...], SparseBatch]:
    """The last layer in float64, its input and a fixed selection over left-padded documents; the last row is padding only."""
    stock = with_varied_vectors(stock_model(architecture=architecture))
    model = lemo_model(stock, lora, attention_forward=form, checkpoint=checkpoint, block_size=block_size, **lemo).double()
    backbone = sparse_backbone(model)
    rows, width = len(lengths) + 1, max(lengths) + 2
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    documents = find_documents(rows, width, block_size, torch.device("cpu"), attention_mask=mask)
    generator = torch.Generator().manual_seed(3)
    marks = torch.rand(sum(documents.block_counts), generator=generator) < 0.5
    for part in documents.split_blocks(marks):
        part[0] = part[-1] = True
    assert 0 < marks.sum() < len(marks)
    hidden = torch.randn(rows, width, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    last = len(backbone.layers) - 1
    batch = SparseBatch(documents, backbone.config.lemo, last + 1, 0, selections={last: selection_of_blocks(marks, documents)})
    return backbone.layers[last], hidden, rotary_of(backbone, hidden), batch


def slowly(
    layer: SparseDecoderLayer,
    hidden: Tensor,
    rotary: tuple[Tensor, ...],
    batch: SparseBatch,
    form: str,
    window: int | None,
    nearby: int = 0,
    sees: Tensor | None = None,
) -> Tensor:
    """The layer document by document with the slow reference; rows of no document pass unchanged.

    `sees` is which kept rows a kept row sees, `(heads or 1, kept, kept)` of the whole batch, as a pattern has it.
    """
    flat = hidden.flatten(0, 1)
    rotary = tuple(part.expand(hidden.shape[0], -1, -1).flatten(0, 1) for part in rotary)
    kept = torch.zeros(flat.shape[0], dtype=torch.bool)
    kept[batch.selections[layer.layer_idx].kept_rows] = True
    output, first = flat, 0
    for start, length in zip(batch.documents.starts, batch.documents.lengths, strict=True):
        span = torch.arange(start, start + length)
        of_document = slice(first, first := first + int(kept[span].sum()))
        pairs = None if sees is None else sees[:, of_document, of_document]
        result = lemo_layer(layer, flat[span], tuple(part[span] for part in rotary), kept[span], form, window, nearby, pairs)
        output = output.index_copy(0, span, result)
    return output.view_as(hidden)


def saved_tensors(compute: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[Any, list[Tensor]]:
    """The result of `compute` and every tensor that autograd saves while it runs, parameters aside."""
    kept = []
    known = {weight.untyped_storage().data_ptr() for weight in parameters}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    return result, kept


def run_layer(
    form: str,
    checkpoint: str,
    keep_ratio: float,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    nearby: int | None = None,
    **changes: Any,
) -> tuple[Tensor, list[Tensor], dict[int, int], int]:
    """The last layer with LoRA on a batch of two documents of 61 tokens and blocks of 8.

    Returns:
        Its output (which must be held while storages are compared), the saved tensors, the bytes of their storages by address,
        and the number of kept rows.
    """
    stock = stock_model(architecture=architecture, **changes).to(dtype)
    lemo = {"attention_forward": form, "checkpoint": checkpoint, "keep_ratio": keep_ratio}
    model = lemo_model(stock, {}, **lemo, **({} if nearby is None else {"nearby_tokens": nearby}))
    backbone = sparse_backbone(model)
    documents = find_documents(2, 61, 8, torch.device("cpu"))
    batch = SparseBatch(documents, backbone.config.lemo, 2, 0)
    hidden = torch.randn(2, 61, 32).to(dtype).requires_grad_()
    rotary = rotary_of(backbone, hidden)
    result, saved = saved_tensors(lambda: backbone.layers[1].sparse_forward(hidden, rotary, batch), model.parameters())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return result, saved, storages, batch.selections[1].kept_rows.numel()
