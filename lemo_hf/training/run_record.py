"""The log of a run as a file that grows with it, for `lemo report`.

`lemo_log.jsonl` holds one line of what the run is, then one line for each entry of the Trainer's log, written when it is logged: a
run that was killed has left all but its last steps. A resumed run writes it anew from its checkpoint's log and goes on.
"""

import json
import logging
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..hub.lemo_files import atomic_path
from .lemo_callback import LemoCallback
from .lemo_run import LemoRun
from .run_card import results_of

logger = logging.getLogger(__name__)

LOG_FILE = "lemo_log.jsonl"
LOG_VERSION = 1
# What the report shows of the arguments.
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "gradient_checkpointing",
    "probe_steps",
    "recall_drop",
    "dense_tail_share",
)


class RunRecord(LemoCallback):
    """Writes the log file, and charges what passes between the steps to what it was: evaluation, saving, other."""

    def __init__(self, run: LemoRun) -> None:
        super().__init__(run)
        self._written_of: TrainerState | None = None
        self._failed_of: TrainerState | None = None
        self._written = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._write(args, state, kwargs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.clock.charge("other")  # loading data, other callbacks

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.clock.charge("training")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.clock.charge("other")
        self.run.metrics |= self.run.resources()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.log_history[-1] if state.log_history else {}
        if self.run.is_attached and "loss" in last:
            # Reading the loss waited for the step, which a GPU may still have been at.
            self.run.clock.charge("training")
        elif self.run.is_attached and "train_runtime" in last:
            # After the last step's evaluation and saving.
            self.run.clock.charge("other")
            last.update(self.run.resources())
        self._write(args, state, kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.clock.charge("evaluation")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.clock.charge("saving")

    def _write(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        run = self.run
        # A trainer may evaluate before it trains.
        if not run.is_attached or not run.writes or self._failed_of is state:
            return
        path = run.folder / LOG_FILE
        try:
            if self._written_of is not state or len(state.log_history) < self._written:
                about = self._about(args, state, kwargs["model"], kwargs["train_dataloader"].dataset)
                with atomic_path(path) as partial:
                    partial.write_text("".join(f"{json.dumps(line)}\n" for line in [about, *state.log_history]), encoding="utf-8")
            elif len(state.log_history) > self._written:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(line)}\n" for line in state.log_history[self._written :])
        except OSError as error:
            logger.warning("log of the run is not written (%s); %s; training goes on, `lemo report` will lack it", error, path)
            self._failed_of = state
        self._written_of, self._written = state, len(state.log_history)

    def _about(self, args: TrainingArguments, state: TrainerState, model: Any, dataset: Any) -> dict[str, Any]:
        # Of choices their word, not Python's name of it.
        arguments = {
            name: getattr(value, "value", value) for name in _ARGUMENTS if (value := getattr(args, name, None)) is not None
        }
        return {
            "log_version": LOG_VERSION,
            "run": results_of(self.run, model, dataset, state.log_history, state.global_step).to_dict(),
            "device": args.device.type,
            "max_steps": state.max_steps,
            "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "begun_at_step": state.global_step,
            "arguments": {
                name: value if isinstance(value, bool | int | float) else str(value) for name, value in arguments.items()
            },
        }
