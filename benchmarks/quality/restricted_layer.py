"""A layer whose gradient is restricted as one likes, for questions that the package's layers do not ask.

`lemo_hf` keeps the same rows in a layer's attention and MLP, and of the others keys and values as constants, because that is what
saves memory. Here every row is computed under autograd and what a restriction would not save is detached where it would be missing:
the gradient is that of a layer that keeps these rows, the bytes and the time are not. With the rows of a `Selection` for both parts
it is the package's exact form (tests/test_quality_choices.py compares the two).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo_hf.models.document_attention import AttentionScope, attend, with_kept_row_gradient
from lemo_hf.models.documents import Documents
from lemo_hf.models.kept_and_rest_rows import heads_of
from lemo_hf.models.token_elimination import Selection


@dataclass(frozen=True)
class Restriction:
    """Where one layer's gradient flows, for flat rows of documents without padding between them.

    Args:
        attention: Rows that attention is saved for.
        mlp: Whether each row's MLP is saved, `(rows,)` bool, or a function that says so of the residual stream after attention.
        keys: What a kept query's backward pass sees: `"all"` keys, the others as constants; `"kept"` keys only; these `"centred"`; or
            all of them with gradients of the others' `"weights"` too, which end at the layer's input.
        attention_weights, mlp_weights: What the gradient entering a row's branch is multiplied by, `(rows,)`; `None` for one.
    """

    attention: Selection
    mlp: Tensor | Callable[[Tensor], Tensor]
    keys: str = "all"
    attention_weights: Tensor | None = None
    mlp_weights: Tensor | None = None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0][:, None], None


def only_where(rows: Tensor, kept: Tensor, weights: Tensor | None = None) -> Tensor:
    """`rows` `(rows, ...)`, whose gradient is zero but for the `kept` ones, `(rows,)` bool, and scaled there by `weights`."""
    scale = kept.to(rows.dtype) if weights is None else kept * weights.to(rows.dtype)
    return _ScaledGradient.apply(rows.flatten(1), scale).view_as(rows)


def restricted_forward(
    layer: Any, residual: Tensor, rotary: tuple[Tensor, ...], documents: Documents, given: Restriction
) -> Tensor:
    """The dense forward pass of a layer with a restricted gradient.

    Args:
        layer: A LeMo layer.
        residual: Its input, `(rows, hidden)`, every row real.
        rotary: Position tensors by flat row.
        documents: The batch's documents.
        given: The restriction.

    Returns:
        Its output, `(rows, hidden)`.
    """
    _refuse_unsupported(layer, documents)
    kept_rows = given.attention.kept_rows
    kept = torch.zeros(len(residual), dtype=torch.bool).index_fill_(0, kept_rows, True)
    normed = layer.attention_norm(residual)
    if given.keys == "weights":
        normed = only_where(normed, kept)
    query, key, value = heads_of(layer, normed, rotary, documents.rows)
    scope = AttentionScope(documents.lengths, layer.attention_scale)
    with torch.no_grad():
        attended, lse = attend(query, key, value, scope)
    if given.keys in ("kept", "centred") and not bool(kept.all()):
        inner = AttentionScope(given.attention.kept_lengths, layer.attention_scale)
        query, key, value, output, lse = (rows.index_select(0, kept_rows) for rows in (query, key, value, attended, lse))
        if given.keys == "centred":
            key, lse = _centred(query, key, lse, inner)
        output = with_kept_row_gradient(query, key, value, output, lse, inner)
        attended = attended.index_copy(0, kept_rows, output)
    else:
        if given.keys == "all":
            key, value = only_where(key, kept), only_where(value, kept)
        # The other queries' outputs get no gradient below, so they add nothing to anyone's.
        attended = with_kept_row_gradient(query, key, value, attended, lse, scope)
    middle = residual + only_where(layer.project_output(attended), kept, given.attention_weights)
    return _with_mlp(layer, middle, given)


def _centred(query: Tensor, key: Tensor, lse: Tensor, scope: AttentionScope) -> tuple[Tensor, Tensor]:
    """Keys less their mean in each document, which changes no probability, and the log-sum-exps that go with them: without what all
    keys have in common the gradient of a query's scores, which no longer sums to zero over the kept ones, does less harm.
    """
    means = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in key.split(scope.lengths)])
    with torch.no_grad():
        shift = (query.unflatten(1, (key.shape[1], -1)) * means.unsqueeze(2)).sum(-1).flatten(1).unsqueeze(-1) * scope.scale
    return key - means, lse - shift


def attend_nearby(
    layer: Any, residual: Tensor, rotary: tuple[Tensor, ...], documents: Documents, selection: Selection, width: int
) -> Tensor:
    """The sparse form, but dropped tokens attend to the `width` tokens before them, themselves included, without gradient.

    Args:
        layer, residual, rotary, documents: As in `restricted_forward`.
        selection: Kept rows of attention and MLP.
        width: Tokens that a dropped token sees.

    Returns:
        The layer's output, `(rows, hidden)`.
    """
    _refuse_unsupported(layer, documents)
    rows, rest = selection.kept_rows, selection.rest_rows
    query, key, value = heads_of(layer, layer.attention_norm(residual), rotary, documents.rows)
    with torch.no_grad():
        near = AttentionScope(documents.lengths, layer.attention_scale, width, documents.place_of_row)
        attended = attend(query, key, value, near)[0]
    inner = AttentionScope(selection.kept_lengths, layer.attention_scale)
    query, key, value = (part.index_select(0, rows) for part in (query, key, value))
    with torch.no_grad():
        output, lse = attend(query, key, value, inner)
    attended = attended.index_copy(0, rows, with_kept_row_gradient(query, key, value, output, lse, inner))
    kept = torch.ones(len(residual), dtype=torch.bool).index_fill_(0, rest, False)
    middle = residual + only_where(layer.project_output(attended), kept)
    return _with_mlp(layer, middle, Restriction(selection, kept))


def _with_mlp(layer: Any, middle: Tensor, given: Restriction) -> Tensor:
    kept = given.mlp
    if not isinstance(kept, Tensor):
        with torch.no_grad():
            kept = kept(middle)
    return middle + only_where(layer.feed_forward(layer.mlp_norm(middle)), kept, given.mlp_weights)


def _refuse_unsupported(layer: Any, documents: Documents) -> None:
    if layer.attention_window is not None or not documents.has_no_padding:
        raise ValueError("restricted layers know neither windows nor padding; got one of them; pack whole rows, take a Llama")
