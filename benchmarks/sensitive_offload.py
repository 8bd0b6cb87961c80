"""Uniform and sensitive offload where kept shares differ by layer: simulated, nothing is measured and no GPU is needed.

    python benchmarks/sensitive_offload.py        # a minute; writes benchmarks/results/sensitive_offload--any.json

Llama-3-8B, LoRA r=8 in bf16, batch 1, on an H200. Bytes that each layer saves are exact counts of the real code on fake tensors; its seconds are
`lemo estimate`'s roofline with assumed efficiencies; transfers and stalls come from lemo_hf/profiling/estimate/offload_plan.py, which runs a step's
events. Compared are no offload, everything, `sensitive` with all that hides, and at the peak that `sensitive` has `uniform`, whose transfers
have the time of one layer as the paper's, and what no setting offers, `uniform` with the window of `sensitive`; and for the window's own
worth `sensitive` with the time of one layer.
"""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.profiling.estimate.cards import ASSUMED, Card, find_card
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.offload import head_seconds, layer_loads
from lemo_hf.profiling.estimate.offload_plan import (
    HostLink,
    LayerLoad,
    hidden_bytes,
    plan_bytes,
    sensitive_bytes,
    simulate,
    uniform_at_peak,
)
from lemo_hf.profiling.estimate.step_model import StepSettings
from lemo_hf.profiling.estimate.step_trace import trace_step
from lemo_hf.profiling.provenance import provenance

RESULT = Path(__file__).parent / "results" / "sensitive_offload--any.json"
MODEL, CARD, LAYERS = "Llama-3-8B", "H200", 32
# Kept share by layer.
PROFILES = {
    "equal": [0.5] * 32,
    "falling by quarters": [0.9] * 8 + [0.6] * 8 + [0.3] * 8 + [0.1] * 8,
    "dense ends": [1.0] * 2 + [0.2] * 28 + [1.0] * 2,
    "dense quarter": [1.0] * 8 + [0.1] * 24,
    "alternating": [0.9, 0.1] * 16,
}
TOKENS = 65536
# Bytes a second, each direction, and what has as much.
LINKS = {"PCIe 5": 51.2e9, "PCIe 4": 25.6e9, "host memory shared by 8 GPUs": 12e9}


def loads_of(estimator: Estimator, card: Card, lemo: LemoConfig, tokens: int) -> tuple[list[LayerLoad], float]:
    """Every layer's bytes and seconds, and the head's seconds."""
    trace = trace_step(estimator.config, StepSettings(tokens, lemo=lemo, adapter_dtype="bfloat16"), on_gpu=True)
    return layer_loads(trace, card), head_seconds(trace, card)


def compared(loads: list[LayerLoad], head: float, bandwidth: float) -> dict[str, Any]:
    """The ways side by side."""
    link, saved = HostLink(bandwidth, bandwidth), [load.saved_bytes for load in loads]
    hidden = hidden_bytes(loads, link)
    plan = plan_bytes("sensitive", loads, link)
    timelines = {"none": simulate(loads, [0] * len(loads), link, head), "everything": simulate(loads, saved, link, head)}
    timelines["sensitive"] = simulate(loads, plan.moved, link, head, plan.window)
    timelines["sensitive_one_layer"] = simulate(loads, sensitive_bytes(saved, hidden), link, head)
    for name, window in (("uniform", 1), ("uniform_same_window", plan.window)):
        moved = uniform_at_peak(saved, hidden, timelines["sensitive"].peak_bytes, window)
        timelines[name] = simulate(loads, moved, link, head, window)
    found: dict[str, Any] = {
        name: {
            "seconds": one.seconds,
            "stall_seconds": one.stall_seconds,
            "overlap": one.overlap,
            "moved_bytes": one.moved_bytes,
            "peak_bytes": one.peak_bytes,
        }
        for name, one in timelines.items()
    }
    none, chosen = timelines["none"], timelines["sensitive"]
    for name in ("uniform", "uniform_same_window"):
        found[f"faster_than_{name}"] = timelines[name].seconds / chosen.seconds
    found["slower_than_none"] = chosen.seconds / none.seconds
    found["window"] = plan.window
    found["peak_saved"] = 1 - chosen.peak_bytes / none.peak_bytes
    found["peak_saved_one_layer"] = 1 - timelines["sensitive_one_layer"].peak_bytes / none.peak_bytes
    return found


def main() -> None:
    """Simulates every profile and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    card = find_card(CARD)
    estimator, rows = Estimator(MODEL, card), []
    for form, selection in (("exact", "sampled"), ("sparse", "ratio")):
        for profile, shares in PROFILES.items():
            lemo = LemoConfig(attention_forward=form, selection=selection, keep_ratio=shares)  # type: ignore[arg-type]
            loads, head = loads_of(estimator, card, lemo, TOKENS)
            row: dict[str, Any] = {"tokens": TOKENS, "form": form, "profile": profile, "head_seconds": head}
            row["layers"] = [list(asdict(load).values()) for load in loads]
            row["links"] = {name: compared(loads, head, bandwidth) for name, bandwidth in LINKS.items()}
            rows.append(row)
            for name, one in row["links"].items():
                print(
                    f"{form} {profile}, {name}: {one['none']['seconds']:.2f} s without, {one['everything']['seconds']:.2f} with everything; "
                    f"sensitive {one['slower_than_none']:.3f} of the first, {one['peak_saved']:.0%} less saved with the time of {one['window']} "
                    f"layers, {one['peak_saved_one_layer']:.0%} with that of one; {one['faster_than_uniform']:.3f} times as fast as uniform, "
                    f"{one['faster_than_uniform_same_window']:.3f} times if that had the window too",
                    flush=True,
                )
    config = {"model": MODEL, "card": CARD, "lora": "r=8 on attention's projections, bfloat16", "batch": 1, "dtype": "bfloat16"}
    config |= {
        "profiles": PROFILES,
        "links": LINKS,
        "efficiency": asdict(ASSUMED),
        "how": "simulated from assumed times, not measured",
    }
    document = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "machine": "any", "config": config, "rows": rows}
    args.out.write_text(json.dumps(document) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
