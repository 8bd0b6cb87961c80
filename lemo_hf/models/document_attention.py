"""Causal attention by document on flat rows, through the flash operators that ATen carries.

Rows of one document are contiguous in `(rows, heads, head_dim)`; lengths are known on the host. Kept rows stay in order, so
causality among compact rows is causality among their original positions. Grouped queries are read without repeating keys.

Forward and backward are apart: `attend` runs the forward without autograd, `with_kept_row_gradient` attaches a backward that
sees kept rows only. In the sparse form both see the same rows; in the exact form (ours) the forward saw all of them and the
flash backward works on kept rows with the *full* forward's output and log-sum-exp. With p_ij = exp(q_i . k_j * scale - lse_i) the probabilities are those of the dense forward and
D_i = dO_i . O_i the dense normaliser's share, so dq, dk and dv are the dense gradient restricted to kept (query, key) pairs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lemo_config import LemoConfigError

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _require_cpu(query: Tensor) -> None:
    if query.device.type != "cpu":
        raise LemoConfigError(
            f"LeMo attention has its operators for the CPU so far; got tensors on {query.device}; "
            "train on the CPU, or with enabled=False"
        )


def _by_document(tensor: Tensor, lengths: list[int]) -> list[Tensor]:
    """`(rows, heads, d)` as views `(documents, heads, length, d)`: one of all documents if equally long, else one each."""
    if len(set(lengths)) == 1:
        return [tensor.view(len(lengths), lengths[0], *tensor.shape[1:]).transpose(1, 2)]
    return [part.transpose(0, 1).unsqueeze(0) for part in tensor.split(lengths)]


def _as_rows(parts: list[Tensor]) -> Tensor:
    """Undoes `_by_document`."""
    flat = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _each(operator: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], lengths: list[int]) -> tuple[Tensor, ...]:
    """Applies a flash operator document by document to flat tensors, and flattens what it returns."""
    lengths = [length for length in lengths if length > 0]
    calls = [operator(*parts) for parts in zip(*(_by_document(tensor, lengths) for tensor in tensors), strict=True)]
    return tuple(_as_rows(list(results)) for results in zip(*calls, strict=True))


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of every document's rows among themselves, without autograd.

    Args:
        query: `(rows, heads, head_dim)`, rotary applied.
        key, value: `(rows, key_value_heads, head_dim)`.
        lengths: Rows of each document; their sum is `rows`.
        scale: Factor on the dot products.

    Returns:
        The attention output `(rows, heads, head_dim)` and the log-sum-exp of the scores `(rows, heads, 1)`.
    """
    _require_cpu(query)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = _flash(q, k, v, 0.0, True, scale=scale)
        return output, lse.unsqueeze(-1)

    output, lse = _each(flash, (query, key, value), lengths)
    return output, lse


class _KeptRowGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, lengths: list[int], scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.lengths, ctx.scale = lengths, scale
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = ctx.scale

        def flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
            return _flash_backward(grad, q, k, v, output, lse.squeeze(-1), 0.0, True, scale=scale)

        grads = _each(flash_backward, (grad.contiguous(), *ctx.saved_tensors), ctx.lengths)
        return *grads, None, None, None, None


def with_kept_row_gradient(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """Attaches a finished attention output to the gradients of kept rows' queries, keys and values.

    Args:
        query: Kept rows' queries, `(kept, heads, head_dim)`, rotary applied.
        key, value: Kept rows' keys and values, `(kept, key_value_heads, head_dim)`.
        output, lse: What `attend` gave for these rows: among kept rows only (sparse form), or the kept rows of its result
            over all rows (exact form).
        lengths: Kept rows of each document.
        scale: Factor on the dot products.

    Returns:
        `output`; its gradient is that of attention among the kept rows with the probabilities that `lse` normalises.
    """
    return _KeptRowGradient.apply(query, key, value, output, lse, lengths, scale)
