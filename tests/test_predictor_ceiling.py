"""The oracles of benchmarks/predictor_ceiling.py, on scores whose answer is known."""

import predictor_ceiling
import pytest
import torch

from lemo_hf.models.token_informativeness import block_scores


def random_scores(documents=6, blocks=16):
    return torch.rand(documents, blocks, blocks, generator=torch.Generator().manual_seed(0)).tril(-1)


def test_knowing_every_partner_is_knowing_informativeness():
    scores = random_scores()
    expected = (scores.sum(0) - scores) / 5
    true, positions = (predictor_ceiling.informativeness_of(each) for each in (scores, expected))
    generator = torch.Generator().manual_seed(1)
    known = predictor_ceiling.surprise_of_partners(scores, expected, 16, generator)
    torch.testing.assert_close(positions + known, true)
    assert not predictor_ceiling.surprise_of_partners(scores, expected, 0, generator).any()


def test_a_combination_is_fitted_on_other_documents():
    true = predictor_ceiling.informativeness_of(random_scores())
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(2))
    alone = predictor_ceiling.combined(true, 2 - 3 * true, noise)
    assert predictor_ceiling.recall(true, alone, 0.5) == 1
    changed = torch.cat((noise[:1], true[1:]))
    torch.testing.assert_close(predictor_ceiling.combined(changed, 2 - 3 * true, noise)[0], alone[0])


def test_gaussian_noise_needs_what_theory_says():
    true = torch.randn(200, 66, generator=torch.Generator().manual_seed(3))
    needed = predictor_ceiling.explained_needed(true, 0.5, torch.Generator().manual_seed(4))
    assert needed == pytest.approx(0.9755, abs=0.006)  # sin(0.45 pi) squared


def test_strangers_are_met_at_their_places():
    generator = torch.Generator().manual_seed(5)
    layer = predictor_ceiling.Layer(block_size=4, scale=0.5)
    layer.query, layer.key = ([torch.randn(24, 2, 8, generator=generator) for _ in range(3)] for _ in range(2))
    layer.scores = [torch.zeros(6, 6)] * 3
    as_key, as_query = layer.strangers(2)
    crossed = block_scores(layer.query[0], layer.key[2], 4, 0.5)
    assert as_key[0, 2, 1] == pytest.approx(crossed[2:, 1].sum().item() / 5)
    assert as_query[0, 0, 4] == pytest.approx(crossed[4, :4].sum().item() / 5)
