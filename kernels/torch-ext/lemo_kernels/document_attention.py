"""Causal attention of flat rows by document, whose backward sees kept rows alone (LeMo paper, section 5.1; exact form ours).

Rows of all documents lie one after the other. `attend` runs the forward without autograd; `with_kept_row_gradient` attaches
the flash backward on kept rows with an output and log-sum-exp that may come from a forward over more rows (exact form, kept keys):
the probabilities are then those of that forward and the gradient is restricted to kept pairs (kept_key_attention.py adds the others').

Two backends, chosen here: ATen's CUDA flash operators where they serve (16-bit rows, no window, a head size that is a multiple
of 8), our Triton kernels (interval_attention.py) everywhere else. Of ATen's backward dq has the same bits twice only under
`torch.use_deterministic_algorithms(True)`; ours always. Softcaps and other masks have no operator here and no argument either.

Memory: what interval_attention.py says, the same for ATen's; 8 bytes a row for the intervals.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .host import on_device, operator, require, require_attended, require_device, require_heads, unit_stride
from .interval_attention import interval_attention, interval_attention_backward


def _intervals(
    lengths: list[int], num_rows: int, window: int | None, positions: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First key that each row sees, and one beyond the last row that sees each key, `(rows,)` int32 both; neither decreases."""
    rows = torch.arange(num_rows, device=device)
    if len(lengths) == 1:
        starts = document = torch.zeros_like(rows)
    else:
        counts = on_device(lengths, device)
        indices = torch.arange(len(lengths), device=device)
        document = indices.repeat_interleave(counts, output_size=num_rows)
        starts = (counts.cumsum(0) - counts)[document]
    if window is None:
        first = starts
    elif positions is None:
        first = torch.maximum(starts, rows - (window - 1))
    else:
        # Documents far apart on one axis: a search over all rows then stays within the row's own document.
        place = positions.long() + (document << 40)
        first = torch.searchsorted(place, place - (window - 1))
    return first.int(), torch.searchsorted(first, rows, right=True).int()


def _cumulated(lengths: list[int], device: torch.device) -> tuple[Tensor, int]:
    # An empty document adds nothing to the result, and flash operators differ in how they take one.
    lengths = [length for length in lengths if length > 0]
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return on_device(ends, device).int(), max(lengths)


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    bounds, longest = _cumulated(lengths, query.device)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return output, lse.transpose(0, 1).unsqueeze(-1)  # (heads, rows) of the operator


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    bounds, longest = _cumulated(lengths, query.device)
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # read for dropout only, which is 0
    unused = torch.empty(0, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, output, lse.squeeze(-1).transpose(0, 1).contiguous(), bounds, bounds, longest, longest,
        0.0, True, random_state, unused, scale=scale
    )  # fmt: skip


def fastest_backend(query: Tensor, lengths: list[int], window: int | None, positions: Tensor | None) -> str:
    """Which of the two backends serves rows like these best. Asked within the operators, where torch.compile does not trace."""
    if query.device.type != "cuda" or query.dtype == torch.float32 or query.shape[2] % 8:
        return "triton"
    moot = window is None or (positions is None and window >= max(lengths, default=0))
    # Flash operators are built for compute capability 8.0 and later.
    return "flash" if moot and torch.cuda.get_device_capability(query.device) >= (8, 0) else "triton"


@operator("attend", reads_host=True)
def attend_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
    positions: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as in `attend`."""
    query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
    num_rows, heads, _ = query.shape
    if num_rows and (backend or fastest_backend(query, lengths, window, positions)) == "flash":
        output, lse = _flash_forward(query, key, value, lengths, scale)
        return output, lse.contiguous()
    if not num_rows:
        return torch.empty_like(query), query.new_empty(0, heads, 1, dtype=torch.float32)
    first_key, _ = _intervals(lengths, num_rows, window, positions, query.device)
    return interval_attention(query, key, value, first_key, scale)


@attend_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(*query.shape[:2], 1, dtype=torch.float32)


@operator("attend_backward", reads_host=True)
def attend_backward_operator(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None,
    positions: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; arguments as in `with_kept_row_gradient`."""
    query, key, value = (unit_stride(tensor) for tensor in (query, key, value))
    grad, output, lse = grad.contiguous(), output.contiguous(), lse.contiguous()
    num_rows = query.shape[0]
    if num_rows and (backend or fastest_backend(query, lengths, window, positions)) == "flash":
        return _flash_backward(grad, query, key, value, output, lse, lengths, scale)
    if not num_rows:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    first_key, end_query = _intervals(lengths, num_rows, window, positions, query.device)
    return interval_attention_backward(grad, query, key, value, output, lse, first_key, end_query, scale)


@attend_backward_operator.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _check(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, positions: Tensor | None) -> None:
    rows = query.shape[0]
    require_heads(query, {"keys": key, "values": value}, rows)
    if positions is not None:
        require_device("positions", positions, query)
    fits = sum(lengths) == rows and min(lengths, default=0) >= 0
    require(fits, f"document lengths must add up to the {rows} rows", lengths, "pass the lengths of these rows")
    require(window is None or window > 0, "a window counts the row itself", f"window={window}", "pass at least 1, or None")
    if positions is not None:
        fits = positions.shape == (rows,) and not positions.is_floating_point()
        got = f"{positions.dtype} of shape {tuple(positions.shape)}"
        require(fits, f"positions must be {rows} whole numbers, one a row", got, "pass the original positions of these rows")


@torch.no_grad()
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every document's rows among themselves, without autograd.

    Args:
        query: `(rows, heads, head_dim)`, positions applied, `head_dim` up to 256.
        key, value: `(rows, key_value_heads, head_dim)`.
        lengths: Rows of each document, 0 allowed; their sum is `rows`.
        scale: Factor on the dot products.
        window: A row sees keys of the last `window` positions, its own included; `None` for all earlier ones.
        positions: Original position of each row, `(rows,)`, increasing within a document; `None` if no row is left out.
        backend: "flash" (ATen on CUDA) or "triton"; `None` chooses.

    Returns:
        The attention output `(rows, heads, head_dim)` and the float32 log-sum-exp of the scores `(rows, heads, 1)`.

    Raises:
        KernelInputError: For shapes, dtypes, devices, lengths or windows that do not fit.
    """
    _check(query, key, value, lengths, window, positions)
    return attend_operator(query, key, value, lengths, scale, window, positions, backend)


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, for functions that attend in several calls and attach one gradient.

    Args:
        grad: That of the output, `(rows, heads, head_dim)`.
        query, key, value, output, lse, lengths, scale, window, positions, backend: As in `with_kept_row_gradient`.

    Raises:
        KernelInputError: As in `attend`, and for a gradient, output or log-sum-exp that are not these queries'.
    """
    _check(query, key, value, lengths, window, positions)
    require_attended(query, lse, grad=grad, output=output)
    return attend_backward_operator(grad, query, key, value, output, lse, lengths, scale, window, positions, backend)


class _KeptRowGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, positions: Tensor | None, *settings: Any
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, output, lse, positions)
        ctx.settings = settings
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, positions = ctx.saved_tensors
        lengths, scale, window, backend = ctx.settings
        grads = attend_backward_operator(grad, *tensors, lengths, scale, window, positions, backend)
        return *grads, *(None,) * (3 + len(ctx.settings))


def with_kept_row_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attaches a finished attention output to the gradients of kept rows' queries, keys and values.

    Args:
        query: Kept rows' queries, `(kept, heads, head_dim)`.
        key, value: Kept rows' keys and values, `(kept, key_value_heads, head_dim)`.
        output, lse: What `attend` gave for these rows, `(kept, heads, head_dim)` in the queries' dtype and `(kept, heads, 1)`
            float32: among kept rows only (sparse form), or the kept rows of its result over all rows (exact form).
        lengths: Kept rows of each document.
        scale, window, positions, backend: As in `attend`.

    Returns:
        `output`; its gradient is that of attention among the kept rows with the probabilities that `lse` normalises.

    Raises:
        KernelInputError: As in `attend`, and for an output or log-sum-exp that are not these queries'.
    """
    _check(query, key, value, lengths, window, positions)
    require_attended(query, lse, output=output)  # autograd gives the gradient of this output the same shape, dtype and device
    return _KeptRowGradient.apply(query, key, value, output, lse, positions, lengths, scale, window, backend)


def probe(device: torch.device, dtype: torch.dtype, head_dim: int, visible: str) -> None:
    """Attends with heads of this size, and back; `visible` is "window" or "all"."""
    # Grouped: triton would compile a loop over one head away, and with it what the loop needs.
    query, key, value = (torch.zeros(2, heads, head_dim, dtype=dtype, device=device, requires_grad=True) for heads in (4, 2, 2))
    settings = ([2], 1.0, *((1, torch.arange(2, device=device)) if visible == "window" else ()))
    with_kept_row_gradient(query, key, value, *attend(query, key, value, *settings), *settings).sum().backward()
