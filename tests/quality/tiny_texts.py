"""Random rows and made-up questions in the place of the quality bench's text."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from benchmarks.quality.measures import SIZES, Measures
from benchmarks.quality.retrieval import TASKS

TOKENS = 256


def token_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 300, (count, TOKENS), generator=generator)


class TinyTexts:
    """Random rows, and questions of made-up answers."""

    def training(self, seed):
        return [{"input_ids": row, "labels": row.clone()} for row in token_rows(12, seed)]

    def measures(self, seed):
        windows = token_rows(3, 100)
        questions = [
            {"input_ids": row, "answers": [(250, 254)], "task": task, "tokens": TOKENS, "depth": depth}
            for row, task, depth in zip(token_rows(3, seed), TASKS, (0.1, 0.9, 0.9), strict=True)
        ]
        spans = [SimpleNamespace(start=200, end=203), SimpleNamespace(start=240, end=242)]
        repositories = [SimpleNamespace(input_ids=row, spans=spans) for row in token_rows(2, 7)]
        return Measures(windows, questions, repositories, replace(SIZES["brief"], far_windows=2))
