"""What the callbacks of a run share: model, documents, what is finished, metrics on their way to the log, and the files.

Two kinds of files let a run survive a kill. Until the first checkpoint there is `lemo_phases.safetensors` in the output folder:
predictors, their optimizer and the phase's progress in one file, replaced as a whole. Every checkpoint holds the predictors, the
lemo block with its thresholds, and `lemo_state.json`: the phase, what is finished, and the settings that must not change.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from ..errors import LemoError
from ..evaluation.layer_scores import backbone_inputs, documents_of
from ..hub.lemo_files import (
    FOUND_FIELDS,
    load_predictors,
    predictor_tensors,
    read_json,
    read_lemo_files,
    read_tensors,
    save_lemo_files,
    set_predictors,
    write_json,
    write_tensors,
)
from ..models.lemo_config import LemoConfig, LemoConfigError
from ..models.sparse_decoder import sparse_backbone
from ..profiling.process_memory import memory_metrics
from .arguments import LemoTrainingArguments
from .faults.sample_checks import require_finite_embeddings, require_sound
from .faults.stop_signals import StopSignals
from .faults.whole_checkpoints import PROCESSES_FIELD, STATE_FILE, explained_write_errors, seal, set_aside_cut
from .phases.phase_cost import PhaseCost
from .phases.phase_documents import PhaseDocuments
from .run_clock import RunClock
from .scale_out.processes import Processes
from .step_memory import keep_within_budget

logger = logging.getLogger(__name__)

PROGRESS_FILE = "lemo_phases.safetensors"
_PHASE_ARGUMENTS = (
    "predictors",
    "predictor_documents",
    "predictor_passes",
    "predictor_steps",
    "predictor_learning_rate",
    "prune_documents",
    "prune_share",
    "share_search",
    "calibrate_documents",
    "calibrate_rounds",
    "calibrate_eta",
    "calibrate_epsilon",
)


# What the two files hold, and as what.
_STATE_FIELDS = {"phase": str, "finished": list, "refits": int, "settings": dict, "predictors_fitted": bool}
_PROGRESS_FIELDS = {"phase": str, "finished": list, "progress": dict, "settings": dict, "predictors_fitted": bool, "lemo": dict}


class LemoRun:
    """One run's shared state; `attach` fills it in when training begins.

    Args:
        args: The arguments of the phases.
    """

    model: Any
    backbone: Any
    documents: PhaseDocuments
    folder: Path
    writes: bool
    shows_progress: bool

    def __init__(self, args: LemoTrainingArguments) -> None:
        self.args = args
        # Set by LemoTrainer: its log, that it writes the LeMo files of checkpoints itself, the checkpoint that it resumes from,
        # and the one whose predictors it has loaded with the weights.
        self.send: Callable[[dict[str, float]], None] | None = None
        self.trainer_saves = False
        self.checkpoint: str | None = None
        self.loaded_predictors: str | None = None
        self.finished: list[str] = []
        self.phase = "predictor"
        self.refits = 0
        # Mean recall after the last fit, and whether no more refits are made: none are left, or the last one did not help.
        self.fitted_recall: float | None = None
        self.refits_over = False
        self.said_foreign = False
        self.metrics: dict[str, float] = {}
        # What the phases were expected to cost as this process began them.
        self.phase_cost: PhaseCost | None = None
        self.clock = RunClock()
        self.stop = StopSignals()
        # Set by SampleWatch: names the samples of the running step.
        self.samples: Any = None
        self.predictors_fitted = False
        # Since training began: thresholds from before belong to predictors of another scale.
        self.fitted_now = False
        self.processes = Processes()
        self.progress: dict[str, Any] | None = None
        self.progress_tensors: dict[str, Tensor] = {}
        self._settings: dict[str, Any] = {}
        self._processes_of_checkpoint: int | None = None
        self._attached_to: TrainerState | None = None
        self._outside_tail: list[int] | None = None

    @property
    def is_attached(self) -> bool:
        """Whether training has begun."""
        return self._attached_to is not None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return 0 if self._attached_to is None else self._attached_to.global_step

    @property
    def lemo(self) -> LemoConfig:
        """The model's lemo block."""
        block: LemoConfig = self.backbone.config.lemo
        return block

    def attach(self, args: TrainingArguments, state: TrainerState, model: Any, train_dataloader: Any) -> None:
        """Looks at the model and the output folder as training begins; every callback may call it, the first call counts."""
        if self._attached_to is state:
            return
        self.leave_tail()  # that an interrupted step left: auto_find_batch_size begins anew after one
        self._attached_to = state
        self.stop.catch()
        self.clock.start(state.log_history)
        self.model, self.backbone = model, sparse_backbone(model)
        # Where the model computes: parameters of the others may be offloaded.
        self.processes = Processes(next(self.backbone.layers[0].lemo_predictor.parameters()).device)
        seed = args.seed if args.data_seed is None else args.data_seed
        parts = self.args.probe_documents, self.args.calibrate_documents
        self.documents = PhaseDocuments(train_dataloader.dataset, train_dataloader.collate_fn, seed, *parts)
        self.documents.check = self._check_document
        if self.lemo.enabled:
            self.documents.agree(self.processes)
        self.folder = Path(str(args.output_dir))
        self.writes = state.is_world_process_zero
        self._processes_of_checkpoint = None if args.save_on_each_node else self.processes.count
        self.shows_progress = self.writes and not args.disable_tqdm
        self.lemo.validate_for(len(self.backbone.layers))
        if self.lemo.enabled and self.lemo.memory_budget and state.global_step == 0:
            keep_within_budget(self, args)
        phase_arguments = {name: getattr(self.args, name) for name in _PHASE_ARGUMENTS}
        # What the phases find, or shipped predictors bring, may differ between the start of a run and its continuation.
        found = (*FOUND_FIELDS, "keep_ratio") if self._finds_shares else FOUND_FIELDS
        # Where saved activations lie changes nothing that is computed.
        found = (*found, "offload", "offload_budget")
        block = {name: value for name, value in self.lemo.to_dict().items() if name not in found}
        self._settings = json.loads(json.dumps({**phase_arguments, **block, "phase_seed": seed}))
        self.finished, self.refits, self.metrics, self.fitted_now = [], 0, {}, False
        self.fitted_recall, self.refits_over, self.said_foreign = None, False, False
        if state.global_step > 0:
            self._load_checkpoint(Path(self.checkpoint or self.folder / f"checkpoint-{state.global_step}"))
        elif state.is_hyper_param_search:
            self.forget_progress()  # of a trial that was cut short: this one may have other settings
        elif (self.folder / PROGRESS_FILE).is_file():
            self._load_progress(self.folder / PROGRESS_FILE)
        if self.writes and self.folder.is_dir() and not state.is_hyper_param_search:
            set_aside_cut(self.folder, state.global_step)
            for partial in self.folder.glob(".*.partial"):  # of files that a kill left half-written
                partial.unlink(missing_ok=True)

    def _check_document(self, batch: dict[str, Any], name: str) -> None:
        require_sound(batch, self.backbone.config, lambda row: name)
        require_finite_embeddings(batch, self.backbone.get_input_embeddings(), lambda row: name)
        try:
            documents_of(backbone_inputs(batch, torch.device("cpu")), self.lemo.block_size)
        except LemoConfigError as error:
            raise LemoError(f"{error} ({name})") from error

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.backbone.parameters()).device
        return device

    def stop_requested(self) -> bool:
        """Whether a signal asked the run to leave; all processes ask at the same places."""
        return self.stop.is_requested(self._device)

    def enter_tail(self) -> None:
        """Keeps every token for one step, so that what is saved between steps is the user's setting."""
        self.phase, self._outside_tail = "dense", self.lemo.dense_layers
        self.lemo.update(dense_layers=list(range(len(self.backbone.layers))))

    def leave_tail(self) -> None:
        """Undoes `enter_tail`."""
        if self._outside_tail is not None:
            self.lemo.update(dense_layers=self._outside_tail)
            self._outside_tail = None

    def report(self, metrics: dict[str, float]) -> None:
        """Logs the outcome of a phase through the Trainer, or into its history where only the callbacks are used."""
        self.clock.charge(self.phase)
        metrics = {**metrics, **self.resources()}
        if self.send is not None:
            self.send(metrics)
        elif self._attached_to is not None:
            self._attached_to.log_history.append({**metrics, "step": self._attached_to.global_step})
            logger.info("%s", metrics)

    def resources(self) -> dict[str, float]:
        """Time and memory that the run took so far, as metrics."""
        return {**self.clock.metrics(), **memory_metrics(self._device)}

    def take_metrics(self) -> dict[str, float]:
        """The metrics gathered since the last log."""
        taken, self.metrics = self.metrics, {}
        return taken

    # Files.

    def save_progress(self, phase: str, progress: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replaces `lemo_phases.safetensors` by the present state of `phase` and the predictors."""
        if not self.writes:
            return
        stored = {"phase": phase, "finished": self.finished, "progress": progress, "predictors_fitted": self.predictors_fitted}
        stored |= {"settings": self._settings, "lemo": self.lemo.to_dict()}
        named = {f"predictors.{name}": value for name, value in predictor_tensors(self.backbone).items()}
        named |= {f"phase.{name}": value for name, value in tensors.items()}
        with explained_write_errors(self.folder, "progress of the phases"):
            write_tensors(self.folder / PROGRESS_FILE, named, {"state": json.dumps(stored)})

    def _load_progress(self, path: Path) -> None:
        tensors, metadata = read_tensors(path)
        try:
            stored = json.loads(metadata["state"])
        except (KeyError, json.JSONDecodeError) as error:
            raise LemoError(f"file holds no phase progress; {str(path)!r}; delete it to start the phases anew") from error
        _require_fields(stored, _PROGRESS_FIELDS, path)
        self._require_same_settings(stored["settings"], path)
        block = LemoConfig.from_dict(stored["lemo"])
        predictors = {
            name.removeprefix("predictors."): value for name, value in tensors.items() if name.startswith("predictors.")
        }
        set_predictors(self.backbone, predictors, block, str(path))
        self.lemo.update(thresholds=block.thresholds, **self._found_share(block))
        self.finished, self.predictors_fitted = stored["finished"], stored["predictors_fitted"]
        self.phase, self.progress = stored["phase"], stored["progress"]
        self.progress_tensors = {
            name.removeprefix("phase."): value for name, value in tensors.items() if name.startswith("phase.")
        }
        logger.info("continuing in the %s phase from %s", self.phase, path)

    def take_progress(self, phase: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What a killed run had of `phase`, once; `None` if it had not begun."""
        if self.progress is None or self.phase != phase:
            return None
        taken = self.progress, self.progress_tensors
        self.progress, self.progress_tensors = None, {}
        return taken

    def save_files(self, folder: str | Path, with_state: bool) -> None:
        """Writes predictors and lemo block, and in a checkpoint the state, into `folder`."""
        if not self.writes:
            return
        save_lemo_files(self.model, folder)
        if with_state:
            values = {"phase": self.phase, "finished": self.finished, "refits": self.refits, "settings": self._settings}
            values |= {"fitted_recall": self.fitted_recall, "refits_over": self.refits_over}
            values[PROCESSES_FIELD] = self._processes_of_checkpoint
            write_json(Path(folder) / STATE_FILE, {**values, "predictors_fitted": self.predictors_fitted})

    def seal(self, step: int) -> None:
        """Has the checkpoint of a step, in which all files lie now, count as whole."""
        folder = self.folder / f"checkpoint-{step}"
        Processes(self._device).all(True)  # every process has written its part
        if self.writes and folder.is_dir():
            with explained_write_errors(folder, f"checkpoint of step {step}"):
                seal(folder)

    def _load_checkpoint(self, folder: Path) -> None:
        if not (folder / STATE_FILE).is_file():
            raise LemoError(f"checkpoint holds no LeMo state; {str(folder)!r}; resume from one that a LeMo run saved whole")
        stored = read_json(folder / STATE_FILE)
        _require_fields(stored, _STATE_FIELDS, folder / STATE_FILE)
        self._require_same_settings(stored["settings"], folder)
        # Settings are the same; besides, there is what the phases found.
        if self.loaded_predictors != str(folder):
            load_predictors(self.backbone, folder)
        block = read_lemo_files(folder)[0]
        self.lemo.update(thresholds=block.thresholds, **self._found_share(block))
        self.phase, self.finished, self.refits = stored["phase"], stored["finished"], stored["refits"]
        self.predictors_fitted = stored["predictors_fitted"]
        self.fitted_recall, self.refits_over = stored.get("fitted_recall"), stored.get("refits_over", False)

    def _found_share(self, block: LemoConfig) -> dict[str, Any]:
        # That of the run's start: pruned predictors may leave room for another one.
        return {"keep_ratio": block.keep_ratio} if self._finds_shares else {}

    @property
    def _finds_shares(self) -> bool:
        return self.lemo.memory_budget is not None or self.args.share_search is not None

    def _require_same_settings(self, stored: dict[str, Any], source: Path) -> None:
        for name, value in self._settings.items():
            if stored.get(name) != value:
                raise LemoError(
                    f"run was started with {name}={stored.get(name)!r}, it is resumed with {value!r}; {str(source)!r}; "
                    "resume with the same settings, or start in another output_dir"
                )

    def forget_progress(self) -> None:
        """Removes the phases' file: a checkpoint holds all of it."""
        if self.writes:
            (self.folder / PROGRESS_FILE).unlink(missing_ok=True)


def _require_fields(stored: Any, fields: dict[str, type], path: Path) -> None:
    for name, kind in fields.items():
        if not isinstance(stored, dict) or not isinstance(stored.get(name), kind):
            raise LemoError(
                f"state of a run is damaged, its {name} is missing or no {kind.__name__}; {str(path)!r}; resume from another"
            )


def has_progress(folder: str | Path) -> bool:
    """Whether a run was stopped in `folder` before its first checkpoint."""
    return (Path(folder) / PROGRESS_FILE).is_file()
