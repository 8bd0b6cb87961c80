"""Attention patterns by their definitions, one row at a time."""

import torch
from torch import Tensor

from lemo_hf.models.block_pair_attention import BlockPairs


def same_document(lengths: list[int]) -> Tensor:
    """Which rows are of one document, `(rows, rows)`."""
    number = torch.cat([torch.full((length,), place) for place, length in enumerate(lengths)])
    return number[:, None] == number


def groups_by_hand(lengths: list[int], size: int | None, heads: int, shifted_heads: set[int]) -> Tensor:
    """`(heads, rows, rows)`: group numbers of every row by their definition, one row at a time."""
    numbers = torch.zeros(heads, sum(lengths), dtype=torch.long)
    for head in range(heads):
        row = 0
        for length in lengths:
            group = size if size is not None else max(2, -(-length // 4))
            for within in range(length):
                shift = group - group // 2 if head in shifted_heads else 0
                numbers[head, row] = 0 if length <= group else (within + shift) // group
                row += 1
    later = torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).triu(1)
    return (numbers[:, :, None] == numbers[:, None]) & same_document(lengths) & ~later


def rows_by_hand(pairs: BlockPairs) -> Tensor:
    """Pairs of blocks by rows, `(rows, rows)`, causal."""
    block, first = [], 0
    for length in pairs.lengths:
        block += [first + place // pairs.block_size for place in range(length)]
        first += -(-length // pairs.block_size)
    numbers = torch.tensor(block)
    return pairs.marks[numbers][:, numbers] & ~torch.ones(len(block), len(block), dtype=torch.bool).triu(1)
