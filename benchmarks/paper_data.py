"""What benchmarks/paper_figures.py shows: the paper's figures and this repository's committed results."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """

    paper: dict[str, Any]
    estimates: dict[str, Any]
    measured: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    gpu: str = ""
    sparsity: dict[str, Any] | None = None

    def memory(self, model: str, seq_len: int, method: str) -> tuple[float, bool] | None:
        """Peak bytes of a method and whether they are measured; `None` if there is neither."""
        for rows, real in ((self.measured, True), (self.estimates["rows"], False)):
            for row in rows:
                if (row["model"], row["seq_len"], row["method"]) == (model, seq_len, method) and (size := peak_bytes(row)):
                    return size, real
        return None

    def estimate(self, model: str, seq_len: int, method: str) -> dict[str, Any]:
        """A row of the estimates."""
        key = (model, seq_len, method)
        return next(row for row in self.estimates["rows"] if (row["model"], row["seq_len"], row["method"]) == key)

    @property
    def words(self) -> dict[str, str]:
        """Methods in words, in the order of the estimates."""
        return {row["method"]: row["words"] for row in self.estimates["rows"]}


def read_results(folder: Path = RESULTS) -> Results:
    """The committed results.

    Raises:
        LemoError: If GPU results are of different commits or machines.
    """
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    on_gpu = [
        one for one in documents if isinstance(one, dict) and isinstance(one.get("machine"), dict) and one["machine"].get("gpu")
    ]
    benched = [one for one in on_gpu if one.get("kind") == "lemo bench"]
    kernels = [row for one in on_gpu if str(one.get("part", "")).startswith("times_") for row in one["rows"]]
    name = next((str(one["machine"]["gpu"]) for one in on_gpu), "")
    estimates = json.loads((folder / "paper_estimates--any.json").read_text())
    path = folder / "sparsity--any.json"
    sparsity = json.loads(path.read_text()) if path.exists() else None
    return Results(json.loads(PAPER.read_text()), estimates, merged(benched) if benched else [], kernels, name, sparsity)
