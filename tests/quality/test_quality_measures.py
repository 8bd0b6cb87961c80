"""What the quality bench measures, and when a difference is called a tie."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny_texts import TOKENS, token_rows

from benchmarks.quality.arms import all_arms
from benchmarks.quality.comparing import Difference, answer_difference, perplexity_difference
from benchmarks.quality.measures import cut_rows, measure_text, stretch_bounds, token_losses
from benchmarks.quality.retrieval_metric import RetrievalMetric
from benchmarks.quality.rows import KINDS, TrainingRows
from benchmarks.quality.setting import Setting, load
from lemo_hf.errors import LemoError
from lemo_hf.evaluation.perplexity import Perplexity, dense_perplexity, paired_difference

# Measures.


def test_stretches_hold_every_token_once_and_make_the_dense_perplexity(base):
    model = load(all_arms(2)["stock"], Setting(base, TOKENS), 0).eval()
    windows = list(token_rows(2, 5))
    found = measure_text(model, windows, 1)
    dense = dense_perplexity(model, [{"input_ids": window} for window in windows])
    assert [sum(counts) for counts in found["tokens"]] == list(dense.token_counts) == [TOKENS - 1] * 2
    assert [sum(sums) for sums in found["nll"]] == pytest.approx(dense.nll_sums, rel=1e-5)
    with torch.no_grad():
        logits = model(input_ids=windows[0][None]).logits[0]
    by_hand = F.cross_entropy(logits[:-1], windows[0][1:], reduction="none")
    bounds = stretch_bounds(TOKENS)
    assert bounds == [0, 64, 128, 192, 256]
    # Position p is predicted by the logits at p - 1, and the first stretch lacks its first token.
    assert found["nll"][0] == pytest.approx([by_hand[max(0, a - 1) : b - 1].sum().item() for a, b in pairwise(bounds)], rel=1e-5)


def test_cut_context_predicts_the_same_tokens(base):
    model = load(all_arms(2)["stock"], Setting(base, TOKENS), 0).eval()
    window = token_rows(1, 6)[0]
    rows = cut_rows(window)
    assert torch.equal(torch.cat([rows[0, 32:], rows[1, 32:]]), window[-64:])
    far = measure_text(model, [window], 1)["far"]
    by_hand = 0.0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0]
        by_hand += F.cross_entropy(logits[31:-1], row[32:], reduction="sum").item()
    assert far["cut_nll"] == pytest.approx([by_hand], rel=1e-5)
    assert far["tokens"] == [64]


def test_losses_of_a_part_are_those_of_the_whole(base):
    model = load(all_arms(2)["stock"], Setting(base, TOKENS), 0).eval()
    row = token_rows(1, 8)
    whole, right = token_losses(model, row)
    part, part_right = token_losses(model, row, slice(200, None))
    assert whole[0, 0] == 0
    assert part[0, :200].abs().sum() == 0
    assert torch.allclose(part[0, 200:], whole[0, 200:], atol=1e-5)
    assert torch.equal(part_right[0, 200:], right[0, 200:])


def test_windows_that_have_no_equal_stretches_are_refused():
    with pytest.raises(LemoError, match="tokens; use a multiple of 8"):
        stretch_bounds(100)


def test_retrieval_metric_counts_by_task_length_and_depth():
    metric = RetrievalMetric()
    asked = [("passkey", 1024, 0.1), ("passkey", 4096, 0.1), ("key_value", 4096, 0.9)]
    references = [dict(zip(("task", "tokens", "depth"), each, strict=True)) for each in asked]
    metric.add_batch(predictions=[1, 0, 0], references=references)
    found = metric.compute()
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert (found["passkey"], found["4096_tokens"], found["depth_0.1"], found["depth_0.9"]) == (0.5, 0, 0.5, 0)
    assert found["questions"] == 3


def test_training_rows_are_their_seeds_alone():
    windows = {"text": list(token_rows(5, 1)), "repository": list(token_rows(3, 2))}
    assert (KINDS.count("text"), KINDS.count("repository"), KINDS.count("retrieval")) == (13, 3, 4)
    first, again, other = (TrainingRows(windows, None, TOKENS, torch.arange(9), seed) for seed in (0, 0, 1))
    places = [place for place in range(60) if KINDS[place % 20] != "retrieval"]
    assert all(torch.equal(first[place]["input_ids"], again[place]["input_ids"]) for place in reversed(places))
    assert not all(torch.equal(first[place]["input_ids"], other[place]["input_ids"]) for place in places)
    texts = [tuple(first[place]["input_ids"].tolist()) for place in places if KINDS[place % 20] == "text"]
    assert len(set(texts[:5])) == 5, "no window comes again before all others came"


def test_windows_of_text_take_the_places_of_repositories_where_there_are_none():
    rows = TrainingRows({"text": list(token_rows(40, 1))}, None, TOKENS, torch.arange(9), 0)
    texts = [tuple(rows[place]["input_ids"].tolist()) for place in range(40) if KINDS[place % 20] != "retrieval"]
    assert len(set(texts)) == len(texts) == 32


# Comparisons.


def measured_text(losses, tokens=100):
    return {"text": {"nll": [[loss * tokens] for loss in losses], "tokens": [[tokens]] * len(losses)}}


def perplexity_of(measured):
    text = measured["text"]
    return Perplexity(tuple(sum(x) for x in text["nll"]), tuple(sum(x) for x in text["tokens"]))


def test_a_difference_has_the_windows_interval_and_the_seeds_spread():
    stock = {0: measured_text([2.0, 2.2, 1.9]), 1: measured_text([2.1, 2.1, 2.0]), 2: measured_text([9, 9, 9])}
    arm = {0: measured_text([2.01, 2.22, 1.91]), 1: measured_text([2.13, 2.12, 2.03]), 3: measured_text([5, 5, 5])}
    found = perplexity_difference(stock, arm, perplexity_of)
    by_seed = [100 * math.expm1(0.04 / 3), 100 * math.expm1(0.08 / 3)]
    assert found.by_seed == pytest.approx(by_seed)  # a seed that only one has does not count
    mean = paired_difference(Perplexity((205, 215, 195), (100,) * 3), Perplexity((207, 217, 197), (100,) * 3))
    assert found.mean == pytest.approx(mean.percent) == pytest.approx(100 * math.expm1(0.02))
    assert (found.low, found.high) == pytest.approx((mean.low, mean.high))
    assert found.spread == pytest.approx(abs(by_seed[1] - by_seed[0]) / math.sqrt(2))
    assert not found.is_tie


@pytest.mark.parametrize(
    ("low", "high", "spread", "tie"),
    [
        (0.2, 0.8, 0.1, False),
        (-0.1, 1.1, 0.1, True),  # windows disagree
        (0.4, 0.6, 0.7, True),  # seeds disagree
        (-0.8, -0.2, 0.6, True),
        (0.2, 0.8, None, False),  # one seed: the windows decide
    ],
)
def test_what_is_a_tie(low, high, spread, tie):
    mean = (low + high) / 2
    assert Difference(mean, low, high, spread, (mean,)).is_tie is tie


def test_answers_are_compared_question_by_question():
    stock = {0: {"retrieval": [{"right": True, "loss": 1.0}, {"right": False, "loss": 2.0}]}}
    arm = {0: {"retrieval": [{"right": True, "loss": 1.5}, {"right": True, "loss": 1.0}]}}
    assert answer_difference(stock, arm, "right").mean == 50
    assert answer_difference(stock, arm, "loss").mean == pytest.approx(-0.25)
    assert answer_difference(stock, {1: arm[0]}, "right") is None
