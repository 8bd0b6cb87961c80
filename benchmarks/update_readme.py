"""Writes the tables of README.md from committed result files. `--check` only says whether they are current.

python benchmarks/update_readme.py [--check]
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def source(result: dict[str, Any]) -> str:
    """One line that says where figures come from."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{result['date']}, commit {result['commit']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{machine['processor']}, {machine['threads']} threads"
    )


def quickstart(result: dict[str, Any]) -> str:
    """The quickstart's table as Markdown: one row per arm, memory, speed and perplexity together."""
    seconds, arms = result["step_seconds_in_turns"], result["arms"]
    stock = arms["stock"]
    lines = [
        "| 4096 tokens, kept share 0.5 | saved for backward | FLOPs a step | step time | recall (chance) "
        "| dense perplexity, equal steps | against stock, 95 % interval | equal time, phases included | against stock, 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, arm in arms.items():
        saved, saved_stock = (sum(a["saved_bytes"].values()) for a in (arm, stock))
        recall = "-" if arm["recall"] is None else f"{sum(arm['recall']) / len(arm['recall']):.3f} ({arm['chance']:.2f})"
        versus = {when: arm["versus_stock"].get(when, {}).get("text", "-") for when in ("equal_steps", "equal_time")}
        later = arm["perplexity"].get("equal_time")
        cells = [
            arm["title"],
            f"{saved / 2**20:.0f} MiB ({saved / saved_stock:.2f})",
            f"{arm['flops'] / stock['flops']:.2f}",
            f"{seconds[name]:.2f} s ({seconds['stock'] / seconds[name]:.2f}x)",
            recall,
            f"{arm['perplexity']['equal_steps']:.3f}",
            versus["equal_steps"],
            "-" if later is None else f"{later:.3f} ({arm['steps_at_equal_time']} steps)",
            versus["equal_time"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    config = result["config"]
    lines += [
        "",
        f"Before training {result['perplexity_before']:.3f}. {config['steps']} steps, batch {config['batch']}, {config['dtype']}, "
        f"LoRA {config['lora']}, constant learning rate {config['learning_rate']:g}. {source(result)}. Repeat: `make quickstart`.",
    ]
    return "\n".join(lines)


def layer_arithmetic(result: dict[str, Any]) -> str:
    """Saved rows and FLOPs of a layer as Markdown."""
    lines = ["| | adapters | saved a token, in rows of H | of stock | FLOPs of stock |", "| --- | --- | ---: | ---: | ---: |"]
    for row in result["rows"]:
        lines.append(
            f"| {row['arm']} | {row['adapters']} | {row['saved_rows_of_h']:.2f} | {row['saved_of_stock']:.3f} "
            f"| {row['flops_of_stock']:.3f} |"
        )
    lines += ["", f"{source(result)}. Repeat: `python benchmarks/layer_arithmetic.py`."]
    return "\n".join(lines)


# Table name in README.md -> (pattern of its result file, what renders it).
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "quickstart": ("quickstart--*.json", quickstart),
    "layer_arithmetic": ("layer_arithmetic--*.json", layer_arithmetic),
}


def updated(text: str) -> str:
    """README text with every table rendered anew.

    Raises:
        FileNotFoundError: If a table has no result file.
        ValueError: If it has several, or README.md has no place for it.
    """
    for name, (pattern, render) in TABLES.items():
        files = sorted(RESULTS.glob(pattern))
        if not files:
            raise FileNotFoundError(f"table {name} has no result; {RESULTS / pattern}; run its benchmark with --out")
        if len(files) > 1:
            raise ValueError(f"table {name} has several results; {[f.name for f in files]}; keep the one to show")
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        table = render(json.loads(files[0].read_text()))
        text, found = marked.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"README.md has {found} places for table {name}; it needs 1; add <!-- table:{name} --> markers")
    return text


def main() -> int:
    """Updates README.md, or with `--check` compares."""
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = updated(before)
    if "--check" in sys.argv[1:]:
        print("README tables: current" if before == after else "README tables: stale; run benchmarks/update_readme.py")
        return int(before != after)
    readme.write_text(after)
    print("README tables: written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
