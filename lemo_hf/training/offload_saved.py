"""A run's offload: settings from the lemo block and the machine, metrics of the steps that are logged."""

import logging
import math
import os
from dataclasses import replace
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import LemoError
from ..profiling.estimate.cards import GIB, read_bytes
from ..profiling.estimate.estimator import Estimator
from ..profiling.estimate.offload_plan import HostLink
from .host_copies import available_host_memory
from .layer_metrics import is_logged
from .lemo_callback import LemoCallback
from .lemo_run import LemoRun
from .sensitive_offload import OffloadReport, OffloadSettings, SensitiveOffload
from .step_memory import step_settings

logger = logging.getLogger(__name__)

# Of the host memory that is free: the rest is for loading data and for writing checkpoints.
_HOST_SHARE = 0.9


class OffloadSaved(LemoCallback):
    """Offloads what the layers save while a run with `LemoConfig(offload=...)` trains."""

    def __init__(self, run: LemoRun) -> None:
        super().__init__(run)
        self._offload: SensitiveOffload | None = None
        self._is_logged = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.end()  # of a training that another trainer than ours cut short
        lemo = self.run.lemo
        if lemo.enabled and lemo.offload != "none":
            settings = offload_settings(self.run, args)
            self._offload = SensitiveOffload(self.run.backbone, settings, signature=lemo.to_dict)
            self._offload.__enter__()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._is_logged = is_logged(args, state, kwargs.get("train_dataloader"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._offload is not None and self._is_logged:
            self.run.metrics |= offload_metrics(self._offload.report())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._offload is not None:
            report = self._offload.report()
            logger.info(
                "offload: %.2f GiB of %.2f that layers saved left the device in the last forward, %.0f %% of the transfers' time hidden; "
                "host memory at most %.2f GiB",
                *(
                    sum(report.moved_bytes) / GIB,
                    sum(report.saved_bytes) / GIB,
                    100 * report.overlap,
                    report.host_peak_bytes / GIB,
                ),
            )
        self.end()

    def end(self) -> None:
        if self._offload is not None:
            self._offload.__exit__(None, None, None)
        self._offload = None


def offload_metrics(report: OffloadReport) -> dict[str, float]:
    """An offload as metrics: bytes and seconds of a step's last forward and backward, host memory since training began."""
    layers = {f"offloaded_bytes/layer_{layer}": float(moved) for layer, moved in enumerate(report.moved_bytes)}
    return layers | {
        "offloaded_bytes": float(sum(report.moved_bytes)),
        "offload/saved_bytes": float(sum(report.saved_bytes)),
        "offload/host_peak_bytes": float(report.host_peak_bytes),
        "offload/unmoved_bytes": float(report.unmoved_bytes),
        "offload/transfer_seconds": report.transfer_seconds,
        "offload/stall_seconds": report.stall_seconds,
        "offload/overlap": report.overlap,
        "offload/window": float(report.window),
    }


def offload_settings(run: LemoRun, args: TrainingArguments) -> OffloadSettings:
    """What a run's lemo block asks for, held against the machine's memory.

    Args:
        run: The run; training has begun.
        args: The trainer's arguments.

    Raises:
        LemoError: If there is not as much host memory; it names both amounts.
    """
    lemo, own = run.lemo, run.args
    # Processes of one machine share its memory; torchrun and accelerate say how many they have started there.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", run.processes.count))
    free = available_host_memory()
    usable = math.inf if free is None else _HOST_SHARE * free / processes
    budget: float | None = None
    if lemo.offload_budget == "all":
        budget = math.inf
        needed = _saved_bytes(run, args)
        if needed is not None and needed > usable:
            raise LemoError(
                f"host memory is too small for all that the layers save; offload_budget='all' is expected to need {needed / GIB:.1f} GiB, "
                f"{_there_are(usable, processes)}; set offload_budget='{_rounded(usable)}' or less, or leave it out"
            )
    elif lemo.offload_budget is not None:
        budget = read_bytes(lemo.offload_budget)
        if budget > usable:
            raise LemoError(
                f"offload_budget is above host memory; {lemo.offload_budget!r}, {_there_are(usable, processes)}; "
                f"set offload_budget='{_rounded(usable)}' or less"
            )
    link = None if own.offload_bandwidth is None else HostLink(own.offload_bandwidth, own.offload_bandwidth)
    assert lemo.offload != "none", "an offload was asked for"
    return OffloadSettings(lemo.offload, budget, usable, own.offload_min_bytes, link)


def _saved_bytes(run: LemoRun, args: TrainingArguments) -> int | None:
    """What the layers are expected to save in a step; `None` if it cannot be estimated."""
    try:
        settings = step_settings(run, args)
        settings = replace(settings, lemo=replace(run.lemo, offload="none", offload_budget=None))
        estimate = Estimator(run.backbone.config, on_gpu=args.device.type == "cuda").estimate(settings)
    except LemoError as error:
        logger.info("host memory for the offload is not estimated, what has no room will stay on the device: %s", error)
        return None
    return sum(estimate.activations.values())


def _there_are(usable: float, processes: int) -> str:
    each = f" for each of {processes} processes" if processes > 1 else ""
    return f"{usable / GIB:.1f} GiB are free{each}"


def _rounded(size: float) -> str:
    return f"{int(size / GIB)}GiB" if size >= 2 * GIB else f"{int(size / 2**20)}MiB"
