"""Estimates at the sizes of the paper's memory figures, for benchmarks/paper_figures.py: no GPU, exact counts on fake tensors.

    python benchmarks/paper_estimates.py        # minutes; writes benchmarks/results/paper_estimates--any.json

Methods have PEFT's default float32 adapters, as the artifact's logs: with them the estimate of stock LoRA on Llama-3-8B at 8192
tokens is 78,689 MiB where the logs say 78,701.
"""

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from lemo_hf.models.pattern_predictor import PatternPredictor
from lemo_hf.profiling.bench.counts import counted_step
from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.fake_model import fake_model
from lemo_hf.profiling.estimate.kernel_shapes import kernels_on_shapes
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model, forward_loss
from lemo_hf.profiling.estimate.step_trace import EveryTokenHasALabel
from lemo_hf.profiling.live_bytes import LiveBytes
from lemo_hf.profiling.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "paper_estimates--any.json"
METHODS = "stock,longlora-float32,lemo-artifact,lemo-exact-float32,lemo-sparse-float32"
SIZES = {
    "Llama-2-7B": (4096, 8192),
    "Llama-3-8B": (4096, 8192),
    "Mistral-7B": (4096,),
    "OPT-6.7B": (4096, 8192),
    "OPT-2.7B": (4096, 8192),
    "OPT-1.3B": (2048, 4096, 8192, 16384, 32768),
}
# The loss's peak: one model and length, logits whole and by segments.
LOSS = ("Llama-3-8B", 8192, (1024, 8192))
POINTS = 400


def estimates() -> list[dict[str, Any]]:
    """Rows of bytes and FLOPs by model, length and method."""
    rows = []
    for model, lengths in SIZES.items():
        estimator = Estimator(model)
        for seq_len in lengths:
            for chosen in choose_methods(METHODS):
                found = counted_step(estimator, chosen.settings(seq_len, "bfloat16"))
                rows.append({"model": model, "seq_len": seq_len, "method": chosen.name, "words": chosen.words, **found})
                print(f"{model} {seq_len} {chosen.name}: {found['estimated_bytes'] / 2**20:.0f} MiB", flush=True)
    return rows


def loss_timeline() -> list[dict[str, Any]]:
    """Bytes alive over a step of LeMo exact by segment size of the loss: at even times, operators counted, from 0 to 1."""
    model_name, seq_len, segments = LOSS
    config = Estimator(model_name).config
    (chosen,) = choose_methods("lemo-exact-float32")
    found = []
    for segment in segments:
        settings = chosen.settings(seq_len, "bfloat16")
        assert settings.lemo is not None, "a LeMo method has a config"
        settings = replace(settings, lemo=replace(settings.lemo, segment_size=segment))
        found.append({"model": model_name, "seq_len": seq_len, "segment_size": segment, "bytes": timeline(config, settings)})
    return found


def timeline(config: Any, settings: StepSettings) -> list[int]:
    """The highest number of bytes alive in each of `POINTS` even stretches of a step."""
    mode = EveryTokenHasALabel(settings.batch_size)
    model = fake_model(lambda: build_model(config, settings, list(range(config.num_hidden_layers))), mode)
    with mode, kernels_on_shapes(on_gpu=True):
        ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long)
        with LiveBytes(model) as live:
            forward_loss(model, ids, settings).backward()
    changes = [(one.born, one.size) for one in live.allocations]
    changes += [(one.died, -one.size) for one in live.allocations if one.died is not None]
    start = max(one.born for one in live.allocations[: len([*model.parameters(), *model.buffers()])]) + 1
    highest, now = [0] * POINTS, 0
    place = 0
    for time, change in sorted(changes):
        now += change
        if time >= start:
            reached = min(POINTS - 1, (time - start) * POINTS // (live.time + 1 - start))
            # A stretch in which nothing changes holds what the one before it ended with.
            for skipped in range(place + 1, reached + 1):
                highest[skipped] = now - change
            place = reached
            highest[place] = max(highest[place], now)
    return highest


def predictor_parameters() -> dict[str, int]:
    """Parameters of a layer's pattern predictor at hidden size 4096."""

    def count(hidden: int, rank: int, features: int) -> int:
        with torch.device("meta"):
            return sum(weight.numel() for weight in PatternPredictor(hidden, [rank] * 4, features).parameters())

    return {"default (rank 32, 32 features)": count(4096, 32, 32), "rank 128, 64 features": count(4096, 128, 64)}


def main() -> None:
    """Estimates everything and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    document: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "machine": "any", "gpu": None}
    document |= {"loss_timeline": loss_timeline(), "predictor_parameters": predictor_parameters(), "rows": estimates()}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
