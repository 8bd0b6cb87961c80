"""Measures an exported base of the quality bench: perplexity on held-out packages, retrieval by task and depth, what the corpus is.

    python -m benchmarks.quality.base_results outputs/quality/base_small --machine amd-epyc-2-cores

Everything is measured at the base's own context, in float32, beside the embedded base for comparison, whose context and tokenizer the
small base has. Retrieval is right where every token of the answer is the most probable one given those before it; `standard_error` is
that of the share of right answers. Writes `benchmarks/results/quality_<folder>--<machine>.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.base import retrieval_scores
from benchmarks.quality.corpus import held_out_documents, statistics
from benchmarks.quality.retrieval import TASKS, sample
from lemo_hf.base_model.training import BASE_MODEL_FOLDER
from lemo_hf.errors import LemoError
from lemo_hf.evaluation.perplexity import dense_perplexity, paired_difference
from lemo_hf.hub.model_card import Interval
from lemo_hf.profiling.provenance import provenance
from lemo_hf.text_data import pack_documents, spread_samples, tokenize_documents

RESULTS = Path("benchmarks/results")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
HAYSTACKS = ("held-out text", "made-up lines")
SEED = 20_000  # far from the seeds of training rows and probes


def questions(tokenizer: Any, tokens: int, repeats: int, haystack: torch.Tensor) -> list[dict[str, Any]]:
    """Samples by task, haystack and depth, `repeats` of each, with these beside them."""
    found = []
    for task in TASKS:
        for name in HAYSTACKS:
            for depth in DEPTHS:
                for repeat in range(repeats):
                    generator = torch.Generator().manual_seed(SEED + len(found))
                    text = haystack if name == HAYSTACKS[0] else None
                    made = sample(task, tokenizer, tokens, depth, generator, text)
                    found.append({**made, "task": task, "haystack": name, "depth": depth, "repeat": repeat})
    return found


def summarised(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of `retrieval_scores`, with the standard error of the share of right answers."""
    count = len(scores)
    right = sum(score["right"] for score in scores) / count
    return {
        "samples": count,
        "right": right,
        "standard_error": math.sqrt(right * (1 - right) / count),
        "tokens_right": sum(score["tokens_right"] for score in scores) / count,
        "loss": sum(score["loss"] for score in scores) / count,
    }


def by_task(asked: Sequence[dict[str, Any]], scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Scores by task and haystack, in all and by depth."""
    found: dict[str, Any] = {}
    pairs = list(zip(asked, scores, strict=True))
    for task in TASKS:
        for name in HAYSTACKS:
            here = [(each["depth"], score) for each, score in pairs if each["task"] == task and each["haystack"] == name]
            found.setdefault(task, {})[name] = {
                **summarised([score for _, score in here]),
                "by_depth": {str(depth): summarised([score for at, score in here if at == depth]) for depth in DEPTHS},
            }
    return found


def measure(folder: Path, windows: int, repeats: int) -> dict[str, Any]:
    """Everything of the module's docstring for the model in `folder` and, with its tokenizer, for the embedded base.

    Args:
        folder: An exported base.
        windows: Held-out windows of its context, evenly from all held-out documents.
        repeats: Questions of each task, haystack and depth.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {"base": folder}
    if (folder / "tokenizer.json").read_bytes() == (BASE_MODEL_FOLDER / "tokenizer.json").read_bytes():
        models["embedded"] = BASE_MODEL_FOLDER
    tokens = AutoModelForCausalLM.from_pretrained(folder).config.max_position_embeddings
    held_out = held_out_documents()
    text = spread_samples(pack_documents(tokenizer, held_out, tokens), windows)
    haystack = torch.tensor([token for ids in tokenize_documents(tokenizer, held_out[::20]) for token in ids[1:-1]])
    asked = questions(tokenizer, tokens, repeats, haystack)
    found: dict[str, Any] = {}
    perplexities = {}
    for name, place in models.items():
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        perplexities[name] = dense_perplexity(model, text, description=f"{name}: held-out text")
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "held_out_perplexity": asdict(Interval.of(perplexities[name])),
            "retrieval": by_task(asked, retrieval_scores(model, asked, autocast=False)),
        }
    if "embedded" in found:
        found["base"]["perplexity_versus_embedded"] = asdict(paired_difference(perplexities["embedded"], perplexities["base"]))
    return {"context": tokens, "windows": len(text), "questions": len(asked), "models": found}


def training_state(folder: Path) -> dict[str, Any]:
    """Step, minutes, history and recipe of the checkpoint that the export `folder` was made with.

    Raises:
        LemoError: If it is no export of `benchmarks.quality.base`, or its checkpoint is gone.
    """
    export = folder.resolve()
    place = export.with_name(export.name.replace("export-", "checkpoint-")) / "state.json"
    if not place.is_file() or place.parent == export:
        raise LemoError(f"export has no checkpoint beside it; {str(folder)!r}; give the newest model of benchmarks.quality.base")
    return json.loads(place.read_text())


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an export of benchmarks.quality.base")
    parser.add_argument("--machine", required=True, help="the machine's name in the result's file name")
    parser.add_argument("--windows", type=int, default=192, help="held-out windows (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="questions a task, haystack and depth (default: %(default)s)")
    args = parser.parse_args()
    state = training_state(args.folder)
    recipe = state["recipe"]
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {"recipe": recipe, "windows": args.windows, "repeats": args.repeats, "seed": SEED},
        "training": {
            "steps": state["step"],
            "minutes": state["minutes"],
            "tokens": state["step"] * recipe["batch_rows"] * recipe["context_length"],
            "history": state["history"],
        },
        "corpus": statistics(),
        **measure(args.folder, args.windows, args.repeats),
    }
    place = RESULTS / f"quality_{args.folder.name}--{args.machine}.json"
    place.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in result["models"].items():
        print(f"{name}: perplexity {found['held_out_perplexity']['value']:.2f}")
        for task, parts in found["retrieval"].items():
            print(f"  {task}: " + ", ".join(f"{part['right']:.2f} in {haystack}" for haystack, part in parts.items()))
    print(place)


if __name__ == "__main__":
    main()
