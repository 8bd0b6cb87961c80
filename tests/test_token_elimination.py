import dataclasses

import pytest
import torch
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


def find(batch, block_size=4):
    rows, width = batch["input_ids"].shape
    known = {name: batch.get(name) for name in ("input_ids", "attention_mask", "position_ids", "seq_idx")}
    return find_documents(rows, width, block_size, CPU, cu_seq_lens=batch.get("cu_seq_lens_q"), **known)


def of_lengths(*lengths, block_size=4):
    return find(place([random_tokens(length, seed) for seed, length in enumerate(lengths)], "packed_positions").batch, block_size)


def draw(config, documents, layer=0, number=0, scores=None):
    marks = choose_blocks(scores, documents, config, layer, number).kept_blocks
    return [part.tolist() for part in documents.split_blocks(marks)]


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


def test_a_draw_repeats_and_differs_by_step_seed_and_document():
    documents = of_lengths(200, 200)
    config = LemoConfig(block_size=4, keep_ratio=0.3)
    first = draw(config, documents)
    assert first == draw(config, documents)
    others = [draw(config, documents, number=1), draw(LemoConfig(block_size=4, keep_ratio=0.3, seed=1), documents)]
    assert all(other != first for other in others)
    assert others[0] != others[1]
    assert first[0] != first[1]


def test_layers_draw_the_same_blocks_or_each_its_own():
    documents = of_lengths(200, 200)
    shared = LemoConfig(block_size=4, keep_ratio=[0.3, 0.3, 0.6])
    first, second, wider = (torch.tensor(draw(shared, documents, layer)) for layer in range(3))
    assert torch.equal(first, second)
    assert (wider | ~first).all(), "what the smaller share keeps, the larger one keeps too"
    assert wider.sum() == 60
    own = [draw(dataclasses.replace(shared, draws="by_layer"), documents, layer) for layer in range(3)]
    assert own[0] != own[1]
    assert own[0] != first.tolist()
    assert (~torch.tensor(own[2]) & torch.tensor(own[0])).any(), "draws of their own are not nested"


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(LemoConfig(block_size=4), of_lengths(40))
    assert torch.equal(before, torch.get_rng_state())


def test_uniform_draws_keep_every_inner_block_equally_often():
    documents = of_lengths(48)
    config = LemoConfig(block_size=4, keep_ratio=0.5, draws="by_layer")
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
