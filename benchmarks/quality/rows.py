"""What the arms of a comparison train on and are measured by: Python as the base has read it, or headers, which it has not.

Of 20 training rows 13 are windows of one file, 3 are files of one repository in a row (of headers, windows of one file too) and 4 are
dense retrieval rows, each at the extended length: a model that never sees a question across 4096 tokens has no reason to look that far.
The order is a function of the seed, so that every seed sees the kinds in the same proportions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.quality import corpus, headers, retrieval
from benchmarks.quality.measures import SIZES, Measures, retrieval_questions
from benchmarks.quality.repositories import RepositorySample, repository_samples
from benchmarks.quality.setting import Setting
from lemo_hf.errors import LemoError
from lemo_hf.text_data import TextDocument, pack_documents, spread_samples

TEXT, REPOSITORY, RETRIEVAL = "text", "repository", "retrieval"
# Kinds of 20 rows in a row, spread out.
KINDS = tuple(RETRIEVAL if place % 5 == 2 else REPOSITORY if place % 7 == 4 else TEXT for place in range(20))


def _python(split: str) -> list[TextDocument]:
    return corpus.held_out_documents() if split == "held_out" else corpus.training_documents(split)


# By text the documents of a split.
TEXTS: dict[str, Callable[[str], list[TextDocument]]] = {"python": _python, "headers": headers.header_documents}
MOST_ROWS = 4000
TRAINING_FILES, HELD_OUT_FILES, HAYSTACK_FILES, REPOSITORY_ROWS = 400, 120, 40, 120


class TrainingRows(Dataset):
    """Rows of one seed, in their order; any row is a function of seed and place.

    Args:
        windows: Windows of text and, under `REPOSITORY`, rows of repositories, `(tokens,)` each, by kind. Without repositories
            windows of text take their places.
        tokenizer: For retrieval rows.
        tokens: Their length.
        haystack: Token ids that every other retrieval row takes its filler from; the others have made-up lines.
        seed: Of order and questions.
    """

    def __init__(self, windows: dict[str, list[Tensor]], tokenizer: Any, tokens: int, haystack: Tensor, seed: int) -> None:
        self.windows, self.tokenizer, self.tokens, self.haystack, self.seed = windows, tokenizer, tokens, haystack, seed
        self.kinds = tuple(kind if kind in (RETRIEVAL, *windows) else TEXT for kind in KINDS)
        generator = torch.Generator().manual_seed(seed)
        self.orders = {kind: torch.randperm(len(found), generator=generator).tolist() for kind, found in windows.items()}

    def __len__(self) -> int:
        return MOST_ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < MOST_ROWS:
            raise IndexError(index)
        cycle, place = divmod(index, len(self.kinds))
        kind = self.kinds[place]
        if kind == RETRIEVAL:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            haystack = self.haystack if torch.rand(1, generator=generator) < 0.5 else None
            return retrieval.training_row(self.tokenizer, self.tokens, generator, haystack)
        before = cycle * self.kinds.count(kind) + self.kinds[:place].count(kind)
        order = self.orders[kind]
        tokens = self.windows[kind][order[before % len(order)]]
        return {"input_ids": tokens, "labels": tokens.clone()}


def long_files(documents: Sequence[TextDocument], tokens: int, limit: int) -> list[TextDocument]:
    """At most `limit` files that fill a window, evenly from all of them: a token is two characters at least, as a rule four."""
    found = [document for document in documents if len(document.text) >= 2.5 * tokens]
    count = min(limit, len(found))
    return [found[index * len(found) // count] for index in range(count)]


class Rows:
    """Text of a comparison, tokenised once for all arms and seeds.

    Args:
        tokenizer: The base's.
        setting: Length and sizes.
    """

    def __init__(self, tokenizer: Any, setting: Setting) -> None:
        self.tokenizer, self.tokens, self.sizes = tokenizer, setting.tokens, SIZES[setting.sizes]
        documents = TEXTS[setting.text]
        training, held_out = documents("extension"), documents("held_out")
        self.windows = {TEXT: self._windows(long_files(training, setting.tokens, TRAINING_FILES))}
        self.repositories: list[RepositorySample] = []
        if setting.text == "python":  # whose imports `repositories.py` follows
            samples = repository_samples(tokenizer, setting.tokens, REPOSITORY_ROWS, documents=training)
            # Rows of one length, whose steps cost the same.
            self.windows[REPOSITORY] = [each.input_ids for each in samples if len(each.input_ids) == setting.tokens]
            if not self.windows[REPOSITORY]:
                raise LemoError(f"no repository fills a row; {setting.tokens} tokens; use fewer, or install more packages")
            self.repositories = repository_samples(tokenizer, setting.tokens, self.sizes.repositories, documents=held_out)
        self.haystack = self._haystack(training)
        self.held_out_haystack = self._haystack(held_out)
        packed = pack_documents(tokenizer, long_files(held_out, setting.tokens, HELD_OUT_FILES), setting.tokens)
        self.held_out = [sample["input_ids"] for sample in spread_samples(packed, self.sizes.windows).samples]

    def _windows(self, documents: Sequence[TextDocument]) -> list[Tensor]:
        return [sample["input_ids"] for sample in pack_documents(self.tokenizer, documents, self.tokens).samples]

    def _haystack(self, documents: Sequence[TextDocument]) -> Tensor:
        chosen = long_files(documents, self.tokens, HAYSTACK_FILES)
        ids = self.tokenizer([document.text for document in chosen], add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor([token for each in ids for token in each])

    def training(self, seed: int) -> TrainingRows:
        """Training rows of a seed."""
        return TrainingRows(self.windows, self.tokenizer, self.tokens, self.haystack, seed)

    def measures(self, seed: int) -> Measures:
        """What models of a seed are measured by: the same text for all seeds, questions of the seed's own."""
        questions = retrieval_questions(self.tokenizer, self.tokens, seed, self.sizes, self.held_out_haystack)
        return Measures(self.held_out, questions, self.repositories, self.sizes)
