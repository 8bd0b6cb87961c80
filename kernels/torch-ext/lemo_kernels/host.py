"""The host's side of a kernel: argument checks, registration, device, tile sizes.

Shapes, dtypes and devices are checked before every launch; they are known without asking the device. Index *values* are not:
reading them would cost a synchronisation a call. They are checked here where that is free (tensors on the CPU, the
interpreter), and every kernel masks the accesses that an index decides: a wrong one gives NaN rows, wrong keys, or a row that is
added nowhere, never an illegal access.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

try:  # kernel-builder writes this module, so that several builds can be loaded side by side
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        """The operator's name with its namespace."""
        return f"lemo_kernels::{name}"


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Wider heads do not fit the tiles of attention and block scores.
MAX_HEAD_DIM = 256


class KernelInputError(ValueError):
    """Arguments that a kernel cannot take: one line with the fact, the value and the fix."""


def operator(name: str, reads_host: bool = False, writes: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Registers a host function as a custom operator: opaque to torch.compile, callable on fake tensors once it has a fake.

    One that writes into arguments names them in `writes`: autograd then knows that these have changed.

    One that copies host numbers with `on_device` says so by `reads_host`: a CUDA graph would copy them again at each replay from
    memory that is no longer theirs, so `torch.compile(mode="reduce-overhead")` runs it outside of its graphs.
    """
    tags = (torch.Tag.cudagraph_unsafe,) if reads_host else ()
    return torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=writes, tags=tags)


def launch_on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one, which is where triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given; raises what went wrong there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def real_and_differentiable() -> Iterator[None]:
    """Runs its block on real tensors under autograd, whatever traces, fakes or infers around it."""
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        yield


def require_interpreter(device: torch.device) -> None:
    """Checks that kernels can run on the device at all: on the CPU only in triton's interpreter."""
    interpreted = device.type != "cpu" or triton.knobs.runtime.interpret
    require(
        interpreted,
        "on the CPU kernels run in triton's interpreter only",
        "TRITON_INTERPRET not set",
        "set it to 1 before triton is imported",
    )


def require(holds: bool, fact: str, value: object, fix: str) -> None:
    """Raises `KernelInputError` unless `holds`."""
    if not holds:
        raise KernelInputError(f"{fact}; got {value}; {fix}")


def require_rows(
    name: str, tensor: Tensor, width: int | None = None, like: Tensor | None = None, count: int | None = None
) -> None:
    """Checks a matrix of rows: two dimensions, a supported dtype, and where given its width, its count and the device of `like`."""
    require(tensor.dim() == 2, f"{name} must be (rows, width)", f"shape {tuple(tensor.shape)}", "flatten the batch first")
    require(tensor.dtype in DTYPES, f"{name} must be float32, float16 or bfloat16", tensor.dtype, "use the PyTorch reference")
    if width is not None:
        require(tensor.shape[1] == width, f"{name} must have rows of width {width}", tensor.shape[1], "pass rows of one width")
    if count is not None:
        require(tensor.shape[0] == count, f"{name} must have {count} rows", tensor.shape[0], "pass one row per index")
    if like is not None:
        require_device(name, tensor, like)


def require_device(name: str, tensor: Tensor, like: Tensor) -> None:
    """Checks that a tensor lies where `like` does."""
    require(tensor.device == like.device, f"{name} must be on {like.device}", tensor.device, "move it there")


def require_heads(query: Tensor, others: dict[str, Tensor], rows: int) -> None:
    """Checks queries `(any, heads, head_dim)` and what they are held against, `(rows, key_value_heads, head_dim)` each, by name."""
    require(query.dim() == 3, "queries must be (rows, heads, head_dim)", f"shape {tuple(query.shape)}", "flatten the batch first")
    _, heads, head_dim = query.shape
    names, key = " and ".join(others), next(iter(others.values()))
    shapes = ", ".join(str(tuple(part.shape)) for part in others.values())
    fits = key.dim() == 3 and (key.shape[0], key.shape[2]) == (rows, head_dim) and key.shape[1] > 0
    fits = fits and all(part.shape == key.shape for part in others.values())
    fact = f"{names} must be ({rows}, key_value_heads, {head_dim}), as the queries are"
    require(fits, fact, shapes, "pass one row of each per token")
    fact = f"{heads} query heads must be a multiple of the key heads"
    require(heads % key.shape[1] == 0, fact, key.shape[1], "repeat the keys")
    dtypes = {query.dtype, *(part.dtype for part in others.values())}
    supported = len(dtypes) == 1 and query.dtype in DTYPES
    require(supported, f"queries, {names} must be of one dtype, float32, float16 or bfloat16", dtypes, "cast them")
    for name, part in others.items():
        require_device(name, part, query)
    require(head_dim <= MAX_HEAD_DIM, f"kernels serve head sizes up to {MAX_HEAD_DIM}", head_dim, "use the PyTorch reference")


def require_attended(query: Tensor, lse: Tensor, **others: Tensor) -> None:
    """Checks what a finished attention left for its queries: its log-sum-exp, and by name what is like them (output, gradient)."""
    for name, part in others.items():
        require(part.shape == query.shape, f"{name} must be {tuple(query.shape)}", tuple(part.shape), "pass one row per query")
        require(part.dtype == query.dtype, f"{name} must be {query.dtype}, as the queries are", part.dtype, "cast it")
        require_device(name, part, query)
    shape = (*query.shape[:2], 1)
    fits = lse.shape == shape and lse.dtype == torch.float32
    got = f"{lse.dtype} {tuple(lse.shape)}"
    require(fits, f"lse must be float32 {shape}, one a row and head", got, "pass what the forward gave")
    require_device("lse", lse, query)


def require_vector(name: str, tensor: Tensor, length: int, like: Tensor) -> None:
    """Checks a contiguous vector such as a norm's weight."""
    require(tensor.shape == (length,), f"{name} must have shape ({length},)", tuple(tensor.shape), "pass one number per column")
    require(tensor.dtype in DTYPES, f"{name} must be float32, float16 or bfloat16", tensor.dtype, "use the PyTorch reference")
    require_device(name, tensor, like)


def require_index(
    name: str,
    index: Tensor,
    bound: int,
    like: Tensor,
    dtype: torch.dtype = torch.int64,
    first: int = 0,
    fix: str = "select rows of this batch",
) -> None:
    """Checks a vector of row numbers; their range, `[first, bound)`, too where it costs no synchronisation."""
    require(index.dim() == 1, f"{name} must be a vector", f"shape {tuple(index.shape)}", "flatten it")
    require(index.dtype == dtype, f"{name} must be {dtype}", index.dtype, f"call .to({dtype})")
    require_device(name, index, like)
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and type(index) is Tensor and index.numel():
        low, high = int(index.min()), int(index.max())
        require(low >= first and high < bound, f"{name} must be in [{first}, {bound})", f"{low} to {high}", fix)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense, a copy otherwise."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def optional(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer for an argument that the kernel does not read."""
    return instead if tensor is None else tensor


def on_device(values: list[int] | Tensor, device: torch.device) -> Tensor:
    """Host numbers as an int64 tensor on a device, without waiting for it: a copy from pageable memory would be synchronous."""
    host = torch.as_tensor(values, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def movement_tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile for kernels that treat columns alike: 8192 elements, 16 KiB of a 16-bit type."""
    columns = min(triton.next_power_of_2(max(width, 1)), 1024)
    return 8192 // max(columns, 128), columns


def whole_row_tile(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile that holds whole rows, for kernels that reduce over them."""
    columns = triton.next_power_of_2(max(width, 1))
    require(
        columns <= 65536, "a row must fit into one program's registers, up to 65536 columns", width, "use the PyTorch reference"
    )
    rows = max(1, 2048 // max(columns, 128))
    return rows, columns, min(32, max(4, columns * rows // 512))
