"""What the kernels' tests share: where they run, seeded inputs, and how far a result may be from its reference."""

import torch
from torch import Tensor

# The GPU where there is one, triton's interpreter on the CPU otherwise (tests/conftest.py sets that up).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# tl.dot on bfloat16 is wrong in the interpreter.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
# Largest ratio of a result's root-mean-square error to its reference's root mean square.
ALLOWED = {torch.float32: 1e-5, torch.float16: 0.002, torch.bfloat16: 0.005}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def split_rows(num_rows: int, kept: int, padding: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted kept and rest rows, chosen at random; `padding` rows are in neither."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    parts = order[padding : padding + kept], order[padding + kept :]
    return tuple(part.sort().values.to(DEVICE) for part in parts)


def strided(tensor: Tensor) -> Tensor:
    """The same values with rows further apart, and not at the storage's beginning."""
    wide = tensor.new_zeros(tensor.shape[0], tensor[:1].numel() + 5)
    view = wide[:, 3 : 3 + tensor[:1].numel()]
    view.copy_(tensor.flatten(1))
    return view.unflatten(1, tensor.shape[1:]) if tensor.dim() > 2 else view


def far_rows(width: int, count: int = 1) -> list[Tensor]:
    """Five float16 rows each whose last begins more than 2^32 elements behind the first, though neither the row number nor the
    stride needs more than 32 bits: an offset that wraps reads other memory, or none. Only the rows themselves touch memory.
    """
    stride = 2**30 + 64
    storage = torch.UntypedStorage((4 * stride + count * width) * 2, device=DEVICE)
    views = []
    for place in range(count):
        view = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(storage, place * width, (5, width), (stride, 1))
        view.copy_(random(5, width, dtype=torch.float16, seed=place))
        views.append(view)
    return views


def transposed(tensor: Tensor) -> Tensor:
    """The same values with columns further apart than rows."""
    return tensor.t().contiguous().t()


def error_ratio(got: Tensor, wanted: Tensor) -> float:
    """Root-mean-square error over root mean square; infinite if an entry is not finite."""
    assert got.shape == wanted.shape
    if not torch.isfinite(got).all():
        return float("inf")
    scale = wanted.double().square().mean().sqrt().clamp_min(1e-12)
    return ((got.double() - wanted.double()).square().mean().sqrt() / scale).item()


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """Within what the dtype allows, and of the reference's dtype."""
    assert got.dtype == wanted.dtype
    assert got.numel() == 0 or error_ratio(got, wanted) <= ALLOWED[dtype or got.dtype]
