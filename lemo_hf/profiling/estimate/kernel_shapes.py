"""Kernels of a GPU's step that is run on shapes alone, where their PyTorch references would be another step.

Most references allocate and compute as their kernels do. Those of kept-key attention do not: they go over the pairs strip by strip,
thousands of operators for 64K tokens, each with its scores in memory. Here each is one operator that knows its results' shapes and
its FLOPs, and computes nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...models.kernel_switch import standing_in
from ..flops import KEPT_KEY_FORMULAS


@torch.library.custom_op("lemo_estimate::attend_kept_keys", mutates_args=())
def attend_kept_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    kept_rows: Tensor,
    places: Tensor,
    lengths: list[int],
    scale: float,
    width: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as in models/kept_key_attention.py, where it passes them to a kernel."""
    raise NotImplementedError("shapes only")


@attend_kept_keys.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(*query.shape[:2], 1, dtype=torch.float32)


@torch.library.custom_op("lemo_estimate::rest_query_gradient", mutates_args=())
def _rest_query_gradient(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    rest_key: Tensor,
    rest_value: Tensor,
    kept_rows: Tensor,
    rest_rows: Tensor,
    places: Tensor,
    lengths: list[int],
    scale: float,
    width: int,
) -> Tensor:
    raise NotImplementedError("shapes only")


@_rest_query_gradient.register_fake
def _(grad: Tensor, query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def rest_query_gradient(*arguments: Any) -> Tensor:
    """The gradient; arguments as in models/kept_key_attention.py."""
    *rest, width, window = arguments
    found: Tensor = _rest_query_gradient(*rest, width if window is None else min(width, window))
    return found


def stand_in_formulas() -> dict[Any, Callable[..., int]]:
    """By operator the function from a call's arguments to its FLOPs, as `flop_formulas` has them."""
    return {getattr(torch.ops.lemo_estimate, name): formula for name, formula in KEPT_KEY_FORMULAS.items()}


def kernels_on_shapes(on_gpu: bool) -> AbstractContextManager[None]:
    """The context in which a step on fake tensors is that of a GPU, or of the CPU."""
    functions: dict[str, Callable[..., Any]] = {"attend_kept_keys": attend_kept_keys, "rest_query_gradient": rest_query_gradient}
    return standing_in(functions) if on_gpu else nullcontext()
