import pytest

from lemo_hf import LemoConfig
from lemo_hf.training.phase_cost import estimate_cost


def test_the_sparse_form_of_an_8b_model():
    lemo = LemoConfig(selection="threshold", attention_forward="sparse", keep_ratio=0.5)
    cost = estimate_cost(lemo, num_layers=32, fitted_documents=64, profile_documents=4, rounds=3, samples=1000)
    assert cost.predictor == pytest.approx(76.8)
    assert cost.calibrate == 4 * (1 + 2 * 32 * 3 * 0.5) == 388
    assert cost.steps == 1500
    assert cost.share == pytest.approx(464.8 / 1964.8)
    assert str(cost).startswith(
        "23.7% of the run's compute goes into the phases before the first step (predictor 3.9%, calibrate 19.7%"
    )


def test_the_exact_form_has_dense_forwards_and_no_rounds():
    lemo = LemoConfig(selection="threshold", attention_forward="exact", keep_ratio=0.25)
    cost = estimate_cost(lemo, 4, fitted_documents=0, profile_documents=4, rounds=3, samples=10)
    assert (cost.predictor, cost.calibrate, cost.steps) == (0, 4, 15)


def test_dense_layers_are_whole_and_not_searched():
    lemo = LemoConfig(selection="threshold", attention_forward="sparse", keep_ratio=0.5, dense_layers=[0, -1])
    cost = estimate_cost(lemo, 4, fitted_documents=0, profile_documents=2, rounds=1, samples=4)
    assert cost.calibrate == 2 * (1 + 2 * 2 * 1 * 0.75)
    assert cost.steps == 3 * 0.75 * 4


def test_without_phases_there_is_no_share():
    assert estimate_cost(LemoConfig(), 4, 0, 0, 3, samples=10).share == 0
