"""`Trainer` with the phases of a LeMo run installed: the same loop, the same arguments, one import to swap.

What LeMo adds to a trainer is a mixin, since trainers are derived from `Trainer` in turn: `LemoSFTTrainer` is `trl.SFTTrainer` with it.
"""

import logging
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, get_token
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, TrainOutput

from ..errors import LemoError
from ..hub.lemo_files import CONFIG_FILE, load_lemo_files, load_predictors, write_json
from ..hub.model_card import CARD_FILE, RESULTS_FILE, Kind, RunResults, write_model_card
from ..hub.push import hub_error, one_line_hub_errors, required_token
from ..hub.weight_files import refuse_pickled_weights
from ..models.documents import PaddingMaskError
from ..models.segmented_loss import IGNORE_INDEX, shift_labels
from ..models.sparse_decoder import sparse_backbone, sparse_evaluation
from .arguments import LemoTrainingArguments
from .callbacks import callbacks_of, not_finite
from .faults.data_workers import keep_workers
from .faults.out_of_memory import is_out_of_memory, out_of_memory
from .faults.whole_checkpoints import checkpoints, explained_write_errors, last_whole_checkpoint, require_whole, unseal
from .lemo_callback import LemoCallback
from .lemo_run import LemoRun, has_progress
from .phases.phase_documents import untouched_randomness
from .run_card import results_of
from .scale_out.parallel_options import refuse_split_sequences
from .scale_out.sharded_saving import ShardedSavingMixin

logger = logging.getLogger(__name__)

# Files that only a run leaves in its output folder.
_RUN_FILES = (CONFIG_FILE, "adapter_model.safetensors", "model.safetensors", "trainer_state.json")
_PUSH_AGAIN = "the run is whole on disk: call push_to_hub again, or `lemo export` with --push"


if TYPE_CHECKING:  # a mixin calls the methods of the trainer that it is put before
    _Trainer = Trainer
else:
    _Trainer = object


class LemoTrainerMixin(ShardedSavingMixin, _Trainer):
    """What LeMo adds to `transformers.Trainer` or a class derived from it (to stand before it in the bases).

    It installs the callbacks of `lemo_callbacks`, merges their metrics into every log, so that each reporter receives them, and
    writes `lemo_predictors.safetensors` and `lemo_config.json` wherever it saves the model, and beside a finished one a model card
    and the run's `results.json`. A finished model's folder holds no pickle. With `push_to_hub=True` predictors, settings and card
    go to the Hub at every push. Evaluation is dense, leaves the random states alone, and with `eval_sparse=True` also measures the
    loss of the sparse forward.

    Args:
        model: A model of `AutoLemoModelForCausalLM`, wrapped by PEFT or to be wrapped by the trainer.
        args: Of `arguments_class`.
        *others: Further positional arguments of the trainer.
        callbacks: More callbacks; they act before LeMo's.
        **kwargs: As for the trainer.

    Raises:
        LemoError: If `args` are of another class, or `model` is a name.
        LemoConfigError: If the model carries no LeMo.
    """

    arguments_class: type[LemoTrainingArguments] = LemoTrainingArguments

    def __init__(
        self,
        model: Any = None,
        args: LemoTrainingArguments | None = None,
        *others: Any,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        args = self.arguments_class() if args is None else args
        if not isinstance(args, self.arguments_class):
            raise LemoError(
                f"{type(self).__name__} needs {self.arguments_class.__name__}; got {type(args).__name__}; "
                "replace the class, its fields are the same"
            )
        if isinstance(model, str):
            raise LemoError(
                f"{type(self).__name__} needs a model; got the name {model!r}; "
                "load it with AutoLemoModelForCausalLM.from_pretrained"
            )
        if model is not None:
            sparse_backbone(model)
        refuse_split_sequences(args, model)
        self.lemo_run = LemoRun(args)
        self.lemo_run.trainer_saves = True  # callbacks look at it as the trainer is made
        self._has_trained = False
        self._said_no_label = False
        # What the card is rendered from, and its heading: set by who knows more of the run than the trainer does.
        self.results: RunResults | None = None
        self.title: str | None = None
        self._pushes: list[Future[Any]] = []  # of checkpoints, in the background
        kwargs["callbacks"] = [*(callbacks or []), *callbacks_of(self.lemo_run)]
        super().__init__(model, args, *others, **kwargs)
        _ = self._backbone  # model_init may have made the model
        self.lemo_run.send = self.log
        for shown in self.callback_handler.callbacks:
            if isinstance(shown, PrinterCallback | DEFAULT_PROGRESS_CALLBACK):
                _show_means_only(shown)

    @property
    def _backbone(self) -> Any:
        model: Any = self.model
        return sparse_backbone(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; `resume_from_checkpoint=True` also continues a run that was stopped before its first checkpoint.

        Raises:
            LemoError: If the output folder holds another run, or there is nothing to resume; if the loss is not finite.
        """
        folder = str(self.args.output_dir)
        if not resume_from_checkpoint:
            self._refuse_used_folder(folder)
            resume_from_checkpoint = None
        elif resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(folder)
            if resume_from_checkpoint is None and not has_progress(folder):
                raise LemoError(f"no run to go on from; {folder!r}; start without resume_from_checkpoint")
        else:
            require_whole(resume_from_checkpoint)
        self._has_trained = True
        self.lemo_run.checkpoint = resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            # Outside of Trainer's loop, which lowers the batch size with auto_find_batch_size when it sees PyTorch's own error.
            if not is_out_of_memory(error) or not self.lemo_run.is_attached:
                raise
            raise out_of_memory(error, self.lemo_run, self.args) from error
        finally:
            self.lemo_run.stop.release()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, LemoCallback):
                    callback.end()

    def _refuse_used_folder(self, folder: str) -> None:
        # A trainer may train several times into its own folder.
        if holds_run(folder) and not self._has_trained:
            raise LemoError(
                f"output folder holds another run; {folder!r}; choose another output_dir, or go on with resume_from_checkpoint=True"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Predictors first: pruning may have left them other shapes than the fresh model's, which weights are loaded into.
        target: Any = self.model if model is None else model
        refuse_pickled_weights(resume_from_checkpoint)
        load_predictors(sparse_backbone(target), resume_from_checkpoint)
        self.lemo_run.loaded_predictors = str(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # Predictors and thresholds of another step than the adapter's would choose by other scores.
        model: Any = self.model
        load_lemo_files(model, str(self.state.best_model_checkpoint))
        super()._load_best_model()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # A run that is resumed from the checkpoint of its last step is finished: Trainer would take one step more.
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except ValueError as error:
            # By its name: a model that came as remote code has its own copy of the class.
            if type(error).__name__ != PaddingMaskError.__name__:
                raise
            raise LemoError(f"{error} ({self.lemo_run.samples.last_names()})") from error
        if not torch.isfinite(loss).all():
            labels = inputs.get("labels")
            if labels is None or (shift_labels(labels) != IGNORE_INDEX).any():
                culprit = self.lemo_run.samples.culprit(whole_step=False)
                raise not_finite("loss", loss.item(), self.state, self.args, culprit)
            # As in the stock Trainer: the loss is 0 / 0, its gradient 0.
            if not self._said_no_label:
                logger.warning(
                    "batch has no label; step %d, %d tokens; it trains nothing: leave out samples whose labels are all -100 "
                    "(said once, others pass alike)",
                    self.state.global_step + 1,
                    labels.numel(),
                )
            self._said_no_label = True
        return loss

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in the trainer; random states stay as they are, so a run that evaluates trains as one that does not."""
        with untouched_randomness():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in the trainer; with `eval_sparse` the metrics also hold `<prefix>_sparse_forward_loss`."""
        keep_workers(dataloader)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        wanted = description == "Evaluation" and self.lemo_run.args.eval_sparse  # and not for predict
        if wanted and self._backbone.config.lemo.enabled and output.metrics is not None:
            for shown in self.callback_handler.callbacks:
                if isinstance(shown, ProgressCallback):  # its bar counts one pass over the data
                    shown.on_predict(self.args, self.state, self.control, metrics=output.metrics)
            name = f"{metric_key_prefix}_sparse_forward_loss"
            output.metrics[name] = self.sparse_forward_loss(dataloader, ignore_keys)
        return output

    def sparse_forward_loss(self, dataloader: Any, ignore_keys: list[str] | None = None) -> float:
        """Mean loss of the training-time forward over an evaluation set: optimistic, since blocks are kept for what later tokens
        see in them; in the exact form it is the dense loss.
        """
        with sparse_evaluation(self._backbone):
            output = super().evaluation_loop(dataloader, "Evaluation of the sparse forward", True, ignore_keys, "sparse")
        return float((output.metrics or {})["sparse_loss"])

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer: every trial has a model of its own and goes through its own phases.

        Raises:
            LemoError: If the trainer was given a model instead of `model_init`.
        """
        if self.model_init is None:
            raise LemoError(
                f"a search trains a new model in each trial; {type(self).__name__} was given a model; "
                "use LemoTrainer(model_init=...), a function that returns the model with its adapter"
            )
        return super().hyperparameter_search(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self.lemo_run.take_metrics()}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        # Checkpoints are saved internally into a folder of their own.
        is_checkpoint = _internal_call and output_dir is not None
        if is_checkpoint and self.args.should_save:
            unseal(folder)
        with nullcontext() if is_checkpoint else explained_write_errors(folder, "model", Path(str(self.args.output_dir))):
            self._write_model(folder, output_dir, is_checkpoint, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        with explained_write_errors(folder, f"checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _write_model(self, folder: Path, output_dir: str | None, is_checkpoint: bool, internal: bool) -> None:
        card = _card_in(folder)
        super().save_model(output_dir, internal)
        self.lemo_run.model = self.model
        self.lemo_run.writes = self.args.should_save
        self.lemo_run.save_files(folder, with_state=is_checkpoint)
        if self.args.should_save and (not is_checkpoint or self._pushes_checkpoints):
            self._write_card(folder, card)
        if self.args.should_save and not is_checkpoint:
            # A pickle, which nothing reads.
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if self._has_trained:
                write_json(folder / RESULTS_FILE, self._results().to_dict())

    @property
    def _pushes_checkpoints(self) -> bool:
        whole = HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS
        return self.args.push_to_hub and self.args.hub_strategy in whole

    def _results(self) -> RunResults:
        state = self.state
        return self.results or results_of(self.lemo_run, self.model, self.train_dataset, state.log_history, state.global_step)

    def _write_card(self, folder: Path, existing: str | None, **known: Any) -> None:
        # Over the one that PEFT writes with every adapter.
        if self._has_trained:
            title = self.title or (self.hub_model_id or folder.resolve().name).split("/")[-1]
            kind: Kind = "adapter" if isinstance(self.model, PeftModel) else "remote-code"
            write_model_card(replace(self._results(), **known), folder, title, existing, self.hub_model_id, kind)

    # The Hub.

    def init_hf_repo(self, token: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self.is_world_process_zero():
            token = required_token(token or self.args.hub_token)
            with one_line_hub_errors(self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name, token):
                super().init_hf_repo(token, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not self._has_trained:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            known: dict[str, Any] = {"license": kwargs.get("license")} if kwargs.get("license") else {}
            for ours, theirs in (("language", "language"), ("datasets", "dataset"), ("datasets", "dataset_name")):
                if kwargs.get(theirs):
                    known[ours] = _as_list(kwargs[theirs])
            self._write_card(folder, _with_tags(_card_in(folder), _as_list(kwargs.get("tags") or [])), **known)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`.

        Raises:
            LemoError: If it cannot be done; what the run saved is whole on disk, and pushing again goes on from what has arrived.
        """
        token = kwargs.get("token") or self.args.hub_token or get_token()
        with one_line_hub_errors(str(self.hub_model_id or self.args.hub_model_id), token, _PUSH_AGAIN):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._say_failed_pushes()
        if self._pushes_checkpoints:
            # All of it lies there. Sealed later, as others are, it might arrive with the seal of the one before.
            self.lemo_run.seal(self.state.global_step)
        if self.args.hub_strategy != HubStrategy.END and self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            self._write_card(folder, _card_in(folder))
        super()._push_from_checkpoint(checkpoint_folder)
        jobs = getattr(getattr(self, "push_in_progress", None), "jobs", [])
        self._pushes += [job for job in jobs if job not in self._pushes]

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._say_failed_pushes()

    def _say_failed_pushes(self) -> None:
        # Uploads of checkpoints run in the background, where Trainer lets their errors pass unseen.
        done = [job for job in self._pushes if job.done()]
        self._pushes = [job for job in self._pushes if job not in done]
        token = self.args.hub_token or get_token()
        for job in done:
            if not job.cancelled() and (error := job.exception()) is not None:
                logger.warning(hub_error(error, str(self.hub_model_id), token, "training goes on, the next push sends it too"))


class LemoTrainer(LemoTrainerMixin, Trainer):
    """A `transformers.Trainer` that trains a LeMo model through its phases, predictor -> calibrate -> sparse -> dense tail.

    Args and errors: see `LemoTrainerMixin`; `args` are `LemoTrainingArguments`.
    """


def holds_run(folder: str | Path) -> bool:
    """Whether an output folder holds what a run has done: a checkpoint, whole or not, the phases' progress, or a model."""
    return bool(checkpoints(folder)) or has_progress(folder) or any((Path(folder) / name).exists() for name in _RUN_FILES)


def _card_in(folder: Path) -> str | None:
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _with_tags(card: str | None, tags: list[str]) -> str | None:
    """A card with more tags, which rendering keeps."""
    if not tags:
        return card
    found = ModelCard(card or "---\n{}\n---\n", ignore_metadata_errors=True)
    found.data["tags"] = list(dict.fromkeys([*(found.data.get("tags") or []), *tags]))
    return str(found)


def _show_means_only(terminal: Any) -> None:
    """Keeps metrics by layer and sums by phase, dozens a step, from a callback that writes to the terminal; others receive them."""
    on_log = terminal.on_log

    def without_layers(*args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return on_log(*args, logs=_means(logs or {}), **kwargs)

    terminal.on_log = without_layers


def _means(logs: dict[str, Any]) -> dict[str, Any]:
    hidden = ("/layer_", "seconds/", "memory/", "offload/")
    return {name: value for name, value in logs.items() if not any(part in name for part in hidden)}
