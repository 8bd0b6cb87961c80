"""TokenTune: gradients of randomly selected tokens only (Simoulin et al., "Memory-Efficient Fine-Tuning of Transformers via Token
Selection", EMNLP 2024, arXiv 2501.18824, section 4), written from the paper.

One set of positions is drawn at each step, for all layers. The forward pass is the dense one. Selected tokens run under autograd,
the others without it, so only selected tokens' activations are cached; in attention a selected query meets every earlier key,
whose gradient stops where its token is not selected. The loss is that of the selected tokens.

    x[K] += Attn(N(x)[K] -> all);  x[K] += MLP(N(x[K]))   under autograd, keys and values of R constant
    x[R] the same                                         without

Unlike LeMo's exact form, the selection is one for the whole model, and gradients do not pass a token by on the residual stream. As
there, every key and value is cached (selected queries need them all). Attention is flash forward and backward over all rows, the others'
gradients being zero: published code masks instead, which takes selected x all numbers and computes as much at a share of a half.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...models.document_attention import AttentionScope, attend, with_kept_row_gradient
from .random_ltd import draw_rows
from .stock_layers import (
    attention_scale,
    decoder_layers,
    feed_forward,
    heads,
    norms,
    positions_of,
    project_output,
    refuse_unsupported,
)


class _Draw:
    """The positions of a step: `selected` and `others`, sorted."""

    selected: Tensor
    others: Tensor


def use_tokentune(model: Any, keep_ratio: float, block_size: int) -> None:
    """Lets a stock causal language model train on selected tokens.

    Args:
        model: The model, before adapters are added.
        keep_ratio: Share of tokens selected, in (0, 1].
        block_size: Tokens that are drawn together; 1 in the paper.

    Raises:
        LemoError: If its layers do what these leave out.
    """
    refuse_unsupported(model.config, "TokenTune")
    draw, stock_forward = _Draw(), model.forward

    def forward(input_ids: Tensor, labels: Tensor, **inputs: Any) -> Any:
        tokens, device = input_ids.shape[1], input_ids.device
        draw.selected = draw_rows(tokens, keep_ratio, block_size, device)
        marks = torch.ones(tokens, dtype=torch.bool, device=device).index_fill(0, draw.selected, False)
        draw.others = torch.nonzero_static(marks, size=tokens - len(draw.selected)).squeeze(1)
        inputs["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=-100).index_select(1, draw.selected)
        return stock_forward(input_ids=input_ids, labels=labels, logits_to_keep=draw.selected, **inputs)

    model.forward = forward
    for layer in decoder_layers(model):
        layer.forward = _selecting(layer, draw)


def _selecting(layer: Any, draw: _Draw) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
        first, second = norms(layer)
        selected = hidden_states.index_select(1, draw.selected)
        with torch.no_grad():
            others = hidden_states.index_select(1, draw.others)
            others_heads = heads(layer, first(others), positions_of(arguments, draw.others))
        positions = positions_of(arguments, draw.selected)
        scale = attention_scale(layer, positions)
        own_heads = heads(layer, first(selected), positions)
        attended, others_attended = attend_all(own_heads, others_heads, draw, scale)
        selected = selected + project_output(layer, attended)
        selected = selected + feed_forward(layer, second(selected))
        with torch.no_grad():
            others = others + project_output(layer, others_attended)
            others = others + feed_forward(layer, second(others))
        # Nothing of the others' path to the loss remains, the residual stream included.
        return _laid_out(selected, others, draw)

    return forward


def attend_all(selected: tuple[Tensor, ...], others: tuple[Tensor, ...], draw: _Draw, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention over all rows, with gradients to the selected rows' heads only.

    Args:
        selected, others: Queries, keys and values of the selected rows and of the others, `(batch, rows, heads, head_dim)`.
        draw: Where the rows stand.
        scale: Factor on the dot products.

    Returns:
        The selected rows' output and the others', which has no gradient.
    """
    return _SelectedAttention.apply(*selected, others, draw, scale)


def _laid_out(selected: Tensor, others: Tensor | None, draw: _Draw) -> Tensor:
    """Rows in the order of the sequence, `(batch, seq_len, ...)`; zeros where there are no others'."""
    tokens = len(draw.selected) + len(draw.others)
    whole = selected.new_zeros(selected.shape[0], tokens, *selected.shape[2:]).index_copy(1, draw.selected, selected)
    return whole if others is None else whole.index_copy(1, draw.others, others)


class _SelectedAttention(torch.autograd.Function):
    """Causal attention over all rows; gradients of the selected rows' queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, others: tuple[Tensor, ...], draw: _Draw, scale: float
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_laid_out(*parts, draw) for parts in zip((query, key, value), others, strict=True))
        shape = q.shape[:2]
        ctx.scope, ctx.draw = AttentionScope([shape[1]] * shape[0], scale), draw
        finished = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ctx.scope)
        output, lse = (part.unflatten(0, shape) for part in finished)
        own, others_output = output.index_select(1, draw.selected), output.index_select(1, draw.others)
        ctx.save_for_backward(query, k, v, own, lse.index_select(1, draw.selected))
        ctx.mark_non_differentiable(others_output)
        return own, others_output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        # A row that was not selected has no gradient, so whatever stands in its place adds nothing.
        query, output, lse, grad = (_laid_out(part, None, ctx.draw) for part in (query, output, lse, grad))
        with torch.enable_grad():
            q, k, v = (part.flatten(0, 1).detach().requires_grad_() for part in (query, key, value))
            attended = with_kept_row_gradient(q, k, v, output.flatten(0, 1), lse.flatten(0, 1), ctx.scope)
        grads = torch.autograd.grad(attended, (q, k, v), grad.flatten(0, 1))
        shape = query.shape[:2]
        return *(part.unflatten(0, shape).index_select(1, ctx.draw.selected) for part in grads), None, None, None
