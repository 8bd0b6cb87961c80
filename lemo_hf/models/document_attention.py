"""Causal attention by document on flat rows: through ATen's flash operators for the CPU, or the kernels on CUDA.

Rows of one document are contiguous in `(rows, heads, head_dim)`; lengths are known on the host. Kept rows stay in order, so
causality among compact rows is causality among their original positions. Grouped queries are read without repeating keys.

Forward and backward are apart: `attend` runs the forward without autograd, `with_kept_row_gradient` attaches a backward that
sees kept rows only. In the sparse form both see the same rows; in the exact form and with kept keys (ours) the forward saw others
too, and the flash backward works on kept rows with *that* forward's output and log-sum-exp. With p_ij = exp(q_i . k_j * scale - lse_i)
the probabilities are those of that forward and D_i = dO_i . O_i its normaliser's share, so dq, dk and dv are its gradient restricted to
kept (query, key) pairs. kept_key_attention.py adds to dq what comes through the dropped keys that a kept query sees.

A sliding window w lets the row at position i see those at positions j with i - w < j <= i, positions being the original ones
in the document: among kept rows distances are wider than their places in the list say. Where a document is longer than w, the
operator takes 512 queries at a time, the keys that any of them may see (a row and its w - 1 predecessors, kept or not, hold
them) and a mask from their positions: 512 * (w + 1023) entries, whatever the document's length, built anew in backward.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_switch import kernel
from .lemo_config import LemoConfigError

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The operator walks keys in blocks of 512: strips that begin where its blocks do give the same bits as the whole at once.
_STRIP = 512


@dataclass(frozen=True)
class AttentionScope:
    """Which of a call's rows see which, and the factor on their dot products.

    A row sees itself and the earlier rows of its document, within a window only those less than `window` positions before it.

    Args:
        lengths: Rows of each document, on the host; their sum is the number of rows. A document may have none.
        scale: Factor on the dot products.
        window: Width of the sliding window in original positions; `None` if there is none, or no document is longer.
        positions: Original position of every row in its document, `(rows,)` int64, ascending within a document; for a window
            only.
    """

    lengths: list[int]
    scale: float
    window: int | None = None
    positions: Tensor | None = None


def _kernel(name: str, query: Tensor, scope: AttentionScope) -> Callable[..., Any] | None:
    fast = kernel(name, query, query.shape[2], "all" if scope.window is None else "window")
    if fast is None:
        require_cpu(query)
    return fast


def require_cpu(query: Tensor) -> None:
    """Raises `LemoConfigError` where neither a kernel nor the reference can attend: the matrix of all scores instead would need the
    memory that this package is for.
    """
    if query.device.type != "cpu":
        raise LemoConfigError(
            f"LeMo attention has a reference for the CPU only; got {query.dtype} on {query.device} and no kernel that runs; "
            "install triton (the log says what else it was), or train on the CPU or with enabled=False"
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


def _each(operator: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], scope: AttentionScope) -> tuple[Tensor, ...]:
    """Applies a flash operator document by document to flat tensors, and flattens what it returns.

    The operator gets the documents' tensors, `(documents, heads, length, d)` each, and their rows' positions
    `(documents, 1, length, 1)`, or `None` without a window.
    """
    lengths = [length for length in scope.lengths if length > 0]
    by_document = [_by_document(tensor, lengths) for tensor in tensors]
    positions: list[Any] = [None] * len(by_document[0])
    if scope.window is not None:
        assert scope.positions is not None, "a window is measured between positions"
        positions = _by_document(scope.positions.view(-1, 1, 1), lengths)
    calls = [operator(*parts) for parts in zip(*by_document, positions, strict=True)]
    return tuple(_as_rows(list(results)) for results in zip(*calls, strict=True))


def _strips(positions: Tensor, window: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Strips of queries, the keys that they may see, and the masks to add to their scores, `(documents, 1, queries, keys)`."""
    length = positions.shape[2]
    for start in range(0, length, _STRIP):
        queries = slice(start, min(start + _STRIP, length))
        keys = slice(max(0, start - window + 1) // _STRIP * _STRIP, queries.stop)
        distance = positions[:, :, queries] - positions[:, :, keys].mT
        hidden = (distance < 0) | (distance >= window)
        yield queries, keys, torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


@torch.no_grad()
def attend(query: Tensor, key: Tensor, value: Tensor, scope: AttentionScope) -> tuple[Tensor, Tensor]:
    """Causal attention of every document's rows among themselves, without autograd.

    Args:
        query: `(rows, heads, head_dim)`, positions applied.
        key, value: `(rows, key_value_heads, head_dim)`.
        scope: Documents, scale and window.

    Returns:
        The attention output `(rows, heads, head_dim)` and the log-sum-exp of the scores `(rows, heads, 1)`.
    """
    if (fast := _kernel("attend", query, scope)) is not None:
        output, lse = fast(query, key, value, scope.lengths, scope.scale, scope.window, scope.positions)
        return output, lse

    def flash(q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        if positions is None or scope.window is None:
            output, lse = _flash(q, k, v, 0.0, True, scale=scope.scale)
            return output, lse.unsqueeze(-1)
        parts = [
            _flash(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, False, attn_mask=mask, scale=scope.scale)
            for queries, keys, mask in _strips(positions, scope.window, q.dtype)
        ]
        return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2).unsqueeze(-1)

    output, lse = _each(flash, (query, key, value), scope)
    return output, lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scope: AttentionScope
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values of kept rows; arguments as in `with_kept_row_gradient`, `grad` is that of its result."""
    if (fast := _kernel("attend_backward", query, scope)) is not None:
        return fast(grad, query, key, value, output, lse, scope.lengths, scope.scale, scope.window, scope.positions)

    def flash_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, ...]:
        lse = lse.squeeze(-1)
        if positions is None or scope.window is None:
            return _flash_backward(grad, q, k, v, output, lse, 0.0, True, scale=scope.scale)
        grad_query = torch.empty_like(q)
        # Keys of several strips: their gradients are summed in float32 at least.
        wide = torch.promote_types(k.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for queries, keys, mask in _strips(positions, scope.window, q.dtype):
            rows = (part[:, :, queries] for part in (grad, q))
            seen = (part[:, :, keys] for part in (k, v))
            finished = output[:, :, queries], lse[:, :, queries]
            parts = _flash_backward(*rows, *seen, *finished, 0.0, False, attn_mask=mask, scale=scope.scale)
            grad_query[:, :, queries] = parts[0]
            grad_key[:, :, keys] += parts[1]
            grad_value[:, :, keys] += parts[2]
        return grad_query, grad_key.to(k.dtype), grad_value.to(v.dtype)

    return _each(flash_backward, (grad.contiguous(), query, key, value, output, lse), scope)


class _KeptRowGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scope: AttentionScope
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scope = scope
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        return *attend_backward(grad, query, key, value, output, lse, ctx.scope), None, None, None


def with_kept_row_gradient(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scope: AttentionScope
) -> Tensor:
    """Attaches a finished attention output to the gradients of kept rows' queries, keys and values.

    Args:
        query: Kept rows' queries, `(kept, heads, head_dim)`, positions applied.
        key, value: Kept rows' keys and values, `(kept, key_value_heads, head_dim)`.
        output, lse: What the forward gave for these rows: `attend` among kept rows only (sparse form), or the kept rows of its
            result over all rows (exact form) or of `attend_kept_keys`.
        scope: The kept rows' documents, scale and window.

    Returns:
        `output`; its gradient is that of attention among the kept rows with the probabilities that `lse` normalises.
    """
    if (fast := _kernel("with_kept_row_gradient", query, scope)) is not None:
        return fast(query, key, value, output, lse, scope.lengths, scope.scale, scope.window, scope.positions)
    return _KeptRowGradient.apply(query, key, value, output, lse, scope)
