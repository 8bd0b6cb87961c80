"""Does `lemo estimate` tell the truth? Estimates beside measured peaks, and the estimates that docs/memory.md shows.

    python benchmarks/memory_estimate.py [--check]

1. Real steps on the CPU, of the embedded model and of small models of every family, against their estimates. Measured twice: bytes
   of live tensors, and the CPU allocator's own record, which also knows what operators hold within themselves.
2. Estimates at 8B shapes for every method. No GPU is needed, so none of this says what one would allocate.
3. GPU peaks, where result files hold them: rows with `estimate_settings` (fields of `StepSettings`), `model` and `peak_allocated_bytes`.

`--check` only says whether docs/memory.md is what the committed result says.
"""

import argparse
import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers import logging as transformers_logging

from lemo_hf import LemoConfig
from lemo_hf.profiling.baselines.baseline import Baseline
from lemo_hf.profiling.estimate.cards import ASSUMED, GIB, find_card
from lemo_hf.profiling.estimate.estimator import ALLOCATOR_SLACK, CUDA_CONTEXT, Estimator
from lemo_hf.profiling.estimate.plot import plot_memory
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model
from lemo_hf.profiling.estimate.step_trace import record_step
from lemo_hf.profiling.estimate.tables import estimate_methods
from lemo_hf.profiling.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# "any": bytes are the same on every machine.
RESULT = RESULTS / "memory_estimate--any.json"
PAGE = ROOT / "docs" / "memory.md"
FIGURE = ROOT / "docs" / "images" / "memory_by_length.png"
EMBEDDED = ROOT / "lemo_hf" / "assets" / "python-llama-4m"
CARD = "H100"
SHOWN = (("Llama-3-8B", (8192, 65536)), ("Qwen3-8B", (32768,)))
_SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
}
_GATED = _SMALL | {"intermediate_size": 448, "num_key_value_heads": 2, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": None},
    "qwen2": _GATED,
    "qwen3": _GATED,
    "opt": _SMALL | {"ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.0, "attention_dropout": 0.0},
}


def compared_settings(seq_len: int) -> list[StepSettings]:
    """The steps that are run for comparison: stock, checkpointing, and LeMo in every form."""
    settings = [StepSettings(seq_len, method, adapter_dtype="bfloat16") for method in ("stock", "checkpointing")]
    forms = [("exact", 0.5, "none"), ("exact", 0.25, "kept_rows"), ("sparse", 0.5, "kept_rows")]
    for form, keep, checkpoint in (*forms, ("kept_keys", 0.5, "none"), ("kept_keys", 0.25, "kept_rows")):
        lemo = LemoConfig(attention_forward=form, keep_ratio=keep, checkpoint=checkpoint, segment_size=256)  # type: ignore[arg-type]
        settings.append(StepSettings(seq_len, "lemo", lemo, adapter_dtype="float32"))
    return settings


def measure(config: PreTrainedConfig, settings: StepSettings) -> dict[str, int]:
    """Peaks of a real step on the CPU, in bytes: live tensors, and the allocator's record. AdamW's moments are added to both."""
    torch.manual_seed(0)
    model = build_model(config, settings, list(range(config.num_hidden_layers)))
    input_ids = torch.randint(0, config.vocab_size, (settings.batch_size, settings.seq_len))
    before = sum(tensor.untyped_storage().nbytes() for tensor in (*model.parameters(), *model.buffers(), input_ids))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        live = record_step(model, input_ids, settings).peak_bytes
    optimizer = _optimizer_bytes(model)
    return {"live_bytes": live + optimizer, "allocator_bytes": before + _highest(record) + optimizer}


def _highest(record: Any) -> int:
    now = highest = 0
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def _optimizer_bytes(model: nn.Module) -> int:
    """AdamW's moments after a step, counted in the optimizer itself."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    optimizer.step()
    states = [state for of_weight in optimizer.state.values() for name, state in of_weight.items() if name != "step"]
    return sum(state.untyped_storage().nbytes() for state in states)


def compare_on_cpu() -> list[dict[str, Any]]:
    """Rows of estimates beside real steps."""
    models = [("python-llama-4m", AutoConfig.from_pretrained(EMBEDDED), 2048)]
    models += [(f"small {family}", AutoConfig.for_model(family, **values), 1024) for family, values in FAMILIES.items()]
    rows = []
    for name, config, seq_len in models:
        estimator = Estimator(config, on_gpu=False)
        for settings in compared_settings(seq_len):
            found, estimated = measure(config, settings), estimator.estimate(settings)
            row = {
                "model": name,
                "method": settings.name,
                "settings": asdict(settings),
                "estimated_bytes": estimated.live_bytes,
                **found,
            }
            print(
                f"{name:18s} {settings.name:42s} {estimated.live_bytes / found['live_bytes'] - 1:+.3%} {estimated.moment}",
                flush=True,
            )
            rows.append(row)
    return rows


def estimate_shapes() -> list[dict[str, Any]]:
    """Rows of estimates at the shapes of `SHOWN`, with bf16 adapters, on `CARD`."""
    rows = []
    for model, lengths in SHOWN:
        estimator = Estimator(model, card=find_card(CARD))
        longest: dict[str, int] = {}
        for seq_len in lengths:
            for one in estimate_methods(estimator, StepSettings(seq_len, adapter_dtype="bfloat16")):
                if one.settings.name not in longest:
                    longest[one.settings.name] = estimator.longest(one.settings)
                activations = sum(one.activations.values())
                row = {"model": model, "seq_len": seq_len, "method": one.settings.name, "settings": asdict(one.settings)}
                row |= {"parts": one.parts, "activation_bytes": activations, "live_bytes": one.live_bytes}
                row |= {"total_bytes": one.total_bytes, "moment": one.moment, "flops": sum(one.flops.values())}
                row |= {"seconds": one.seconds, "seconds_at_least": one.seconds_at_least, "longest": longest[one.settings.name]}
                rows.append(row)
                print(
                    f"{model} {seq_len} {one.settings.name}: {one.total_bytes / GIB:.1f} GiB, longest {row['longest']}",
                    flush=True,
                )
    return rows


def compare_on_gpu(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of estimates beside GPU peaks from result files; none where no file holds any."""
    rows = []
    for path in sorted(results.glob("*.json")):
        document = json.loads(path.read_text())
        for row in document.get("rows", []) if isinstance(document, dict) else []:
            if not {"estimate_settings", "model", "peak_allocated_bytes"} <= row.keys():
                continue
            fields = dict(row["estimate_settings"])
            fields["lemo"] = LemoConfig.from_dict(fields["lemo"]) if fields.get("lemo") else None
            fields["targets"] = tuple(fields.get("targets", ()))
            fields["baseline"] = Baseline(**fields["baseline"]) if fields.get("baseline") else None
            estimated = Estimator(row["model"]).estimate(StepSettings(**fields))
            rows.append(
                {
                    "model": row["model"],
                    "method": estimated.settings.name,
                    "seq_len": estimated.settings.seq_len,
                    "source": path.name,
                    "estimated_bytes": estimated.live_bytes,
                    "allocator_bytes": row["peak_allocated_bytes"],
                }
            )
    return rows


def shapes_table(rows: list[dict[str, Any]]) -> str:
    """Estimates at 8B shapes as Markdown."""
    lines = [
        "| model, tokens | method | needed, GiB | of it weights | activations | loss | workspace | TFLOP | s on an H100 (at least) | longest in 79.6 GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        parts = row["parts"]
        sizes = [parts["weights"], row["activation_bytes"], parts.get("loss", 0), parts.get("workspace", 0)]
        cells = [f"{row['model']}, {row['seq_len']}", row["method"], f"{row['total_bytes'] / GIB:.1f}"]
        cells += [f"{size / GIB:.1f}" for size in sizes]
        cells += [f"{row['flops'] / 1e12:.0f}", f"{row['seconds']:.2f} ({row['seconds_at_least']:.2f})", f"{row['longest']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Estimates beside measurements as Markdown."""
    if not rows:
        return "No result file holds a measurement of this kind yet."
    lines = [
        "| model | method | estimated, MiB | live tensors | allocator | difference |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        estimated, allocator = row["estimated_bytes"], row["allocator_bytes"]
        live = f"{row['live_bytes'] / 2**20:.2f}" if "live_bytes" in row else "-"
        lines.append(
            f"| {row['model']} | {row['method']} | {estimated / 2**20:.2f} | {live} | {allocator / 2**20:.2f} "
            f"| {(estimated / allocator - 1):+.2%} |"
        )
    return "\n".join(lines)


def updated(page: str, result: dict[str, Any]) -> str:
    """The page with its tables rendered anew.

    Raises:
        ValueError: If it has no place for one.
    """
    versions = result["versions"]
    source = f"{result['date']}, commit {result['commit']}, torch {versions['torch']}, transformers {versions['transformers']}."
    repeat = f"{source} Repeat: `python benchmarks/memory_estimate.py`."
    tables = {
        "shapes": shapes_table(result["shapes"]) + f"\n\n{repeat}",
        "cpu": comparison_table(result["cpu"]) + f"\n\n{repeat}",
        "gpu": comparison_table(result["gpu"]),
        "assumed": (
            f"allocator slack {ALLOCATOR_SLACK:.0%} of what is not resident; CUDA context {CUDA_CONTEXT / GIB:.1f} GiB; products "
            f"{ASSUMED.products:.0%}, attention {ASSUMED.attention:.0%}, movement {ASSUMED.movement:.0%} of the card's peaks."
        ),
    }
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        page, found = marked.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page)
        if found != 1:
            raise ValueError(f"docs/memory.md has {found} places for table {name}; it needs 1; add <!-- table:{name} --> markers")
    return page


def main() -> int:
    """Measures, writes the result and the page; with `--check` compares the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    page = PAGE.read_text()
    if args.check:
        current = updated(page, json.loads(RESULT.read_text())) == page
        print("docs/memory.md: current" if current else "docs/memory.md: stale; run benchmarks/memory_estimate.py")
        return int(not current)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    result = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), "card": asdict(find_card(CARD))}
    result |= {"cpu": compare_on_cpu(), "gpu": compare_on_gpu(), "shapes": estimate_shapes()}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(updated(page, result))
    drawn = Estimator(SHOWN[0][0], card=find_card(CARD))
    plot_memory(drawn, StepSettings(65536, adapter_dtype="bfloat16"), FIGURE, 131072)
    print(f"wrote {RESULT} and {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
