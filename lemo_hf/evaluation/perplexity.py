"""Token-exact perplexity, and whether two models differ by more than chance.

    loss = sum of -log p(token | its document so far) over all labelled tokens / their number        (nats a token)
    perplexity = exp(loss)

The number that counts is the *dense* one: the model in evaluation mode, as stock `transformers` serves it. The *sparse* one
runs the training-time forward; it looks ahead (a block is kept for what later queries see in it), so it is optimistic, and it
is labelled wherever it is shown.

Two models are compared on the same documents. With d_i the difference of document i's summed losses, t_i its labelled tokens
and D = sum d_i / sum t_i, the relative difference in perplexity is exp(D) - 1. Documents, not tokens, are the independent
units, so D's standard error is that of a ratio over n documents,

    SE = sqrt(n / (n - 1) * sum (d_i - t_i D)^2) / sum t_i,

and the interval D -+ t(n - 1) * SE with Student's t.

Memory: hidden states of one batch, and logits of `segment_size` tokens at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import LemoError
from ..models.documents import find_documents
from ..models.segmented_loss import IGNORE_INDEX
from ..models.sparse_decoder import sparse_backbone, sparse_evaluation
from .layer_scores import evaluation_mode


@dataclass(frozen=True)
class Perplexity:
    """Negative log-likelihoods by document.

    Args:
        nll_sums: Summed negative log-likelihood of each document's labelled tokens, nats.
        token_counts: How many these are, per document.
        forward: "dense" or "sparse".
    """

    nll_sums: tuple[float, ...]
    token_counts: tuple[int, ...]
    forward: str = "dense"

    @property
    def tokens(self) -> int:
        """Labelled tokens of all documents."""
        return sum(self.token_counts)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return math.fsum(self.nll_sums) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class PairedDifference:
    """How much higher a perplexity is than a reference's on the same documents.

    Args:
        percent: Relative difference in perplexity, percent; negative is better than the reference.
        low: Lower end of the interval, percent.
        high: Upper end of the interval, percent.
        confidence: Coverage of the interval, fraction in (0, 1).
        documents: Documents compared.
    """

    percent: float
    low: float
    high: float
    confidence: float
    documents: int

    def __str__(self) -> str:
        return f"{self.percent:+.2f} % [{self.low:+.2f}, {self.high:+.2f}]"


def dense_perplexity(
    model: nn.Module, dataset: Any, batch_size: int = 1, segment_size: int = 512, description: str | None = None
) -> Perplexity:
    """Perplexity of the model as stock `transformers` would serve it.

    Args:
        model: A causal language model, with adapters or without; its training mode is restored afterwards.
        dataset: Samples with `input_ids` `(seq_len,)`, and optionally `labels` (-100 is left out; without them all tokens
            count), `attention_mask` and `position_ids` (a packed row's documents are told apart). A document's first token
            has nothing to be predicted from and never counts.
        batch_size: Samples at a time; samples of different lengths are padded on the right.
        segment_size: Tokens whose logits exist at one time.
        description: Shows a progress bar under this name.

    Raises:
        LemoError: If no token can be predicted, or a loss is not finite.
    """
    return _measure(model, dataset, batch_size, segment_size, description, "dense")


def sparse_perplexity(
    model: nn.Module, dataset: Any, batch_size: int = 1, segment_size: int = 512, description: str | None = None
) -> Perplexity:
    """Perplexity of the sparse training-time forward of a LeMo model: optimistic, to be shown under this name only.

    Arguments and errors as in [`dense_perplexity`].

    Raises:
        LemoConfigError: If the model carries no LeMo.
    """
    with sparse_evaluation(sparse_backbone(model)):
        return _measure(model, dataset, batch_size, segment_size, description, "sparse")


@torch.no_grad()
def _measure(model: Any, dataset: Any, batch_size: int, segment_size: int, description: str | None, forward: str) -> Perplexity:
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
    if head is None:
        raise LemoError(f"perplexity needs a language-model head; {type(causal_lm).__name__} has none; load a causal model")
    device = next(model.parameters()).device
    sums: list[float] = []
    counts: list[int] = []
    starts = range(0, len(dataset), batch_size)
    with evaluation_mode(model):
        for start in tqdm(starts, desc=description, disable=description is None, leave=False):
            samples = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            batch, targets = _batch(samples, device)
            lengths = _documents(batch, targets)
            hidden = decoder(**batch, use_cache=False).last_hidden_state.flatten(0, 1)
            losses = _token_losses(hidden, targets.flatten(), head, segment_size)
            counted = targets.flatten() != IGNORE_INDEX
            for first, length in lengths:
                document = slice(first, first + length)
                sums.append(float(losses[document].sum(dtype=torch.float64)))
                counts.append(int(counted[document].sum()))
    kept = [(nll, count) for nll, count in zip(sums, counts, strict=True) if count]
    if not kept:
        raise LemoError(f"no token to predict; {len(dataset)} samples; give samples with labels and at least 2 tokens")
    if not all(math.isfinite(nll) for nll, _ in kept):
        place = next(index for index, (nll, _) in enumerate(kept) if not math.isfinite(nll))
        raise LemoError(
            f"loss is not finite; {kept[place][0]} in document {place}; check the weights, or load an earlier checkpoint"
        )
    return Perplexity(tuple(nll for nll, _ in kept), tuple(count for _, count in kept), forward)


def _batch(samples: Sequence[Any], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs and the token that each position predicts, `(batch, seq_len)`, -100 where none."""
    rows = [{name: torch.as_tensor(sample[name]) for name in _COLUMNS if name in sample} for sample in samples]
    for row in rows:
        row.setdefault("labels", row["input_ids"])
    longest = max(row["input_ids"].shape[0] for row in rows)
    ragged = any(row["input_ids"].shape[0] < longest for row in rows)
    if ragged and any("position_ids" in row for row in rows):
        raise LemoError(f"packed samples of different lengths cannot share a batch; batch_size={len(rows)}; set batch_size to 1")
    if ragged:
        for row in rows:
            row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    columns = {
        name: torch.stack([F.pad(row[name], (0, longest - row[name].shape[0]), value=_COLUMNS[name]) for row in rows]).to(device)
        for name in rows[0]
    }
    targets = F.pad(columns.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
    if "attention_mask" in columns:
        targets = targets.masked_fill(columns["attention_mask"] == 0, IGNORE_INDEX)
    return columns, targets


# Column of a sample -> what pads it.
_COLUMNS = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0, "position_ids": 0}


def _documents(batch: dict[str, Tensor], targets: Tensor) -> list[tuple[int, int]]:
    """First flat row and length of each document; marks in `targets` that a document's last token predicts nothing."""
    batch_size, seq_len = batch["input_ids"].shape
    found = find_documents(
        batch_size,
        seq_len,
        block_size=1,  # documents are wanted here, not blocks
        device=targets.device,
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
    )
    last = [start + length - 1 for start, length in zip(found.starts, found.lengths, strict=True)]
    targets.view(-1)[torch.tensor(last, dtype=torch.long, device=targets.device)] = IGNORE_INDEX
    return list(zip(found.starts, found.lengths, strict=True))


def _token_losses(hidden: Tensor, targets: Tensor, head: nn.Module, segment_size: int) -> Tensor:
    """Negative log-likelihood of each row's target, `(rows,)` float32; 0 where there is none."""
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    for rows in (targets != IGNORE_INDEX).nonzero().squeeze(1).split(segment_size):
        logits = head(hidden.index_select(0, rows)).float()
        losses[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
    return losses


def paired_difference(reference: Perplexity, other: Perplexity, confidence: float = 0.95) -> PairedDifference:
    """Relative difference in perplexity of `other` to `reference` over the same documents, with its confidence interval.

    Args:
        reference: What is compared with.
        other: What is compared.
        confidence: Coverage of the interval, fraction in (0, 1).

    Raises:
        LemoError: If the documents differ, or there are fewer than 2.
    """
    if reference.token_counts != other.token_counts:
        raise LemoError(
            f"perplexities of different documents cannot be paired; {len(reference.token_counts)} documents of "
            f"{reference.tokens} tokens and {len(other.token_counts)} of {other.tokens}; measure both on the same data"
        )
    documents = len(reference.token_counts)
    if documents < 2:
        raise LemoError(f"an interval needs at least 2 documents; got {documents}; give more held-out text")
    differences = [mine - base for base, mine in zip(reference.nll_sums, other.nll_sums, strict=True)]
    mean = math.fsum(differences) / reference.tokens
    squares = math.fsum((d - t * mean) ** 2 for d, t in zip(differences, reference.token_counts, strict=True))
    error = math.sqrt(documents / (documents - 1) * squares) / reference.tokens
    reach = student_t_quantile((1 + confidence) / 2, documents - 1) * error
    low, percent, high = (100 * math.expm1(value) for value in (mean - reach, mean, mean + reach))
    return PairedDifference(percent, low, high, confidence, documents)


def student_t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` degrees of freedom stays below with `probability`.

    By bisection of the closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        probability: Fraction in (0, 1).
        degrees: At least 1.
    """
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _student_t_within(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _student_t_within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_t_within(value: float, degrees: int) -> float:
    """Probability that |t| is below `value`."""
    angle = math.atan(value / math.sqrt(degrees))
    square = math.cos(angle) ** 2
    term = total = 1.0 if degrees % 2 == 0 else math.cos(angle)
    for step in range(degrees % 2 + 2, degrees - 1, 2):
        term *= square * (step - 1) / step
        total += term
    if degrees % 2 == 0:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))
