"""Which implementation runs: the Triton kernels of `lemo_kernels`, or the PyTorch reference in this folder.

Tensors on CUDA take the kernels where triton is installed, everything else the reference. `kernel_mode` forces either, and
there is no other way: no environment variable, no config field (which kernels run is not a property of a model).

A kernel is tried on a few rows before its first use with a dtype and a size, forward and backward, outside of any graph that
`torch.compile` traces. One that fails to compile is logged once, with the reason, and its reference runs instead; under
`kernel_mode("kernels")` that is an error. So it is for attention, whose reference has operators for the CPU only: its caller refuses.
A device that fails, or runs out of memory, is no reason for the reference: that is raised.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .lemo_config import LemoConfigError

try:
    import lemo_kernels
except ImportError as error:
    lemo_kernels = None
    _absence = str(error)

KernelMode = Literal["auto", "kernels", "reference"]

# What this code expects of lemo_kernels: it may travel with a model, away from the package.
_INTERFACE = 1
# Attention whose references call ATen's operators for the CPU; document_attention.py and kept_key_attention.py refuse other devices.
_CPU_REFERENCES = {"attend", "attend_backward", "with_kept_row_gradient", "attend_kept_keys", "rest_query_gradient"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_mode: KernelMode = "auto"
_stand_ins: dict[str, Callable[..., Any]] = {}
_logger = logging.getLogger(__name__)


@contextmanager
def kernel_mode(mode: KernelMode) -> Iterator[None]:
    """Runs its block with the kernels, or with the reference, whatever the device.

    Args:
        mode: `"kernels"` insists on them and raises where one cannot run; on the CPU that takes triton's interpreter
            (TRITON_INTERPRET=1 before triton is imported). `"reference"` runs none. `"auto"` is the state outside.

    Raises:
        LemoConfigError: If there is no such mode.
    """
    global _mode
    if mode not in get_args(KernelMode):
        raise LemoConfigError(f"kernel_mode must be one of {', '.join(get_args(KernelMode))}; got {mode!r}; choose one of these")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


@contextmanager
def standing_in(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Runs its block with functions in place of kernels, whatever the device and the mode: on shapes alone, a step with kernels is
    not what it is with their references.

    Args:
        functions: By the kernel's name.
    """
    global _stand_ins
    before, _stand_ins = _stand_ins, functions
    try:
        yield
    finally:
        _stand_ins = before


def kernel(name: str, rows: Tensor, *sizes: int | str) -> Callable[..., Any] | None:
    """The kernel to run, or `None` where the reference does.

    Args:
        name: Public function of `lemo_kernels`.
        rows: The tensor whose device and dtype decide.
        sizes: What the kernel is compiled for, as the `probe` of its module takes it: row width, head sizes, an activation.

    Raises:
        LemoConfigError: If `kernel_mode("kernels")` is on and the kernel cannot run.
    """
    if name in _stand_ins:
        return _stand_ins[name]
    mode = _mode
    if mode == "reference" or (mode == "auto" and rows.device.type != "cuda"):
        return None
    if not _may_run(name, mode == "kernels", rows.device.type, rows.dtype, sizes):
        return None
    return getattr(lemo_kernels, name)


# Runs while torch.compile traces, and its answer is part of the graph: trying a kernel must not be.
@torch.compiler.assume_constant_result
def _may_run(name: str, insists: bool, device_type: str, dtype: torch.dtype, sizes: tuple[int | str, ...]) -> bool:
    reason = _reason_against(name, device_type, dtype, sizes)
    if reason is not None and insists:
        raise LemoConfigError(f"the kernel {name} cannot run; {reason}; leave kernel_mode at 'auto'")
    if reason is not None:
        _say_once(name, reason)
    return reason is None


@cache
def _reason_against(name: str, device_type: str, dtype: torch.dtype, sizes: tuple[int | str, ...]) -> str | None:
    if lemo_kernels is None:
        return f"lemo_kernels is not there ({_absence})"
    if lemo_kernels.INTERFACE != _INTERFACE:
        return f"lemo_kernels has interface {lemo_kernels.INTERFACE}, this code was written for {_INTERFACE}"
    if dtype not in _DTYPES:
        return f"kernels take float32, float16 and bfloat16, not {dtype}"
    try:
        lemo_kernels.probe(name, torch.device(device_type), dtype, *sizes)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # says nothing of the kernel: memory is short for the moment, or the device has failed and no reference can run
    except Exception as failure:  # whatever the compiler or the driver raises: it is the reason
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"
    return None


@cache
def _say_once(name: str, reason: str) -> None:
    instead = "and its PyTorch reference is for the CPU" if name in _CPU_REFERENCES else "its PyTorch reference does"
    _logger.warning("The kernel %s cannot run, %s: %s", name, instead, reason)
