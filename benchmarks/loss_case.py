"""The loss and its gradient beside other libraries', for benchmarks/kernel_times.py."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_setting import Case, Setting
from torch import Tensor

from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.segmented_loss import segmented_causal_lm_loss


def libraries(head: torch.nn.Linear, hidden: Tensor, labels: Tensor) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Fused losses of other packages: those that are here, and why the others are not.

    Args:
        head: Without a bias.
        hidden: `(1, rows, hidden)`, which requires a gradient.
        labels: `(1, rows)`.

    Returns:
        By name what computes the loss and the gradient of `hidden`, and by name a reason.
    """
    found: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}

    def with_gradient(loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        # Rows that lie together, as these packages want them; each predicts the next label.
        value = loss_of(hidden[0, :-1], labels[0, 1:])
        return value.detach(), torch.autograd.grad(value, hidden)[0]

    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except Exception as error:  # absent, or not made for this torch or triton: either way there is nothing to compare with
        missing["liger"] = f"{type(error).__name__}: {error}"
    else:
        fused = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = partial(with_gradient, partial(fused, head.weight))
    try:
        from cut_cross_entropy import linear_cross_entropy
    except Exception as error:  # likewise
        missing["cut-cross-entropy"] = f"{type(error).__name__}: {error}"
    else:
        found["cut-cross-entropy"] = partial(with_gradient, lambda rows, wanted: linear_cross_entropy(rows, head.weight, wanted))
    return found, missing


def loss(setting: Setting) -> Case:
    """Head, loss and gradient of all rows by segments, frozen head: kernels against the PyTorch path and libraries that are here."""
    hidden = setting.random(1, setting.rows, setting.hidden).requires_grad_()
    head = torch.nn.Linear(setting.hidden, setting.vocabulary, bias=False, device=setting.device, dtype=setting.dtype)
    head.requires_grad_(False)
    labels = torch.randint(0, setting.vocabulary, (1, setting.rows), device=setting.device)

    def segmented(mode: Any) -> tuple[Tensor, Tensor]:
        with kernel_mode(mode):
            value = segmented_causal_lm_loss(hidden, labels, head, setting.segment)
        return value.detach(), torch.autograd.grad(value, hidden)[0]

    found, missing = libraries(head, hidden, labels)
    flops = 4 * setting.rows * setting.hidden * setting.vocabulary
    ours, naive = partial(segmented, "kernels"), partial(segmented, "reference")
    return Case(ours, naive, flops=flops, libraries=found, missing=missing, allowed=2, compiles=False)
