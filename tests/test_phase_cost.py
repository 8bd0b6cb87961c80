from dataclasses import replace

import phase_flops
import pytest
from references.tiny_models import SIXTEENTH_OF_8B

from lemo_hf import LemoConfig
from lemo_hf.training.phases.phase_cost import LARGE_SHARE, PhaseCost, estimate_cost, estimate_search_cost
from lemo_hf.training.phases.share_search import affordable_documents


def test_the_sparse_form_of_an_8b_model():
    lemo = LemoConfig(selection="threshold", attention_forward="sparse", keep_ratio=0.5)
    cost = estimate_cost(lemo, num_layers=32, fitted_documents=64, profile_documents=4, rounds=3, samples=1000)
    assert cost.predictor == pytest.approx(76.8)
    assert cost.calibrate == pytest.approx(4 * (1 + 2 * 32 * 3 * 0.9))
    assert cost.steps == pytest.approx(1400)
    assert cost.share == pytest.approx(772 / 2172)
    assert str(cost).startswith(
        "35.5% of the run's compute goes into the phases before the first step (predictor 3.5%, calibrate 32.0%"
    )


def test_the_exact_form_has_dense_forwards_and_no_rounds():
    lemo = LemoConfig(selection="threshold", attention_forward="exact", keep_ratio=0.25)
    cost = estimate_cost(lemo, 4, fitted_documents=0, profile_documents=4, rounds=3, samples=10)
    assert (cost.predictor, cost.calibrate, cost.steps) == (0, 4, 12.5)


def test_with_kept_keys_forwards_are_about_dense_and_the_loss_depends_on_what_is_dropped():
    """All rows are projected, so a forward counts as one; what is dropped is differentiated as in the sparse form."""
    lemo = LemoConfig(selection="threshold", attention_forward="kept_keys", keep_ratio=0.25)
    cost = estimate_cost(lemo, 4, fitted_documents=0, profile_documents=4, rounds=3, samples=10)
    assert (cost.predictor, cost.calibrate, cost.steps) == (0, 4 * (1 + 2 * 4 * 3), 12.5)
    search = estimate_search_cost(lemo, 4, probes=2)
    assert (search.measured, search.compared) == (1 + 2 * (4 + 3 + 2 + 1) / 4, 2)


def test_dense_layers_are_whole_and_not_searched():
    lemo = LemoConfig(selection="threshold", attention_forward="sparse", keep_ratio=0.5, dense_layers=[0, -1])
    cost = estimate_cost(lemo, 4, fitted_documents=0, profile_documents=2, rounds=1, samples=4)
    assert cost.calibrate == pytest.approx(2 * (1 + 2 * 2 * 1 * 0.95))
    assert cost.steps == pytest.approx((0.95 + 0.75) * 4)


def test_without_phases_there_is_no_share():
    assert estimate_cost(LemoConfig(), 4, 0, 0, 3, samples=10).share == 0


@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_the_estimate_is_what_the_flop_counter_finds(form):
    """The real phases on one layer with the proportions of an 8B model; the goal for a normal run's phases is 5 %."""
    shape = phase_flops.LLAMA_3_8B | SIXTEENTH_OF_8B
    lemo = LemoConfig(attention_forward=form, selection="threshold", predictor_rank=8, predictor_features=4)
    shares = phase_flops.shares(phase_flops.measure(shape, 512, lemo, steps=4), lemo, rounds=1, profile=4)
    samples, documents, layers = phase_flops.SAMPLES, phase_flops.DOCUMENTS, phase_flops.LAYERS
    estimate = estimate_cost(lemo, layers, documents, profile_documents=4, rounds=1, samples=samples)
    assert shares["phases"] == pytest.approx(estimate.share, rel=0.3)
    assert shares["phases"] < 0.05


def test_documents_follow_from_five_percent():
    lemo = LemoConfig(keep_ratio=0.5)
    one = estimate_search_cost(lemo, 32, 2)
    assert one.measured == pytest.approx(3.5 + 2 * (1.5 + 0.5 * 15.5))
    assert one.compared == 5
    for samples in (1000, 4000, 10**6):
        others = PhaseCost(predictor=10.0, calibrate=0.0, steps=1.5 * samples)
        documents = affordable_documents(others, one, 1)
        assert replace(others, shares=documents * one.document).share <= LARGE_SHARE
        assert documents == 16 or replace(others, shares=(documents + 1) * one.document).share > LARGE_SHARE
    assert affordable_documents(PhaseCost(1e9, 0.0, 1.0), one, 1) == 1
    assert "shares 3.3%" in str(PhaseCost(0.0, 0.0, 29.0, 1.0))
    assert estimate_cost(lemo, 2, 0, 0, 0, 4).shares == 0
