"""Offload on a GPU, for benchmarks/gpu_suite.py: the same bits first, then none, sensitive and uniform at the same peak at 64K tokens."""

import math
from dataclasses import asdict, replace
from typing import Any, get_args

import torch
from agreement import require
from gpu_checks import Scale, moved, small_model

from lemo_hf import LemoConfig
from lemo_hf.models.lemo_config import AttentionForward
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.bench.run import BenchOptions, heading, new_row, take_result
from lemo_hf.profiling.bench.step import measure_step
from lemo_hf.profiling.estimate.cards import find_card
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.offload import layer_loads, plan_offload
from lemo_hf.profiling.estimate.offload_plan import hidden_bytes, uniform_at_peak
from lemo_hf.profiling.estimate.step_trace import trace_step
from lemo_hf.training.host_copies import measured_link
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

# Kept share by quarter of the layers.
SHARES = (0.9, 0.6, 0.3, 0.1)
MODES = ("none", "sensitive", "uniform")


def run_equality(scale: Scale) -> dict[str, Any]:
    """Gradients with parts and all of what is saved in host memory, against those without, to the bit; and bytes held."""
    rows, dtype = [], torch.float32 if scale.tiny else torch.bfloat16
    tokens = torch.randint(0, 160, (2, 192), generator=torch.Generator().manual_seed(0)).to(scale.device)
    for form in get_args(AttentionForward):
        for checkpoint in ("none", "kept_rows"):
            nearby = 7 if form == "kept_keys" else None
            lemo = LemoConfig(
                attention_forward=form,
                nearby_tokens=nearby,
                checkpoint=checkpoint,  # type: ignore[arg-type]
                block_size=8,
                segment_size=64,
            )
            wanted: list[torch.Tensor] | None = None
            for budget in (0.0, math.inf, 40_000.0, None):
                model = moved(small_model("llama", lemo, scale.tiny), scale.device, dtype)
                backbone = sparse_backbone(model)
                settings = OffloadSettings(budget=budget, smallest=1, seconds=[(1e-4, 1e-4)] * len(backbone.layers))
                with SensitiveOffload(backbone, settings) as offload:
                    for _ in range(3):
                        model.zero_grad(set_to_none=True)
                        backbone.lemo_draw = 0
                        model(input_ids=tokens, labels=tokens).loss.backward()
                    report = offload.report()
                got = [weight.grad for weight in model.parameters() if weight.grad is not None]
                wanted = wanted or got
                row = {"form": form, "checkpoint": checkpoint, "budget": str(budget), **asdict(report)}
                row["same_bits"] = all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
                rows.append(row)
                require(row["same_bits"], f"other gradients with offload: {row}")
                # Of a single layer nothing hides.
                require(budget is None or (sum(report.moved_bytes) > 0) == (budget > 0), f"nothing or too much was moved: {row}")
                require(offload.host_bytes == offload.device_bytes == 0, f"the step has left something: {row}")
    return {"rows": rows, "link": asdict(measured_link(scale.device))}


def run_offload(scale: Scale, config: Any, model: str, mode: str, tokens: int, steps: int) -> dict[str, Any]:
    """A row as `lemo bench` writes it: LeMo exact with shares that fall with depth, and one way to offload.

    Args:
        scale: Real sizes, or tiny ones.
        config: The model's config.
        model: Its name.
        mode: `LemoConfig.offload`; `"uniform"` has the peak of `"sensitive"` by the estimate of an H200.
        tokens, steps: Length, and timed steps.
    """
    layers = config.num_hidden_layers
    (chosen,) = choose_methods("lemo-exact" if mode == "none" else f"lemo-exact-{mode}-offload")
    settings = chosen.settings(tokens, "float32" if scale.tiny else "bfloat16")
    shares = [SHARES[layer * len(SHARES) // layers] for layer in range(layers)]
    budget = None if mode != "uniform" else f"{uniform_budget(config, settings, shares) / 2**30:.3f}GiB"
    lemo = replace(settings.lemo_config or LemoConfig(), keep_ratio=shares, offload_budget=budget)
    settings = replace(settings, lemo=lemo)
    row = new_row(model, tokens, chosen, settings) | {"tiny": scale.tiny, "words": f"LeMo exact, 0.9 to 0.1 kept, {mode} offload"}
    result = measure_step(config, chosen, settings, scale.device, steps, counts=False)
    take_result(row, result | {"settings": asdict(settings)}, tokens)
    options = BenchOptions(model, (tokens,), chosen.name, steps, 1, device=scale.device.type, counts=False)
    repeat = f"python benchmarks/gpu_suite.py --out DIR --part offload_{tokens}_{mode}"
    return heading(options) | {"repeat": repeat, "left_out": {}, "rows": [row]}


def uniform_budget(config: Any, settings: Any, shares: list[float]) -> float:
    """Bytes that uniform offload moves at the peak of the sensitive one, at least 0.001 GiB, by the estimate of an H200."""
    lemo, card = replace(settings.lemo_config, keep_ratio=shares, offload="none"), find_card("H200")
    trace = trace_step(Estimator(config).config, replace(settings, lemo=lemo), on_gpu=True)
    plan = plan_offload(trace, replace(lemo, offload="sensitive"), card)
    assert plan is not None, "an offload was asked for"
    saved = [load.saved_bytes for load in layer_loads(trace, card)]
    hidden = hidden_bytes(layer_loads(trace, card), plan.link)
    return max(sum(uniform_at_peak(saved, hidden, plan.timeline.peak_bytes)), 2**30 / 1000)
