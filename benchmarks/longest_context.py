"""The longest sample that trains on a card, by estimate: kept-row checkpointing against stock LoRA with checkpointing and Liger.

    python benchmarks/longest_context.py        # a minute or two; writes benchmarks/results/longest_context--any.json

Memory is `lemo estimate`'s, its assumed slack and CUDA context included; tokens per second are its roofline's, at each method's own
longest sample, with assumed efficiencies and without. No GPU: benchmarks/gpu_suite.py `--part longest` would measure it.
"""

import argparse
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.estimate.cards import find_card
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.profiling.provenance import provenance

RESULT = Path(__file__).parent / "results" / "longest_context--any.json"
MODEL = "Llama-3-8B"
CARDS = ("H100-80GB", "H200")
METHODS = (
    "liger-checkpointing,lemo-exact-rows@0.5,lemo-keys-rows@0.5,lemo-sparse-rows@0.5,lemo-exact-rows@0.3,lemo-keys-rows@0.3,"
    "lemo-sparse-rows@0.3"
)


def rows() -> list[dict[str, Any]]:
    """One row a card and method: its longest sample in tokens, and tokens a second there."""
    found = []
    estimator = Estimator(MODEL)  # one for all cards: what it has traced is the same for all
    for chosen in choose_methods(METHODS):
        settings = chosen.settings(1, "bfloat16")
        for card in map(find_card, CARDS):
            estimator.card, estimator.memory = card, card.memory
            longest = estimator.longest(settings)
            estimate = estimator.estimate(replace(settings, seq_len=longest))
            assert estimate.seconds is not None, "the estimator has a card"
            assert estimate.seconds_at_least is not None, "the estimator has a card"
            row = {"card": card.name, "memory": card.memory, "method": chosen.name, "words": chosen.words, "longest": longest}
            row |= {"total_bytes": estimate.total_bytes, "flops": sum(estimate.flops.values())}
            row |= {
                "tokens_per_second": longest / estimate.seconds,
                "tokens_per_second_at_most": longest / estimate.seconds_at_least,
            }
            found.append(row)
            print(f"{card.name} {chosen.name}: {longest} tokens, {row['tokens_per_second']:.0f} a second", flush=True)
    return found


def main() -> None:
    """Estimates everything and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write (default: %(default)s)")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    document: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "machine": "any", "model": MODEL}
    args.out.write_text(json.dumps(document | {"rows": rows()}, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
