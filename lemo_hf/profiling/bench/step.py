"""One method at one length, measured in this process: `python -m lemo_hf.profiling.bench.step JOB.json RESULT.json`.

A step is forward, backward and AdamW on the adapters, on random tokens and random weights. Order: a step to warm up; what is
counted (bytes saved for backward, FLOPs, on a CPU the most bytes alive), once per method; the timed steps; one step by phase.
Only the timed steps give the time, and on CUDA the allocator's peaks. LeMo's offload begins after the counting.
"""

import gc
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ...errors import LemoError
from ...loading import model_location
from ...models.lemo_config import LemoConfig
from ...models.pattern_predictor import PredictorParameters
from ...models.sparse_decoder import sparse_backbone
from ...training.host_copies import available_host_memory
from ...training.sensitive_offload import SMALLEST, TIMED_FORWARDS, OffloadSettings, SensitiveOffload
from ..activation_memory import ActivationMemory
from ..estimate.cards import read_bytes
from ..estimate.estimator import Estimator
from ..estimate.model_shapes import read_model_config
from ..estimate.step_model import StepSettings, build_model, forward_loss, runs_flex_attention
from ..flops import FlopCounter
from ..live_bytes import LiveBytes
from .methods import ChosenMethod, choose_methods
from .phases import phase_seconds

SEED = 0


def bench_model(config: PreTrainedConfig, settings: StepSettings, device: torch.device) -> nn.Module:
    """The model of a step on a device, with random weights; Liger's functions are the library's own.

    Args:
        config: The model's config.
        settings: The step.
        device: CPU or CUDA.

    Raises:
        LemoError: See [`build_model`].
    """
    # What step_model.py has in Liger's place only allocates as it does.
    plain = replace(
        settings, method={"liger": "stock", "liger+checkpointing": "checkpointing"}.get(settings.method, settings.method)
    )
    torch.manual_seed(SEED)
    with device:
        model: Any = build_model(config, plain, list(range(config.num_hidden_layers)))
    for module in model.modules():
        if isinstance(module, PredictorParameters):
            module.reset_parameters()
    if settings.method.startswith("liger"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance  # type: ignore[import-not-found,unused-ignore]

        _apply_liger_kernel_to_instance(model=model.base_model.model)
    return model


def measure_step(
    config: PreTrainedConfig,
    chosen: ChosenMethod,
    settings: StepSettings,
    device: torch.device,
    steps: int,
    counts: bool,
    cold: bool = False,
) -> dict[str, Any]:
    """Time and memory of training steps; running out of memory is a result.

    Args:
        config: The model's config.
        chosen: The method.
        settings: Its step.
        device: CPU or CUDA.
        steps: Timed steps.
        counts: Whether bytes and FLOPs are counted too; they are the same in every repeat.
        cold: Whether the timed steps are all there are, for samples whose steps take minutes: none to warm up, AdamW's moments made
            before the first, nothing by phase.

    Returns:
        `seconds` of each timed step, `phases` (none if `cold`), `losses`, `resident_bytes`; on CUDA `peak_allocated_bytes` and
        `peak_reserved_bytes`; with `counts` `saved_bytes`, `flops` and on a CPU `live_peak_bytes`. Or `out_of_memory`.
    """
    row: dict[str, Any] = {}
    cuda = device.type == "cuda"
    try:
        model = bench_model(config, settings, device)
        _collect(cuda)
        row["resident_bytes"] = sum(part.untyped_storage().nbytes() for part in (*model.parameters(), *model.buffers()))
        row |= _steps(model, config, chosen, settings, device, steps, counts, cold)
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = " ".join(str(error).split())[:300]
        row["peak_before_failure_bytes"] = torch.cuda.max_memory_allocated()
    return row


def _steps(
    model: Any,
    config: PreTrainedConfig,
    chosen: ChosenMethod,
    settings: StepSettings,
    device: torch.device,
    steps: int,
    counts: bool,
    cold: bool,
) -> dict[str, Any]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    shape = (settings.batch_size, settings.seq_len)
    ids = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(SEED)).to(device)
    offload = _offloading(model) if chosen.method.offload else nullcontext
    losses: list[float] = []

    def backward() -> Tensor:
        with offload():
            loss = forward_loss(model, ids, settings)
            loss.backward()
        return loss.detach()

    def step(named: Callable[..., AbstractContextManager[Any]] = nullcontext) -> None:
        losses.append(backward().item())
        with named("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if cold:
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    else:
        step()
    row: dict[str, Any] = {}
    if counts:
        row |= _counted(model, optimizer, config, ids, settings, backward)
    lemo = settings.lemo_config
    with own_offload(model, lemo) if lemo is not None and lemo.offload != "none" else nullcontext() as own:
        for _ in range(TIMED_FORWARDS if own is not None else 0):  # until its budgets are set
            step()
        _collect(device.type == "cuda")
        seconds = []
        for _ in range(steps):
            start = _clock(device)
            step()
            seconds.append(_clock(device) - start)
        row |= {"seconds": seconds, "losses": losses}
        if device.type == "cuda":
            row["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        if own is not None:
            report = own.report()
            row["offloaded"] = asdict(report) | {"overlap": report.overlap}
        row["phases"] = {} if cold else phase_seconds(model, device, step)
    if not all(loss == loss for loss in losses):
        raise LemoError(f"a loss is not a number; {losses}; {chosen.name} cannot be measured")
    return row


def _counted(
    model: Any, optimizer: Any, config: PreTrainedConfig, ids: Tensor, settings: StepSettings, backward: Callable[[], Tensor]
) -> dict[str, Any]:
    with ActivationMemory(model) as memory:
        loss = forward_loss(model, ids, settings)
    counted: dict[str, Any] = {"saved_bytes": memory.saved.total, "saved_by_part": memory.saved.by("part")}
    by_layer = memory.saved.by("layer")
    counted["saved_by_layer"] = [by_layer.get(layer, 0) for layer in range(model.config.num_hidden_layers)]
    loss.backward()
    optimizer.zero_grad(set_to_none=True)
    if ids.device.type != "cpu" and runs_flex_attention(settings, config.num_hidden_layers):
        # Compiled code shows a counter nothing: these are the FLOPs of the same step on fake tensors.
        counted["flops"] = sum(Estimator(config).estimate(settings).flops.values())
    else:
        with FlopCounter(model) as counter:
            backward()
        counted |= {"flops": counter.flops.total, "flops_by_part": counter.flops.by("part")}
    optimizer.zero_grad(set_to_none=True)
    if ids.device.type == "cpu":
        with LiveBytes(model) as live:
            moments = [part for state in optimizer.state.values() for part in state.values() if isinstance(part, Tensor)]
            live.label([ids, *moments], "resident")
            backward()
        counted["live_peak_bytes"] = live.peak_bytes
        optimizer.zero_grad(set_to_none=True)
    return counted


def own_offload(model: Any, lemo: LemoConfig) -> SensitiveOffload:
    """LeMo's offload as a run of this config has it, with nine tenths of the host memory that is free."""
    free, budget = available_host_memory(), lemo.offload_budget
    total = None if budget is None else math.inf if budget == "all" else read_bytes(budget)
    assert lemo.offload != "none", "an offload was asked for"
    # Small models save small storages, and are measured too.
    smallest = min(SMALLEST, model.config.hidden_size * 64)
    host = math.inf if free is None else 0.9 * free
    return SensitiveOffload(sparse_backbone(model), OffloadSettings(lemo.offload, total, host, smallest))


def _offloading(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    context = get_act_offloading_ctx_manager(model)
    return lambda: context


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _collect(cuda: bool) -> None:
    """Returns what nobody holds, and begins peaks anew."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def summary(repeats: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """What the repeats of a method come to: medians over all timed steps, with their spread.

    Args:
        repeats: Results of [`measure_step`], none of them out of memory.
        tokens: Tokens of a step.
    """
    seconds = [value for repeat in repeats for value in repeat["seconds"]]
    median = statistics.median(seconds)
    found: dict[str, Any] = {
        "median_seconds": median,
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "tokens_per_second": tokens / median,
        "phases": {phase: statistics.median(repeat["phases"][phase] for repeat in repeats) for phase in repeats[0]["phases"]},
    }
    for name in ("peak_allocated_bytes", "peak_reserved_bytes"):
        if name in repeats[0]:
            found[name] = max(repeat[name] for repeat in repeats)
    return found


class _Warned(logging.Handler):
    """What the package warns of, one line each: a kernel that cannot run, say, whose reference was measured then."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(job_path: str, result_path: str) -> None:
    """Measures what a job says and writes the result with its `warnings`, or the error that a person can do something about."""
    job = json.loads(Path(job_path).read_text())
    warned = _Warned()
    logging.getLogger("lemo_hf").addHandler(warned)
    torch.set_num_threads(job["threads"])
    (chosen,) = choose_methods(job["method"])
    settings = chosen.settings(job["seq_len"], job["dtype"], job["batch_size"])
    try:
        config = read_model_config(model_location(job["model"]))
        result = measure_step(config, chosen, settings, torch.device(job["device"]), job["steps"], job["counts"])
        result |= {"settings": asdict(settings), "warnings": warned.lines}
    except LemoError as error:
        result = {"refused": str(error)}
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
