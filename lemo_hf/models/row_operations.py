"""Row-wise operations that save less for backward than their stock modules, with the stock forward bit for bit.

Saved per row of width H (or MLP width I), in bytes of the row's dtype of size e:

| operation | stock autograd | here |
| --- | --- | --- |
| RMSNorm | 2 float32 rows (input, normalised) | e * H (input) + 4 |
| act(gate) * up | 3 e * I | 2 e * I (gate, up) |
| adapter input, float32 adapters on a 16-bit base | 4 H for each of q, k, v | 4 H once |

On a GPU kernels of the same formulas run (kernel_switch.py), which also read positions by row number instead of gathering them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .kernel_switch import kernel

# By the names of transformers' and torch's classes, as the kernel calls them.
_ACTIVATION_NAMES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


def unpatched(module: nn.Module) -> bool:
    """Whether calling the module runs its class's own forward and nothing else: no hook, no replaced method."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(rows, weight, inverse)
        return weight * (wide * inverse).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, inverse = ctx.saved_tensors
        normalised = rows.to(inverse.dtype) * inverse
        grad_weight = None
        if ctx.needs_input_grad[1]:
            terms = grad * normalised.to(rows.dtype)
            grad_weight = terms.sum(tuple(range(terms.dim() - 1)), dtype=inverse.dtype).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        wide_grad = (grad * weight).to(inverse.dtype)
        along = (wide_grad * normalised).mean(-1, keepdim=True)
        return ((wide_grad - normalised * along) * inverse).to(rows.dtype), grad_weight, None


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm of each row, float32 statistics, saving the rows and one number each.

    Args:
        rows: `(..., hidden)`.
        weight: `(hidden,)`, may be of a wider dtype (the result is then of that dtype, as in the stock module).
        epsilon: Added to the mean square.
    """
    add_norm = kernel("add_norm", rows, rows.shape[-1], "plain")
    if add_norm is not None:
        return add_norm(rows.reshape(-1, rows.shape[-1]), None, weight, epsilon=epsilon)[1].view(rows.shape)
    return _RMSNorm.apply(rows, weight, epsilon)


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotates queries `(rows, heads, head_dim)` and keys `(rows, key_value_heads, head_dim)` by their rows' positions.

    Args:
        query, key: Projected heads.
        cos, sin: By flat row, `(all_rows, head_dim)`; the chosen rows of them are all that is saved for backward.
        rows: Flat row of each query; `None` if `cos` and `sin` have one entry for each.
    """
    rotate = kernel("apply_rotary", query, query.shape[1], key.shape[1], query.shape[2])
    if rotate is not None:
        return rotate(query, key, cos, sin, rows)
    if rows is not None:
        cos, sin = cos.index_select(0, rows), sin.index_select(0, rows)
    return apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=1)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(activated, leaf, grad * up)
        return grad_gate, grad * activated.detach(), None


def gated_activation(gate: Tensor, up: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`activation(gate) * up`, saving gate and up only; the activation is run again in backward."""
    if torch.compiler.is_compiling():
        return activation(gate) * up  # the compiler decides itself what to run again, and cannot trace autograd within a backward
    if not isinstance(activation, nn.Module) or unpatched(activation):
        name = type(activation).__name__
        name = _ACTIVATION_NAMES.get(name, name)
        product = kernel("gated_activation", gate, gate.shape[-1], name)
        if product is not None:
            return product(gate, up, name)
    return _GatedActivation.apply(gate, up, activation)


@contextmanager
def shared_adapter_input(*projections: nn.Module) -> Iterator[None]:
    """Lets adapters on several projections of one input share a single cast of it.

    PEFT's layers cast their input to the adapter's dtype, each for itself: float32 adapters on q, k and v of a 16-bit model
    save three float32 copies of the same rows. Within this context the first cast is kept and handed to the others. Under
    autocast nothing is cast at all, since the adapter's matmul would cast back at once: the values are the same.
    Projections without adapters are left alone, and so are all of them while `torch.compile` traces: Dynamo loses instance
    attributes at a graph break, and the compiler sees by itself that the casts are one.
    """
    if torch.compiler.is_compiling():
        yield
        return
    cast: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def cast_once(rows: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if rows is None or rows.dtype == dtype or torch.is_autocast_enabled(rows.device.type):
            return rows
        source, copy = cast.get(dtype, (None, None))
        if source is not rows:
            copy = rows.to(dtype)
            cast[dtype] = (rows, copy)
        return copy

    adapted = [module for module in projections if getattr(module, "cast_input_dtype_enabled", False)]
    for module in adapted:
        # An instance attribute hides the class's method; removing it restores the method.
        module._cast_input_dtype = cast_once  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in adapted:
            vars(module).pop("_cast_input_dtype", None)
