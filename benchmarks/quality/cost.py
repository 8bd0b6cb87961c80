"""What a training step of an arm costs beside stock's: time by steps in turns, FLOPs and saved bytes by counting.

Time is the processor's time of this process on the CPU, which a busy machine stretches least, and wall-clock time on a GPU. Both
models take a step in every round, and the ratio is the median of the rounds' ratios, so that whatever slows the machine down
slows both. Times are of forward and backward; the optimizer's step on an adapter is the same in every arm, and small.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.flops import FlopCounter


def seconds(device: torch.device) -> float:
    """Of this process on the CPU, of the clock once the device is done on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def step(model: nn.Module, batch: Mapping[str, Tensor], mixed: bool) -> None:
    """Forward and backward in training mode; under bfloat16 autocast if `mixed`."""
    device = batch["input_ids"].device
    model.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def count_step(model: nn.Module, batch: Mapping[str, Tensor], mixed: bool) -> dict[str, float]:
    """A step's FLOPs and the bytes that its forward saves for backward."""
    device = batch["input_ids"].device
    model.train()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed)
    with ActivationMemory(model) as memory, autocast:
        loss = model(**batch).loss
    del loss
    with FlopCounter(model) as counter:
        step(model, batch, mixed)
    return {"saved_bytes": float(memory.saved.total), "flops": float(counter.flops.total)}


def kept_share(model: nn.Module) -> float:
    """Mean over layers of the share of rows that the last training step kept, in [0, 1]."""
    return statistics.fmean(sparse_backbone(model).lemo_kept_shares)


def measure_cost(
    stock: nn.Module,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    rounds: int,
    mixed: bool = True,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """A step's cost beside stock's.

    Args:
        stock: The stock model with its adapter.
        model: The arm's, a LeMo model.
        batch: One batch, on the models' device.
        rounds: Rounds that count; one more comes before them.
        mixed: Whether forward passes run under bfloat16 autocast.
        around: What the arm's steps run within.

    Returns:
        `time_ratio`, the median of `time_ratios`; `stock_seconds`, the median of stock's; `saved_bytes` and `flops`, and the same of
        stock; `kept_share`.
    """
    device = batch["input_ids"].device
    ratios, stock_seconds = [], []
    for number in range(rounds + 1):
        began = seconds(device)
        step(stock, batch, mixed)
        middle = seconds(device)
        with around():
            step(model, batch, mixed)
        if number:
            ended = seconds(device)
            stock_seconds.append(middle - began)
            ratios.append((ended - middle) / (middle - began))
    with around():
        counted = count_step(model, batch, mixed)
        share = kept_share(model)
    return {
        "time_ratio": statistics.median(ratios),
        "time_ratios": ratios,
        "stock_seconds": statistics.median(stock_seconds),
        "kept_share": share,
        **counted,
        **{f"stock_{name}": value for name, value in count_step(stock, batch, mixed).items()},
    }
