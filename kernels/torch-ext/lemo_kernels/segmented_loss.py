"""Cross-entropy of a segment of tokens: its logits become their own gradient, in place (LeMo paper, section 5.2).

For logits z of a row, z' = c tanh(z / c) with a softcap c and z' = z without, and label y:

    loss = log sum_v exp(z'_v) - z'_y,        d loss / d z_v = (exp(z'_v - log sum exp) - [v = y]) * (1 - (z'_v / c)^2)

One program per row reads its logits twice: for maximum and sum (online, float32), then to write the gradient over them.

Memory: the logits themselves, rows * vocabulary * e bytes at e bytes a number, and 4 bytes a row; no float32 copy, no second
matrix. PyTorch's path holds e + 4 + 4 bytes for each logit. Traffic: two reads and one write of the logits, of which the
second read comes from the L2 cache where the rows in flight fit into it (132 rows of 128K 16-bit logits are 34 MB).

Why not a library's fused linear cross-entropy: Liger's and cut-cross-entropy take the head's weight and bias as tensors, so
the adapter on a LoRA-wrapped head, or a quantised head, would be passed by silently. Here the head is called as a module, one
segment at a time, and this kernel is all that is left to fuse; its logits need as little memory as Liger's chunks. Cut-cross-entropy
forms no logits at all but computes them a second time: a third matrix product in place of segment_size * vocabulary * e bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import DTYPES, launch_on, operator, require

IGNORE_INDEX = -100


@triton.jit
def _capped(logits, softcap, HAS_SOFTCAP: tl.constexpr):
    logits = logits.to(tl.float32)
    if HAS_SOFTCAP:
        # tanh, written so that neither exponential overflows.
        shrunk = tl.exp(-2.0 * tl.abs(logits / softcap))
        size = softcap * (1.0 - shrunk) / (1.0 + shrunk)
        logits = tl.where(logits < 0, -size, size)
    return logits


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, row_stride, vocabulary, softcap,
    HAS_SOFTCAP: tl.constexpr, WIDTH: tl.constexpr, IGNORE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * row_stride
    target = tl.load(targets_ptr + row)
    counted = target != IGNORE
    # A label outside the vocabulary gives a NaN loss, never an illegal access.
    inside = (target >= 0) & (target < vocabulary)
    own = _capped(tl.load(base + target, mask=inside, other=float("nan")), softcap, HAS_SOFTCAP)
    peak = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, WIDTH):
        column = start + tl.arange(0, WIDTH)
        real = column < vocabulary
        values = _capped(tl.load(base + column, mask=real, other=0.0), softcap, HAS_SOFTCAP)
        new_peak = tl.maximum(peak, tl.max(tl.where(real, values, float("-inf")), 0))
        # A row may begin with logits of minus infinity, as a mask writes them.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.where(real, tl.exp(values - shift), 0.0), 0)
        peak = new_peak
    # Maximum and logarithm apart: their sum would round the latter to the former's last bits.
    tl.store(losses_ptr + row, tl.where(counted, peak - own + tl.log(total), 0.0))
    tl.debug_barrier()  # every thread has read the label's logit before any of them writes over it
    for start in range(0, vocabulary, WIDTH):
        column = start + tl.arange(0, WIDTH)
        real = column < vocabulary
        values = _capped(tl.load(base + column, mask=real, other=0.0), softcap, HAS_SOFTCAP)
        grad = tl.exp(values - peak) / total - tl.where(column == target, 1.0, 0.0)
        if HAS_SOFTCAP:
            grad = grad * (1.0 - (values / softcap) * (values / softcap))
        grad = tl.where(counted, grad, 0.0)
        tl.store(base + column, grad.to(logits_ptr.dtype.element_ty), mask=real)


@operator("cross_entropy_in_place", writes=("logits",))
def cross_entropy_in_place_operator(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Losses of the rows; `logits` become their gradients. Arguments as in `cross_entropy_in_place`."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        width = min(triton.next_power_of_2(vocabulary), 16384)
        with launch_on(logits):
            _cross_entropy_kernel[(rows,)](
                logits, targets.contiguous(), losses, logits.stride(0), vocabulary, 1.0 if softcap is None else softcap,
                HAS_SOFTCAP=softcap is not None, WIDTH=width, IGNORE=IGNORE_INDEX, num_warps=min(16, max(1, width // 512)),
            )  # fmt: skip
    return losses


@cross_entropy_in_place_operator.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.no_grad()
def cross_entropy_in_place(logits: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Cross-entropy of each row; the logits are replaced by the gradient of the rows' sum.

    Autograd is told that `logits` changed: an operation that has saved them for its backward raises instead of reading the
    gradient in their place.

    Args:
        logits: `(rows, vocabulary)`, rows dense; written over.
        targets: Labels, `(rows,)` int64; a row with -100 has loss 0 and gradient 0.
        softcap: Bound c of `c * tanh(logits / c)`; `None` for none. The gradient is that of the logits before it.

    Returns:
        The losses, `(rows,)` in float32.

    Raises:
        KernelInputError: If shapes, dtypes, devices or (on the CPU) labels do not fit.
    """
    require(logits.dim() == 2, "logits must be (rows, vocabulary)", f"shape {tuple(logits.shape)}", "flatten the batch first")
    require(logits.dtype in DTYPES, "logits must be float32, float16 or bfloat16", logits.dtype, "use the PyTorch reference")
    dense = logits.stride(1) == 1 or logits.shape[1] == 1
    require(dense, "rows of logits must be dense, they are written over", f"strides {logits.stride()}", "copy them first")
    fits = targets.shape == logits.shape[:1] and targets.dtype == torch.int64 and targets.device == logits.device
    got = f"{targets.dtype} of shape {tuple(targets.shape)} on {targets.device}"
    require(fits, f"labels must be ({logits.shape[0]},) int64 on {logits.device}", got, "pass one label per row of logits")
    require(softcap is None or softcap > 0, "a softcap is positive", softcap, "pass None for no softcap")
    if targets.device.type == "cpu" and type(targets) is Tensor and not torch.compiler.is_compiling():
        wrong = targets[(targets != IGNORE_INDEX) & ((targets < 0) | (targets >= logits.shape[1]))]
        require(not wrong.numel(), f"labels must be -100 or in [0, {logits.shape[1]})", wrong[:3].tolist(), "check the tokenizer")
    return cross_entropy_in_place_operator(logits, targets, softcap)


def probe(device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
    """The loss of one row of this many logits."""
    cross_entropy_in_place(
        torch.zeros(1, vocabulary, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    )
