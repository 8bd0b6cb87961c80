"""Leaves a run that a signal asked to end, once a step and its checkpoint are finished."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..lemo_callback import LemoCallback
from .data_workers import keep_workers
from .whole_checkpoints import newest_whole


class LeaveOnSignal(LemoCallback):
    """Has the trainer save, and leaves as soon as it has. Stands last: nothing of `on_save` is left undone."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        keep_workers(kwargs["train_dataloader"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.stop_requested():
            self.run.stop.is_saving = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A trainer saves after it has evaluated.
        if self.run.is_attached and state.global_step:
            self.on_step_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # save_strategy="best" takes the wish back where the evaluation after it finds no better model; a loop that ends comes by here.
        if self.run.stop.is_saving:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.stop.is_saving:
            self.run.stop.leave(
                f"in {self.run.folder / f'checkpoint-{state.global_step}'}", with_optimizer=not args.save_only_model
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.stop.is_saving:  # and it was taken back again, by an evaluation at the epoch's end
            self.run.stop.leave(f"in {newest_whole(self.run.folder)}", with_optimizer=not args.save_only_model)
        # What comes after the last step is short: the run is finished instead.
        self.run.stop.release()
