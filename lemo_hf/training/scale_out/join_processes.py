"""What the processes of a run settle before anything is trained, in whichever trainer."""

import logging
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ...models.sparse_decoder import sparse_backbone
from ..lemo_callback import LemoCallback
from ..phases.phase_documents import is_stream
from .parallel_options import prepare_engine
from .processes import Processes, settings_of

_START_ALIKE = "start all processes with the same script, recipe and versions"


class JoinProcesses(LemoCallback):
    """Refuses engines that LeMo does not train with, compares the processes' settings, and leaves talking to rank 0.

    It acts as a trainer has been made: before an engine wraps the model, where unlike models would make processes wait for each
    other. Stands first.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs.get("model")
        if model is None:  # of `model_init`, later
            return
        processes = Processes(args.device)
        if processes.rank and args.log_level_replica == "warning":  # the default; another one is the user's wish
            logging.getLogger(__package__.partition(".")[0]).setLevel(logging.ERROR)
        prepare_engine(args, model, saves_whole=self.run.trainer_saves)
        if processes:
            own = self.run.args
            arguments = [args] if own is args else [own, args]
            processes.require_same(settings_of(model, sparse_backbone(model).config.lemo.to_dict(), arguments), _START_ALIKE)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        run = self.run
        if not run.processes:
            return
        dataset = kwargs["train_dataloader"].dataset
        found = {
            **{f"lemo.{name}": value for name, value in run.lemo.to_dict().items()},
            "samples of the training set": None if is_stream(dataset) else len(dataset),
            "steps done": state.global_step,
            "phases done": run.finished,
            "progress of the phase": run.progress,
        }
        run.processes.require_same(found, f"{_START_ALIKE}, and let all read the same output_dir")
        # Predictors that were drawn, not loaded, are others in every process.
        run.processes.copy_from(0, [weight for layer in run.backbone.layers for weight in layer.lemo_predictor.parameters()])
