"""The embedded base model's tokenizer and its rows of tokens, for training and for held-out evaluation."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import LemoError
from ..text_data import TextDocument
from .renaming import DocumentRenaming

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(documents: list[TextDocument], vocab_size: int, context_length: int) -> Any:
    """Trains byte-level BPE; `<|endoftext|>` is both bos and eos, standing between documents, and pad is distinct."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


class TokenStream:
    """Rows of training tokens, a pure function of (seed, row number), so that a step alone says where to resume.

    Each epoch permutes the documents, lays them end to end, drops a random number of leading tokens and visits the
    rows of `context_length + 1` tokens (inputs and the targets beside them) in random order. Renamed documents have other
    lengths: an epoch has the rows of the documents as they are, and leaves tokens out at its end or begins again.
    """

    def __init__(
        self, documents: list[list[int]], context_length: int, seed: int, renaming: DocumentRenaming | None = None
    ) -> None:
        self.documents = [torch.tensor(document, dtype=torch.int32) for document in documents]
        self.context_length = context_length
        self.seed = seed
        self.renaming = renaming
        tokens = sum(map(len, documents))
        # One row fewer than would fit, which leaves room for any offset below context_length.
        self.rows_per_epoch = (tokens - 1) // context_length - 1
        if self.rows_per_epoch < 1:
            raise LemoError(f"too little text for context_length {context_length}; {tokens} tokens; give more text")
        self._epoch = -1
        self._rows = torch.empty(0)

    def _cut(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.documents), generator=generator).tolist()
        renamed = {} if self.renaming is None else self.renaming.renamed(epoch)
        others = {index: torch.tensor(ids, dtype=torch.int32) for index, ids in renamed.items()}
        stream = torch.cat([others.get(index, self.documents[index]) for index in order])
        offset = int(torch.randint(self.context_length, (1,), generator=generator))
        needed = offset + self.rows_per_epoch * self.context_length + 1
        while len(stream) < needed:
            stream = torch.cat([stream, stream])
        used = stream[offset:needed]
        rows = used.unfold(0, self.context_length + 1, self.context_length)
        return rows[torch.randperm(self.rows_per_epoch, generator=generator)]

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count` of the endless stream, int64 `(count, context_length + 1)`."""
        parts = []
        for number in range(first, first + count):
            epoch, row = divmod(number, self.rows_per_epoch)
            if epoch != self._epoch:
                self._epoch, self._rows = epoch, self._cut(epoch)
            parts.append(self._rows[row])
        return torch.stack(parts).long()


def held_out_rows(documents: list[list[int]], context_length: int) -> torch.Tensor:
    """Windows of held-out documents, int64 `(rows, context_length + 1)`, padded at the right with -100."""
    rows = []
    for document in documents:
        for start in range(0, len(document) - 1, context_length):
            window = torch.full((context_length + 1,), -100)
            piece = torch.tensor(document[start : start + context_length + 1])
            window[: len(piece)] = piece
            rows.append(window)
    return torch.stack(rows)
