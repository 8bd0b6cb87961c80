import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.tiny_models import place, random_tokens
from transformers import DataCollatorWithFlattening

from lemo_hf.models.documents import PaddingMaskError, find_documents
from lemo_hf.models.lemo_config import LemoConfigError

LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]


def find(batch, block_size=4):
    rows, width = batch["input_ids"].shape
    known = {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids", "seq_idx")}
    return find_documents(rows, width, block_size, torch.device("cpu"), cu_seq_lens=batch.get("cu_seq_lens_q"), **known)


def of_lengths(*lengths, block_size=4):
    return find(place([random_tokens(length, seed) for seed, length in enumerate(lengths)], "packed_positions").batch, block_size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 19), min_size=1, max_size=5), st.sampled_from(LAYOUTS), st.integers(0, 3), st.integers(1, 8))
def test_documents_are_found_wherever_they_lie(lengths, layout, extra, block_size):
    tokens = [random_tokens(length, seed) for seed, length in enumerate(lengths)]
    placed = place(tokens, layout, extra)
    documents = find(placed.batch, block_size)
    width = placed.batch["input_ids"].shape[1]
    assert documents.starts == [row * width + start for row, start, _ in placed.places]
    assert documents.lengths == lengths
    assert documents.block_counts == [-(-length // block_size) for length in lengths]
    flat = placed.batch["input_ids"].flatten()
    assert torch.equal(flat[documents.rows], torch.cat(tokens))
    alone = [int(find({"input_ids": part[None]}, block_size).keys[0]) for part in tokens]
    assert documents.keys.tolist() == alone
    # Blocks are counted through, start anew in each document, and hold block_size rows but for each document's last.
    counted = [number // block_size for length in lengths for number in range(length)]
    offsets = [sum(documents.block_counts[:index]) for index, length in enumerate(lengths) for _ in range(length)]
    assert documents.block_of_row.tolist() == [block + offset for block, offset in zip(counted, offsets, strict=True)]


def test_padding_on_both_sides_and_a_row_of_nothing_else():
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]])
    documents = find({"input_ids": torch.arange(20).view(4, 5), "attention_mask": mask}, 2)
    assert (documents.starts, documents.lengths) == ([1, 10, 19], [3, 1, 1])
    assert documents.rows.tolist() == [1, 2, 3, 10, 19]


def test_a_batch_of_padding_has_no_documents():
    documents = find({"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.zeros(2, 3)})
    assert documents.lengths == []
    assert documents.starts == []


def test_packed_documents_with_padding_behind_them():
    batch = {
        "input_ids": torch.arange(9)[None],
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]]),
    }
    documents = find(batch)
    assert (documents.starts, documents.lengths) == ([0, 3], [3, 4])


def test_positions_that_do_not_start_at_zero_are_one_document():
    assert find({"input_ids": torch.arange(6)[None], "position_ids": torch.arange(40, 46)[None]}).lengths == [6]


def test_one_row_of_positions_serves_every_row_of_the_batch():
    documents = find({"input_ids": torch.arange(12).view(2, 6), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])})
    assert documents.lengths == [4, 2, 4, 2]


def test_keys_depend_on_the_tokens_and_their_order_alone():
    tokens = random_tokens(10, 0)
    key = find({"input_ids": tokens[None]}).keys
    assert find({"input_ids": tokens.flip(0)[None]}).keys != key
    assert find({"input_ids": tokens[:9][None]}).keys != key


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (torch.ones(1, 1, 4, 4), r"of shape \(1, 1, 4, 4\)"),
        (torch.ones(4), r"of shape \(4,\)"),
        (torch.ones(1, 5), r"of shape \(1, 5\)"),
        ({"full_attention": None}, "dict"),
    ],
    ids=["4 dimensions", "1 dimension", "another length", "one per layer type"],
)
def test_other_masks_are_refused(mask, found):
    with pytest.raises(LemoConfigError, match=f"got a mask {found}; pass the padding mask"):
        find({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": mask})


def test_a_hole_in_the_padding_mask_is_refused():
    """The stock model lets tokens behind a hole attend to those before it; as two documents they would not."""
    with pytest.raises(LemoConfigError, match="row 1"):
        find({"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 1, 1]])})


@pytest.mark.parametrize("behind", [[2, 3], [3, 4]], ids=["tokens counted", "places counted"])
def test_positions_that_count_on_across_a_hole_do_not_make_it_two_documents(behind):
    rows = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 1, 1]])}
    with pytest.raises(LemoConfigError, match="row 1"):
        find(rows | {"position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, *behind]])})
    assert find(rows | {"position_ids": torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]])}).lengths == [5, 2, 2]


def test_numbers_and_lengths_tell_documents_apart_on_both_sides_of_a_hole():
    rows = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [1, 1, 0, 1, 1]])}
    for name, apart, one in (
        ("seq_idx", [[0] * 5, [0, 0, 0, 1, 1]], [[0] * 5, [1] * 5]),
        ("cu_seq_lens_q", [0, 5, 8, 10], [0, 5, 10]),
    ):
        assert find(rows | {name: torch.tensor(apart, dtype=torch.int32)}).lengths == [5, 2, 2]
        with pytest.raises(PaddingMaskError, match="row 1"):
            find(rows | {name: torch.tensor(one, dtype=torch.int32)})


def test_every_way_of_the_flattening_collator_finds_the_same_documents():
    samples = [{"input_ids": random_tokens(length, length), "labels": random_tokens(length, length)} for length in (5, 1, 9, 4)]
    for says in ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx"):
        only = {"return_position_ids": False} | {says: True}
        documents = find(DataCollatorWithFlattening(**only)(samples))
        assert (documents.starts, documents.lengths) == ([0, 5, 6, 15], [5, 1, 9, 4])
        assert documents.are_packed(1)
    assert not of_lengths(7).are_packed(1)


def test_lengths_numbers_and_positions_of_another_batch_are_refused():
    tokens = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
    for lengths in ([0, 5, 11], [0, 5, 13], [0]):
        with pytest.raises(
            LemoConfigError, match=f"must end at the 12 tokens of the batch, padding included; got {lengths[-1]};"
        ):
            find(tokens | {"cu_seq_lens_q": torch.tensor(lengths, dtype=torch.int32)})
    for name, shape in (("position_ids", (2, 5)), ("position_ids", (3, 2, 6)), ("seq_idx", (1, 6))):
        with pytest.raises(LemoConfigError, match=rf"{name} must have the batch's shape \(2, 6\); got \({shape[0]}, "):
            find(tokens | {name: torch.zeros(shape, dtype=torch.int32)})
