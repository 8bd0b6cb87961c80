"""What benchmarks/paper_figures.py shows: the paper's figures and this repository's committed results."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemo_hf.errors import LemoError
from lemo_hf.profiling.bench.table import merged, peak_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER = ROOT / "benchmarks" / "paper_results.json"


@dataclass
class Results:
    """What is drawn.

    Args:
        paper: benchmarks/paper_results.json.
        estimates: What benchmarks/paper_estimates.py wrote.
        measured: Rows of `lemo bench` on a GPU.
        kernels: Rows of benchmarks/kernel_times.py on a GPU.
        gpu: Its name.
        sparsity: What benchmarks/sparsity_figures.py wrote.
        patterns: Rows of `lemo bench --counts-only` with attention patterns.
        offload: What benchmarks/sensitive_offload.py wrote.
        times: What benchmarks/paper_times.py wrote, rows of long steps under "long".
        pattern_source: Where `patterns` come from.
    """

    paper: dict[str, Any]
    estimates: dict[str, Any]
    measured: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    gpu: str = ""
    sparsity: dict[str, Any] | None = None
    patterns: list[dict[str, Any]] = field(default_factory=list)
    offload: dict[str, Any] | None = None
    times: dict[str, Any] | None = None
    pattern_source: str = ""

    def memory(self, model: str, seq_len: int, method: str) -> tuple[float, bool] | None:
        """Peak bytes of a method and whether they are measured; `None` if there is neither."""
        for rows, real in ((self.measured, True), (self.estimates["rows"], False)):
            for row in rows:
                if _is(row, model, seq_len, method) and (size := peak_bytes(row)):
                    return size, real
        return None

    def measured_seconds(self, model: str, seq_len: int, method: str) -> float | None:
        """Median seconds of a step on the GPU, if it was run there."""
        found = (row for row in self.measured if _is(row, model, seq_len, method) and row.get("summary"))
        return next((float(row["summary"]["median_seconds"]) for row in found), None)

    def seconds(self, model: str, seq_len: int, method: str) -> tuple[float, bool] | None:
        """Seconds of a step and whether they are measured; `None` if there is neither."""
        if (real := self.measured_seconds(model, seq_len, method)) is not None:
            return real, True
        rows = [] if self.times is None else [*self.times["rows"], *self.times["long"]]
        return next(((row["estimated_seconds"], False) for row in rows if _is(row, model, seq_len, method)), None)

    def estimate(self, model: str, seq_len: int, method: str) -> dict[str, Any]:
        """A row of the estimates."""
        key = (model, seq_len, method)
        return next(row for row in self.estimates["rows"] if (row["model"], row["seq_len"], row["method"]) == key)

    @property
    def words(self) -> dict[str, str]:
        """Methods in words, in the order of the estimates."""
        return {row["method"]: row["words"] for row in self.estimates["rows"]}


def _is(row: dict[str, Any], model: str, seq_len: int, method: str) -> bool:
    """Whether a row is of this configuration; one whose layers keep unlike shares is of another than its method's name says."""
    shares = ((row.get("settings") or {}).get("lemo") or {}).get("keep_ratio")
    return (row["model"], row["seq_len"], row["method"]) == (model, seq_len, method) and not isinstance(shares, list)


def read_results(folder: Path = RESULTS) -> Results:
    """The committed results.

    Raises:
        LemoError: If GPU results are of different commits or machines, or times of different commits.
    """
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    on_gpu = [
        one for one in documents if isinstance(one, dict) and isinstance(one.get("machine"), dict) and one["machine"].get("gpu")
    ]
    benched = [one for one in on_gpu if one.get("kind") == "lemo bench"]
    kernels = [row for one in on_gpu if str(one.get("part", "")).startswith("times_") for row in one["rows"]]
    names = list(dict.fromkeys(str(one["machine"]["gpu"]) for one in on_gpu))
    if len(names) > 1:
        raise LemoError(f"results of different GPUs on one page; {' and '.join(names)}; keep those of one in {folder}")
    name = names[0] if names else ""
    estimates = json.loads((folder / "paper_estimates--any.json").read_text())
    sparsity, offload, counts, short, long = (
        json.loads(path.read_text()) if (path := folder / f"{name}--any.json").exists() else None
        for name in ("sparsity", "sensitive_offload", "pattern_counts_llama3_8b", "paper_times_short", "paper_times_long")
    )
    if short and long and short["commit"] != long["commit"]:
        raise LemoError(
            f"times of different commits on one page; {short['commit']} and {long['commit']}; run benchmarks/paper_times.py"
        )
    times = short | {"long": long["rows"]} if short and long else None
    patterns = counts["rows"] if counts else []
    paper = json.loads(PAPER.read_text())
    source = f"{counts['date']}, commit {counts['commit']}" if counts else ""
    measured = merged(benched) if benched else []
    return Results(paper, estimates, measured, kernels, name, sparsity, patterns, offload, times, source)
