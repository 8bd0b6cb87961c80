"""Documents, the choice of kept blocks, and the movement of kept rows (LeMo paper, sections 4.1 and 5.1).

A batch of B samples of N tokens is treated as B * N flat rows. A *document* is a sample, or one of several packed into a row;
its block grid starts at its first real token, so it chooses the same blocks alone, padded on either side, batched or packed.
A `Selection` is the one value that the rest of the layer sees: flat sorted rows and how many of them each document kept.
Nothing else knows how they were chosen.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_switch import kernel
from .lemo_config import LemoConfig, LemoConfigError


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flattened batch lie.

    Args:
        starts: First flat row of each document.
        lengths: Tokens of each document.
        keys: A number per document, `(documents,)` int64, that depends on its own tokens only; `"sampled"` draws are seeded by
            it, so that a document draws the same wherever it stands in a batch.
        block_size: Tokens per block.
        num_rows: Rows of the flattened batch, padding included.
        device: Device of the index tensors.
    """

    starts: list[int]
    lengths: list[int]
    keys: Tensor
    block_size: int
    num_rows: int
    device: torch.device

    @cached_property
    def block_counts(self) -> list[int]:
        """Blocks of each document."""
        return [-(-length // self.block_size) for length in self.lengths]

    @property
    def has_no_padding(self) -> bool:
        """Whether every row of the batch is a token of some document."""
        return sum(self.lengths) == self.num_rows

    @cached_property
    def rows(self) -> Tensor:
        """Flat rows of all real tokens, `(real_rows,)`, sorted."""
        if self.has_no_padding:
            return torch.arange(self.num_rows, device=self.device)
        spans = [torch.arange(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        return torch.cat(spans).to(self.device)

    @cached_property
    def block_of_row(self) -> Tensor:
        """Index, over all documents' blocks, of every real row's block, `(real_rows,)`."""
        offsets = [0, *accumulate(self.block_counts)]
        spans = [torch.arange(length) // self.block_size + offset for length, offset in zip(self.lengths, offsets, strict=False)]
        return torch.cat(spans).to(self.device)

    @cached_property
    def place_of_row(self) -> Tensor:
        """Place in its document of every real row, from 0, `(real_rows,)`: what sliding windows are measured by."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)

    @cached_property
    def block_spans(self) -> tuple[Tensor, Tensor]:
        """First flat row and number of tokens of every block, `(blocks,)` int64 and int32."""
        size, spans = self.block_size, list(zip(self.starts, self.lengths, strict=True))
        firsts = [torch.arange(start, start + length, size) for start, length in spans]
        lengths = [(length - torch.arange(0, length, size)).clamp_max(size) for _, length in spans]
        return torch.cat(firsts).to(self.device), torch.cat(lengths).int().to(self.device)

    def split_blocks(self, per_block: Tensor) -> list[Tensor]:
        """Splits a tensor over all blocks `(blocks, ...)` into one per document."""
        return list(per_block.split(self.block_counts))


def find_documents(
    batch_size: int,
    seq_len: int,
    block_size: int,
    device: torch.device,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Documents:
    """Finds the documents of a batch: with one transfer to the host, or none for a batch of whole rows.

    Boundaries are row starts, the first real token after padding, a step of `position_ids` other than +1 (as `transformers`
    reads packed rows), a change of `seq_idx`, and the entries of `cu_seq_lens`.

    Args:
        batch_size, seq_len: Shape of the batch.
        block_size: Tokens per block.
        device: Device of the batch.
        input_ids: `(batch, seq_len)`; without them a document's draw key is its length.
        attention_mask: `(batch, seq_len)`, zero at padding.
        position_ids: `(batch or 1, seq_len)`.
        seq_idx: `(batch, seq_len)` document numbers of packed rows.
        cu_seq_lens: `(documents + 1,)` cumulated lengths over the flattened batch.

    Returns:
        `Documents`; there may be none if every token is padding.

    Raises:
        LemoConfigError: If the attention mask is no padding mask of this batch, or has padding within a document.
    """
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch_size, seq_len)):
        found = f"of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise LemoConfigError(
            f"LeMo trains on causal attention with a padding mask of shape {(batch_size, seq_len)}, (batch, seq_len); got a mask {found}; "
            "pass the padding mask, or train with enabled=False"
        )
    if attention_mask is None and position_ids is None and seq_idx is None and cu_seq_lens is None:
        starts, lengths = [row * seq_len for row in range(batch_size)], [seq_len] * batch_size
        places = torch.arange(seq_len, device=device)
        keys = _document_keys(input_ids, places.repeat(batch_size), starts, lengths, device)
        return Documents(starts, lengths, keys, block_size, batch_size * seq_len, device)
    shape = (batch_size, seq_len)
    starts_here = torch.zeros(shape, dtype=torch.bool, device=device)
    starts_here[:, 0] = True
    if position_ids is not None:
        starts_here[:, 1:] |= (position_ids[:, 1:] - position_ids[:, :-1] != 1).expand(batch_size, -1)
    if seq_idx is not None:
        starts_here[:, 1:] |= (seq_idx[:, 1:] != seq_idx[:, :-1]).expand(batch_size, -1)
    if cu_seq_lens is not None:
        inner = cu_seq_lens[cu_seq_lens < batch_size * seq_len].long()
        starts_here.view(-1)[inner] = True
    if attention_mask is None:
        real = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        real = attention_mask.bool()
        starts_here[:, 1:] |= real[:, 1:] & ~real[:, :-1]
    starts_here &= real
    first_rows = starts_here.view(-1).nonzero().squeeze(1)
    # A document's real rows are contiguous: its length is the number of real rows up to the next start.
    real_before = real.view(-1).long().cumsum(0)
    counts = torch.diff(real_before[first_rows] - 1, append=real_before[-1:])
    starts, lengths = torch.stack((first_rows, counts)).tolist()
    if seq_idx is None and cu_seq_lens is None:
        _refuse_holes(starts, lengths, seq_len, None if position_ids is None else position_ids.expand(batch_size, -1).flatten())
    real_rows = real.view(-1).nonzero().squeeze(1)
    places = real_rows - first_rows.repeat_interleave(counts)
    tokens = None if input_ids is None else input_ids.reshape(-1)[real_rows]
    keys = _document_keys(tokens, places, starts, lengths, device)
    return Documents(starts, lengths, keys, block_size, batch_size * seq_len, device)


def _refuse_holes(starts: list[int], lengths: list[int], seq_len: int, positions: Tensor | None) -> None:
    # Between documents of one row padding may lie, within one it may not: the stock model lets tokens behind a hole attend to
    # those before it; as two documents they would not. Positions that count on say that it is one.
    lasts = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
    holes = [
        (last, after)
        for last, after in zip(lasts, starts[1:], strict=False)
        if last // seq_len == after // seq_len and after > last + 1
    ]
    if holes and positions is not None:
        before, behind = positions[torch.tensor(holes, device=positions.device).T]
        holes = [hole for hole, counts_on in zip(holes, (behind > before).tolist(), strict=True) if counts_on]
    if holes:
        raise LemoConfigError(
            f"the attention mask may pad a row's ends only; got padding between the tokens of row {holes[0][0] // seq_len}; "
            "give position_ids that start anew at each document, or train with enabled=False"
        )


def _document_keys(tokens: Tensor | None, places: Tensor, starts: list[int], lengths: list[int], device: torch.device) -> Tensor:
    if tokens is None:
        return torch.tensor(lengths, dtype=torch.int64, device=device)
    # A token's weight depends on its place in the document, so a permutation has another key; int64 wraps around.
    terms = (tokens.reshape(-1) + 1) * (places * 0x2545F491 + 0x9E3779B1)
    return torch.stack([part.sum() for part in terms.split(lengths)]) if starts else terms


@dataclass(frozen=True)
class Selection:
    """Which rows of a flattened batch a layer computes on.

    Args:
        kept_rows: Flat rows kept, `(kept,)`, sorted.
        rest_rows: Flat rows of the other real tokens, `(rest,)`, sorted; padding is in neither.
        kept_lengths: Kept rows of each document.
        kept_blocks: Whether each block of the batch is kept, `(blocks,)`.
        real_kept, real_rest: The same rows as positions in the list of real rows.
    """

    kept_rows: Tensor
    rest_rows: Tensor
    kept_lengths: list[int]
    kept_blocks: Tensor
    real_kept: Tensor
    real_rest: Tensor

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
        config: Mode, ratio or threshold, temperature, seed.
        layer: Layer index.
        draw: Number of the training forward; it makes each step's draw another one, and a recomputed or resumed step's the same.
    """
    if config.selection == "threshold":
        if config.thresholds is None:
            raise LemoConfigError(
                "selection='threshold' needs thresholds; got none; run the calibrate phase (LemoTrainer does) or set them"
            )
        assert informativeness is not None, "thresholds are compared with scores"
        marks = [_always_kept(scores.float() >= config.thresholds[layer]) for scores in informativeness]
        return selection_of_blocks(torch.cat(marks), documents)
    counts = [kept_block_count(blocks, config.ratio_of(layer)) for blocks in documents.block_counts]
    marks = []
    for index, blocks in enumerate(documents.block_counts):
        weights = None if informativeness is None else informativeness[index].float()
        if config.selection == "sampled":
            weights = _perturbed(weights, blocks, config, layer, draw, documents.keys[index])
        assert weights is not None, "the most informative blocks need scores"
        marks.append(_best_blocks(weights, counts[index]))
    # All blocks but the last, which is always kept, are full: the host knows the number of kept rows without asking.
    sizes = zip(documents.lengths, documents.block_counts, counts, strict=True)
    kept_lengths = [length - (blocks - count) * documents.block_size for length, blocks, count in sizes]
    return selection_of_blocks(torch.cat(marks), documents, kept_lengths)


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
    uniform = _uniform(key, (config.seed, draw, layer), torch.arange(blocks, device=key.device))
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
