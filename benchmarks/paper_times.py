"""Estimated times of the paper's steps and bytes of its movement kernels, for benchmarks/speed_figures.py: no GPU.

    python benchmarks/paper_times.py --part short        # a minute; writes benchmarks/results/paper_times_short--any.json
    python benchmarks/paper_times.py --part long         # likewise

A step's time is `lemo estimate`'s: a roofline over the operators of the real code on fake tensors, with assumed efficiencies. What a
movement kernel must move is kernel_cases.py's count; what the plain operators in its place move is counted as they run.
"""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, Setting
from paper_estimates import METHODS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import logging as transformers_logging

from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.estimate.cards import ASSUMED, find_card
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.estimate.operator_cost import operator_cost
from lemo_hf.profiling.provenance import provenance

RESULTS = Path(__file__).parent / "results"
# The paper's card, but for the link between several: an A800 computes and moves as an A100.
CARD = "A100-80GB"
SHORT = (("Llama-2-7B", 8192), ("Llama-3-8B", 8192), ("OPT-6.7B", 8192), ("OPT-1.3B", 8192))
# Longer steps, which run layers again in backward.
LONG_METHODS = "checkpointing,lemo-exact-rows,lemo-sparse-rows"
LONG = (("Llama-2-7B", 16384), ("Llama-2-7B", 65536))
# Kernels that move rows, and kept shares; bytes are in proportion to rows, so how many does not matter.
MOVEMENT, MOVED_SHARES, MOVED_ROWS = ("gather_norm", "scatter_add", "take_and_merge"), (0.3, 0.5, 0.7), 1024


def steps(sizes: tuple[tuple[str, int], ...], methods: str) -> list[dict[str, Any]]:
    """Rows of times, peaks and FLOPs."""
    rows = []
    for model, seq_len in sizes:
        estimator = Estimator(model, card=find_card(CARD))
        for chosen in choose_methods(methods):
            found = estimator.estimate(chosen.settings(seq_len, "bfloat16"))
            row = {"model": model, "seq_len": seq_len, "method": chosen.name, "words": chosen.words}
            row |= {
                "estimated_bytes": found.live_bytes,
                "adapter_bytes": found.parts["adapter"],
                "flops": sum(found.flops.values()),
            }
            row |= {"estimated_seconds": found.seconds, "estimated_seconds_at_least": found.seconds_at_least}
            rows.append(row)
            print(f"{model} {seq_len} {chosen.name}: {found.seconds:.2f} s", flush=True)
    return rows


class _Traffic(TorchDispatchMode):
    """Sums what operators read and write, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        cost = operator_cost(func, args, kwargs or {}, result)
        self.bytes += cost.traffic if cost is not None else 0
        return result


def movement() -> list[dict[str, Any]]:
    """Bytes that a movement kernel must move, and those of the plain operators in its place, at the width of Llama-3-8B."""
    rows = []
    for name in MOVEMENT:
        for keep in MOVED_SHARES:
            torch.manual_seed(0)
            case = CASES[name](Setting(MOVED_ROWS, keep, torch.device("cpu"), torch.bfloat16))
            with _Traffic() as naive:
                case.naive()
            rows.append({"kernel": name, "keep": keep, "rows": MOVED_ROWS, "bytes": case.bytes, "naive_bytes": naive.bytes})
            print(f"{name} {keep}: {naive.bytes / case.bytes:.2f} times the bytes", flush=True)
    return rows


def main() -> None:
    """Estimates everything and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("short", "long"), required=True, help="short steps and movement, or long steps")
    parser.add_argument("--out", type=Path, help="JSON file to write; in benchmarks/results if not given")
    args = parser.parse_args()
    out = args.out or RESULTS / f"paper_times_{args.part}--any.json"
    transformers_logging.set_verbosity_error()
    document: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "machine": "any", "gpu": None}
    document |= {"card": CARD, "efficiency": asdict(ASSUMED)}
    if args.part == "short":
        document |= {"rows": steps(SHORT, METHODS), "movement": movement()}
    else:
        document |= {"rows": steps(LONG, LONG_METHODS)}
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
