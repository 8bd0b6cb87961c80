"""The documents that the phases read: samples of the training set in an order of their own, and what each of them is for."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ...errors import LemoError
from ...evaluation.layer_scores import backbone_inputs, documents_of
from ...models.lemo_config import LemoConfig
from ...models.token_elimination import kept_block_count

logger = logging.getLogger(__name__)


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
            batch = self._collate([self._dataset[self._order[place]] if self._stream is None else self._read[place]])
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

    @property
    def probe_count(self) -> int:
        """Documents that nothing is fitted on: 0 only if there is no second document."""
        return min(self._probes, max(self.count(self._probes + 1) - 1, 0))

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


def require_blocks(batches: list[dict[str, Any]], lemo: LemoConfig, num_layers: int) -> None:
    """Looks at documents of the training set: training where no block can be left out is dense, and nobody asked for that.

    Args:
        batches: Collated documents.
        lemo: The model's lemo block.
        num_layers: Layers of the model.

    Raises:
        LemoError: If every document is shorter than a block.
    """
    cpu = torch.device("cpu")
    found = [documents_of(backbone_inputs(batch, cpu), lemo.block_size) for batch in batches]
    longest = max((length for documents in found for length in documents.lengths), default=0)
    chosen = [layer for layer in range(num_layers) if not lemo.is_dense(layer, num_layers)]
    if not longest or not chosen:
        return
    if longest < lemo.block_size:
        raise LemoError(
            f"seq_len {longest} is shorter than one block (block_size={lemo.block_size}); lower block_size or use longer samples"
        )
    blocks = -(-longest // lemo.block_size)
    # By a threshold every block but the first and the last may go.
    ratio = 0.0 if lemo.selection == "threshold" else min(map(lemo.ratio_of, chosen))
    if kept_block_count(blocks, ratio) >= blocks:
        logger.warning(
            "no document has a block that can be left out, so training is dense; the longest of %d has %d blocks (%d tokens, "
            "block_size=%d), and the first and last always stay; lower block_size, or use longer samples",
            len(batches),
            blocks,
            longest,
            lemo.block_size,
        )
