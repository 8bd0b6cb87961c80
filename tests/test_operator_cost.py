"""What one operator costs, on fake tensors as on real ones, and how long a card takes for it."""

from dataclasses import replace

import memory_estimate as benchmark
import pytest
import torch
from transformers import AutoConfig

from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.estimate.cards import FULL, GIB, Card, Efficiency, seconds
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.operator_cost import OperatorCost, flash_workspace, operator_cost
from lemo_hf.profiling.estimate.step_model import build_model
from lemo_hf.profiling.estimate.step_trace import record_step, trace_step


def test_nearby_tokens_cost_the_dropped_rows_projections_and_a_band():
    config = AutoConfig.for_model("llama", **benchmark.FAMILIES["llama"])
    (chosen,) = choose_methods("lemo-sparse-nearby")
    settings = chosen.settings(1024, "bfloat16")
    without = replace(settings, lemo=replace(settings.lemo, nearby_tokens=0))
    estimator = Estimator(config)
    nearby, plain = estimator.estimate(settings), estimator.estimate(without)
    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    narrow = config.num_key_value_heads * size
    weights = 2 * hidden * hidden + 2 * hidden * narrow
    adapters = 8 * (2 * (hidden + hidden) + 2 * (hidden + narrow))
    dropped, stretch = 512, 64 + 128  # half of 1024 rows; a block of queries reads itself and the 128 before it
    layer = dropped * 2 * (weights + adapters) + dropped * stretch * heads * size * 4
    added = sum(nearby.flops.values()) - sum(plain.flops.values())
    assert added == pytest.approx((config.num_hidden_layers - 1) * layer, rel=1e-6)
    assert nearby.live_bytes == pytest.approx(plain.live_bytes, rel=0.01), "nothing of it is saved"


def test_cuda_backward_holds_float32_sums_and_expanded_keys():
    def query(heads):
        return torch.empty(2, heads, 200, 80, dtype=torch.bfloat16, device="meta")

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    sums = 2 * 4 * 256 * (96 + 1) * 4  # 200 rows in blocks of 128, heads of 80 in steps of 32
    assert flash_workspace(operator, (query(4), query(4), query(4)), {}) == sums
    assert flash_workspace(operator, (query(4), query(4), query(2)), {}) == sums + 2 * 2 * 4 * 200 * 80 * 2
    assert flash_workspace(torch.ops.aten.mm.default, (query(4),), {}) == 0


def test_time_is_the_slower_of_computing_and_moving():
    card = Card("card", GIB, peak_flops=1e12, bandwidth=1e9)
    half = Efficiency(products=0.5, attention=0.25, movement=0.5, source="test")
    computing, moving = OperatorCost(10**12, 10, False), OperatorCost(10, 10**9, False)
    assert seconds([computing, moving], card, FULL) == pytest.approx(2.0)
    assert seconds([computing, moving], card, half) == pytest.approx(4.0)
    assert seconds([computing._replace(attention=True)], card, half) == pytest.approx(4.0)


@pytest.mark.parametrize("place", [0, 4])
def test_a_fake_step_costs_what_a_real_one_does(place):
    # Fake tensors are asked for their device by operators that real ones never see; those move nothing.
    settings = benchmark.compared_settings(256)[place]
    config = AutoConfig.for_model("llama", **benchmark.FAMILIES["llama"])
    layers = list(range(config.num_hidden_layers))
    model = build_model(config, settings, layers)
    ids = torch.randint(0, config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    real, fake = record_step(model, ids, settings), trace_step(config, settings, on_gpu=False)

    def sums(trace, stretch, at):
        costs = trace.stretches[stretch, at].costs
        return sum(cost.flops for cost in costs), sum(cost.traffic for cost in costs)

    for layer in layers:
        for stretch in ("forward", "backward"):
            flops, traffic = sums(real, stretch, layer)
            assert flops
            assert sums(fake, stretch, fake.place_of_layer[layer]) == (flops, pytest.approx(traffic, rel=0.01))


def test_views_and_questions_about_a_tensor_cost_nothing():
    tensor = torch.empty(8, 8)
    for operator, arguments in ((torch.ops.prim.device.default, ()), (torch.ops.aten._unsafe_view.default, ([64],))):
        assert operator_cost(operator, (tensor, *arguments), {}, tensor) is None
    assert operator_cost(torch.ops.aten.add.Tensor, (tensor, tensor), {}, tensor) == OperatorCost(0, 3 * 256, False)
