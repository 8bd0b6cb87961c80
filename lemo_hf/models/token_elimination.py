"""The choice of kept blocks, and the movement of kept rows (LeMo paper, sections 4.1 and 5.1).

A `Selection` is the one value that the rest of the layer sees: flat sorted rows and how many of them each document kept.
Nothing else knows how they were chosen.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .documents import Documents
from .kernel_switch import kernel
from .lemo_config import LemoConfig, LemoConfigError


@dataclass(frozen=True)
class Selection:
    """Which rows of a flattened batch a layer computes on.

    Args:
        kept_rows: Flat rows kept, `(kept,)`, sorted.
        rest_rows: Flat rows of the other real tokens, `(rest,)`, sorted; padding is in neither.
        kept_lengths: Kept rows of each document.
        kept_blocks: Whether each block of the batch is kept, `(blocks,)`.
        real_kept, real_rest: The same rows as positions in the list of real rows.
        mlp_kept, mlp_rest: Places in the list of kept rows of those that the MLP keeps, `(mlp,)`, sorted, and of the others;
            `None` if it keeps them all.
    """

    kept_rows: Tensor
    rest_rows: Tensor
    kept_lengths: list[int]
    kept_blocks: Tensor
    real_kept: Tensor
    real_rest: Tensor
    mlp_kept: Tensor | None = None
    mlp_rest: Tensor | None = None

    @property
    def kept_share(self) -> float:
        """Kept rows over real rows, in [0, 1]."""
        kept = self.kept_rows.numel()
        return kept / max(1, kept + self.rest_rows.numel())


def selection_of_blocks(kept_blocks: Tensor, documents: Documents, kept_lengths: list[int] | None = None) -> Selection:
    """The `Selection` that keeps exactly the marked blocks.

    Args:
        kept_blocks: Marks over all documents' blocks, `(blocks,)` bool.
        documents: The batch's documents.
        kept_lengths: Kept rows of each document if the host knows them (every mode but thresholds): then nothing is
            transferred to it and all shapes are static.
    """
    kept_of_row = kept_blocks[documents.block_of_row]
    if kept_lengths is None:
        kept_lengths = torch.stack([part.sum() for part in kept_of_row.split(documents.lengths)]).tolist()
    kept = sum(kept_lengths)
    real_kept = torch.nonzero_static(kept_of_row, size=kept).squeeze(1)
    real_rest = torch.nonzero_static(~kept_of_row, size=sum(documents.lengths) - kept).squeeze(1)
    if documents.has_no_padding:
        return Selection(real_kept, real_rest, kept_lengths, kept_blocks, real_kept, real_rest)
    rows = documents.rows
    return Selection(rows[real_kept], rows[real_rest], kept_lengths, kept_blocks, real_kept, real_rest)


def with_mlp_blocks(selection: Selection, mlp_blocks: Tensor, documents: Documents, count: int) -> Selection:
    """The same rows, the MLP keeping fewer of them.

    Args:
        selection: The layer's rows.
        mlp_blocks: Marks of blocks, all of them kept ones, `(blocks,)` bool.
        documents: The batch's documents.
        count: Rows of the marked blocks.
    """
    marks = mlp_blocks[documents.block_of_row[selection.real_kept]]
    kept = torch.nonzero_static(marks, size=count).squeeze(1)
    rest = torch.nonzero_static(~marks, size=len(marks) - count).squeeze(1)
    return replace(selection, mlp_kept=kept, mlp_rest=rest)


def keep_everything(documents: Documents) -> Selection:
    """The `Selection` of a dense layer."""
    marks = torch.ones(sum(documents.block_counts), dtype=torch.bool, device=documents.device)
    return selection_of_blocks(marks, documents, documents.lengths)


def kept_block_count(blocks: int, ratio: float) -> int:
    """Blocks kept of a document of `blocks` at a ratio: ceil(ratio * blocks), first and last among them."""
    # 0.1 * 30 is 3.0000000000000004 in binary; a kept block must not hang on that.
    wanted = -(-round(ratio * blocks * 2**20) // 2**20)
    return min(blocks, max(wanted, min(blocks, 2)))


def choose_blocks(
    informativeness: list[Tensor] | None, documents: Documents, config: LemoConfig, layer: int, draw: int
) -> Selection:
    """Chooses the blocks that a layer keeps. The first block (attention sink) and the last one always are.

    Args:
        informativeness: I of each document's blocks, `(blocks_of_document,)` each; `None` for the uniform draw.
        documents: The batch's documents.
        config: Mode, ratios or threshold, temperature, seed.
        layer: Layer index; draws depend on it where the config says `draws="by_layer"`.
        draw: Number of the training forward; it makes each step's draw another one, and a recomputed or resumed step's the same.
    """
    if config.selection == "threshold":
        if config.thresholds is None:
            raise LemoConfigError(
                "selection='threshold' needs thresholds; got none; run the calibrate phase (LemoTrainer does) or set them"
            )
        assert informativeness is not None, "thresholds are compared with scores"
        marks = [_always_kept(scores.float() >= config.thresholds[layer]) for scores in informativeness]
        selection = selection_of_blocks(torch.cat(marks), documents)
        if config.mlp_keep_ratio is None:
            return selection
        weights = [scores.float() for scores in informativeness]
        counts = _kept_counts(documents, selection.kept_lengths)  # not asked of the device a second time
        return _with_mlp_share(selection, weights, counts, documents, config.mlp_keep_ratio)
    counts = [kept_block_count(blocks, config.ratio_of(layer)) for blocks in documents.block_counts]
    weights = []
    for index, blocks in enumerate(documents.block_counts):
        scores = None if informativeness is None else informativeness[index].float()
        if config.selection == "sampled":
            scores = _perturbed(scores, blocks, config, layer, draw, documents.keys[index])
        assert scores is not None, "the most informative blocks need scores"
        weights.append(scores)
    marks = [_best_blocks(scores, count) for scores, count in zip(weights, counts, strict=True)]
    selection = selection_of_blocks(torch.cat(marks), documents, _kept_lengths(documents, counts))
    if config.mlp_keep_ratio is None:
        return selection
    return _with_mlp_share(selection, weights, counts, documents, config.mlp_keep_ratio)


def _with_mlp_share(
    selection: Selection, weights: list[Tensor], counts: list[int], documents: Documents, ratio: float
) -> Selection:
    """The best blocks by the same scores, of each document at most the `counts` that are kept."""
    wanted = [kept_block_count(blocks, ratio) for blocks in documents.block_counts]
    mlp_counts = [min(kept, count) for kept, count in zip(counts, wanted, strict=True)]
    if mlp_counts == counts:
        return selection
    marks = [_best_blocks(scores, count) for scores, count in zip(weights, mlp_counts, strict=True)]
    return with_mlp_blocks(selection, torch.cat(marks), documents, sum(_kept_lengths(documents, mlp_counts)))


def _kept_lengths(documents: Documents, counts: list[int]) -> list[int]:
    # All blocks but the last, which is always kept, are full: the host knows the number of kept rows without asking.
    sizes = zip(documents.lengths, documents.block_counts, counts, strict=True)
    return [length - (blocks - count) * documents.block_size for length, blocks, count in sizes]


def _kept_counts(documents: Documents, kept_lengths: list[int]) -> list[int]:
    """Kept blocks of each document: undoes `_kept_lengths`."""
    sizes = zip(documents.lengths, documents.block_counts, kept_lengths, strict=True)
    return [blocks - (length - kept) // documents.block_size for length, blocks, kept in sizes]


def _always_kept(marks: Tensor) -> Tensor:
    marks[0] = marks[-1] = True
    return marks


def _best_blocks(scores: Tensor, count: int) -> Tensor:
    # First and last are chosen before the others, so that they count towards the ratio.
    forced = scores.clone()
    forced[0] = forced[-1] = torch.inf
    # A stable sort: tied scores (bf16 models tie often) resolve to the earlier block, the same in every run.
    order = forced.sort(descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order[:count], True)


def _perturbed(scores: Tensor | None, blocks: int, config: LemoConfig, layer: int, draw: int, key: Tensor) -> Tensor:
    # Gumbel top-k: the k largest of log-weight + Gumbel noise are a draw of k without replacement by weight.
    counters = (config.seed, draw, layer) if config.draws == "by_layer" else (config.seed, draw)
    uniform = _uniform(key, counters, torch.arange(blocks, device=key.device))
    noise = -(-uniform.log()).log()
    if scores is None or config.sampling_temperature is None:
        return noise
    return scores.double().clamp_min(1e-30).log() / config.sampling_temperature + noise


def _uniform(key: Tensor, counters: tuple[int, ...], index: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) that are a function of their arguments alone: the same on every device, in every rank, in a
    recomputed and in a resumed step, without a generator's state. SplitMix64's finaliser over the chained counters.
    """
    state = key
    # Written by the device itself: a number that is copied there makes the host wait.
    numbers = [torch.full((), counter, dtype=torch.int64, device=key.device) for counter in counters]
    for number in (*numbers, index):
        state = _mix(state ^ _mix(number))
    return ((state >> 11) & (2**53 - 1)).double().add_(0.5) * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    # int64 multiplication wraps; >> is arithmetic, so the bits it shifts in are masked off.
    state = state + -0x61C8864680B583EB
    state = (state ^ ((state >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    state = (state ^ ((state >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return state ^ ((state >> 31) & (2**33 - 1))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = hidden_states.shape[0]
        return hidden_states.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        # Each row is gathered once, so its gradient is copied to its place; nothing is summed.
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, rows, grad), None


def gather_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Copies distinct rows of the residual stream: `(rows, hidden)` from `(all_rows, hidden)`. Saves the index only."""
    if hidden_states.dim() == 2 and not (torch.is_grad_enabled() and hidden_states.requires_grad):
        take_rows = kernel("take_rows", hidden_states, hidden_states.shape[1])
        if take_rows is not None:
            return take_rows(hidden_states, rows)[0]
    return _GatherRows.apply(hidden_states, rows)


class _MergeRows(torch.autograd.Function):
    """residual with kept and rest rows replaced; only kept rows carry gradient through the layer."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, kept: Tensor, kept_rows: Tensor, rest: Tensor | None, rest_rows: Tensor) -> Tensor:
        ctx.save_for_backward(kept_rows)
        # Out of place: the layer's input may be a leaf, a checkpoint's stored input or a recorded hidden state.
        merged = residual.clone()
        merged.index_copy_(0, kept_rows, kept)
        if rest is not None:
            merged.index_copy_(0, rest_rows, rest)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept_rows,) = ctx.saved_tensors
        grad_kept = grad.index_select(0, kept_rows)
        # The rest rows pass the layer by on the residual stream: their gradient is untouched.
        return grad.index_fill(0, kept_rows, 0), grad_kept, None, None, None


def merge_rows(residual: Tensor, kept: Tensor, rest: Tensor | None, selection: Selection) -> Tensor:
    """Writes a layer's results back into the residual stream.

    Args:
        residual: The layer's input, `(all_rows, hidden)`; not modified.
        kept: New values of the kept rows, `(kept, hidden)`; they carry gradient.
        rest: New values of the other real rows, `(rest, hidden)`, without gradient, or `None` if they do not change.
        selection: The rows.

    Returns:
        `(all_rows, hidden)`. A rest row's gradient is that of the residual alone, as if its update were a constant.
    """
    return _MergeRows.apply(residual, kept, selection.kept_rows, rest, selection.rest_rows)
