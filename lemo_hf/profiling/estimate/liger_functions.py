"""What Liger's fused functions allocate and save, for estimates: shapes and lifetimes, no values (clean-room, by their published
sources; Liger needs Triton and a GPU, so its own code is not run here).

| function | saved for backward | backward |
| --- | --- | --- |
| RMSNorm | its input, one float32 number a row | writes over the incoming gradient |
| SwiGLU | gate and up | writes their gradients over them |
| linear + cross-entropy | the gradient of its input | scales it in place |

The loss works in chunks of 2 ** ceil(log2(rows / ceil(vocabulary / hidden))) rows and holds one chunk's logits, which become
their own gradient. Rotary positions stay stock: Liger's save the same (cos and sin) and its transients are no layer's peak.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import LemoError


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty(rows.shape[:-1], dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return grad.mul_(1.0), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate.mul_(grad), up.mul_(grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        rows, width = hidden.shape
        chunk = min(rows, 1 << (-(-rows // -(-weight.shape[0] // width)) - 1).bit_length())
        grad_hidden, losses = torch.zeros_like(hidden), hidden.new_zeros(rows, dtype=torch.float32)
        logits = hidden.new_empty(chunk, weight.shape[0])
        for start in range(0, rows, chunk):
            size = min(chunk, rows - start)
            torch.mm(hidden[start : start + size], weight.t(), out=logits[:size])
            torch.mm(logits[:size].mul_(1.0), weight, out=grad_hidden[start : start + size])
        ctx.save_for_backward(grad_hidden)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden.mul_(grad), None


def use_liger_functions(model: Any) -> None:
    """Lets a stock model with RMS norms and gated MLPs run these functions; on fake tensors only, since values are not computed.

    Args:
        model: A stock causal language model, before adapters are added.

    Raises:
        LemoError: If its architecture has no such modules.
    """
    found = {"RMSNorm": 0, "MLP": 0}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm_forward, module)
            found["RMSNorm"] += 1
        elif isinstance(getattr(module, "gate_proj", None), nn.Module):
            module.forward = MethodType(_mlp_forward, module)
            found["MLP"] += 1
    if not all(found.values()):
        raise LemoError(
            f"Liger has no functions for model type {model.config.model_type!r}; method 'liger'; choose stock, checkpointing or lemo"
        )
    model.forward = MethodType(_causal_lm_forward, model)


def _norm_forward(norm: Any, rows: Tensor) -> Tensor:
    return _Norm.apply(rows, norm.weight)


def _mlp_forward(mlp: Any, rows: Tensor) -> Tensor:
    return mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(rows), mlp.up_proj(rows)))


def _causal_lm_forward(model: Any, labels: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
    hidden = model.model(**inputs).last_hidden_state
    return CausalLMOutputWithPast(loss=_LinearCrossEntropy.apply(hidden.flatten(0, -2), model.lm_head.weight))
