"""The definitions that benchmarks/score_definitions.py compares, on a document small enough to write them out."""

import score_definitions
import torch

from lemo_hf.models.token_informativeness import block_informativeness, block_scores

SIZE, SCALE = 4, 0.5


def heads():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 4, 8, generator=generator), torch.randn(16, 2, 8, generator=generator)


def test_definitions_are_their_formulas():
    query, key = heads()
    signed = torch.einsum("ihd,jhd->hij", query, key.repeat_interleave(2, 1)) * SCALE
    causal = torch.ones(16, 16).tril().bool()
    mass = signed.masked_fill(~causal, -torch.inf).softmax(-1).mean(0)
    got = score_definitions.pair_scores(query, key, SIZE, SCALE)
    rows, columns = slice(8, 12), slice(4, 8)
    pair = signed[:, rows, columns]
    positive = pair.relu()
    wanted = {
        "max": positive.mean(0).max(),
        "mean of positive": positive.mean(),
        "max over queries": positive.mean(0).amax(0).mean(),
        "max over keys": positive.mean(0).amax(1).mean(),
        "max by head": positive.amax((1, 2)).mean(),
        "max over heads": positive.max(),
        "mean": pair.mean(),
        "pooled positive": pair.mean((1, 2)).relu().mean(),
        "mass": mass[rows, columns].sum() / SIZE,
    }
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name][2, 1], value, msg=name)
        assert not got[name].triu(1).any()
    torch.testing.assert_close(got["max"], block_scores(query, key, SIZE, SCALE))
    torch.testing.assert_close(got["mass"].sum(1), torch.ones(4))


def test_strips_do_not_show(monkeypatch):
    query, key = heads()
    whole = score_definitions.pair_scores(query, key, SIZE, SCALE)
    monkeypatch.setattr(score_definitions, "_STRIP", 8)
    for name, scores in score_definitions.pair_scores(query, key, SIZE, SCALE).items():
        torch.testing.assert_close(scores, whole[name], msg=name)


def test_a_definition_is_described_by_what_foretells_it():
    generator = torch.Generator().manual_seed(1)
    place = torch.rand(12, 12, generator=generator).tril()
    noise = [torch.rand(12, 12, generator=generator).tril() for _ in range(6)]
    found = score_definitions.describe({"max": noise, "mean": noise, "fixed": [place + 1e-4 * each for each in noise]}, "both")
    assert found["max"]["finds_max"] == found["mean"]["pooled"] == found["fixed"]["positions"] == 1
    assert found["max"]["positions"] < 0.9
    assert found["max"]["spread"] > 0.05


def test_as_keys_counts_later_blocks_only():
    scores = torch.rand(5, 5, generator=torch.Generator().manual_seed(2)).tril()
    torch.testing.assert_close(score_definitions.informativeness(scores, "as keys")[1], scores[2:, 1].sum() / 4)
    torch.testing.assert_close(score_definitions.informativeness(scores, "both"), block_informativeness(scores))
