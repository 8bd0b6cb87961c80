"""How far a result is from what it must be, for the programs that compare kernels with formulas."""

from typing import Any

import torch
from torch import Tensor

ALLOWED = {torch.float32: 1e-5, torch.float16: 0.002, torch.bfloat16: 0.005}  # root-mean-square error over root mean square
# Numbers that are held in float64 at one time: 0.1 GB each of the result, what is wanted and their difference.
_AT_ONCE = 1 << 24


def error_ratio(got: Tensor, wanted: Tensor) -> float:
    """Root-mean-square error over root mean square, a stretch of numbers at a time; infinite if an entry is not a number.

    Args:
        got, wanted: Of one shape, any float dtypes.

    Raises:
        ValueError: If the shapes differ.
    """
    if got.shape != wanted.shape:
        raise ValueError(f"results must have one shape; got {tuple(got.shape)} and {tuple(wanted.shape)}; compare like with like")
    error = torch.zeros((), dtype=torch.float64, device=got.device)
    size = torch.zeros_like(error)
    parts = (part.detach().reshape(-1).split(_AT_ONCE) for part in (got, wanted))
    for one, other in zip(*parts, strict=True):
        error += (one.double() - other.double()).square().sum()
        size += other.double().square().sum()
    count = max(1, got.numel())
    ratio = ((error / count).sqrt() / (size / count).sqrt().clamp_min(1e-12)).item()
    return ratio if ratio == ratio else float("inf")


def require(right: bool, what: str) -> None:
    """Ends a part whose result is not what it must be."""
    if not right:
        raise AssertionError(what)


class PartFailure(AssertionError):
    """A part of benchmarks/gpu_suite.py whose result is not what it must be.

    Args:
        what: The fact.
        found: What it measured all the same; it stands in the part's file.
    """

    def __init__(self, what: str, found: dict[str, Any]) -> None:
        super().__init__(what)
        self.found = found
