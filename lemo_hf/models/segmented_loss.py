"""Causal language-model loss by segments of tokens (LeMo paper, section 5.2).

Whole logits cost tokens * vocabulary * (2 + 4 + 4) bytes at their peak: 16-bit logits, their float32 copy and its gradient.
Here logits, loss and gradient of `segment_size` tokens exist at a time; the gradient with respect to the hidden states and to
the head's trainable parameters is formed in the forward pass, so backward only scales it. Peak: segment_size / tokens of the
whole; saved: one gradient in the shape of the hidden states. Tokens without a label need no logits at all. Where its kernel
runs, a segment's 16-bit logits become their gradient in place: segment_size * vocabulary * 2 bytes at the peak.

Exact for any head that maps `(rows, hidden)` to `(rows, vocabulary)`: frozen, trained, tied or wrapped by an adapter. A softcap c,
logits c * tanh(logits / c) as Gemma 2 has them, is applied to a segment's logits in float32. No architecture that LeMo has
today caps its logits.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .kernel_switch import kernel

IGNORE_INDEX = -100


def shift_labels(labels: Tensor) -> Tensor:
    """Labels of the next token, `(batch, seq_len)`; the last one of each row is ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def _sum_of_losses(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows' summed loss, what to differentiate for its gradient, and the gradient that this starts from."""
    in_place = kernel("cross_entropy_in_place", logits, logits.shape[1])
    if in_place is None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        return loss, loss, None
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    gradient = logits.detach()  # the same memory
    return in_place(gradient, targets, softcap).sum(), logits, gradient


class _SegmentedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Callable[[Tensor], Tensor],
        segment_size: int,
        softcap: float | None,
        *weights: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        needs_hidden = ctx.needs_input_grad[0]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Sums over segments in float32 at least: a bf16 sum would lose the small late terms.
        grad_weights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        for start in range(0, hidden.shape[0], segment_size):
            part = slice(start, start + segment_size)
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_(needs_hidden)
                loss, differentiable, gradient = _sum_of_losses(head(rows), targets[part], softcap)
            inputs = [*([rows] if needs_hidden else []), *weights]
            if inputs:
                grads = list(torch.autograd.grad(differentiable, inputs, gradient, allow_unused=True))
                if grad_hidden is not None:
                    grad_hidden[part] = grads.pop(0)
                for grad_sum, grad in zip(grad_weights, grads, strict=True):
                    if grad is not None:
                        grad_sum += grad
            total += loss.detach()
            del differentiable, gradient  # or two segments' logits exist at one time
        ctx.save_for_backward(*([grad_hidden] if grad_hidden is not None else []), *grad_weights)
        ctx.weight_dtypes, ctx.rows = [w.dtype for w in weights], hidden.shape[0]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        # Without a label the loss is 0 / 0 and its gradient 0, as in transformers; 0 * inf would be NaN.
        grad = grad if ctx.rows else torch.zeros_like(grad)
        grad_hidden = saved.pop(0) * grad if ctx.needs_input_grad[0] else None
        weights = [(g * grad).to(dtype) for g, dtype in zip(saved, ctx.weight_dtypes, strict=True)]
        return grad_hidden, None, None, None, None, *weights


def _with_gathered_weights(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The head to be called on each segment; sharded by FSDP2, with its weights gathered once.

    FSDP2's hooks would gather them at every call, and each segment's own little backward would make it free them (and every
    other unit's) again. Processes have different numbers of segments, and the one without a label has none: all would wait for
    each other. The gradients of a trained head are reduced, and its weights freed, when the whole backward ends.
    """
    sharded: Any = head
    if not hasattr(sharded, "unshard"):
        return head
    sharded.unshard()
    forward: Callable[[Tensor], Tensor] = sharded.forward
    return forward


def segmented_causal_lm_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    head: nn.Module,
    segment_size: int,
    num_items_in_batch: Tensor | int | None = None,
    next_labels: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross-entropy of the next tokens, as `transformers` defines it, by segments.

    Args:
        hidden_states: Final hidden states, `(batch, seq_len, hidden)`.
        labels: Token ids, `(batch, seq_len)`; -100 is ignored. May be `None` if `next_labels` is given.
        head: The language-model head; called on `(rows, hidden)`.
        segment_size: Tokens whose logits exist at one time.
        num_items_in_batch: Labels of the whole accumulated batch: the sum is divided by it instead of by this batch's labels.
        next_labels: Labels already shifted by one, `(batch, seq_len)`.
        softcap: Bound c of the logits, `c * tanh(logits / c)`; `None` for none.

    Returns:
        The loss, a float32 scalar; NaN if there is no label and no `num_items_in_batch`, as in `transformers`.

    Raises:
        ValueError: Without labels, or if `softcap` is not above 0.
    """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap bounds the logits and must be above 0; got {softcap}; pass None for none")
    if next_labels is None:
        if labels is None:
            raise ValueError("the segmented loss needs labels; got neither labels nor next_labels; pass one of them")
        next_labels = shift_labels(labels)
    targets = next_labels.reshape(-1).to(hidden_states.device)
    labelled = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    hidden = hidden_states.flatten(0, -2)
    if labelled.numel() < targets.numel():
        hidden, targets = hidden.index_select(0, labelled), targets[labelled]
    project = _with_gathered_weights(head)
    trainable = [weight for weight in head.parameters() if weight.requires_grad]
    total = _SegmentedLoss.apply(hidden, targets, project, segment_size, softcap, *trainable)
    divisor = labelled.numel() if num_items_in_batch is None else num_items_in_batch
    if torch.is_tensor(divisor):
        divisor = divisor.to(total.device)
    elif divisor == 0:
        divisor = total.new_zeros(())
    return total / divisor
