"""Gradient noise of forms: the estimates are those of distributions that are known."""

import math

import pytest
import torch
from tiny_texts import TOKENS, token_rows

from benchmarks.quality import report
from benchmarks.quality.arms import Arm, exact
from benchmarks.quality.comparing import Difference
from benchmarks.quality.extension import EQUAL_STEPS, EQUAL_TIME
from benchmarks.quality.noise_scale import row_gradients, step_cost, steps_needed, warmed_up, with_errors
from benchmarks.quality.setting import Setting
from lemo_hf.errors import LemoError

ROWS, WEIGHTS = 64, 400


def drawn(mean, spread, seed):
    """Rows of gradients: a mean and noise of `spread` in every weight."""
    return mean + spread * torch.randn(ROWS, WEIGHTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_and_bias_are_those_of_the_distribution():
    along = torch.ones(WEIGHTS, dtype=torch.float64)
    across = torch.cat([along[: WEIGHTS // 2], -along[WEIGHTS // 2 :]])
    dense = drawn(along, 2.0, 0)
    bias, noise = step_cost(dense, dense)
    assert bias == pytest.approx(0, abs=1e-9)
    assert noise == pytest.approx(4.0, rel=0.1)
    # Half as long, with half as much across: neither the length nor the sign of what lies across matters.
    for sign in (1, -1):
        found = with_errors(drawn(0.5 * along + sign * 0.25 * across, 2.0, 1), dense)
        assert found["bias"][0] == pytest.approx(0.25, abs=0.1)
        assert found["noise"][0] == pytest.approx(16.0, rel=0.15)
        assert 0 < found["bias"][1] < 0.2
        assert 0 < found["noise"][1] < 4


def test_weights_of_large_gradients_count_no_more_than_others():
    mean = torch.ones(WEIGHTS, dtype=torch.float64)
    scale = torch.linspace(0.01, 100, WEIGHTS, dtype=torch.float64).sqrt()
    plain = with_errors(drawn(mean, 2.0, 1), drawn(mean, 2.0, 0))
    # Adam's step is along gradient over its root mean square, so a product of two gradients is divided by it once.
    scaled = with_errors(drawn(mean, 2.0, 1) * scale, drawn(mean, 2.0, 0) * scale)
    assert scaled["noise"][0] == pytest.approx(plain["noise"][0], rel=0.1)
    one = torch.ones(WEIGHTS, dtype=torch.float64)
    one[0] = 1e3  # without weighing this one alone would be the noise
    assert with_errors(drawn(mean, 2.0, 1) * one, drawn(mean, 2.0, 0) * one)["noise"][0] < 1.2 * plain["noise"][0] + 1


def test_errors_are_those_of_repeated_draws():
    along = torch.ones(WEIGHTS, dtype=torch.float64)
    several = [with_errors(drawn(along, 4.0, 2 * seed), drawn(along, 4.0, 2 * seed + 1)) for seed in range(40)]
    for pick in (lambda found: found["bias"], lambda found: found["noise"], lambda found: found["steps"]["4"]):
        seen = torch.tensor([pick(found)[0] for found in several]).std().item()
        told = sum(pick(found)[1] for found in several) / len(several)
        # Leaving out one row at a time tells too much of what depends on squares, never too little.
        assert 0.8 * seen < told < 1.7 * seen


def test_steps_that_a_form_needs_follow_the_rows_of_a_step():
    stock, form = (0.0, 8.0), (0.1, 16.0)
    assert steps_needed(form, stock, 1) == pytest.approx(17.1 / 9)
    assert steps_needed(form, stock, 8) == pytest.approx(3.1 / 2)
    assert steps_needed(form, stock, math.inf) == pytest.approx(1.1)


def test_too_few_rows_are_refused():
    with pytest.raises(LemoError, match="3 rows; give 4 or more"):
        with_errors(torch.ones(3, 5), torch.ones(3, 5))


def test_gradients_of_rows_are_of_the_adapter_and_of_their_own_draws(base):
    setting, rows = Setting(base, TOKENS), list(token_rows(3, 0))
    adapter = warmed_up(setting, rows[2:])
    same_row = [rows[0], rows[0]]
    stock = row_gradients(Arm("stock", "core"), setting, adapter, same_row)
    everything = row_gradients(Arm("all", "core", exact(1.0)), setting, adapter, same_row)
    half = row_gradients(Arm("half", "core", exact(0.5, block_size=16)), setting, adapter, same_row)
    assert torch.equal(stock[0], stock[1])
    assert not torch.equal(half[0], half[1]), "each row has a draw of its own"
    assert torch.allclose(everything, stock, rtol=1e-3, atol=1e-5 * stock.abs().max().item())
    names = (stock[0] != 0).float().mean().item()
    assert names > 0.9, "after a step all of the adapter's weights have a gradient"


STEPS = {"1": (1.9, 0.3), "4": (1.7, 0.2), "16": (1.4, 0.1), "64": (1.2, 0.1)}
NOISE = {
    "date": "2026-11-22",
    "config": {"rows": 16, "tokens": 4096, "base": "base", "dtype": "float32"},
    "texts": {
        "headers": {
            "stock": {"bias": (0.0, 0.0), "noise": (8.0, 1.0), "steps": dict.fromkeys(STEPS, (1.0, 0.0))},
            "exact-0.5": {"bias": (0.1, 0.2), "noise": (16.0, 2.0), "steps": STEPS},
        }
    },
}


def setting_of(text, rows):
    point = {"versus_stock": {"perplexity": Difference(-1.0, -2.0, -0.5, 0.1, (-1.0, -1.0)).to_dict()}}
    arm = {"seeds": [0, 1], "points": {EQUAL_STEPS: point, EQUAL_TIME: point}, "cost": {"mean_time_ratio": 0.5}}
    stock = {"seeds": [0, 1], "points": {EQUAL_STEPS: point}, "cost": None}
    return {
        "setting": {"steps": 9, "tokens": 8, "text": text, "accumulation": rows},
        "arms": {"exact-0.5": arm, "stock": stock, "exact-0.1": arm},
    }


def test_tables_set_what_the_noise_foretells_beside_what_runs_showed():
    results = [{"settings": {"a": setting_of("headers", 16), "b": setting_of("python", 16), "c": setting_of("headers", 1)}}]
    lines = report.batch_table(results, NOISE).splitlines()
    assert [line.split(" | ")[1:7] for line in lines[2:]] == [
        ["1", "9", "exact-0.5", "2", "1.90 ± 0.30", "2.00"],
        ["16", "9", "exact-0.5", "2", "1.40 ± 0.10", "2.00"],
    ]
    assert "| headers | exact-0.5 | 0.10 ± 0.20 | 16.0 ± 2.0 | 1.90 ± 0.30 | " in report.noise_table(results, NOISE)
    assert report.batch_table(results, None) == report.noise_table(results, None) == report.NONE
