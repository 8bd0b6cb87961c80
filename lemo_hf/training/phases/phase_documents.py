"""The documents that the phases read: samples of the training set in an order of their own, and what each of them is for."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ...errors import LemoError
from ...evaluation.layer_scores import backbone_inputs, documents_of
from ...models.lemo_config import LemoConfig, LemoConfigError
from ...models.token_elimination import kept_block_count
from ...models.two_dimensional_sparsity import group_beyond, kept_for_groups
from ..scale_out.processes import Processes

logger = logging.getLogger(__name__)

# Samples whose lengths are looked at before the first step: for their share, and at most, where all of them are short.
_LOOKED_AT, _MOST_LOOKED_AT = 64, 512


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leaves the global random states of Python, NumPy and torch as they were: phases must not move the training curve."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is what is protected)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def is_stream(dataset: Any) -> bool:
    """Whether samples can only be read one after the other."""
    # One that is split among processes has a length, by its class, and raises when asked for it.
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"))


class PhaseDocuments:
    """Single samples of the training set as collated batches, in an order of their own.

    Args:
        dataset: The training set, or of a stream that is split among processes the part of this one; a stream is read from its
            start into memory as far as it is needed.
        collate: The training collator.
        seed: Seed of the order.
        probes, profile: How many documents, the first ones, measure recall, and how many after them are the profile set of
            calibration. The others are fitted on; where there are too few of them, those of the profile set too.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], dict[str, Any]],
        seed: int,
        probes: int = 0,
        profile: int = 0,
    ) -> None:
        self._dataset = dataset
        self._probes, self._profile = probes, profile
        # Documents that every process has, as far as it matters to how many measure recall.
        self._shared = probes + 1
        self._collate = collate
        # Called with every document and its name, before anybody reads it.
        self.check: Callable[[dict[str, Any], str], None] | None = None
        self._stream = iter(dataset) if is_stream(dataset) else None
        self._read: list[Any] = []
        self._order: list[int] = []
        if self._stream is None:
            self._order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The `index`-th document; beyond the last one the order starts again."""
        total = self.count(index + 1)
        if not total:
            raise LemoError("the training set is empty; 0 samples; give it at least one")
        with untouched_randomness():
            place = index % total
            batch = self._collate([self._sample(place)])
        if self.check is not None:
            self.check(batch, self.name(index))
        return batch

    def name(self, index: int) -> str:
        """The `index`-th document as a user can find it."""
        place = index % max(self.count(index + 1), 1)
        return f"sample {self._order[place] if self._stream is None else place} of the training set"

    def span(self, start: int, count: int) -> list[dict[str, Any]]:
        """Documents `start` to `start + count - 1`."""
        return [self[index] for index in range(start, start + count)]

    def count(self, wanted: int) -> int:
        """How many of `wanted` documents there are."""
        if self._stream is None:
            return min(wanted, len(self._order))
        with untouched_randomness():
            while len(self._read) < wanted:
                sample = next(self._stream, None)
                if sample is None:
                    break
                self._read.append(sample)
        return min(wanted, len(self._read))

    def agree(self, processes: Processes) -> None:
        """Has all processes measure recall on equally many documents, whatever the parts of a stream are that they read.

        Args:
            processes: Those that train together; all of them have to call it.

        Raises:
            LemoError: On every process alike, if one has no document.
        """
        counts = processes.gather(self.count(self._shared)) if processes else [self._shared]
        self._shared = min(counts)
        if not self._shared:
            raise LemoError(
                f"the training set is empty on rank {counts.index(0)}; 0 samples; give each process at least one, "
                "or leave dispatch_batches=False out"
            )

    def stated_lengths(self, least: int, enough: Callable[[int], bool]) -> list[int]:
        """Tokens of the first documents as the samples' `input_ids` have them, not collated; none if a sample does not say.

        Looked at are `least` of a stream and some more of a training set that is at hand, and while none has `enough` tokens, many.
        """
        lengths: list[int] = []
        found = False
        with untouched_randomness():
            while len(lengths) < _MOST_LOOKED_AT:
                wanted = least if self._stream is not None else max(least, _LOOKED_AT)
                if len(lengths) >= wanted and found:
                    break
                if self.count(len(lengths) + 1) == len(lengths):
                    break
                sample = self._sample(len(lengths))
                tokens = sample.get("input_ids") if isinstance(sample, Mapping) else None
                if not isinstance(tokens, Sized) or getattr(tokens, "ndim", 1) != 1:
                    return []
                mask = sample.get("attention_mask")
                lengths.append(len(tokens) if mask is None else int(np.count_nonzero(mask)))
                found = found or enough(lengths[-1])
        return lengths

    def _sample(self, place: int) -> Any:
        return self._dataset[self._order[place]] if self._stream is None else self._read[place]

    @property
    def probe_count(self) -> int:
        """Documents that nothing is fitted on, as many on every process: 0 only if there is no second document."""
        return min(self._probes, max(self.count(self._shared) - 1, 0))

    def probes(self) -> list[dict[str, Any]]:
        """The documents that recall is measured on."""
        return self.span(0, max(self.probe_count, 1))

    def profile(self) -> list[dict[str, Any]]:
        """The documents that thresholds are found on."""
        first = self.probe_count
        return self.span(first, self.count(first + self._profile) - first)

    def fitting_count(self, wanted: int) -> int:
        """How many of `wanted` different documents there are to fit on."""
        first = self.probe_count
        return min(wanted, self.count(first + self._profile + wanted) - first)

    def fitting(self, index: int) -> dict[str, Any]:
        """The `index`-th document to fit on; when they run out, those of the profile set, and then from their start again."""
        return self[self._fitting_place(index)]

    def name_of_fitting(self, index: int) -> str:
        """The name of the `index`-th document to fit on."""
        return self.name(self._fitting_place(index))

    def _fitting_place(self, index: int) -> int:
        first, place = self.probe_count, self._profile + index
        return first + place % max(self.count(first + place + 1) - first, 1)


def require_blocks(documents: PhaseDocuments, lemo: LemoConfig, num_layers: int) -> None:
    """Looks at documents of the training set: training where no block can be left out is dense, and nobody asked for that.

    Args:
        documents: Those of the phases.
        lemo: The model's lemo block.
        num_layers: Layers of the model.

    Raises:
        LemoError: If every document that is looked at is shorter than a block.
        LemoConfigError: If none of many, or of all, fills a group of the attention pattern.
    """
    chosen = [layer for layer in range(num_layers) if not lemo.is_dense(layer, num_layers)]
    lengths, samples = _lengths(documents, lemo, num_layers)
    longest = max(lengths, default=0)
    if (beyond := group_beyond(lemo, lengths, num_layers)) is not None:
        if samples >= _MOST_LOOKED_AT or documents.count(samples + 1) == samples:
            raise LemoConfigError(beyond)
        logger.warning("%s; documents that fill no group attend to all that they keep", beyond)
    if not longest or not chosen:
        return
    if longest < lemo.block_size:
        raise LemoError(
            f"seq_len {longest} is shorter than one block (block_size={lemo.block_size}); lower block_size or use longer samples"
        )
    blocks = -(-longest // lemo.block_size)
    # By a threshold every block but the first and the last may go.
    ratio = 0.0 if lemo.selection == "threshold" else min(map(lemo.ratio_of, chosen))
    short = sum(length < lemo.block_size for length in lengths)
    if kept_block_count(blocks, ratio) >= blocks:
        logger.warning(
            "no document has a block that can be left out, so training is dense; the longest of %d has %d blocks (%d tokens, "
            "block_size=%d), and the first and last always stay; lower block_size, or use longer samples",
            len(lengths),
            blocks,
            longest,
            lemo.block_size,
        )
    elif short > len(lengths) / 2:
        logger.warning(
            "most documents are shorter than one block and are trained densely; %d of %d looked at, block_size=%d; lower block_size, "
            "or use longer samples",
            short,
            len(lengths),
            lemo.block_size,
        )


def _lengths(documents: PhaseDocuments, lemo: LemoConfig, num_layers: int) -> tuple[list[int], int]:
    """Tokens of documents, several per sample where samples are packed, and of how many samples: many, if they say it uncollated.

    What a sample's `input_ids` say is believed if it is what the collator made of those that the phases read: it may cut or pack.
    """
    cpu = torch.device("cpu")
    batches = [*documents.probes(), *documents.profile()]
    collated = [documents_of(backbone_inputs(batch, cpu), lemo.block_size).lengths for batch in batches]
    drawn = [length for lengths in collated for length in lengths]

    def enough(tokens: int) -> bool:
        kept = kept_for_groups(lemo, tokens, num_layers)
        return tokens >= lemo.block_size and (kept is None or kept >= (lemo.group_size or 0))

    stated = documents.stated_lengths(len(batches), enough)
    return (stated, len(stated)) if stated[: len(drawn)] == drawn else (drawn, len(batches))
