"""Writes the tables of README.md and docs/benchmarks.md from committed result files. `--check` only says whether they are current.

python benchmarks/update_readme.py [--check]
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goals import FILES, goals

from lemo_hf.profiling.bench.table import bench_table, merged, phase_table, source_line

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
    lines += [
        "",
        "Bytes and FLOPs of a layer alone: its speed is not measured, nor is perplexity at this size; the table of the small model has all "
        f"three. {source(result)}. Repeat: `python benchmarks/layer_arithmetic.py`.",
    ]
    return "\n".join(lines)


def estimate_error(result: dict[str, Any]) -> str:
    """How far `lemo estimate` is from measured peaks, in a sentence."""

    def within(rows: list[dict[str, Any]]) -> str:
        errors = sorted(abs(row["estimated_bytes"] / row["allocator_bytes"] - 1) for row in rows)
        return f"within {errors[-1]:.1%} of {{}}, half of the time within {errors[(len(errors) - 1) // 2]:.1%}".replace("%", " %")

    families = {row["model"] for row in result["cpu"] if row["model"].startswith("small ")}
    on_gpu = (
        f"{within(result['gpu']).format('the peak')}, on {len(result['gpu'])} steps on a GPU"
        if result["gpu"]
        else "no GPU has been compared yet"
    )
    return (
        f"`lemo estimate` is {within(result['cpu']).format('the allocator' + chr(39) + 's peak')}, on {len(result['cpu'])} real steps of "
        f"{len(families)} families on a CPU; {on_gpu} ([docs/memory.md](docs/memory.md); {result['date']}, commit {result['commit']}). "
        "It says nothing of perplexity."
    )


def bench(result: dict[str, Any], against: str | None = None) -> str:
    """What `lemo bench` found as Markdown: methods side by side, phases if steps were timed, and where it comes from."""
    parts = [bench_table(result["rows"], against)]
    if phases := phase_table(result["rows"]):
        parts.append(f"Seconds by phase of a step that is slowed by timing every operator:\n\n{phases}")
    return "\n\n".join([*parts, source_line(result)])


def long(result: dict[str, Any]) -> str:
    """As [`bench`], against what the goals at these lengths are: checkpointing with a fused loss."""
    return bench(result, "liger-checkpointing")


def headline(results: dict[str, Any]) -> str:
    """What benchmarks/gpu_suite.py measured of training steps as Markdown, one table a group of methods; or that it has not."""
    if not results:
        return (
            "Nothing was measured on a GPU yet: no file `benchmarks/results/headline_*.json` is there. "
            "`python benchmarks/gpu_suite.py --out benchmarks/results --part headline` writes them."
        )
    merged([*results.values()])  # refuses results of several commits or machines
    return "\n\n".join(bench(result) for result in results.values())


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Args:
        pattern: Of its result file in benchmarks/results, or patterns of them.
        render: Makes Markdown of the result, or of results by stem where there may be `several` or none.
        several: Whether it is of all files of the patterns.
    """

    pattern: str | tuple[str, ...]
    render: Callable[[Any], str]
    several: bool = False


# Page -> table name in it -> the table.
TABLES: dict[str, dict[str, Table]] = {
    "README.md": {
        "quickstart": Table("quickstart--*.json", quickstart),
        "layer_arithmetic": Table("layer_arithmetic--*.json", layer_arithmetic),
        "estimate_error": Table("memory_estimate--*.json", estimate_error),
    },
    "docs/benchmarks.md": {
        "headline": Table("headline_*.json", headline, several=True),
        "goals": Table(FILES, goals, several=True),
        "bench_small": Table("bench_small--*.json", bench),
        "bench_counts": Table("bench_counts_llama3_8b--*.json", bench),
        "bench_long": Table("bench_long_llama3_8b--*.json", long),
    },
}


def updated(text: str, page: str = "README.md") -> str:
    """A page's text with every table rendered anew.

    Raises:
        FileNotFoundError: If a table has no result file.
        ValueError: If it has several, or the page has no place for it.
    """
    for name, shown in TABLES[page].items():
        patterns = (shown.pattern,) if isinstance(shown.pattern, str) else shown.pattern
        found = sorted(path for pattern in patterns for path in RESULTS.glob(pattern))
        files = [path for path in found if not path.stem.endswith((".failed", ".unfinished"))]
        if not files and not shown.several:
            raise FileNotFoundError(f"table {name} has no result; {RESULTS / shown.pattern}; run its benchmark with --out")
        if len(files) > 1 and not shown.several:
            raise ValueError(f"table {name} has several results; {[f.name for f in files]}; keep the one to show")
        marked = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table:{name} -->)", re.DOTALL)
        results = {path.stem: json.loads(path.read_text()) for path in files}
        table = shown.render(results if shown.several else next(iter(results.values())))
        text, places = marked.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if places != 1:
            raise ValueError(f"{page} has {places} places for table {name}; it needs 1; add <!-- table:{name} --> markers")
    return text


def main() -> int:
    """Updates the pages, or with `--check` compares."""
    check, stale = "--check" in sys.argv[1:], []
    for page in TABLES:
        before = (ROOT / page).read_text()
        after = updated(before, page)
        if before != after:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(after)
    if check:
        print(f"stale: {', '.join(stale)}; run benchmarks/update_readme.py" if stale else "tables: current")
        return int(bool(stale))
    print(f"tables: written to {', '.join(stale) or 'no page, all were current'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
