"""What autograd saves while something runs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_tensors(compute: Callable[[], Any], parameters: Iterable[Tensor]) -> tuple[Any, list[Tensor]]:
    """The result of `compute` and every tensor that autograd saves while it runs, parameters aside."""
    kept = []
    known = {weight.untyped_storage().data_ptr() for weight in parameters}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = compute()
    return result, kept
