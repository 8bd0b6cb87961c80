"""Poisoned samples, which would spoil a run: refused by name before they do, or found after they did.

Before every forward the batch is looked at: empty or ragged rows, tokens and labels that are no whole numbers or no words of the
vocabulary. On a GPU an index out of range is a device-side assertion, after which the process can do nothing, not even save. When
a loss or a gradient is not a number, each row of the step is run alone: a row that gives it alone is the culprit, otherwise the
weights are. A row's index in the training set is read off the sampler's order and believed only if that sample, collated again,
holds the row's tokens; otherwise step, row and first tokens are named.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...models.segmented_loss import IGNORE_INDEX, shift_labels
from ..lemo_callback import LemoCallback, precision
from ..lemo_run import LemoRun
from ..phases.phase_documents import untouched_randomness
from ..scale_out.processes import Processes
from .sample_checks import require_sound

logger = logging.getLogger(__name__)

_SHOWN_TOKENS = 8


@dataclass(frozen=True)
class Row:
    """One row of the running step."""

    micro_batch: int
    row: int


class SampleWatch(LemoCallback):
    """Looks at each batch before its forward, and knows which samples the running step holds.

    Under `torch.compile` of the whole model batches pass unseen: looking at them would break its graph.
    """

    def __init__(self, run: LemoRun) -> None:
        super().__init__(run)
        self._hook: Any = None
        self._loader: Any = None
        self._inputs: list[dict[str, Any]] = []
        self._state: TrainerState | None = None
        self._args: TrainingArguments | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._release()
        self._loader, self._state, self._args = kwargs["train_dataloader"], state, args
        self._hook = kwargs["model"].register_forward_pre_hook(self._look, with_kwargs=True)
        self.run.samples = self

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._inputs = []

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._inputs = None, []

    def _look(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if model.training:
            self._inputs.append(kwargs)
        micro_batch = len(self._inputs) - 1

        def name(row: int | None) -> str:
            if not model.training:
                return "the batch to evaluate" if row is None else f"row {row} of the batch to evaluate"
            return self.name(Row(micro_batch, row or 0)) if row is not None else self._place(micro_batch)

        require_sound(kwargs, self.run.backbone.config, name)

    # Who it was.

    def culprit(self, whole_step: bool) -> str | None:
        """The rows of the last micro-batch, or of the whole step, that give a loss which is no number when they run alone.

        `None` if none does, or the weights are to blame: then text that the run has read before gives it too.
        """
        if Processes() or not self._inputs:
            return None  # one process alone cannot run a model whose layers are spread over several
        first = 0 if whole_step else len(self._inputs) - 1
        rows = [Row(micro, row) for micro in range(first, len(self._inputs)) for row in range(_rows(self._inputs[micro]))]
        try:
            bad = [row for row in rows if not self._is_finite(self._row(row))]
            if not bad or not all(self._is_finite(batch) for batch in self.run.documents.probes() if _has_labels(batch)):
                return None
        except Exception as error:  # whatever it is, it must not stand in for what is reported
            logger.info("rows of the step could not be run alone: %s", error)
            return None
        names = [f"{self.name(row)}{self._bad_tokens(row)}" for row in bad[:4]]
        return ", ".join(names) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")

    def _row(self, row: Row) -> dict[str, Any]:
        inputs = self._inputs[row.micro_batch]
        count = _rows(inputs)
        part = slice(row.row, row.row + 1)
        cut = {
            name: value[part] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
            for name, value in inputs.items()
        }
        cut.pop("num_items_in_batch", None)
        return cut

    @torch.no_grad()
    def _is_finite(self, inputs: Mapping[str, Any]) -> bool:
        if not _has_labels(inputs):
            return True
        run = self.run
        assert self._args is not None
        device = next(run.backbone.parameters()).device
        on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        draw = run.backbone.lemo_draw
        hook, self._hook = self._hook, None
        hook.remove()
        try:
            with untouched_randomness(), precision(self._args):
                loss = run.model(**on_device).loss
        finally:
            run.backbone.lemo_draw = draw
            self._hook = run.model.register_forward_pre_hook(self._look, with_kwargs=True)
        return bool(torch.isfinite(loss).all())

    def _bad_tokens(self, row: Row) -> str:
        tokens = self._row(row).get("input_ids")
        weight = getattr(self.run.backbone.get_input_embeddings(), "weight", None)
        if tokens is None or not isinstance(weight, Tensor):
            return ""
        bad = tokens.flatten()[~weight.detach()[tokens.flatten()].isfinite().all(-1)].unique().tolist()
        return f", whose token {bad[0]} has an embedding that is not finite" if bad else ""

    def name(self, row: Row) -> str:
        """A row as a user can find it: its index in the training set, or where it stands and how it begins."""
        indices = self._indices(row.micro_batch)
        if indices is not None:
            return f"sample {indices[row.row]} of the training set"
        tokens = self._row(row).get("input_ids")
        begin = "" if tokens is None else f" (it begins with tokens {tokens.flatten()[:_SHOWN_TOKENS].tolist()})"
        return f"row {row.row} of {self._place(row.micro_batch)}{begin}"

    def last_names(self) -> str:
        """All rows of the last micro-batch."""
        last = len(self._inputs) - 1
        indices = self._indices(last)
        return self._place(last) if indices is None else f"samples {', '.join(map(str, indices))} of the training set"

    def _place(self, micro_batch: int) -> str:
        step = self._state.global_step + 1 if self._state is not None else 0
        return f"micro-batch {micro_batch} of step {step}"

    def _indices(self, micro_batch: int) -> list[int] | None:
        """Indices of a micro-batch's rows in the training set, if the sampler's order gives them for certain."""
        loader, args, state = self._loader, self._args, self._state
        sampler, dataset = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
        readable: Any = dataset
        if (
            sampler is None
            or args is None
            or state is None
            or not hasattr(dataset, "__getitem__")
            or not hasattr(loader, "__len__")
        ):
            return None
        accumulated = args.gradient_accumulation_steps
        epoch, step = divmod(state.global_step, max(-(-len(loader) // accumulated), 1))
        try:
            with untouched_randomness():
                if hasattr(loader, "set_epoch"):
                    loader.set_epoch(epoch)
                indices = next(islice(iter(sampler), step * accumulated + micro_batch, None), None)
                if indices is None:
                    return None
                again = loader.collate_fn([readable[index] for index in indices])
        except Exception as error:  # of the user's data set; the poisoned sample is what is reported
            logger.info("order of the samples cannot be read again: %s", error)
            return None
        found, wanted = self._inputs[micro_batch].get("input_ids"), again.get("input_ids")
        same = isinstance(found, Tensor) and isinstance(wanted, Tensor) and torch.equal(found.cpu(), wanted.cpu())
        return list(indices) if same and len(indices) == _rows(self._inputs[micro_batch]) else None


def _rows(inputs: Mapping[str, Any]) -> int:
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    return tokens.shape[0] if isinstance(tokens, Tensor) and tokens.dim() else 0


def _has_labels(inputs: Mapping[str, Any]) -> bool:
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and bool((shift_labels(labels) != IGNORE_INDEX).any())
