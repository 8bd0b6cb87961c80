import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references.tiny_models import place, random_tokens

from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.token_elimination import (
    choose_blocks,
    gather_rows,
    keep_everything,
    kept_block_count,
    merge_rows,
    selection_of_blocks,
)

CPU = torch.device("cpu")
LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]


def find(batch, block_size=4):
    rows, width = batch["input_ids"].shape
    known = {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids", "seq_idx")}
    return find_documents(rows, width, block_size, CPU, cu_seq_lens=batch.get("cu_seq_lens_q"), **known)


def of_lengths(*lengths, block_size=4):
    return find(place([random_tokens(length, seed) for seed, length in enumerate(lengths)], "packed_positions").batch, block_size)


def draw(config, documents, layer=0, number=0, scores=None):
    marks = choose_blocks(scores, documents, config, layer, number).kept_blocks
    return [part.tolist() for part in documents.split_blocks(marks)]


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
    assert find(rows | {"seq_idx": torch.tensor([[0] * 5, [0, 0, 0, 1, 1]])}).lengths == [5, 2, 2]


@pytest.mark.parametrize(
    ("blocks", "ratio", "kept"),
    [
        (1, 0.5, 1),
        (2, 0.01, 2),
        (3, 0.01, 2),
        (10, 0.5, 5),
        (11, 0.5, 6),
        (30, 0.1, 3),
        (10, 0.7, 7),
        (7, 1.0, 7),
        (100, 0.29, 29),
    ],
)
def test_kept_count_is_the_ceiling_and_never_drops_the_ends(blocks, ratio, kept):
    assert kept_block_count(blocks, ratio) == kept


@pytest.mark.parametrize("marks", [[True] * 7, [False] * 7, [True, False, True, True, False, False, True]])
def test_a_selection_splits_the_real_rows(marks):
    mask = torch.tensor([[0, 0] + [1] * 9, [1] * 5 + [0] * 6, [0] * 11, [0] * 7 + [1] * 4])
    documents = find({"input_ids": torch.zeros(4, 11, dtype=torch.long), "attention_mask": mask})
    assert documents.block_counts == [3, 2, 1]
    marks = marks[:6]
    selection = selection_of_blocks(torch.tensor(marks), documents)
    kept = [row for row, block in zip(documents.rows.tolist(), documents.block_of_row.tolist(), strict=True) if marks[block]]
    assert selection.kept_rows.tolist() == kept
    assert sorted(kept + selection.rest_rows.tolist()) == documents.rows.tolist()
    assert selection.rest_rows.tolist() == sorted(selection.rest_rows.tolist())
    assert torch.equal(documents.rows[selection.real_kept], selection.kept_rows)
    assert torch.equal(documents.rows[selection.real_rest], selection.rest_rows)
    assert sum(selection.kept_lengths) == len(kept)
    assert selection.kept_share == pytest.approx(len(kept) / 18)


def test_keeping_everything():
    selection = keep_everything(of_lengths(9, 1, 4))
    assert selection.kept_rows.tolist() == list(range(14))
    assert selection.kept_lengths == [9, 1, 4]
    assert selection.rest_rows.numel() == 0
    assert selection.kept_share == 1


def test_ratio_keeps_the_best_and_the_ends():
    documents = of_lengths(40, 3)
    scores = [torch.tensor([0.0, 5, 1, 4, 2, 3, 6, 0, 7, 0.0]), torch.zeros(1)]
    config = LemoConfig(selection="ratio", keep_ratio=0.5, block_size=4)
    assert draw(config, documents, scores=scores) == [
        [block in (0, 9, 8, 6, 1) for block in range(10)],
        [True],
    ]


def test_ties_go_to_the_earlier_block():
    documents = of_lengths(400)
    for scores in (torch.zeros(100), torch.full((100,), 0.5, dtype=torch.bfloat16)):
        kept = draw(LemoConfig(selection="ratio", keep_ratio=0.3, block_size=4), documents, scores=[scores])[0]
        assert kept == [block < 29 or block == 99 for block in range(100)]


def test_ratio_by_layer():
    config = LemoConfig(selection="ratio", keep_ratio=[0.3, 0.8], block_size=4)
    documents = of_lengths(40)
    assert [sum(draw(config, documents, layer, scores=[torch.rand(10)])[0]) for layer in (0, 1)] == [3, 8]


def test_threshold_is_inclusive_and_keeps_the_ends():
    documents = of_lengths(20, 2)
    config = LemoConfig(selection="threshold", thresholds=[9.0, 0.5], block_size=4)
    scores = [torch.tensor([0.0, 0.5, 0.49999, 0.7, 0.1]), torch.zeros(1)]
    assert draw(config, documents, 1, scores=scores) == [[True, True, False, True, True], [True]]
    assert draw(config, documents, 0, scores=scores) == [[True, False, False, False, True], [True]]
    assert choose_blocks(scores, documents, config, 1, 0).kept_lengths == [16, 2]


def test_threshold_without_thresholds_says_what_to_do():
    with pytest.raises(LemoConfigError, match="needs thresholds; got none; run the calibrate phase"):
        choose_blocks([torch.zeros(2)], of_lengths(8), LemoConfig(selection="threshold"), 0, 0)


def test_a_draw_repeats_and_differs_by_step_layer_seed_and_document():
    documents = of_lengths(200, 200)
    config = LemoConfig(block_size=4, keep_ratio=0.3)
    first = draw(config, documents)
    assert first == draw(config, documents)
    others = [
        draw(config, documents, number=1),
        draw(config, documents, layer=1),
        draw(LemoConfig(block_size=4, keep_ratio=0.3, seed=1), documents),
    ]
    assert all(other != first for other in others)
    assert others[0] != others[1] != others[2] != others[0]
    assert first[0] != first[1]


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(LemoConfig(block_size=4), of_lengths(40))
    assert torch.equal(before, torch.get_rng_state())


def test_uniform_draws_keep_every_inner_block_equally_often():
    documents = of_lengths(48)
    config = LemoConfig(block_size=4, keep_ratio=0.5)
    number = 1500
    counts = sum(
        torch.tensor(draw(config, documents, layer, step)[0]).double() for step in range(number // 3) for layer in range(3)
    )
    assert counts[0] == counts[-1] == number
    share = 4 / 10  # 6 of 12 blocks, two of them the ends
    spread = (number * share * (1 - share)) ** 0.5
    assert (counts[1:-1] - number * share).abs().max() < 4 * spread
    assert counts[1:-1].sum() == 4 * number


def test_pairs_of_blocks_are_drawn_independently_of_their_distance():
    documents = of_lengths(48)
    config = LemoConfig(block_size=4, keep_ratio=0.5)
    number = 1000
    kept = torch.stack([torch.tensor(draw(config, documents, 0, step)[0]).double() for step in range(number)])[:, 1:-1]
    together = kept.T @ kept / number
    wanted = 4 / 10 * 3 / 9
    inner = together[~torch.eye(10, dtype=torch.bool)]
    assert (inner - wanted).abs().max() < 4.5 * (wanted * (1 - wanted) / number) ** 0.5
    # A block's draws at successive steps are independent too.
    successive = (kept[1:] * kept[:-1]).mean(0)
    assert (successive - 0.16).abs().max() < 4.5 * (0.16 * 0.84 / number) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_by_informativeness_have_the_right_odds(temperature):
    """One inner block of three is drawn: with probability weight / sum of weights."""
    documents = of_lengths(20)
    informativeness = torch.tensor([9.0, 1.0, 2.0, 5.0, 9.0])
    config = LemoConfig(block_size=4, keep_ratio=0.6, sampling_temperature=temperature)
    number = 1000
    counts = sum(torch.tensor(draw(config, documents, 0, step, [informativeness])[0]).double() for step in range(number))
    weights = informativeness[1:-1].double() ** (1 / temperature)
    share = weights / weights.sum()
    assert ((counts[1:-1] - number * share).abs() < 4 * (number * share * (1 - share)).sqrt()).all()


def test_blocks_without_informativeness_are_drawn_last_but_are_drawn():
    documents = of_lengths(20)
    config = LemoConfig(block_size=4, keep_ratio=0.8, sampling_temperature=1.0)
    scores = torch.tensor([0.0, 0.0, -1.0, 3.0, 0.0])
    picked = [draw(config, documents, 0, step, [scores])[0] for step in range(50)]
    assert all(kept[3] and sum(kept) == 4 for kept in picked)
    assert {kept[1] for kept in picked} == {True, False}


def test_gather_and_merge_have_the_gradients_of_their_formula():
    generator = torch.Generator().manual_seed(0)
    documents = find(
        {"input_ids": torch.zeros(2, 11, dtype=torch.long), "attention_mask": torch.tensor([[0, 0] + [1] * 9, [1] * 11])}
    )
    selection = selection_of_blocks(torch.tensor([1, 0, 1, 1, 0, 1]).bool(), documents)
    residual = torch.randn(22, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rest = torch.randn(len(selection.rest_rows), 3, generator=generator, dtype=torch.float64)

    def merged(stream):
        return merge_rows(stream, gather_rows(stream, selection.kept_rows).sin(), rest + 0 * rest, selection)

    result = merged(residual)
    untouched = torch.ones(22, dtype=torch.bool)
    untouched[documents.rows] = False
    assert torch.equal(result[untouched], residual[untouched])
    assert torch.equal(result[selection.rest_rows], rest)
    upstream = torch.randn(22, 3, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad(result, residual, upstream)
    wanted = upstream.clone()
    wanted[selection.kept_rows] *= residual.detach()[selection.kept_rows].cos()
    torch.testing.assert_close(grad, wanted)


def test_merge_does_not_write_into_its_input():
    stream = torch.ones(6, 2).requires_grad_()
    before, version = stream.detach().clone(), stream._version
    selection = selection_of_blocks(torch.tensor([True, False]), find({"input_ids": torch.zeros(1, 6, dtype=torch.long)}))
    merge_rows(stream, gather_rows(stream, selection.kept_rows) * 2, torch.zeros(2, 2), selection)
    assert torch.equal(stream, before)
    assert stream._version == version
