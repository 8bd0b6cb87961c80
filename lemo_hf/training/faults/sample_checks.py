"""What a batch must be before a model reads it, and what of it predictors can learn from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import LemoError, LemoRunError
from ...evaluation.layer_scores import LayerScores
from ...models.segmented_loss import IGNORE_INDEX

# Largest difference of rows that are alike, over their largest value: above what rounding to 16 bits makes of equal ones.
_ALIKE = 0.05
# What says of a row that it holds several documents.
_PLACES = ("position_ids", "seq_idx", "cu_seq_lens_q")


def require_sound(batch: Mapping[str, Any], config: Any, name: Callable[[int | None], str]) -> None:
    """Refuses what no forward can take; one wait for the device for all of it.

    Args:
        batch: Collated inputs.
        config: The model's config: vocabulary and, where positions are learned, their number.
        name: Names a row of the batch, or with `None` all of it.

    Raises:
        LemoError: If tokens or labels are empty, of another shape or type, or outside the vocabulary.
    """
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(tokens, Tensor):
        return
    if tokens.numel() == 0:
        raise LemoError(f"sample has no token; {name(0 if tokens.dim() and tokens.shape[0] else None)}; leave it out")
    _require_whole_numbers(tokens, "tokens", name)
    limits = {"token": (tokens, config.vocab_size)}
    if isinstance(labels, Tensor):
        _require_whole_numbers(labels, "labels", name)
        if labels.shape != tokens.shape:
            shapes = f"{tuple(labels.shape)} labels for {tuple(tokens.shape)} tokens"
            raise LemoError(f"labels and tokens differ in shape; {shapes}, {name(None)}; give one label per token, -100 for none")
        limits["label"] = (labels.masked_fill(labels == IGNORE_INDEX, 0), config.vocab_size)
    # Learned positions (OPT) end; rotary ones go on. Several documents in a row may together be longer: the model looks at each.
    length = tokens.shape[1]
    is_one = all(batch.get(name) is None for name in _PLACES)
    if is_one and getattr(config, "rope_parameters", None) is None and length > config.max_position_embeddings:
        raise LemoError(
            f"sample is longer than the model's {config.max_position_embeddings:,} positions; {length:,} tokens, {name(0)}; "
            "cut it, or pack with a shorter seq_len"
        )
    bounds = torch.stack([edge for values, _ in limits.values() for edge in values.aminmax()]).tolist()
    for place, (what, (values, size)) in enumerate(limits.items()):
        if bounds[2 * place] < 0 or bounds[2 * place + 1] >= size:
            row, column = ((values < 0) | (values >= size)).nonzero()[0].tolist()
            raise LemoError(
                f"{what} is outside the vocabulary of {size:,}; {values[row, column].item()} at place {column}, {name(row)}; "
                + ("use the model's own tokenizer, or resize its embeddings" if what == "token" else "use -100 for no label")
            )


def _require_whole_numbers(values: Tensor, what: str, name: Callable[[int | None], str]) -> None:
    if values.dtype not in (torch.int64, torch.int32) or values.dim() != 2:
        raise LemoError(
            f"{what} must be whole numbers, (batch, tokens); got {values.dtype}, {tuple(values.shape)}, {name(None)}; "
            "convert them in the data set or the collator"
        )


def require_finite_embeddings(batch: Mapping[str, Any], embeddings: Any, name: Callable[[int | None], str]) -> None:
    """Refuses tokens whose embedding is not finite: predictors would be fitted to nothing else from there on.

    Args:
        batch: Collated inputs.
        embeddings: The model's input embeddings.
        name: As in `require_sound`.

    Raises:
        LemoError: If there is such a token.
    """
    tokens, weight = batch.get("input_ids"), getattr(embeddings, "weight", None)
    # Sharded by FSDP2, no process has all of them.
    if not isinstance(tokens, Tensor) or not isinstance(weight, Tensor) or isinstance(weight, DTensor) or weight.numel() == 0:
        return
    used = tokens.flatten().unique()
    bad = used[~weight.detach()[used.to(weight.device)].isfinite().all(-1).cpu()].tolist()
    if bad:
        raise LemoError(
            f"token has an embedding that is not finite; token {bad[0]}, {name(None)}; "
            "initialise the embeddings of tokens that were added, or leave such samples out"
        )


def without_uniform_documents(found: LayerScores) -> LayerScores:
    """Leaves a document whose rows are all alike, such as one token a million times, without blocks to learn from.

    Its features cannot tell its blocks apart. As a first document it would set the scale of all features by rounding errors.

    Raises:
        LemoRunError: If the layer's input is not finite.
    """
    scores = []
    for rows, of_document in zip(found.hidden.split(found.documents.lengths), found.scores, strict=True):
        largest = rows.abs().amax().item()
        if not math.isfinite(largest):
            raise LemoRunError(
                f"attention input is not finite; layer {found.layer}; look at the model's weights, and at the sample that is read"
            )
        alike = (rows - rows[:1]).abs().amax().item() <= _ALIKE * largest
        scores.append(of_document[:1, :1] if alike else of_document)
    return replace(found, scores=scores)
