"""Drift: LoRA moves the model away from its predictors, so their recall is probed now and then, and they are fitted again.

A probe runs the same held-out documents through the model every time, densely and without autograd, so two of them differ by
what training did and by nothing else. What recall can be depends on model and text (docs/experiments/predictors.md), so the bound is
relative: a refit comes when mean recall has lost `recall_drop` since the last fit.

A probe also says whether the text is one that the predictors know: they may have come with the model, fitted on another one.

Cost, in dense forwards: a probe 1.15 a document; a refit 1.2 for each of `refit_documents`, the probe after it, and with thresholds 2 for
each of `calibrate_documents` (phase_cost.py says the share of the run). Memory: one layer's rows at a time, as in the predictor phase.
"""

import logging
import math
from dataclasses import replace

from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...evaluation.block_recall import RecallReport, measure_recall, positions_of_others
from ...evaluation.layer_scores import LayerScores
from ...hub.lemo_files import predictor_tensors
from ..lemo_callback import LemoCallback, by_layer, precision
from ..lemo_run import LemoRun
from ..scale_out.processes import within_forward
from .block_score_maps import BlockScoreMaps
from .phase_cost import LARGE_PROBE_SHARE, estimate_probe_cost
from .phase_documents import untouched_randomness
from .predictor_training import PredictorTraining
from .threshold_search import ThresholdSearch

logger = logging.getLogger(__name__)

DEFAULT_DOCUMENTS = 64
# Of what chance leaves to find: predictors that find less choose almost at random.
_LEAST_GAIN = 0.1


def probe(run: LemoRun, training: PredictorTraining | None = None) -> RecallReport:
    """Recall on the run's probe documents, which no phase fits on unless there is only one document."""
    maps = BlockScoreMaps(run)
    positions = training.positions if training is not None else None
    true: list[list[Tensor]] = [[] for _ in run.backbone.layers]

    def look(found: LayerScores) -> None:
        maps(found)
        true[found.layer] += found.informativeness()

    report = measure_recall(run.backbone, run.documents.probes(), positions, also=look)
    if positions is None:
        # No phase of this run learned what positions say: each document is foretold by the others.
        ratios = [run.lemo.ratio_of(layer) for layer in range(len(true))]
        report = replace(report, positions=positions_of_others(true, ratios))
    maps.save()
    # All processes read the same documents, unless a stream is split among them; what follows is to be decided alike.
    means = iter(run.processes.means([*report.layers, *report.positions, report.chance]))
    return RecallReport([next(means) for _ in report.layers], [next(means) for _ in report.positions], next(means))


def say_if_text_is_foreign(run: LemoRun, report: RecallReport) -> None:
    """Warns, once a run, where predictors that the selection reads know less of the run's text than positions do, or next to nothing."""
    if run.said_foreign or not run.lemo.needs_predictors or math.isnan(report.mean):
        return
    positions = 0.0 if math.isnan(report.position_mean) else report.position_mean
    if report.mean >= max(positions, report.chance + _LEAST_GAIN * (1 - report.chance)):
        return
    run.said_foreign = True
    logger.warning(
        "predictors do not know this text: they find %.3f of the blocks, their positions alone %.3f, chance %.3f; fit them on it "
        "(raise predictor_documents), or choose selection='sampled', which reads none",
        *(report.mean, report.position_mean, report.chance),
    )


def threshold_search(run: LemoRun) -> ThresholdSearch:
    """The search over the run's profile documents."""
    own = run.args
    profile = run.documents.profile()
    profile = profile[: min(run.processes.gather(len(profile)))]
    return ThresholdSearch(run.model, run.backbone, profile, own.calibrate_eta, own.calibrate_epsilon, run.processes)


class RecallProbe(LemoCallback):
    """Measures recall on fixed text every so many steps, and fits the predictors again when it has fallen."""

    begins = "probes"

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        run, own = self.run, self.run.args
        if not own.probe_steps or not run.predictors_fitted:
            return
        if state.global_step == 0:
            self._say_cost(args, state)
        if run.fitted_recall is None:
            # No phase fitted them in this run: they came with the model, or from a run that was stopped after its phases.
            report = probe(run)
            run.fitted_recall = _known(report.mean)
            say_if_text_is_foreign(run, report)

    def _say_cost(self, args: TrainingArguments, state: TrainerState) -> None:
        run, own = self.run, self.run.args
        samples = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps
        probes, documents = state.max_steps // own.probe_steps, len(run.documents.probes())
        refits = min(own.refit_limit, probes) if run.lemo.needs_predictors else 0
        profile = len(run.documents.profile()) if run.lemo.selection == "threshold" else 0
        parts = probes * documents, refits, own.refit_documents, documents, profile
        cost = estimate_probe_cost(run.lemo, len(run.backbone.layers), *parts, samples)
        if cost.share > LARGE_PROBE_SHARE:
            logger.warning("%s; raise probe_steps, or lower probe_documents, refit_documents or refit_limit", cost)
        elif cost.share > 0:
            logger.info("%s", cost)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        run, own = self.run, self.run.args
        if not run.lemo.enabled or not run.predictors_fitted or not own.probe_steps or state.global_step % own.probe_steps:
            return
        run.clock.charge("other")
        with untouched_randomness(), precision(args):
            report = within_forward(run.model, self._look)
        run.metrics |= by_layer("recall", report.layers)
        say_if_text_is_foreign(run, report)
        run.clock.charge("probes")

    def _look(self) -> RecallReport:
        run = self.run
        report = probe(run)
        if run.lemo.needs_predictors and not run.refits_over and self._has_fallen(report.mean):
            report = self._answer(report)
        return report

    def _has_fallen(self, recall: float) -> bool:
        fitted = self.run.fitted_recall
        return fitted is not None and recall < fitted - self.run.args.recall_drop

    def _answer(self, fallen: RecallReport) -> RecallReport:
        """Fits the predictors again if the run has refits left, and says what came of it; returns what recall is now."""
        run, own = self.run, self.run.args
        lost = f"mean recall is {fallen.mean:.3f}, it was {run.fitted_recall:.3f} when the predictors were last fitted"
        if run.refits >= own.refit_limit:
            run.refits_over = True
            logger.warning("%s; refit_limit=%d is used up; raise it, or lower learning_rate (said once)", lost, own.refit_limit)
            return fallen
        self._refit()
        report = probe(run)
        run.metrics["recall_before_refit"] = fallen.mean
        run.fitted_recall = _known(report.mean)
        if report.mean > fallen.mean or own.recall_drop < 0:
            logger.info("%s; fitted again on %d documents: %.3f", lost, own.refit_documents, report.mean)
        else:
            run.refits_over = True
            logger.warning(
                "%s; fitting again on %d documents did not help: %.3f; raise refit_documents or lower learning_rate "
                "(said once, this run fits them no more)",
                *(lost, own.refit_documents, report.mean),
            )
        return report

    def _refit(self) -> None:
        run, own = self.run, self.run.args
        run.refits += 1
        shares = None
        if run.lemo.selection == "threshold":
            search = threshold_search(run)
            search.begin(keep_thresholds=True)
            shares = search.kept_shares()
        rate = own.predictor_learning_rate / 3
        total = own.refit_documents
        training = PredictorTraining(run.backbone, total, own.predictor_steps, rate, fresh=False, processes=run.processes)
        # Each refit reads documents that neither the phase nor an earlier refit read.
        fitted = (own.predictor_documents or DEFAULT_DOCUMENTS) + (run.refits - 1) * own.refit_documents
        with tqdm(total=total, desc="refit", unit="doc", leave=False, disable=not run.shows_progress) as bar:
            while training.done < total:
                index, together, counted = run.processes.turn(training.done, total)
                training.fit(run.documents.fitting(fitted + index), together, counted)
                bar.update(together)
        run.processes.require_same_tensors(predictor_tensors(run.backbone))
        if shares is not None:
            # The new predictors may have another scale: the layers' kept shares stay, the thresholds follow.
            search = threshold_search(run)
            search.begin(keep_thresholds=True)
            search.keep_shares(shares)


def _known(recall: float) -> float | None:
    """A mean recall, or `None` where no document leaves a choice."""
    return None if math.isnan(recall) else recall
