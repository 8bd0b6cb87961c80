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
        ("kept keys", torch.bfloat16, 0.45),
        ("sparse", torch.bfloat16, 0.45),
        ("exact", torch.float32, 0.40),
        ("kept keys", torch.float32, 0.40),
        ("sparse", torch.float32, 0.40),
        ("exact, kept-row checkpointing", torch.bfloat16, 0.10),
        ("kept keys, kept-row checkpointing", torch.bfloat16, 0.10),
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


@pytest.mark.parametrize(("arm", "bound"), [("exact", 0.74), ("kept keys", 0.72), ("sparse", 0.67)])
def test_flops_stay_below_their_share_of_stock(measured, arm, bound):
    figures = measured[torch.bfloat16]
    assert figures[arm]["flops"] / figures["stock"]["flops"] <= bound


def test_predictors_are_below_one_percent_of_a_layer(measured):
    """Pooled ones, which have no hidden layers: 2 * 4096 * 64 = 0.52 M of 218 M."""
    for figures in measured.values():
        for arm, found in figures.items():
            low, high = (0, 0) if arm == "stock" else (0.002, 0.003) if "kept keys" in arm else (0.004, 0.01)
            assert low <= found["predictor_share"] <= high, arm


# P of q, k, v, o and the MLP; LoRA adds r * (inputs + outputs) to each of four; A: Q K^T and P V over all causal pairs.
HIDDEN, WIDTH, TOKENS, KV = 4096, 14336, 4096, 1024
MATRICES = 2 * TOKENS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * WIDTH)
LORA = 2 * TOKENS * 8 * (2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + KV))
PAIRS = TOKENS * (TOKENS + 1) / 2
ATTENTION = 2 * 2 * PAIRS * HIDDEN


def test_stock_flops_are_the_closed_form(measured):
    # Backward: input gradients only for frozen matrices, both gradients for LoRA's; flash attention 2.5 of a forward.
    expected = 2 * MATRICES + 3 * LORA + 3.5 * ATTENTION
    assert measured[torch.bfloat16]["stock"]["flops"] == pytest.approx(expected, rel=1e-6)


def test_flops_of_the_exact_form_are_the_closed_form(measured):
    """Backward for the kept rows alone: of a forward's attention 2.5 r^2 among them, and 1.5 for pairs with dropped keys."""
    kept = 0.5
    found = measured[torch.bfloat16]["exact"]["flops"]
    expected = (1 + kept) * MATRICES + (1 + 2 * kept) * LORA + (1 + 2.5 * kept**2 + 1.5 * kept * (1 - kept)) * ATTENTION
    assert found == pytest.approx(expected, rel=0.003)
    # To the pair: 16 strips of queries see all dropped keys up to their ends, 1/16 too many; kept rows see themselves. Of the three
    # products with dropped keys two have a column more than the heads' 128.
    rows = kept * TOKENS
    pairs = PAIRS + 2.5 * rows * (rows + 1) / 2 + (3 * 128 + 2) / (2 * 128) * (1 + 1 / 16) * rows * rows / 2
    assert found == pytest.approx((1 + kept) * MATRICES + (1 + 2 * kept) * LORA + 4 * HIDDEN * pairs, rel=1e-6)


def test_flops_with_kept_keys_are_the_closed_form(measured):
    """Attention of all rows to the kept ones and 256 nearby, backward as in the exact form but for dropped keys, nearby ones too."""
    kept, near = 0.5, 256
    found = measured[torch.bfloat16]["kept keys"]["flops"]
    rows = kept * TOKENS
    common = (1 + kept) * MATRICES + (1 + 2 * kept) * LORA + 4 * HIDDEN * 2.5 * rows * (rows + 1) / 2
    # But for pairs that the strips compute and mask: a fifth more of these, 0.6 % of the whole.
    seen = kept * PAIRS + (1 - kept) * near * TOKENS + 1.5 * kept * (1 - kept) * near * TOKENS
    assert found == pytest.approx(common + 4 * HIDDEN * seen, rel=0.01)
    # To the pair: each strip of 256 sees the 512 rows that end with it, and of those before them the kept ones; its 128 kept
    # queries the 256 dropped rows among those 512. The first has half as many. Pooled predictors are beside it, 0.01 %.
    strips = range(1, TOKENS // 256)
    pairs = 256 * (256 + sum(512 + 128 * (strip - 1) for strip in strips)) + 1.5 * 128 * (128 + 256 * len(strips))
    assert found == pytest.approx(common + 4 * HIDDEN * pairs, rel=1e-4)


@pytest.mark.parametrize("form", ["exact", "kept keys"])
def test_dropped_keys_and_values_are_saved_beside_what_the_sparse_form_saves(measured, form):
    of_rest = TOKENS // 2 * 2 * KV * 2
    for figures in measured.values():
        saved = {arm: figures[arm]["saved_bytes"] for arm in figures}
        assert saved[form] == saved["sparse"] + of_rest
        # Beside the kept residual rows: attention's output, and a float32 log-sum-exp of each of 32 heads.
        rows = TOKENS // 2 * (2 * HIDDEN + 4 * 32)
        assert saved[f"{form}, kept-row checkpointing"] == saved["sparse, kept-row checkpointing"] + rows + of_rest
