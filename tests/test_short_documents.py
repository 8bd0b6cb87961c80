"""Training sets whose samples are shorter than a block: refused or said by what many of them are, not by the few that are drawn."""

import pytest
import torch
from training_runs import RandomText
from transformers import default_data_collator

from lemo_hf import LemoConfig
from lemo_hf.errors import LemoError
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.training.phases.phase_documents import PhaseDocuments, require_blocks


class Lengths(RandomText):
    """Text whose samples are as long as it is told; they may be padded."""

    def __init__(self, lengths, padded=False):
        super().__init__(samples=len(lengths))
        self.lengths, self.padded = lengths, padded

    def __getitem__(self, index):
        sample = {name: tokens[: self.lengths[index]] for name, tokens in super().__getitem__(index).items()}
        if self.padded:
            sample = {name: torch.nn.functional.pad(tokens, (0, 96 - len(tokens))) for name, tokens in sample.items()}
            sample["attention_mask"] = (torch.arange(96) < self.lengths[index]).long()
        return sample


@pytest.mark.parametrize("padded", [False, True])
def test_a_few_short_documents_do_not_stand_for_all(caplog, padded):
    """The five that the phases draw say little of chat data, in which many samples are shorter than a block."""
    lemo = LemoConfig(block_size=8, selection="ratio", keep_ratio=0.5)

    def looked_at(lengths, collate=default_data_collator):
        caplog.clear()
        documents = PhaseDocuments(Lengths(lengths, padded), collate, seed=0, probes=1, profile=4)
        with caplog.at_level("WARNING", logger="lemo_hf"):
            require_blocks(documents, lemo, 2)
        return caplog.text

    order = PhaseDocuments(Lengths([0] * 300), default_data_collator, seed=0)._order

    def long_at(places):
        return [64 if order.index(index) in places else 5 for index in range(300)]

    text = looked_at(long_at({200}))
    assert "most documents are shorter than one block and are trained densely; 200 of 201 looked at, block_size=8" in text
    assert "50 of 64 looked at" in looked_at(long_at(range(14)))
    assert looked_at(long_at(range(5, 64))) == ""
    with pytest.raises(LemoError, match=r"^seq_len 5 is shorter than one block \(block_size=8\); lower block_size or use longer"):
        looked_at(long_at(()))

    def cut(samples):
        return {name: tokens[:, :6] for name, tokens in default_data_collator(samples).items()}

    # A collator that cuts: what samples say of their lengths is not so.
    with pytest.raises(LemoError, match="seq_len 6 is shorter than one block"):
        looked_at([64] * 20, cut)


def test_of_a_stream_more_is_read_only_while_all_is_short():
    for lengths, read in (([64] * 20, 5), ([5] * 9 + [64] * 11, 10)):
        samples = iter([{name: tokens[:length] for name, tokens in RandomText(1)[0].items()} for length in lengths])
        documents = PhaseDocuments(samples, default_data_collator, seed=0, probes=1, profile=4)
        require_blocks(documents, LemoConfig(block_size=8), 2)
        assert len(documents._read) == read


def test_a_group_is_refused_if_none_of_many_documents_fills_it(caplog):
    """Looked at are up to 512 samples or all; of fewer, because a collator changes their lengths, it is said only."""
    fields = {"attention_forward": "sparse", "attention_pattern": "shifted_groups", "block_size": 8, "keep_ratio": 0.5}
    lemo = LemoConfig(**fields, group_size=40)
    order = PhaseDocuments(Lengths([0] * 300), default_data_collator, seed=0)._order

    def look(long_place, collate=default_data_collator):
        lengths = [96 if order.index(index) == long_place else 64 for index in range(300)]
        documents = PhaseDocuments(Lengths(lengths), collate, seed=0, probes=1, profile=4)
        with caplog.at_level("WARNING", logger="lemo_hf"):
            require_blocks(documents, lemo, 2)

    look(250)
    assert caplog.text == ""
    with pytest.raises(
        LemoConfigError, match="of 300 looked at a layer keeps 32 tokens at most, of one with 64; got group_size=40; set it to 8"
    ):
        look(None)
    look(250, lambda samples: {name: tokens[:, :56] for name, tokens in default_data_collator(samples).items()})
    assert "of 5 looked at a layer keeps 32 tokens at most, of one with 56" in caplog.text
    assert "documents that fill no group attend to all that they keep" in caplog.text


def test_packed_documents_of_a_few_samples_are_not_taken_for_all(caplog):
    """Five samples give twenty documents here, as many as there are samples: of the other fifteen nothing is known."""
    fields = {"attention_forward": "sparse", "attention_pattern": "shifted_groups", "block_size": 8, "keep_ratio": 0.5}

    def packed(samples):
        batch = default_data_collator(samples)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1])[None] % 16}

    documents = PhaseDocuments(Lengths([64] * 20), packed, seed=0, probes=1, profile=4)
    with caplog.at_level("WARNING", logger="lemo_hf"):
        require_blocks(documents, LemoConfig(**fields, group_size=40), 2)
    assert "of 20 looked at a layer keeps 16 tokens at most, of one with 16" in caplog.text
