"""The gated MLP's activation, `act(gate) * up` (LeMo paper, section 4.1: the MLP runs on every row, kept rows save).

    forward    h = act(g) * u
    backward   dg = dh * u * act'(g),   du = dh * act(g)

Bytes that must move, in rows of the MLP's width: forward read 2, write 1; backward read 3, write 2. Saved: gate and up, by
kept rows only, since the rest rows run without autograd; the activation is computed again in backward. Plain, LoRA-wrapped and
quantised projections alike: the kernel begins behind them.

Against Liger's kernels for the same formula (SiLU and tanh-GELU): the traffic is the same; theirs write the gradients over the
saved gate and up, so a second backward through the graph is wrong silently, and they know no other activation. Ours costs
fewer lines than the dependency.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .host import launch_on, movement_tile, operator, require, require_rows, unit_stride

# The activations this kernel knows. Others have no kernel: callers run the PyTorch reference.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def _activation(gate, ACTIVATION: tl.constexpr):
    """act(gate) and its derivative."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * below
        slope = below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh(z) = 2 * sigmoid(2 z) - 1, so 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        below = tl.sigmoid(2.0 * inner)
        value = gate * below
        slope = below + gate * 2.0 * below * (1.0 - below) * 0.7978845608028654 * (1.0 + 0.134145 * gate * gate)
    else:
        tl.static_assert(ACTIVATION == "relu")
        value = tl.where(gate < 0.0, 0.0, gate)  # NaN stays NaN, as in PyTorch
        slope = tl.where(gate > 0.0, 1.0, 0.0)
    return value, slope


@triton.jit
def _forward_kernel(
    gate, up, product, count, width, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count) & (column < width)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activation(g.to(tl.float32), ACTIVATION)
    # Rounded before the product, as the two separate operators do.
    value = value.to(g.dtype).to(tl.float32)
    tl.store(product + row * width + column, (value * u).to(product.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    grad, gate, up, grad_gate, grad_up, count, width, grad_stride, gate_stride, up_stride,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count) & (column < width)
    h = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    value, slope = _activation(g, ACTIVATION)
    at = row * width + column
    tl.store(grad_gate + at, (h * u * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + at, (h * value).to(grad_up.dtype.element_ty), mask=mask)


def _grid(count: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    rows, columns = movement_tile(width)
    rows = max(1, rows // 2)  # two to three operands a tile: half the rows keep it within the registers
    return (triton.cdiv(count, rows), triton.cdiv(width, columns)), {"ROWS": rows, "COLUMNS": columns}


@operator("gated_activation")
def gated_activation_operator(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`, `(rows, width)`."""
    gate, up = unit_stride(gate), unit_stride(up)
    product = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    if product.numel():
        count, width = gate.shape
        grid, tile = _grid(count, width)
        with launch_on(gate):
            _forward_kernel[grid](
                gate, up, product, count, width, gate.stride(0), up.stride(0), ACTIVATION=activation, num_warps=8, **tile
            )  # fmt: skip
    return product


@gated_activation_operator.register_fake
def _(gate, up, activation):
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@operator("gated_activation_backward")
def gated_activation_backward_operator(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad, gate, up = unit_stride(grad), unit_stride(gate), unit_stride(up)
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if grad_gate.numel():
        count, width = gate.shape
        grid, tile = _grid(count, width)
        with launch_on(gate):
            _backward_kernel[grid](
                grad, gate, up, grad_gate, grad_up, count, width, grad.stride(0), gate.stride(0), up.stride(0),
                ACTIVATION=activation, num_warps=8, **tile,
            )  # fmt: skip
    return grad_gate, grad_up


@gated_activation_backward_operator.register_fake
def _(grad, gate, up, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_activation_operator(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *gated_activation_backward_operator(grad, gate, up, ctx.activation), None


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`, saving gate and up only.

    Args:
        gate, up: `(rows, width)`, rows dense; each keeps its dtype.
        activation: `"silu"`, `"gelu"` (exact), `"gelu_tanh"` or `"relu"`.

    Returns:
        `(rows, width)` in the wider dtype of the two.

    Raises:
        KernelInputError: If shapes, dtypes or devices do not fit, or the activation has no kernel.
    """
    known = ", ".join(ACTIVATIONS)
    require(activation in ACTIVATIONS, f"activation must be one of {known}", repr(activation), "use the PyTorch reference")
    require_rows("gate", gate)
    require_rows("up", up, gate.shape[1], gate, gate.shape[0])
    return _GatedActivation.apply(gate, up, activation)


def probe(device: torch.device, dtype: torch.dtype, width: int, activation: str) -> None:
    """The activation of rows of this width, and its gradient."""
    gate = torch.zeros(1, width, dtype=dtype, device=device, requires_grad=True)
    gated_activation(gate, gate.detach(), activation).sum().backward()
