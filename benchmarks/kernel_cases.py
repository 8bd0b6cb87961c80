"""Every kernel that benchmarks/kernel_times.py measures, and at which sizes."""

from collections.abc import Callable, Iterator

import torch
from attention_cases import attention, block_scores, kept_key_attention, nearby_attention, rest_query_gradient
from kernel_setting import Case, Setting
from loss_case import loss
from row_cases import (
    add_norm,
    block_features,
    gated_activation,
    gather_norm,
    gather_norm_backward,
    rotary,
    scatter_add,
    take_and_merge,
)

CASES: dict[str, Callable[[Setting], Case]] = {
    builder.__name__: builder
    for builder in (
        gather_norm, gather_norm_backward, add_norm, rotary, scatter_add, take_and_merge, gated_activation, block_features,
        block_scores, loss, attention, nearby_attention, kept_key_attention, rest_query_gradient,
    )
}  # fmt: skip


def settings_of(name: str, tiny: bool) -> Iterator[Setting]:
    """The sizes at which a kernel is measured."""
    if tiny:
        sizes = {"hidden": 32, "heads": 4, "key_heads": 2, "head_dim": 16, "vocabulary": 70, "block_size": 8, "segment": 16}
        sizes |= {"intermediate": 48, "predictor": 6}
        yield Setting(48, 0.5, torch.device("cpu"), torch.float32, **sizes)  # type: ignore[arg-type]
        return
    quadratic = name in ("block_scores", "attention", "kept_key_attention", "rest_query_gradient")
    all_rows = (8192, 32768, 65536) if quadratic else (16384,) if name == "loss" else (16384, 32768, 65536, 131072)
    for rows in all_rows:
        for keep in (1.0,) if name in ("loss", "block_scores", "block_features") else (0.5,) if quadratic else (0.3, 0.5, 0.7):
            yield Setting(rows, keep, torch.device("cuda"), torch.bfloat16)
