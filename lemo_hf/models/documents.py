"""The documents of a batch: where they begin and end, whatever says so (LeMo paper, section 4.1).

A batch of B samples of N tokens is treated as B * N flat rows. A *document* is a sample, or one of several packed into a row;
its block grid starts at its first real token, so it chooses the same blocks alone, padded on either side, batched or packed.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .lemo_config import LemoConfigError


class PaddingMaskError(LemoConfigError):
    """The attention mask is no padding mask of the batch, or pads within a document."""


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

    def are_packed(self, batch_size: int) -> bool:
        """Whether a row of the batch holds more than one document."""
        return len({start * batch_size // self.num_rows for start in self.starts}) < len(self.starts)

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

    def positions(self, padding: int) -> Tensor:
        """Every flat row's place in its document, `(num_rows,)` int64, and `padding` where there is none."""
        return self.rows.new_full((self.num_rows,), padding).index_copy_(0, self.rows, self.place_of_row)

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
        PaddingMaskError: If the attention mask is no padding mask of this batch, or has padding within a document.
        LemoConfigError: If positions, numbers or lengths of documents do not belong to this batch.
    """
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch_size, seq_len)):
        found = f"of shape {tuple(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise PaddingMaskError(
            f"LeMo trains on causal attention with a padding mask of shape {(batch_size, seq_len)}, (batch, seq_len); got a mask {found}; "
            "pass the padding mask, or train with enabled=False"
        )
    if attention_mask is None and position_ids is None and seq_idx is None and cu_seq_lens is None:
        starts, lengths = [row * seq_len for row in range(batch_size)], [seq_len] * batch_size
        places = torch.arange(seq_len, device=device)
        keys = _document_keys(input_ids, places.repeat(batch_size), starts, lengths, device)
        return Documents(starts, lengths, keys, block_size, batch_size * seq_len, device)
    shape = (batch_size, seq_len)
    for name, given, allowed in (
        ("position_ids", position_ids, (shape, (1, seq_len))),
        ("seq_idx", seq_idx, (shape,)),
    ):
        if given is not None and tuple(given.shape) not in allowed:
            raise LemoConfigError(
                f"{name} must have the batch's shape {shape}; got {tuple(given.shape)}; give one number per token of the batch"
            )
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
    total = first_rows.new_full((1,), batch_size * seq_len) if cu_seq_lens is None else cu_seq_lens[-1:].to(first_rows)
    *numbers, covered = torch.cat((first_rows, counts, total)).tolist()
    if covered != batch_size * seq_len:
        raise LemoConfigError(
            f"cu_seq_lens must end at the {batch_size * seq_len} tokens of the batch, padding included; got {covered}; "
            "cumulate the lengths of all documents of the flattened batch"
        )
    starts, lengths = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    _refuse_holes(starts, lengths, seq_len, position_ids, seq_idx, cu_seq_lens)
    real_rows = real.view(-1).nonzero().squeeze(1)
    places = real_rows - first_rows.repeat_interleave(counts)
    tokens = None if input_ids is None else input_ids.reshape(-1)[real_rows]
    keys = _document_keys(tokens, places, starts, lengths, device)
    return Documents(starts, lengths, keys, block_size, batch_size * seq_len, device)


def _refuse_holes(
    starts: list[int],
    lengths: list[int],
    seq_len: int,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> None:
    # Between documents of one row padding may lie, within one it may not: the stock model lets tokens behind a hole attend to
    # those before it; as two documents they would not. So something in the batch has to say that they are two.
    lasts = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
    holes = [
        (last, after)
        for last, after in zip(lasts, starts[1:], strict=False)
        if last // seq_len == after // seq_len and after > last + 1
    ]
    if not holes:
        return
    device = next((given.device for given in (position_ids, seq_idx, cu_seq_lens) if given is not None), None)
    last, after = torch.tensor(holes, device=device).T
    apart = torch.zeros(len(holes), dtype=torch.bool, device=device)
    if position_ids is not None:
        size = position_ids.numel()  # one row of them may serve every row of the batch
        # Positions that count on say that it is one.
        apart |= position_ids.flatten()[after % size] <= position_ids.flatten()[last % size]
    if seq_idx is not None:
        apart |= seq_idx.flatten()[last] != seq_idx.flatten()[after]
    if cu_seq_lens is not None:
        ends = cu_seq_lens.long()
        apart |= torch.searchsorted(ends, last, right=True) < torch.searchsorted(ends, after, right=True)
    if not apart.all():
        row = holes[apart.tolist().index(False)][0] // seq_len
        raise PaddingMaskError(
            f"the attention mask may pad a row's ends only; got padding between the tokens of row {row}; "
            "give position_ids that start anew at each document, or train with enabled=False"
        )


def _document_keys(tokens: Tensor | None, places: Tensor, starts: list[int], lengths: list[int], device: torch.device) -> Tensor:
    if tokens is None:
        return torch.tensor(lengths, dtype=torch.int64, device=device)
    # A token's weight depends on its place in the document, so a permutation has another key; int64 wraps around.
    terms = (tokens.reshape(-1) + 1) * (places * 0x2545F491 + 0x9E3779B1)
    return torch.stack([part.sum() for part in terms.split(lengths)]) if starts else terms
