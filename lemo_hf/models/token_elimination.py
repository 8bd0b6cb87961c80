"""Documents, the choice of kept blocks, and the movement of kept rows (LeMo paper, sections 4.1 and 5.1).

A batch of B samples of N tokens is treated as B * N flat rows. A *document* is a sample, or one of several packed into a row;
its block grid starts at its first real token, so it chooses the same blocks alone, padded on either side, batched or packed.
A `Selection` is the one value that the rest of the layer sees: flat sorted rows and how many of them each document kept.
Nothing else knows how they were chosen.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lemo_config import LemoConfig, LemoConfigError

# Odd 61-bit constants that spread consecutive keys, layers and draws over the generator's seeds.
_SPREAD = (0x9E3779B97F4A7C15 >> 3, 0xBF58476D1CE4E5B9 >> 3, 0x94D049BB133111EB >> 3)
_SEED_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class Documents:
    """Where the documents of a flattened batch lie.

    Args:
        starts: First flat row of each document.
        lengths: Tokens of each document.
        keys: A number per document that depends on its own tokens only; `"sampled"` draws are seeded by it, so that a
            document draws the same wherever it stands in a batch.
        block_size: Tokens per block.
        num_rows: Rows of the flattened batch, padding included.
        device: Device of the index tensors.
    """

    starts: list[int]
    lengths: list[int]
    keys: list[int]
    block_size: int
    num_rows: int
    device: torch.device

    @cached_property
    def block_counts(self) -> list[int]:
        """Blocks of each document."""
        return [-(-length // self.block_size) for length in self.lengths]

    @cached_property
    def cu_seqlens(self) -> list[int]:
        """Ends of the documents in the list of real rows, after a leading 0."""
        return [0, *accumulate(self.lengths)]

    @cached_property
    def rows(self) -> Tensor:
        """Flat rows of all real tokens, `(real_rows,)`, sorted."""
        spans = [torch.arange(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        return torch.cat(spans).to(self.device)

    @cached_property
    def block_of_row(self) -> Tensor:
        """Index, over all documents' blocks, of every real row's block, `(real_rows,)`."""
        offsets = [0, *accumulate(self.block_counts)]
        spans = [
            torch.arange(length) // self.block_size + offset
            for length, offset in zip(self.lengths, offsets, strict=False)
        ]
        return torch.cat(spans).to(self.device)

    def split_blocks(self, per_block: Tensor) -> list[Tensor]:
        """Splits a tensor over all blocks `(blocks, ...)` into one per document."""
        return list(per_block.split(self.block_counts))


def find_documents(
    batch_size: int,
    seq_len: int,
    block_size: int,
    device: torch.device,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Documents:
    """Finds the documents of a batch, with one transfer to the host.

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
        LemoConfigError: If the attention mask is not two-dimensional.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise LemoConfigError(
            f"LeMo trains on causal attention with a (batch, seq_len) padding mask; got a mask of shape {tuple(attention_mask.shape)}; "
            "pass the padding mask, or train with enabled=False"
        )
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
    starts = starts_here.view(-1).nonzero().squeeze(1)
    # A document's real rows are contiguous: its length is the number of real rows up to the next start.
    real_before = real.view(-1).long().cumsum(0)
    first = real_before[starts] - 1
    lengths = torch.diff(first, append=real_before[-1:])
    if input_ids is None:
        keys = lengths
    else:
        # A token's weight depends on its place in the document, so a permutation has another key; int64 wraps around.
        place = torch.arange(starts.numel(), device=device).repeat_interleave(lengths)
        rows = real.view(-1).nonzero().squeeze(1)
        offset = rows - starts[place]
        terms = (input_ids.reshape(-1)[rows] + 1) * (offset * 0x2545F491 + 0x9E3779B1)
        keys = torch.zeros_like(lengths).index_add_(0, place, terms)
    table = torch.stack((starts, lengths, keys)).tolist()
    return Documents(table[0], table[1], table[2], block_size, batch_size * seq_len, device)


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


def selection_of_blocks(kept_blocks: Tensor, documents: Documents) -> Selection:
    """The `Selection` that keeps exactly the blocks marked in `kept_blocks`, `(blocks,)` bool over all documents."""
    kept_of_row = kept_blocks[documents.block_of_row]
    real_kept = kept_of_row.nonzero().squeeze(1)
    real_rest = (~kept_of_row).nonzero().squeeze(1)
    kept_lengths = [int(part.sum()) for part in kept_of_row.split(documents.lengths)]
    rows = documents.rows
    return Selection(rows[real_kept], rows[real_rest], kept_lengths, kept_blocks, real_kept, real_rest)


def keep_everything(documents: Documents) -> Selection:
    """The `Selection` of a dense layer."""
    return selection_of_blocks(torch.ones(sum(documents.block_counts), dtype=torch.bool, device=documents.device), documents)


def kept_block_count(blocks: int, ratio: float) -> int:
    """Blocks kept of a document of `blocks` at a ratio: ceil(ratio * blocks), first and last among them."""
    # 0.1 * 30 is 3.0000000000000004 in binary; a kept block must not hang on that.
    wanted = -(-round(ratio * blocks * 2**20) // 2**20)
    return min(blocks, max(wanted, min(blocks, 2)))


def choose_blocks(
    informativeness: list[Tensor] | None, documents: Documents, config: LemoConfig, layer: int, draw: int
) -> Tensor:
    """Marks the blocks that a layer keeps. The first block (attention sink) and the last one always are.

    Args:
        informativeness: I of each document's blocks, `(blocks_of_document,)` each; `None` for the uniform draw.
        documents: The batch's documents.
        config: Mode, ratio or threshold, temperature, seed.
        layer: Layer index.
        draw: Number of the training forward; it makes each step's draw another one, and a recomputed or resumed step's the same.

    Returns:
        `(blocks,)` bool over all documents.
    """
    marks = []
    for index, blocks in enumerate(documents.block_counts):
        scores = None if informativeness is None else informativeness[index].float()
        if config.selection == "threshold":
            if config.thresholds is None:
                raise LemoConfigError(
                    "selection='threshold' needs thresholds; got none; run the calibrate phase (LemoTrainer does) or set them"
                )
            kept = scores >= config.thresholds[layer]
        else:
            if config.selection == "sampled":
                scores = _perturbed(scores, blocks, config, layer, draw, documents.keys[index]).to(documents.device)
            kept = _best_blocks(scores, kept_block_count(blocks, config.ratio_of(layer)))
        kept[0] = kept[-1] = True
        marks.append(kept)
    return torch.cat(marks)


def _best_blocks(scores: Tensor, count: int) -> Tensor:
    # First and last are chosen before the others, so that they count towards the ratio.
    forced = scores.clone()
    forced[0] = forced[-1] = torch.inf
    # A stable sort: tied scores (bf16 models tie often) resolve to the earlier block, the same in every run.
    order = forced.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def _perturbed(scores: Tensor | None, blocks: int, config: LemoConfig, layer: int, draw: int, key: int) -> Tensor:
    # Gumbel top-k: the k largest of log-weight + Gumbel noise are a draw of k without replacement by weight.
    seed = sum(part * spread for part, spread in zip((draw, layer, config.seed), _SPREAD, strict=True)) ^ key
    generator = torch.Generator().manual_seed(seed & _SEED_MASK)
    uniform = torch.rand(blocks, generator=generator, dtype=torch.float64).clamp_min_(1e-300)
    noise = -(-uniform.log()).clamp_min(1e-300).log()
    if scores is None or config.sampling_temperature is None:
        return noise
    return scores.double().cpu().clamp_min(1e-30).log() / config.sampling_temperature + noise


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = hidden_states.shape[0]
        return hidden_states.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        # Each row is gathered once, so its gradient is copied to its place; nothing is summed.
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, rows, grad), None


def gather_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Copies distinct rows of the residual stream: `(rows, hidden)` from `(all_rows, hidden)`. Saves the index only."""
    return _GatherRows.apply(hidden_states, rows)


class _MergeRows(torch.autograd.Function):
    """residual with kept and rest rows replaced; only kept rows carry gradient through the layer."""

    @staticmethod
    def forward(ctx, residual: Tensor, kept: Tensor, kept_rows: Tensor, rest: Tensor | None, rest_rows: Tensor) -> Tensor:
        ctx.save_for_backward(kept_rows)
        # Out of place: the layer's input may be a leaf, a checkpoint's stored input or a recorded hidden state.
        merged = residual.clone()
        merged.index_copy_(0, kept_rows, kept)
        if rest is not None:
            merged.index_copy_(0, rest_rows, rest)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
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
