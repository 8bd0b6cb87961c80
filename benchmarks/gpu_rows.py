"""Kernels that move, normalise and activate rows, at real sizes, for benchmarks/gpu_suite.py: against formulas written out in float32.

`run_rows` has Llama-3-8B's sizes in every dtype, `run_offsets` results of more than 2^31 numbers.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from agreement import ALLOWED, PartFailure, error_ratio
from gpu_checks import Scale
from torch import Tensor

# Name, result, what it must be. An error of a gradient may be twice that of a result.
Pairs = list[tuple[str, Tensor, Tensor]]
EPSILON = 1e-6
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda rows: F.gelu(rows, approximate="tanh"),
    "relu": F.relu,
}
# Bytes that a case of `run_offsets` may hold: some ten tensors of 2^31 numbers in 16 bits.
_NEEDED = 60 * 2**30


def normal(scale: Scale, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.empty(shape, device=scale.device, dtype=dtype).normal_()


def normed(rows: Tensor, weight: Tensor, bias: Tensor | None, centred: bool) -> Tensor:
    """RMSNorm or LayerNorm of `(rows, hidden)` by its formula, in the inputs' dtype."""
    rows = rows - rows.mean(-1, keepdim=True) if centred else rows
    straight = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPSILON)
    return straight * weight if bias is None else straight * weight + bias


def wide(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Float32 copies, leaves of autograd where the tensors are."""
    return [None if part is None else part.detach().float().requires_grad_(part.requires_grad) for part in tensors]


def with_gradients(names: str, got: Any, wanted: Any, leaves: Any, wide_leaves: Any, grads: list[Tensor]) -> Pairs:
    """Results and all gradients, of the kernel and of the formula.

    Args:
        names: Of the results, then of the leaves.
        got, wanted: Results of kernel and formula.
        leaves, wide_leaves: Their leaves.
        grads: Gradients of the results.
    """
    of_got = torch.autograd.grad(got, leaves, grads)
    of_wanted = torch.autograd.grad(wanted, wide_leaves, [grad.float() for grad in grads])
    return list(zip(names.split(), (*got, *of_got), (*wanted, *of_wanted), strict=True))


def norm_parameters(scale: Scale, dtype: torch.dtype, hidden: int, centred: bool, frozen: bool) -> tuple[Tensor, Tensor | None]:
    """Weights away from zero and, for LayerNorm, smaller biases: backward may work from the result."""
    weight = (normal(scale, dtype, hidden).abs() + 0.5).requires_grad_(not frozen)
    return weight, (normal(scale, dtype, hidden).clamp_(-2, 2) * 0.25).requires_grad_(not frozen) if centred else None


def gated(scale: Scale, dtype: torch.dtype, activation: str) -> Pairs:
    """`act(gate) * up` and both gradients."""
    import lemo_kernels

    shape = (17, 48) if scale.tiny else (8191, 14336)
    leaves = [normal(scale, dtype, *shape).requires_grad_() for _ in range(2)]
    gate, up = wide_leaves = wide(tuple(leaves))
    got = lemo_kernels.gated_activation(*leaves, activation)
    wanted = ACTIVATIONS[activation](gate) * up  # type: ignore[arg-type]
    return with_gradients("product dgate dup", (got,), (wanted,), leaves, wide_leaves, [normal(scale, dtype, *shape)])


def gather_norm(scale: Scale, dtype: torch.dtype, centred: bool, from_output: bool) -> Pairs:
    """Kept rows and their norm; the gradient of the stream, and of a norm that trains."""
    import lemo_kernels

    count, hidden = (17, 32) if scale.tiny else (8191, 4096)
    stream = normal(scale, dtype, count, hidden).requires_grad_()
    weight, bias = norm_parameters(scale, dtype, hidden, centred, frozen=from_output)
    marks = torch.arange(count, device=scale.device) % 5 < 3
    kept, rest = marks.nonzero().squeeze(1), (~marks).nonzero().squeeze(1)
    slots = lemo_kernels.row_slots(kept, rest, count)
    rows, result, _ = lemo_kernels.gather_norm(
        stream, kept, slots, weight, bias, epsilon=EPSILON, centred=centred, from_output=from_output
    )
    inputs = wide((stream, weight, bias))
    taken = inputs[0][kept]  # type: ignore[index]
    wanted = taken, normed(taken, inputs[1], inputs[2], centred)  # type: ignore[arg-type]
    grads = [normal(scale, dtype, *rows.shape) for _ in range(2)]
    leaves = [part for part in (stream, weight, bias) if part is not None and part.requires_grad]
    wide_leaves = [part for part in inputs if part is not None and part.requires_grad]
    names = "rows normed dstream" + ("" if from_output else " dweight dbias" if centred else " dweight")
    return with_gradients(names, (rows, result), wanted, leaves, wide_leaves, grads)


def add_norm(scale: Scale, dtype: torch.dtype, centred: bool, from_output: bool) -> Pairs:
    """Sums of two rows and their norm, and the gradients of both and of a norm that trains."""
    import lemo_kernels

    shape = (17, 32) if scale.tiny else (8191, 4096)
    rows, update = (normal(scale, dtype, *shape).requires_grad_() for _ in range(2))
    weight, bias = norm_parameters(scale, dtype, shape[1], centred, frozen=from_output)
    got = lemo_kernels.add_norm(rows, update, weight, bias, epsilon=EPSILON, centred=centred, from_output=from_output)
    inputs = wide((rows, update, weight, bias))
    sums = inputs[0] + inputs[1]  # type: ignore[operator]
    wanted = sums, normed(sums, inputs[2], inputs[3], centred)  # type: ignore[arg-type]
    leaves = [part for part in (rows, update, weight, bias) if part is not None and part.requires_grad]
    wide_leaves = [part for part in inputs if part is not None and part.requires_grad]
    names = "sums normed drows dupdate" + ("" if from_output else " dweight dbias" if centred else " dweight")
    return with_gradients(names, got, wanted, leaves, wide_leaves, [normal(scale, dtype, *shape) for _ in range(2)])


def rest_norm(scale: Scale, dtype: torch.dtype, centred: bool, with_update: bool) -> Pairs:
    """The norm of rest rows where they stand, with something added to them or without."""
    import lemo_kernels

    count, hidden = (17, 32) if scale.tiny else (8191, 4096)
    stream, rows = normal(scale, dtype, count, hidden), torch.arange(1, count, 2, device=scale.device)
    update = normal(scale, dtype, len(rows), hidden) if with_update else None
    weight, bias = norm_parameters(scale, dtype, hidden, centred, frozen=True)
    sums, got = lemo_kernels.rest_norm(stream, rows, update, weight, bias, EPSILON, centred)
    wanted = stream[rows].float() if update is None else stream[rows].float() + update.float()
    result = normed(wanted, weight.float(), None if bias is None else bias.float(), centred)
    return [("normed", got, result), *([("sums", sums, wanted)] if with_update else [])]


def block_features(scale: Scale, dtype: torch.dtype, centred: bool) -> Pairs:
    """The predictor's features of all blocks, the last one ragged."""
    import lemo_kernels

    count, hidden, size, width = (17, 32, 8, 6) if scale.tiny else (8191, 4096, 64, 32)
    stream = normal(scale, dtype, count, hidden)
    weight, bias = norm_parameters(scale, dtype, hidden, centred, frozen=True)
    shapes = (hidden, width), (width, width), (width, width)
    networks = [[normal(scale, torch.float32, *shape) / shape[0] ** 0.5 for shape in shapes] for _ in range(2)]
    firsts = torch.arange(0, count, size, device=scale.device)
    lengths = (count - firsts).clamp_max(size).int()
    got = lemo_kernels.block_features(
        stream, firsts, lengths, weight, bias, *networks, block_size=size, epsilon=EPSILON, centred=centred
    )
    rows, pairs = normed(stream.float(), weight.float(), None if bias is None else bias.float(), centred), []
    for name, features, (first, second, third) in zip(("query", "key"), got, networks, strict=True):
        blocks = (torch.relu(torch.relu(rows @ first) @ second) @ third).split(size)
        half = width // 2
        wanted = [torch.cat((block[:, :half].mean(0), block[:, half:].amax(0))) for block in blocks]
        pairs.append((name, features, torch.stack(wanted)))
    return pairs


def cases() -> list[tuple[Callable[..., Pairs], tuple[Any, ...]]]:
    """Every function above with every way to call it."""
    both = (False, True)
    found: list[tuple[Callable[..., Pairs], tuple[Any, ...]]] = [(gated, (name,)) for name in ACTIVATIONS]
    for run in (gather_norm, add_norm, rest_norm):
        found += [(run, (centred, other)) for centred in both for other in both]
    return found + [(block_features, (centred,)) for centred in both]


def run_rows(scale: Scale) -> dict[str, Any]:
    """Results and gradients at Llama-3-8B's sizes; LayerNorm is `centred`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for dtype in scale.dtypes[: 1 if scale.tiny else None]:
        for run, options in cases():
            torch.manual_seed(0)
            errors = {name: error_ratio(got, wanted) for name, got, wanted in run(scale, dtype, *options)}
            right = all(error <= ALLOWED[dtype] * (2 if name.startswith("d") else 1) for name, error in errors.items())
            rows.append({"kernel": run.__name__, "options": options, "dtype": str(dtype), "errors": errors, "right": right})
    return judged(rows)


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The part's result.

    Raises:
        PartFailure: If a row is wrong; it holds all of them.
    """
    if bad := [row for row in rows if not row.get("right", True)]:
        raise PartFailure(f"results are not what they must be; {bad}", {"rows": rows})
    return {"rows": rows}


def far(scale: Scale, width: int) -> tuple[int, Tensor]:
    """Rows of this width that are more than 2^31 numbers, and some to look at: the first, the last and those at 2^31."""
    count = 24 if scale.tiny else 2**31 // width + 4096
    edge = 12 if scale.tiny else 2**31 // width
    some = 4 if scale.tiny else 64
    starts = (some, edge - some // 2, count - some)
    return count, torch.cat([torch.arange(start, start + some) for start in starts]).to(scale.device)


def far_movement(scale: Scale) -> Pairs:
    """Taking and merging, and the stream's gradient, to the bit; all rows are kept but the first ones."""
    import lemo_kernels

    width, dtype = (32 if scale.tiny else 4096), scale.dtypes[-1]
    count, at = far(scale, width)
    first = int(at[0])
    stream, upstream = normal(scale, dtype, count, width).requires_grad_(), normal(scale, dtype, count, width)
    rest, kept = (torch.arange(*ends, device=scale.device) for ends in ((0, first), (first, count)))
    instead, slots = normal(scale, dtype, first, width), lemo_kernels.row_slots(kept, rest, count)
    rows, passed = lemo_kernels.take_rows(stream, kept, slots)
    merged = lemo_kernels.merge_rows(passed, kept, slots, rows, rest=instead)
    (grad,) = torch.autograd.grad(merged, stream, upstream)
    bits = [("taken", rows[at - first], stream[at]), ("merged", merged[at], stream[at]), ("gradient", grad[at], upstream[at])]
    return [*bits, ("rest", merged[:first], instead)]


def far_norm(scale: Scale, centred: bool) -> Pairs:
    """Taking and normalising, and the stream's gradient."""
    import lemo_kernels

    width, dtype = (32 if scale.tiny else 4096), scale.dtypes[-1]
    count, at = far(scale, width)
    first = int(at[0])
    stream = normal(scale, dtype, count, width).requires_grad_()
    weight, bias = norm_parameters(scale, dtype, width, centred, frozen=True)
    rest, kept = (torch.arange(*ends, device=scale.device) for ends in ((0, first), (first, count)))
    slots = lemo_kernels.row_slots(kept, rest, count)
    rows, result, _ = lemo_kernels.gather_norm(stream, kept, slots, weight, bias, epsilon=EPSILON, centred=centred)
    grads = [normal(scale, dtype, *rows.shape) for _ in range(2)]
    (grad,) = torch.autograd.grad((rows, result), stream, grads)
    some = stream.detach()[at].float().requires_grad_()
    wanted = some, normed(some, weight.float(), None if bias is None else bias.float(), centred)
    (right,) = torch.autograd.grad(wanted, some, [part[at - first].float() for part in grads])
    return [("rows", rows[at - first], wanted[0]), ("normed", result[at - first], wanted[1]), ("dstream", grad[at], right)]


def far_rotary(scale: Scale) -> Pairs:
    """Rotary positions of queries and keys, and their gradients."""
    import lemo_kernels

    (heads, key_heads, dim), dtype = ((2, 1, 16) if scale.tiny else (32, 8, 128)), scale.dtypes[-1]
    count, at = far(scale, heads * dim)
    leaves = [normal(scale, dtype, count, some, dim).requires_grad_() for some in (heads, key_heads)]
    angles = torch.rand(count, dim // 2, device=scale.device).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    got = lemo_kernels.apply_rotary(*leaves, cos, sin, torch.arange(count, device=scale.device))
    upstream = [normal(scale, dtype, *part.shape) for part in got]
    grads = torch.autograd.grad(got, leaves, upstream)
    pairs: Pairs = []
    for name, leaf, result, given, grad in zip(("query", "key"), leaves, got, upstream, grads, strict=True):
        some = leaf.detach()[at].float().requires_grad_()
        one, other = some.chunk(2, -1)
        wanted = some * cos[at][:, None].float() + torch.cat((-other, one), -1) * sin[at][:, None].float()
        (right,) = torch.autograd.grad(wanted, some, given[at].float())
        pairs += [(name, result[at], wanted), (f"d{name}", grad[at], right)]
    return pairs


def far_gated(scale: Scale) -> Pairs:
    """The gated MLP's product and both gradients."""
    import lemo_kernels

    width, dtype = (48 if scale.tiny else 14336), scale.dtypes[-1]
    count, at = far(scale, width)
    leaves = [normal(scale, dtype, count, width).requires_grad_() for _ in range(2)]
    product, upstream = lemo_kernels.gated_activation(*leaves, "silu"), normal(scale, dtype, count, width)
    grads = torch.autograd.grad(product, leaves, upstream)
    gate, up = (leaf.detach()[at].float().requires_grad_() for leaf in leaves)
    wanted = F.silu(gate) * up
    right = torch.autograd.grad(wanted, (gate, up), upstream[at].float())
    return [("product", product[at], wanted), ("dgate", grads[0][at], right[0]), ("dup", grads[1][at], right[1])]


OFFSETS: dict[str, Callable[[Scale], Pairs]] = {
    "take and merge": far_movement,
    "gather and norm": lambda scale: far_norm(scale, centred=False),
    "gather and LayerNorm": lambda scale: far_norm(scale, centred=True),
    "rotary": far_rotary,
    "gated activation": far_gated,
}


def free_bytes(device: torch.device) -> int:
    """Bytes that a device still has, what an allocator caches among them; of a CPU more than tiny sizes need."""
    gc.collect()
    if device.type != "cuda":
        return 1 << 62
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def run_offsets(scale: Scale) -> dict[str, Any]:
    """Results and gradients of more than 2^31 numbers, looked at where 32 bits would end; a case that does not fit says so."""
    rows: list[dict[str, Any]] = []
    for name, run in OFFSETS.items():
        free = free_bytes(scale.device)
        if free < _NEEDED:
            reason = f"it needs {_NEEDED / 2**30:.0f} GiB; {free / 2**30:.0f} GiB are free"
            rows.append({"kernel": name, "skipped": reason})
            print(f"offsets of {name} skipped: {reason}", flush=True)
            continue
        torch.manual_seed(0)
        dtype, pairs = scale.dtypes[-1], run(scale)
        errors = {part: error_ratio(got, wanted) for part, got, wanted in pairs}
        right = all(error <= ALLOWED[dtype] * (2 if part.startswith("d") else 1) for part, error in errors.items())
        if run is far_movement:
            right &= all(torch.equal(got, wanted) for _, got, wanted in pairs)
        rows.append({"kernel": name, "dtype": str(dtype), "errors": errors, "right": right})
        del pairs
    return judged(rows)
