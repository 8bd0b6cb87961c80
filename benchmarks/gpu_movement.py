"""What choosing, predicting and moving rows costs of a training step, for benchmarks/gpu_suite.py.

The sparse form with predicted scores, whose layers do most of it: all blocks' features, the choice, kept rows taken and put back.
Each operator's time on the device (`PhaseTimer`, launched ahead) is held against the step's own, which nothing slows. With kernels
a norm that takes its rows, and a residual add that puts them back, count as movement: the share is an upper bound.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from gpu_checks import Scale
from transformers import PreTrainedConfig

from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.bench.phases import phase_seconds
from lemo_hf.profiling.bench.step import bench_model
from lemo_hf.profiling.estimate.step_model import forward_loss

# Of a step, by its tokens.
GOALS = {8192: 0.03, 65536: 0.01}
PHASES = ("select, predict", "movement")


def run_movement(scale: Scale, config: PreTrainedConfig, tokens: int, steps: int) -> dict[str, Any]:
    """The share of a step that goes into selection, prediction and movement, beside its goal; missing it is a result.

    Args:
        scale: Real sizes, or tiny ones.
        config: The model's config.
        tokens, steps: Length, and timed steps.
    """
    # At 64K the sparse form fits with kept-row checkpointing, which takes rows twice.
    (chosen,) = choose_methods("lemo-sparse" if tokens <= 16384 else "lemo-sparse-rows")
    settings = chosen.settings(tokens, "float32" if scale.tiny else "bfloat16")
    model = bench_model(config, settings, scale.device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(scale.device)

    def step(named: Callable[..., AbstractContextManager[Any]] = nullcontext) -> None:
        forward_loss(model, ids, settings).backward()
        with named("optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    seconds = []
    for _ in range(steps):
        start = clock(scale)
        step()
        seconds.append(clock(scale) - start)
    phases = phase_seconds(model, scale.device, step, launched_ahead=True)
    whole = statistics.median(seconds)
    row = {"method": chosen.name, "tokens": tokens, "seconds": seconds, "phases": phases}
    row |= share_of_step(phases, whole, None if scale.tiny else GOALS[tokens])
    print(in_words(row), flush=True)
    return {"rows": [row]}


def share_of_step(phases: dict[str, float], seconds: float, goal: float | None) -> dict[str, Any]:
    """The share, its parts, and whether it is within the goal.

    Args:
        phases: Seconds by phase.
        seconds: Of the step that nothing slows.
        goal: The largest share, in [0, 1]; `None` where time is no measure of anything.
    """
    parts = {name: phases[name] / seconds for name in PHASES}
    share = sum(parts.values())
    return {"share": share, "share_by_phase": parts, "goal": goal, "met": None if goal is None else share <= goal}


def in_words(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    parts = ", ".join(f"{name} {part:.2%}" for name, part in row["share_by_phase"].items())
    judged = "not judged" if row["met"] is None else f"{'met' if row['met'] else 'MISSED'}, wanted at most {row['goal']:.0%}"
    return f"{row['method']} at {row['tokens']} tokens: {row['share']:.2%} of a step ({parts}), an upper bound: {judged}"


def clock(scale: Scale) -> float:
    """Seconds, once the device is done."""
    if scale.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
