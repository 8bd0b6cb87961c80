"""FLOPs of a training step: `FlopCounterMode` with attention counted as it is computed, split by module and phase.

A multiply-add is 2 FLOPs. What is counted are matrix products and attention; element-wise work is not. PyTorch's counter
counts CPU flash attention as 0 and every causal attention as if all pairs were computed. Here, for heads of size d:

    pairs    = sum over query rows i of min(i + 1, keys)    if causal, else queries * keys
    forward  = 2 * pairs * heads * (d + d_v)                Q K^T and P V
    backward = 2 * pairs * heads * (3 d + 2 d_v)            Q K^T again, dO V^T, P^T dO, dS K, dS^T Q

`heads` are query heads: grouped queries read fewer keys but compute as much. With a mask in place of the causal flag all pairs
count, since all are computed.

Llama-3-8B per token and layer, in multiply-adds: P = 218.1 M, of which attention's projections 2 H^2 + 2 H^2 / 4 = 41.9 M and the
MLP 3 * 3.5 H^2 = 176.2 M; attention over N causal tokens A = 2 H * (N + 1) / 2: 16.8 M at 4096, 134.2 M at 32K. LoRA does not
form the frozen weights' gradients, so a stock step costs 2 P + 3.5 A (494.9 M at 4096; adapters of r = 8 add 0.6 M). With a share r of the rows kept:

    sparse     2 r P_attention + (1 + r) P_mlp + 3.5 r^2 A
    kept_keys  (1 + r) (P_attention + P_mlp) + (r + 2.5 r^2) A + (1 - r) (1 + 1.5 r) A_w
    exact      (1 + r) (P_attention + P_mlp) + (1 + 2.5 r^2 + 1.5 r (1 - r)) A

    r = 0.5: 320.9 M, 347.9 M and 360.7 M at 4096, 0.648, 0.703 and 0.729 of stock

before selection and prediction. A_w = 2 H w: attention to w nearby tokens, 2.1 M for w = 256. The terms with 1.5 are the gradient of
kept queries through dropped keys, Q K^T, dO V^T and dS K. On the CPU strips with masks compute and count some pairs more.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

from .breakdown import Breakdown, RunningOwners

FIELDS = ("module", "layer", "part", "phase", "operator")

_aten = torch.ops.aten
_ATTENTION_FORWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
)
_ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
)

# Of `lemo_kernels`, and what stands in for them where a GPU's step is estimated.
_KERNELS_OF_ATTENTION = {"attend", "attend_backward", "attend_nearby", "attend_kept_keys", "rest_query_gradient"}


def attention_pairs(queries: int, keys: int, is_causal: bool) -> int:
    """(query, key) pairs that attention computes; causal means key index <= query index, as in PyTorch's `is_causal`.

    Args:
        queries: Query rows.
        keys: Key rows.
        is_causal: Whether later keys are left out.
    """
    if not is_causal:
        return queries * keys
    within = min(queries, keys)
    return within * (within + 1) // 2 + (queries - within) * keys


def _attention_flops(operator: Any, products_by_key_size: int, products_by_value_size: int) -> Callable[..., int]:
    # The schema names the arguments: the operators of the family place them differently.
    names = [argument.name for argument in operator.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = {**dict(zip(names, args)), **kwargs}
        batch, heads, queries, key_size = given["query"].shape
        keys, value_size = given["value"].shape[-2:]
        pairs = attention_pairs(queries, keys, bool(given.get("is_causal", False)))
        widths = products_by_key_size * key_size + products_by_value_size * value_size
        return 2 * batch * heads * pairs * widths

    return count


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """By operator (overload packet) the function from a call's arguments, and `out_val`, to its FLOPs."""
    formulas: dict[Any, Callable[..., int]] = dict(flop_registry)
    formulas.update({operator: _attention_flops(operator, 1, 1) for operator in _ATTENTION_FORWARD})
    formulas.update({operator: _attention_flops(operator, 3, 2) for operator in _ATTENTION_BACKWARD})
    return formulas | _kernel_formulas()


def _window_pairs(lengths: Sequence[int], window: int | None) -> int:
    """Pairs of documents' rows among themselves; a window is taken to count rows, as if none were left out."""
    pairs = 0
    for length in lengths:
        near = length if window is None else min(window, length)
        pairs += attention_pairs(near, near, True) + (length - near) * near
    return pairs


def _attend_kept_keys(query: Tensor, key: Tensor, value: Tensor, kept_key: Tensor, *rest: Any, **_: Any) -> int:
    """As if the kept rows lay evenly: of all earlier keys of a document their share, of the nearby ones all."""
    lengths, _, width, window = rest[-4:]
    rows, kept = query.shape[0], kept_key.shape[0]
    nearby = _window_pairs(lengths, width if window is None else min(width, window))
    pairs = (kept * _window_pairs(lengths, window) + (rows - kept) * nearby) // max(1, rows)
    return 2 * pairs * query.shape[1] * 2 * query.shape[2]


def _rest_query_gradient(grad: Tensor, query: Tensor, output: Tensor, lse: Tensor, rest_key: Tensor, *rest: Any, **_: Any) -> int:
    """As if the kept rows lay evenly; its window is in its width."""
    lengths, _, width = rest[-3:]
    kept, dropped = query.shape[0], rest_key.shape[0]
    pairs = kept * dropped * _window_pairs(lengths, width) // max(1, kept + dropped) ** 2
    return 2 * pairs * query.shape[1] * 3 * query.shape[2]


KEPT_KEY_FORMULAS: dict[str, Callable[..., int]] = {
    "attend_kept_keys": _attend_kept_keys,
    "rest_query_gradient": _rest_query_gradient,
}


def _kernel_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of the operators in `lemo_kernels`, where it is installed; its other operators move rows only."""
    try:
        from lemo_kernels import (  # noqa: F401  # registers them
            document_attention,
            kept_key_attention,
            nearby_attention,
            pattern_predictor,
            token_informativeness,
        )
    except ImportError:
        return {}

    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], *rest: Any, out_val: Any = None) -> int:
        _, window, _, _ = rest
        return 2 * _window_pairs(lengths, window) * query.shape[1] * 2 * query.shape[2]

    def attend_backward(grad: Tensor, query: Tensor, *rest: Any, out_val: Any = None) -> int:
        *_, lengths, _, window, _, _ = rest
        return 2 * _window_pairs(lengths, window) * query.shape[1] * 5 * query.shape[2]

    def attend_nearby(query: Tensor, key: Tensor, *rest: Any, out_val: Any = None) -> int:
        pairs = query.shape[0] * min(rest[-1], key.shape[0])  # as if every row had as many before it
        return 2 * pairs * query.shape[1] * 2 * query.shape[2]

    def block_scores(query: Tensor, key: Tensor, lengths: Sequence[int], *rest: Any, out_val: Any = None) -> int:
        *_, window = rest
        return 2 * _window_pairs(lengths, window) * query.shape[1] * query.shape[2]

    def block_features(stream: Tensor, *rest: Any, out_val: Any = None) -> int:
        *_, query_matrices, key_matrices, _ = rest
        return 2 * stream.shape[0] * sum(matrix.numel() for matrix in (*query_matrices, *key_matrices))

    named: dict[str, Callable[..., int]] = {
        formula.__name__: formula for formula in (attend, attend_backward, attend_nearby, block_scores, block_features)
    }
    return {getattr(torch.ops.lemo_kernels, name): formula for name, formula in (named | KEPT_KEY_FORMULAS).items()}


def is_attention(operator: Any) -> bool:
    """Whether an operator (overload packet) is attention, forward or backward."""
    kernel = str(operator).rpartition(".")[2] in _KERNELS_OF_ATTENTION
    return kernel or operator in _ATTENTION_FORWARD or operator in _ATTENTION_BACKWARD


class _NoTracker(ModuleTracker):
    """Replaces the tracker of `FlopCounterMode`, whose gradient hooks forbid `torch.autograd.grad` within the forward."""

    def __enter__(self) -> "_NoTracker":
        return self

    def __exit__(self, *exception: object) -> None:
        return None


class FlopCounter:
    """Context manager that counts the FLOPs of what runs within it, forward and backward.

    ```python
    with FlopCounter(model) as counter:
        model(**batch).loss.backward()
    counter.flops.total
    counter.flops.by("part")     # {"mlp": ..., "q,k,v": ...}
    counter.flops.by("phase")    # {"backward": ..., "forward": ...}
    ```

    The backward of an operation belongs to the module that ran it forward, and so does its recomputation under activation
    checkpointing, which counts as backward. Under `FakeTensorMode` enter the mode first. Backward must run in the thread of
    the forward (it does on the CPU) for its modules to be told apart; the total does not depend on it.

    Args:
        model: Its module names are those of the breakdown.
    """

    def __init__(self, model: nn.Module) -> None:
        counting = {operator: self._counting(operator, formula) for operator, formula in flop_formulas().items()}
        self._mode = FlopCounterMode(display=False, custom_mapping=counting)
        self._mode.mod_tracker = _NoTracker()
        self._owners = RunningOwners(model)
        self._amounts: Counter[tuple[str, int | None, str, str, str]] = Counter()

    def __enter__(self) -> "FlopCounter":
        self._amounts.clear()
        self._owners.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)
        self._owners.__exit__(kind, error, trace)

    @property
    def flops(self) -> Breakdown:
        """FLOPs so far, by module, layer, part, phase (forward, backward) and operator."""
        return Breakdown(FIELDS, self._amounts)

    def _counting(self, operator: Any, formula: Callable[..., int]) -> Callable[..., int]:
        name = getattr(operator, "__name__", str(operator)).removeprefix("_")

        def counted(*args: Any, **kwargs: Any) -> int:
            flops = formula(*args, **kwargs)
            owner = self._owners.owner()
            part = "attention" if is_attention(operator) else owner.part
            phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
            self._amounts[owner.module, owner.layer, part, phase, name] += flops
            return flops

        # FlopCounterMode replaces tensors by shapes otherwise, and formulas of its registry expect tensors.
        counted._get_raw = True  # type: ignore[attr-defined]
        return counted
