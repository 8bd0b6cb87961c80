"""What the callbacks of a run have in common."""

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .faults.out_of_memory import is_out_of_memory, out_of_memory
from .lemo_run import LemoRun
from .phases.phase_documents import untouched_randomness
from .scale_out.processes import within_forward


class LemoCallback(TrainerCallback):
    """A callback of a run: it joins the run as training begins, and does its phase then if it has one.

    Args:
        run: What the callbacks share.
    """

    # What the time of `begin` goes into.
    begins = "other"

    def __init__(self, run: LemoRun) -> None:
        self.run = run

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.attach(args, state, kwargs["model"], kwargs["train_dataloader"])
        if self.run.lemo.enabled:
            try:
                with untouched_randomness(), precision(args):
                    within_forward(kwargs["model"], lambda: self.begin(args, state))
            except RuntimeError as error:
                # No smaller batch would help: phases read one document at a time.
                if not is_out_of_memory(error):
                    raise
                raise out_of_memory(error, self.run, args) from error
        self.run.clock.charge(self.begins)

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """What the callback does before the first step."""

    def end(self) -> None:
        """Takes what the callback has put on the model off it. `LemoTrainer` calls it however a training has ended: after an error or an
        interrupt nobody else does.
        """


def precision(args: TrainingArguments) -> torch.autocast:
    """The precision that the training forward runs in."""
    device = args.device.type
    half = bool(args.fp16) and device != "cpu"  # where accelerate leaves float16 out
    return torch.autocast(device, dtype=torch.float16 if half else torch.bfloat16, enabled=bool(args.bf16) or half)


def by_layer(name: str, values: list[float]) -> dict[str, float]:
    """A metric's mean over the layers that have it, and `name/layer_<i>`; nothing if none has."""
    known = {f"{name}/layer_{index}": value for index, value in enumerate(values) if not math.isnan(value)}
    return known and {name: sum(known.values()) / len(known), **known}
