"""What one operator costs: FLOPs, bytes it reads and writes, and the bytes that a CUDA kernel holds while it works.

Traffic counts each input read once and each output written once, as operators run one by one do; views cost nothing. Movement of
rows reads and writes the rows it moves.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..flops import flop_formulas, is_attention
from .kernel_shapes import stand_in_formulas

_FORMULAS: dict[Any, Callable[..., int]] = {}
# By name: the tensor whose bytes are read and written; the operator touches no more of its other arguments.
_MOVES_RESULT = {"index_select", "gather", "embedding", "index", "cat", "copy_", "_to_copy", "clone"}
_MOVES_ARGUMENT = {"index_copy_": 3}
_WRITES_RESULT = {"zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_full", "zero_", "fill_"}
# `_unsafe_view` is a view of a result that nobody else holds.
_COSTS_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}


class OperatorCost(NamedTuple):
    """FLOPs, bytes read and written, and whether it is attention rather than a plain matrix product."""

    flops: int
    traffic: int
    attention: bool


def operator_cost(operator: Any, args: Any, kwargs: Any, result: Any) -> OperatorCost | None:
    """The cost of one call, or `None` if it costs nothing."""
    name = operator._schema.name.rpartition("::")[2]
    # What asks a tensor for its device and the like (`prim`) shows on fake tensors only, and touches no data.
    if operator.is_view or operator.namespace == "prim" or name in _COSTS_NOTHING:
        return None
    if not _FORMULAS:
        _FORMULAS.update(flop_formulas() | stand_in_formulas())
    formula = _FORMULAS.get(operator._overloadpacket)
    flops = formula(*args, **kwargs, out_val=result) if formula is not None else 0
    if name in _MOVES_ARGUMENT:
        traffic = 2 * _bytes([args[_MOVES_ARGUMENT[name]]])
    elif name in _MOVES_RESULT:
        traffic = 2 * _bytes(tree_leaves(result))
    elif name in _WRITES_RESULT:
        traffic = _bytes(tree_leaves(result))
    else:
        traffic = _bytes(tree_leaves((args, kwargs))) + _bytes(tree_leaves(result))
    return OperatorCost(flops, traffic, is_attention(operator._overloadpacket))


def _bytes(values: Iterable[Any]) -> int:
    tensors = [value for value in values if isinstance(value, Tensor)]
    # An expanded tensor has more elements than bytes.
    return sum(min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()) for tensor in tensors)


def flash_workspace(operator: Any, args: Any, kwargs: Any) -> int:
    """Bytes that the CUDA flash backward holds within itself, where the CPU's holds none.

    FlashAttention 2, as PyTorch carries it, sums dq in float32, keeps one float32 number a query row, and where heads share
    keys forms dk and dv for every query head before it sums them: rows in multiples of 128, head sizes of 32. Calls with a mask
    (windows, pairs of blocks) are another kernel's on CUDA, which holds one float32 number a query row and head.
    """
    if operator._overloadpacket is not torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 0
    _, query, key = args[:3]
    batch, heads, rows, size = query.shape
    if kwargs.get("attn_mask") is not None:
        return batch * heads * rows * 4
    rows, wide = -(-rows // 128) * 128, -(-size // 32) * 32
    grouped = 2 * batch * heads * key.shape[2] * size * key.itemsize if key.shape[1] != heads else 0
    return batch * heads * rows * (wide + 1) * 4 + grouped
