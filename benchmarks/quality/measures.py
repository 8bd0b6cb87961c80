"""What a model can do at its extended context: dense perplexity by position, what far context is worth, retrieval, repositories.

Everything runs the dense forward pass in evaluation mode and float32, as stock `transformers` serves the model, on text of packages that
nothing was trained on. Losses are kept by window, so that two models are compared on the same windows (`lemo_hf.evaluation.perplexity`).

- text: windows of one file each; summed losses in four stretches of equal length, 0-1K, 1-2K, 2-3K and 3-4K at 4096 tokens.
- far context: the last stretch again, from no more than a quarter of the context (512 to 1023 tokens at 4096): what the tokens
  farther back are worth is the difference. A model that has not learnt to use them loses by them.
- repositories: the names that a file imports, in its import lines and its code, thousands of tokens after the lines that define them
  (`repositories.py`); again with the context cut to begin 512 tokens (at 4096) before the first of them.
- retrieval: one question at the end of a context (`retrieval.py`), right if every token of the answer is the most likely one given
  those before it; the answer's loss says more where few are right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality import retrieval
from benchmarks.quality.repositories import RepositorySample
from benchmarks.quality.retrieval_metric import RetrievalMetric
from lemo_hf.errors import LemoError
from lemo_hf.evaluation.layer_scores import evaluation_mode
from lemo_hf.evaluation.perplexity import PairedDifference, Perplexity, paired_difference

STRETCHES = 4


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Args:
        windows: Windows of text; `far_windows` of them also with their context cut.
        tasks: Retrieval tasks, each at every one of `lengths` (shares of the context) and `depths`, `repeats` times.
        repositories: Repository rows.
        everywhere: Whether retrieval and repositories are measured of every arm at both points, and not at equal steps of the core
            arms and shares alone.
    """

    windows: int
    far_windows: int
    lengths: tuple[float, ...]
    depths: tuple[float, ...]
    repeats: int
    repositories: int
    everywhere: bool
    tasks: tuple[str, ...] = retrieval.TASKS


# By name: what every arm is measured by, and what the arms of the main comparison are.
SIZES = {
    "brief": Sizes(12, 4, (1.0,), (0.1, 0.5, 0.9), 1, 4, False),
    "full": Sizes(24, 12, (0.25, 0.5, 1.0), (0.1, 0.3, 0.5, 0.7, 0.9), 1, 8, True),
}


def stretch_bounds(tokens: int, stretches: int = STRETCHES) -> list[int]:
    """Where stretches of a window begin, and its end: `stretches + 1` positions.

    Raises:
        LemoError: If they would be of different lengths, or hold nothing to predict.
    """
    if tokens % (2 * stretches) or tokens < 4 * stretches:
        raise LemoError(
            f"a window is measured in {stretches} stretches of equal halves; {tokens} tokens; use a multiple of {2 * stretches}"
        )
    return [tokens * index // stretches for index in range(stretches + 1)]


@torch.no_grad()
def token_losses(model: nn.Module, input_ids: Tensor, logits_of: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token given those before it, and whether it is the most likely one.

    Args:
        model: A causal language model in evaluation mode.
        input_ids: `(batch, tokens)`.
        logits_of: Which tokens are wanted; the first has nothing before it and counts 0, and as not the most likely.

    Returns:
        Losses in nats, float64 `(batch, tokens)`, and bool `(batch, tokens)`; outside `logits_of` zeros.
    """
    input_ids = input_ids.to(next(model.parameters()).device)
    first = max(1, logits_of.indices(input_ids.shape[1])[0])
    kept = (
        input_ids.shape[1] - first + 1
    )  # the logits that stand before the tokens wanted, and the last, which predicts nothing here
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=kept).logits[:, :-1].float()
    targets = input_ids[:, first:]
    losses = torch.zeros(input_ids.shape, dtype=torch.float64)
    right = torch.zeros(input_ids.shape, dtype=torch.bool)
    losses[:, first:] = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).cpu()
    right[:, first:] = (logits.argmax(-1) == targets).cpu()
    return losses, right


def cut_rows(tokens: Tensor) -> Tensor:
    """The last stretch of a window `(tokens,)` as two rows `(2, stretch)`, each of whose second half is to be predicted."""
    stretch = len(tokens) // STRETCHES
    return torch.stack([tokens[-stretch - stretch // 2 : -(stretch // 2)], tokens[-stretch:]])


def measure_text(model: nn.Module, windows: Sequence[Tensor], far_windows: int) -> dict[str, Any]:
    """Summed losses by window and stretch, and of the last stretch with the context cut.

    Args:
        model: In evaluation mode.
        windows: Token ids, `(tokens,)` each.
        far_windows: How many of them are measured with their context cut too.

    Returns:
        `nll` and `tokens` by window and stretch; `far`: `full_nll`, `cut_nll` and `tokens` by window.
    """
    bounds = stretch_bounds(len(windows[0]))
    counts = [bounds[1] - 1, *(end - start for start, end in pairwise(bounds[1:]))]
    nll, cut = [], []
    for index, window in enumerate(windows):
        losses, _ = token_losses(model, window[None])
        nll.append([losses[0, start:end].sum().item() for start, end in pairwise(bounds)])
        if index < far_windows:
            half = slice(bounds[1] // 2, None)
            cut.append(token_losses(model, cut_rows(window), half)[0][:, half].sum().item())
    far = {"full_nll": [sums[-1] for sums in nll[: len(cut)]], "cut_nll": cut, "tokens": [counts[-1]] * len(cut)}
    return {"nll": nll, "tokens": [counts] * len(windows), "far": far}


def measure_retrieval(model: nn.Module, questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each question's task, length and depth, whether its answer is right, and the answer's loss in nats a token."""
    found = []
    for question in questions:
        (start, end), *_ = question["answers"]
        losses, right = token_losses(model, question["input_ids"][None], slice(start, None))
        entry = {name: question[name] for name in ("task", "tokens", "depth")}
        found.append(entry | {"right": bool(right[0, start:end].all()), "loss": losses[0, start:end].mean().item()})
    return found


def retrieval_questions(tokenizer: Any, tokens: int, seed: int, sizes: Sizes, haystack: Tensor | None) -> list[dict[str, Any]]:
    """Questions of every task, length and depth; other ones for another seed, the same for every arm."""
    found = []
    for task_number, task in enumerate(sizes.tasks):
        for share in sizes.lengths:
            for depth in sizes.depths:
                for repeat in range(sizes.repeats):
                    name = (seed, task_number, round(share * 1000), round(depth * 1000), repeat)
                    generator = torch.Generator().manual_seed(sum(part * 1009**place for place, part in enumerate(name)) % 2**62)
                    length = round(share * tokens)
                    question = retrieval.sample(task, tokenizer, length, depth, generator, haystack)
                    found.append(question | {"task": task, "tokens": length, "depth": depth})
    return found


def measure_repositories(model: nn.Module, samples: Sequence[RepositorySample]) -> dict[str, list[float]]:
    """By sample the summed losses of its names, with the whole context and with it cut, and their tokens."""
    found: dict[str, list[float]] = {"nll": [], "cut_nll": [], "tokens": []}
    for sample in samples:
        places = torch.tensor([place for span in sample.spans for place in range(span.start, span.end)])
        first = sample.spans[0].start
        start = max(0, first - len(sample.input_ids) // 8)
        losses, _ = token_losses(model, sample.input_ids[None], slice(first, None))
        cut, _ = token_losses(model, sample.input_ids[None, start:], slice(first - start, None))
        found["nll"].append(losses[0, places].sum().item())
        found["cut_nll"].append(cut[0, places - start].sum().item())
        found["tokens"].append(len(places))
    return found


class Measures:
    """What is measured of every model of a run of the bench.

    Args:
        windows: Held-out text, `(tokens,)` token ids each.
        questions: From `retrieval_questions`.
        repositories: Rows from `repositories.py`; none where text has no imports to follow.
        sizes: How much of it.
    """

    def __init__(
        self,
        windows: Sequence[Tensor],
        questions: Sequence[Mapping[str, Any]],
        repositories: Sequence[RepositorySample],
        sizes: Sizes,
    ) -> None:
        self.windows, self.questions, self.repositories, self.sizes = windows, questions, repositories, sizes

    def __call__(self, model: nn.Module, text_alone: bool = False) -> dict[str, Any]:
        """Measures `model`, whose training mode is restored afterwards; JSON types.

        Args:
            model: A causal language model.
            text_alone: Whether retrieval and repositories are left out.
        """
        with evaluation_mode(model):
            found: dict[str, Any] = {"text": measure_text(model, self.windows, self.sizes.far_windows)}
            if not text_alone:
                found["retrieval"] = measure_retrieval(model, self.questions)
                if self.repositories:
                    found["repositories"] = measure_repositories(model, self.repositories)
        losses = [*(loss for sums in found["text"]["nll"] for loss in sums)]
        if not all(map(math.isfinite, losses)):
            raise LemoError(f"loss is not finite; {losses}; check the weights, or lower the learning rate")
        return found


def text_perplexity(measured: Mapping[str, Any], stretch: int | None = None) -> Perplexity:
    """Perplexity of the text, of all of it or of one stretch, by window."""
    text = measured["text"]
    part = slice(None) if stretch is None else slice(stretch, stretch + 1)
    return Perplexity(tuple(sum(sums[part]) for sums in text["nll"]), tuple(sum(counts[part]) for counts in text["tokens"]))


def repository_perplexity(measured: Mapping[str, Any], cut: bool = False) -> Perplexity:
    """Perplexity of imported names, by sample; `cut`: with the context that defines them cut off."""
    found = measured["repositories"]
    return Perplexity(tuple(found["cut_nll" if cut else "nll"]), tuple(found["tokens"]))


def far_context(measured: Mapping[str, Any]) -> PairedDifference:
    """How much lower the last stretch's perplexity is for the context that is farther back, percent; negative is lower."""
    far = measured["text"]["far"]
    full, cut = (Perplexity(tuple(far[name]), tuple(far["tokens"])) for name in ("full_nll", "cut_nll"))
    return paired_difference(cut, full)


def retrieval_scores(measured: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy by task, length and depth of one or several runs' questions, and `loss`, the mean over answers."""
    metric = RetrievalMetric()
    references = [{name: asked[name] for name in ("task", "tokens", "depth")} for asked in measured]
    metric.add_batch(predictions=[int(asked["right"]) for asked in measured], references=references)
    scores: dict[str, float] = metric.compute()
    return scores | {"loss": sum(asked["loss"] for asked in measured) / len(measured)}
