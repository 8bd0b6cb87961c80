"""Memory of the running process, read without touching anything: counters of the CUDA allocator, or resident pages on a CPU.

Nothing is reset: whoever reads `torch.cuda.max_memory_allocated()` after training finds the peak of all of it.
"""

from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def memory_metrics(device: torch.device) -> dict[str, float]:
    """What a log says of memory, in bytes: `memory/peak_bytes`, the most since the process began.

    On CUDA tensors of the fullest card, on a CPU resident pages, which hold the interpreter and libraries too (about 1 GiB); nothing
    on other devices and systems.

    Args:
        device: The device that trains.
    """
    peak = _bytes(device, "VmHWM", torch.cuda.max_memory_allocated)
    return {} if peak is None else {"memory/peak_bytes": float(peak)}


def after_forward_metrics(device: torch.device) -> dict[str, float]:
    """The same of this moment, `memory/after_forward_bytes`, for the end of a forward pass, when all that backward needs is there."""
    now = _bytes(device, "VmRSS", torch.cuda.memory_allocated)
    return {} if now is None else {"memory/after_forward_bytes": float(now)}


def _bytes(device: torch.device, field: str, of_card: Callable[[int], int]) -> int | None:
    if device.type == "cuda":
        return max(of_card(card) for card in range(torch.cuda.device_count()))
    if device.type != "cpu" or not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
