"""The phases of a run as callbacks for any Trainer: predictor -> shares -> calibrate -> sparse -> dense tail, probes, layer metrics.

    Trainer(model=model, args=args, callbacks=lemo_callbacks(LemoTrainingArguments(...)), ...)

`LemoTrainer` and `LemoSFTTrainer` install the same ones and also hand their metrics to TensorBoard, W&B or trackio. A stock Trainer
calls those reporters before callbacks that a user passes, so there the metrics land in `state.log_history` and trainer_state.json;
give the reporter among `callbacks`, after these, to have them reported too. LeMo's files lie in its checkpoints and, when training
has ended, in its output folder; what a stock Trainer cannot do is refused before the first step.

Metrics, means over layers and by layer: `kept_share/layer_<i>` (rows kept of the step's last forward, in [0, 1]),
`saved_bytes/layer_<i>` (measured on logged steps in the step's first forward: every unique storage that autograd keeps),
`threshold/layer_<i>`, and after a probe `recall/layer_<i>`. Of several processes these are means; times and memory are rank 0's. Under `LemoTrainer` the terminal shows the means only.
"""

import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..errors import LemoError, LemoRunError
from ..hub.lemo_files import load_lemo_files, load_predictors, predictor_tensors, record_predictor_sizes
from ..profiling.activation_memory import plain_tensors
from .arguments import LemoTrainingArguments
from .compatible_options import CompatibleOptions
from .faults.leave_on_signal import LeaveOnSignal
from .faults.sample_watch import SampleWatch
from .faults.whole_checkpoints import SEAL_FILE, newest_whole, unseal
from .layer_metrics import LayerMetrics
from .lemo_callback import LemoCallback, by_layer
from .lemo_run import LemoRun
from .memory_warning import WarnOfMemory
from .offload_saved import OffloadSaved
from .phases.phase_cost import LARGE_SHARE, estimate_cost
from .phases.phase_documents import require_blocks
from .phases.predictor_training import PredictorTraining, parameter_share
from .phases.recall_probe import DEFAULT_DOCUMENTS, RecallProbe, probe, say_if_text_is_foreign, threshold_search
from .phases.share_search import SharePhase
from .run_record import RunRecord
from .scale_out.join_processes import JoinProcesses

logger = logging.getLogger(__name__)

# float16 scales begin at 2 ** 16.
_MOST_SKIPPED = 32


def lemo_callbacks(args: LemoTrainingArguments) -> list[TrainerCallback]:
    """The callbacks of a LeMo run, for `transformers.Trainer` and trainers derived from it, `trl.SFTTrainer` among them.

    Args:
        args: Arguments of the phases. Output folder, seed and logging are those of the Trainer that the callbacks join.
    """
    return callbacks_of(LemoRun(args))


def callbacks_of(run: LemoRun) -> list[TrainerCallback]:
    """The callbacks that share `run`, in the order in which they act."""
    # Metrics before the probe: what they read of the step's last forward, a refit overwrites.
    phases = (
        JoinProcesses,
        CompatibleOptions,
        OffloadSaved,
        WarnOfMemory,
        PredictorPhase,
        SharePhase,
        CalibratePhase,
        SparsePhase,
        LayerMetrics,
        RecallProbe,
        RunRecord,
    )
    return [*(phase(run) for phase in phases), SampleWatch(run), LeaveOnSignal(run)]


class PredictorPhase(LemoCallback):
    """Fits the predictors on the frozen model before the first step."""

    begins = "predictor"

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        run, own = self.run, self.run.args
        if not run.trainer_saves:
            refuse_beyond_stock(own, args, state)
        require_blocks(run.documents, run.lemo, len(run.backbone.layers))
        if "predictor" in run.finished:
            return
        documents = own.predictor_documents
        if documents is None:
            documents = DEFAULT_DOCUMENTS if run.lemo.needs_predictors else 0
        if documents:
            documents = self._available(documents)
        self._say_cost(args, state, documents * own.predictor_passes)
        taken = run.take_progress("predictor")
        if taken is None and own.predictors:
            load_predictors(run.backbone, own.predictors)
            run.predictors_fitted = True
        if documents:
            self._fit(documents * own.predictor_passes, documents, taken)
        elif run.lemo.needs_predictors and run.predictors_fitted:
            logger.info("predictor phase skipped (predictor_documents=0): those of %s stay", own.predictors or "the run")
        elif run.lemo.needs_predictors:
            logger.warning("predictor phase skipped (predictor_documents=0): selection reads the predictors as they are")
        else:
            logger.info("predictor phase skipped: selection=%r does not read predictors", run.lemo.selection)
        run.finished.append("predictor")
        run.phase = "calibrate"

    def _say_cost(self, args: TrainingArguments, state: TrainerState, fitted: int) -> None:
        run, own = self.run, self.run.args
        searches = run.lemo.selection == "threshold" and (run.lemo.thresholds is None or fitted > 0)
        profile = len(run.documents.profile()) if searches else 0
        # Of one process: all share the documents of the phases, and the samples.
        fitted, profile = (-(-count // run.processes.count) for count in (fitted, profile))
        samples = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        cost = estimate_cost(run.lemo, len(run.backbone.layers), fitted, profile, own.calibrate_rounds, samples)
        run.phase_cost = cost
        if cost.share > LARGE_SHARE:
            logger.warning(
                "%s; %d documents to fit on, %d profiled in %d rounds, %d training samples; lower predictor_documents, "
                "calibrate_documents or calibrate_rounds, or train for more steps",
                *(cost, fitted, profile, own.calibrate_rounds if profile else 0, samples),
            )
        elif cost.share > 0:
            logger.info("%s", cost)

    def _available(self, wanted: int) -> int:
        # Streams may be split among processes, and end early.
        documents = min(self.run.processes.gather(self.run.documents.fitting_count(wanted)))
        probes = self.run.documents.probe_count
        if not probes:
            logger.warning("training set has one document: recall is measured on the text that the predictors are fitted on")
        elif documents < wanted:
            logger.warning(
                "predictor_documents=%d is more than the training set has; fitting on %d, %d more measure recall",
                wanted,
                documents,
                probes,
            )
        return documents

    def _fit(self, total: int, documents: int, taken: Any) -> None:
        run, own = self.run, self.run.args
        # A model that a LeMo run saved brings fitted predictors too; the profile of drawn ones is flat.
        fresh = not run.predictors_fitted and not any(layer.lemo_predictor.distance[0].any() for layer in run.backbone.layers)
        pruning = own.prune_documents, own.prune_share
        optimizer = own.predictor_steps, own.predictor_learning_rate
        training = PredictorTraining(run.backbone, total, *optimizer, *pruning, fresh=fresh, processes=run.processes)
        if taken is not None:
            training.restore(taken[1], taken[0]["done"])
        began = time.perf_counter()
        with tqdm(total=total, initial=training.done, desc="predictor", unit="doc", disable=not run.shows_progress) as bar:
            while training.done < total:
                before = training.done
                index, together, counted = run.processes.turn(before, total)
                place = index % documents
                try:
                    losses = training.fit(run.documents.fitting(place), together, counted)
                except LemoRunError as error:
                    raise LemoRunError(f"{error} ({run.documents.name_of_fitting(place)})") from error
                if not all_finite(predictor_tensors(run.backbone).values()):
                    raise LemoRunError(
                        f"predictors are not finite; after {run.documents.name_of_fitting(place)}; lower predictor_learning_rate"
                    )
                bar.update(together)
                if known := [loss for loss in losses if not math.isnan(loss)]:  # a document of padding alone has none
                    bar.set_postfix(loss=f"{sum(known) / len(known):.3f}")
                stopped = run.stop_requested()
                if stopped or training.done // own.phase_save_documents > before // own.phase_save_documents:
                    run.save_progress("predictor", {"done": training.done}, training.tensors())
                if stopped:
                    run.stop.leave(f"after {training.done} of {total} documents of the predictor phase")
        run.processes.require_same_tensors(predictor_tensors(run.backbone))
        record_predictor_sizes(run.backbone)
        run.predictors_fitted = run.fitted_now = True
        report = probe(run, training)
        run.fitted_recall = None if math.isnan(report.mean) else report.mean
        say_if_text_is_foreign(run, report)
        run.report(
            {
                **by_layer("recall", report.layers),
                "recall_of_positions": report.position_mean,
                "recall_of_chance": report.chance,
                "predictor_parameter_share": parameter_share(run.backbone),
                "predictor_seconds": time.perf_counter() - began,
            }
        )


class CalibratePhase(LemoCallback):
    """Finds the thresholds before the first step, where the selection reads them."""

    begins = "calibrate"

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        run = self.run
        if "calibrate" in run.finished:
            return
        taken = run.take_progress("calibrate")
        if run.lemo.selection != "threshold":
            logger.info("calibrate phase skipped: selection=%r has no thresholds", run.lemo.selection)
        elif taken is None and run.lemo.thresholds is not None and not run.fitted_now:
            logger.info("calibrate phase skipped: the lemo block brings thresholds and no predictor was fitted in this run")
            brought = threshold_search(run)
            brought.begin(keep_thresholds=True)
            brought.require_choice()
        else:
            self._search(taken)
        run.finished.append("calibrate")
        run.phase = "sparse"
        run.save_progress("sparse", {}, {})

    def _search(self, taken: Any) -> None:
        run, own = self.run, self.run.args
        began = time.perf_counter()
        search = threshold_search(run)
        search.begin()
        if any(run.lemo.ratio_of(layer) < 1 for layer in search.searched):
            search.require_choice()
        if taken is not None:
            search.restore(taken[0])
        rounds = own.calibrate_rounds if search.differentiates else 0
        with tqdm(total=rounds, initial=search.round, desc="calibrate", unit="round", disable=not run.shows_progress) as bar:
            if rounds and taken is None:
                run.save_progress("calibrate", search.state(), {})
            # What a round found before its end is not kept: waiting for it would save nothing.
            search.after_document = self._leave_if_asked
            while search.round < rounds:
                self._leave_if_asked()  # by a signal that came before the rounds
                search.step()
                run.save_progress("calibrate", search.state(), {})
                bar.update()
        run.processes.require_same({"thresholds": search.thresholds}, "see that all run on the same kind of device")
        run.report(
            {
                **by_layer("threshold", search.thresholds),
                **by_layer("calibrated_share", search.kept_shares()),
                "calibrate_forward_passes": search.forward_passes,
                "calibrate_seconds": time.perf_counter() - began,
            }
        )

    def _leave_if_asked(self) -> None:
        if self.run.stop_requested():
            self.run.stop.leave("where its files stand")


class SparsePhase(LemoCallback):
    """Ties draws to the step, makes the last steps dense, writes checkpoints' LeMo files, stops at a gradient that is not finite."""

    def __init__(self, run: LemoRun) -> None:
        super().__init__(run)
        self._skipped = 0

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        self._set_draw(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_draw(state)
        tail = self.run.args.dense_tail_share
        if self.run.lemo.enabled and tail and state.global_step >= round(state.max_steps * (1 - tail)):
            self.run.enter_tail()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_draw(state)

    def _set_draw(self, state: TrainerState) -> None:
        # What a document draws depends on its tokens and the step alone: a run that was stopped and resumed draws alike, and so
        # does a batch that is accumulated from smaller ones or split among processes.
        self.run.backbone.lemo_draw = state.global_step

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # With a float16 scaler infinite gradients are its business: it skips the step.
        if args.fp16:
            return
        gradients = (weight.grad for weight in kwargs["model"].parameters() if weight.grad is not None)
        # Of a sharded gradient this process looks at its part.
        if not self.run.processes.all(all_finite(part for grad in gradients for part in plain_tensors(grad))):
            raise not_finite("gradient", math.nan, state, args, self.run.samples.culprit(whole_step=True))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # It halves its scale each time, which soon is small enough, if it is the scale that is to blame.
        self._skipped = self._skipped + 1 if getattr(kwargs["optimizer"], "step_was_skipped", False) else 0
        if self._skipped > _MOST_SKIPPED:
            raise not_finite(f"float16 gradient of the last {self._skipped} steps", math.nan, state, args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.leave_tail()
        self._save_ahead(state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._save_ahead(state, control)

    def _save_ahead(self, state: TrainerState, control: TrainerControl) -> None:
        # A stock trainer deletes older checkpoints before it calls `on_save`: the new one must not lack anything then.
        if control.should_save and not self.run.trainer_saves:
            folder = self.run.folder / f"checkpoint-{state.global_step}"
            if self.run.writes:
                unseal(folder)
            self.run.save_files(folder, with_state=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.run.trainer_saves:
            self.run.save_files(self.run.folder / f"checkpoint-{state.global_step}", with_state=True)
        self.run.seal(state.global_step)
        self.run.forget_progress()

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer is about to upload its output folder, and perhaps the checkpoint that it has just written.
        if not self.run.is_attached:
            return
        self.run.save_files(self.run.folder, with_state=False)
        checkpoint = self.run.folder / f"checkpoint-{state.global_step}"
        # One that is sealed stays as it is: after training the model may be that of an earlier step, the best one.
        if checkpoint.is_dir() and not (checkpoint / SEAL_FILE).is_file():
            self.run.save_files(checkpoint, with_state=True)
            self.run.forget_progress()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.run.forget_progress()
        if self.run.trainer_saves or not self.run.is_attached:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            # Predictors and thresholds of another step than the adapter's would choose by other scores.
            load_lemo_files(self.run.model, state.best_model_checkpoint)
        if args.save_strategy != "no":
            self.run.save_files(self.run.folder, with_state=False)


def refuse_beyond_stock(own: LemoTrainingArguments, args: TrainingArguments, state: TrainerState) -> None:
    """Refuses what callbacks in a trainer that is not LeMo's cannot do.

    Raises:
        LemoError: If such a thing is asked for.
    """
    if own.eval_sparse:
        raise LemoError(
            "a stock trainer evaluates densely only; eval_sparse=True; use LemoTrainer or LemoSFTTrainer, or leave it out"
        )
    if state.global_step >= state.max_steps > 0:
        raise LemoError(
            f"checkpoint is of the run's last step, and a stock trainer would take one more; step {state.global_step}; "
            "load the model from it, raise max_steps, or use LemoTrainer"
        )
    if state.is_hyper_param_search and args.save_strategy != "no":
        raise LemoError(
            f"callbacks cannot tell where a search saves its trials; save_strategy={SaveStrategy(args.save_strategy).value!r}; "
            "set it to 'no', or use LemoTrainer"
        )


def all_finite(gradients: Iterable[Tensor]) -> bool:
    """Whether every value is finite; one wait for each device that holds gradients."""
    flags: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        flags.setdefault(gradient.device, []).append(gradient.isfinite().all())
    return all(bool(torch.stack(of_device).all()) for of_device in flags.values())


def not_finite(what: str, value: float, state: TrainerState, args: TrainingArguments, culprit: str | None = None) -> LemoError:
    """The error that stops a run whose loss or gradient is not finite.

    Args:
        what: Loss or gradient.
        value: What it is.
        state, args: The trainer's.
        culprit: The samples that give it alone, if it was they.
    """
    folder = newest_whole(str(args.output_dir))
    fact = f"{what} is not finite; {value} at step {state.global_step + 1}"
    if culprit is not None:
        return LemoError(
            f"{fact}, from {culprit} alone, last good checkpoint: {folder or 'none yet'}; repair or leave out what is named, then resume"
        )
    return LemoRunError(f"{fact}, last good checkpoint: {folder or 'none yet'}; lower learning_rate and resume from it")
