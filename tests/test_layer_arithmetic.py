"""The numbers that the README claims of a layer at 8B shapes, as bounds: counted, not timed, so they cannot be noisy."""

import layer_arithmetic
import pytest
import torch


@pytest.fixture(scope="module")
def measured():
    """Every arm at 4096 tokens and kept share 0.5, by adapter dtype."""
    arms = layer_arithmetic.arms(0.5)
    return {
        dtype: {name: layer_arithmetic.measure(1, 4096, lemo, dtype, autocast=False) for name, lemo in arms.items()}
        for dtype in (torch.bfloat16, torch.float32)
    }


@pytest.mark.parametrize(
    ("arm", "dtype", "bound"),
    [
        ("exact", torch.bfloat16, 0.45),
        ("sparse", torch.bfloat16, 0.45),
        ("exact", torch.float32, 0.40),
        ("sparse", torch.float32, 0.40),
        ("exact, kept-row checkpointing", torch.bfloat16, 0.10),
        ("sparse, kept-row checkpointing", torch.bfloat16, 0.10),
    ],
)
def test_saved_bytes_stay_below_their_share_of_stock(measured, arm, dtype, bound):
    assert measured[dtype][arm]["saved_bytes"] / measured[dtype]["stock"]["saved_bytes"] <= bound


def test_autocast_with_float32_adapters_saves_no_second_copy_of_any_input(measured):
    exact = layer_arithmetic.arms(0.5)["exact"]
    found = layer_arithmetic.measure(1, 4096, exact, torch.float32, autocast=True)["saved_bytes"]
    # What is left above 16-bit adapters is autocast's copies of the adapters themselves.
    assert found <= 1.01 * measured[torch.bfloat16]["exact"]["saved_bytes"]


@pytest.mark.parametrize(("arm", "bound"), [("exact", 0.74), ("sparse", 0.67)])
def test_flops_stay_below_their_share_of_stock(measured, arm, bound):
    figures = measured[torch.bfloat16]
    assert figures[arm]["flops"] / figures["stock"]["flops"] <= bound


def test_predictors_are_below_one_percent_of_a_layer(measured):
    for figures in measured.values():
        assert all(0.004 < found["predictor_share"] <= 0.01 for arm, found in figures.items() if arm != "stock")
        assert figures["stock"]["predictor_share"] == 0


def test_stock_flops_are_the_closed_form(measured):
    # P of q, k, v, o and the MLP; LoRA adds r * (inputs + outputs) to each of four; backward: input gradients only for frozen
    # matrices, both gradients for LoRA's; flash attention 1 forward, 2.5 backward of 2 * pairs * hidden multiply-adds.
    hidden, width, tokens, kv = 4096, 14336, 4096, 1024
    matrices = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width
    lora = 8 * (2 * (hidden + hidden) + 2 * (hidden + kv))
    pairs = tokens * (tokens + 1) / 2
    expected = 2 * tokens * (2 * matrices + 3 * lora) + 2 * 2 * pairs * hidden * 3.5
    assert measured[torch.bfloat16]["stock"]["flops"] == pytest.approx(expected, rel=1e-6)
