"""Metrics by layer on the steps that are logged."""

import math
from typing import Any

from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..profiling.activation_memory import ActivationMemory
from ..profiling.process_memory import after_forward_metrics
from .lemo_callback import LemoCallback, by_layer
from .lemo_run import LemoRun


class LayerMetrics(LemoCallback):
    """Gathers kept share, threshold and saved bytes by layer on the steps that will be logged."""

    def __init__(self, run: LemoRun) -> None:
        super().__init__(run)
        self._hooks: list[Any] = []
        self._memory: ActivationMemory | None = None
        self._measured = False
        self._is_logged = False

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        self.end()  # of a step that was interrupted under another trainer than ours

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.lemo.enabled and is_logged(args, state, kwargs.get("train_dataloader")):
            self._measured, self._is_logged = False, True
            model = kwargs["model"]
            # What a compiled forward saves passes no hook of ours without breaking its graph at each module.
            if not (args.torch_compile or hasattr(model, "_orig_mod")):
                self._hooks = [
                    model.register_forward_pre_hook(self._before_forward),
                    model.register_forward_hook(self._after_forward, always_call=True),
                ]

    def _before_forward(self, model: Any, args: Any) -> None:
        if not self._measured:
            self._memory = ActivationMemory(model)
            self._memory.__enter__()

    def _after_forward(self, model: Any, args: Any, output: Any) -> None:
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
            saved = self._memory.saved.by("layer")
            layers = [saved.get(layer, 0) for layer in range(len(self.run.backbone.layers))]
            self.run.metrics |= {f"saved_bytes/layer_{layer}": value for layer, value in enumerate(layers)}
            # The whole forward: beside the layers the embeddings, the last norm and the loss.
            self.run.metrics["saved_bytes"] = self._memory.saved.total
            self.run.metrics |= after_forward_metrics(next(self.run.backbone.parameters()).device)
            self._memory, self._measured = None, True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._is_logged:
            return
        self._is_logged = False
        self._remove_hooks()
        self.run.metrics |= by_layer("kept_share", self._kept_shares())
        if self.run.lemo.selection == "threshold" and self.run.lemo.thresholds is not None:
            self.run.metrics |= by_layer("threshold", self.run.lemo.thresholds)

    def _kept_shares(self) -> list[float]:
        """Kept shares by layer. Of several processes: their means, which saved bytes become too."""
        run = self.run
        kept = list(run.backbone.lemo_kept_shares)
        if run.processes:
            count = len(run.backbone.layers)
            names = ["saved_bytes", *(f"saved_bytes/layer_{layer}" for layer in range(count))]
            # A process that has seen padding only has no share yet.
            means = run.processes.means([*(kept or [math.nan] * count), *(run.metrics.get(name, math.nan) for name in names)])
            kept = means[:count]
            run.metrics |= {name: mean for name, mean in zip(names, means[count:], strict=True) if not math.isnan(mean)}
        return kept

    def end(self) -> None:
        self._remove_hooks()
        if self._memory is not None:
            self._memory.__exit__(None, None, None)
        self._memory = None

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            metrics = self.run.take_metrics()  # already in the logs under LemoTrainer
            state.log_history[-1].update(metrics)
            logs.update(metrics)


def is_logged(args: TrainingArguments, state: TrainerState, dataloader: Any) -> bool:
    """Whether the step that begins is followed by a log."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    if args.logging_strategy != IntervalStrategy.EPOCH:
        return False
    if step == state.max_steps or not has_length(dataloader):
        return step == state.max_steps
    return step % max(-(-len(dataloader) // args.gradient_accumulation_steps), 1) == 0
