"""Rankings of blocks that look at no model: what is drawn where, and how often."""

import itertools
import math

import pytest
import torch

from benchmarks.quality import block_rankings
from lemo_hf import LemoConfig


class Blocks:
    """A situation of whole blocks for rankings that look at nothing else: one document of `blocks`."""

    generator = block_rankings.Situation.generator
    count = block_rankings.Situation.count

    def __init__(self, blocks, share=0.5, draw=0, number=0):
        keys = torch.tensor([5])
        self.documents = type("Documents", (), {"block_counts": [blocks], "keys": keys})
        self.batch = type("Batch", (), {"draw": draw})
        self.config, self.number = LemoConfig(keep_ratio=share), number


def drawn(ranking, blocks, share=0.5, draw=0, number=0):
    at = Blocks(blocks, share, draw, number)
    return at.count(blocks), ranking(at)[0]


@pytest.mark.parametrize(("blocks", "share"), [(20, 0.5), (37, 0.3), (9, 0.1), (3, 0.5), (1, 0.5)])
def test_placed_draws(blocks, share):
    """Strided, stratified, one stretch: as many marks as there are inner blocks to keep, where the definition wants them."""
    for draw in range(30):
        count, scores = drawn(block_rankings.stratified, blocks, share, draw)
        marks = scores[1:-1].nonzero()[:, 0].tolist()
        assert len(marks) == count
        assert all(i * (blocks - 2) // count <= mark < (i + 1) * (blocks - 2) // count for i, mark in enumerate(marks))
        _, scores = drawn(block_rankings.one_stretch, blocks, share, draw)
        marks = scores.nonzero()[:, 0]
        assert len(marks) == count
        assert (marks.diff() == 1).all()
        assert count == 0 or (marks[0] >= 1 and marks[-1] <= blocks - 2)
    _, scores = drawn(block_rankings.strided, blocks, share)
    marks = scores.nonzero()[:, 0]
    assert len(marks) == count
    assert count < 2 or marks.diff().max() - marks.diff().min() <= 1


def test_stratified_draws_are_even_and_vary():
    total = sum(drawn(block_rankings.stratified, 22, 0.5, draw)[1] for draw in range(300))
    inner = total[1:-1].view(-1)
    assert inner.min() > 0
    # 9 stretches of 20 blocks: 2 or 3 blocks each.
    assert (inner.view(-1) / 300 < 0.6).all()
    assert (inner / 300 > 0.25).all()


@pytest.mark.parametrize(("blocks", "share"), [(20, 0.5), (37, 0.3), (12, 0.75)])
def test_balanced_draws_take_what_was_left_out_first(blocks, share):
    count, inner = drawn(block_rankings.balanced, blocks, share)[0], blocks - 2
    steps = [drawn(block_rankings.balanced, blocks, share, draw)[1][1:-1].bool() for draw in range(inner)]
    assert all(step.sum() == count for step in steps)
    assert (sum(step.long() for step in steps) == count).all(), "equally often"
    if 2 * count <= inner:
        period = inner // math.gcd(inner, count)
        for step, (one, other) in enumerate(itertools.pairwise(steps), 1):
            assert step % period == 0 or not (one & other).any()


def test_pairs_of_layers_and_runs():
    by_layer = [drawn(block_rankings.drawn_by_pairs_of_layers, 20, number=layer)[1] for layer in range(4)]
    assert torch.equal(by_layer[0], by_layer[1])
    assert torch.equal(by_layer[2], by_layer[3])
    assert not torch.equal(by_layer[1], by_layer[2])
    runs = drawn(block_rankings.in_runs, 22)[1]
    assert len(runs) == 22
    assert (runs[:20].view(5, 4) == runs[:20].view(5, 4)[:, :1]).all()
    assert len(runs.unique()) == 6


def test_inclusion_chances():
    weights = torch.tensor([1.0, 2.0, 100.0, 3.0, 0.5])
    chances = block_rankings.inclusion_chances(weights, 3)
    assert chances.sum() == pytest.approx(3)
    assert chances[2] == 1
    torch.testing.assert_close(chances[[0, 1, 3, 4]], weights.double()[[0, 1, 3, 4]] * 2 / 6.5)


def test_informative_draws_keep_blocks_as_often_as_their_chance_says():
    scores = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) ** 3
    at = Blocks(12)
    at.true_scores = [scores]
    kept, chances = torch.zeros(12), None
    for draw in range(800):
        at.batch.draw = draw
        marks, (chances,) = block_rankings.informative_draw(at)
        assert marks[0].sum() == 4
        kept += marks[0]
    assert (kept[1:-1] / 800 - chances[1:-1]).abs().max() < 4 * (0.25 / 800) ** 0.5
    assert chances[1:-1].max() > 2 * chances[1:-1].min()
