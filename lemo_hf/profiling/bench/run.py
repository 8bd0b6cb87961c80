"""`lemo bench`: every method in a process of its own, taking turns (A B C A B C), and one result file.

Turns, because a machine's speed drifts; processes, because allocators, caches and kernels remember. What one method cannot do here
(no CUDA, no Liger) is refused if it was asked for by name and listed with its reason under "all".
"""

import difflib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...errors import LemoError
from ...hub.lemo_files import read_json, write_json
from ...loading import model_location
from ..estimate.estimator import Estimator
from ..estimate.model_shapes import SHAPES, read_model_config, stock_type
from ..estimate.step_model import StepSettings
from ..provenance import provenance
from .counts import counted_step
from .methods import ChosenMethod, choose_methods
from .step import summary
from .table import with_perplexity

SMALL_MODEL = "python-llama-4m"
KIND = "lemo bench"


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Args:
        model: A shape's name, the embedded model's, a config.json, a folder with one, or a Hub id.
        seq_lens: Tokens of a sample, one row of the table each.
        methods: As [`choose_methods`] reads them.
        steps: Timed steps in each process.
        repeats: Processes of each method.
        batch_size: Samples of a step.
        dtype: Float type of the base model; bfloat16 on CUDA and float32 on a CPU if empty.
        device: "cuda" or "cpu"; CUDA where there is one if empty.
        counts_only: Nothing is run: bytes and FLOPs are those of `lemo estimate`, the same on every machine.
        perplexity: A quickstart's result, whose dense perplexities are put beside the rows of the same configuration.
        counts: Whether saved bytes and FLOPs are counted, by two steps more of each method.
    """

    model: str
    seq_lens: tuple[int, ...]
    methods: str
    steps: int = 3
    repeats: int = 3
    batch_size: int = 1
    dtype: str = ""
    device: str = ""
    counts_only: bool = False
    perplexity: Path | None = None
    counts: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise LemoError(f"{name} must be at least 1; got {getattr(self, name)}; set it to 1 or more")
        if self.device not in ("", "cpu", "cuda"):
            raise LemoError(f"no such device; {self.device!r}; choose cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise LemoError("no CUDA device is there; device 'cuda'; leave out --device, or add --counts-only")

    @property
    def on(self) -> torch.device:
        """The device that steps run on; estimates are for CUDA."""
        if self.counts_only:
            return torch.device("cuda")
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def float_type(self) -> str:
        """The base model's."""
        return self.dtype or ("bfloat16" if self.on.type == "cuda" else "float32")


def bench_config(model: str) -> PreTrainedConfig:
    """The config of a model to measure.

    Raises:
        LemoError: If there is none; it names the nearest shape.
    """
    names = {name.lower(): name for name in (*SHAPES, SMALL_MODEL)}
    if model.lower() not in names and "/" not in model and not Path(model).exists():
        near = difflib.get_close_matches(model.lower(), names, n=1)
        hint = f"did you mean {names[near[0]]!r}?" if near else f"choose one of {', '.join(names.values())}"
        raise LemoError(f"no such model shape; {model!r}; {hint}")
    return read_model_config(model_location(model))


def run_bench(
    options: BenchOptions, out: Path | None = None, say: Callable[[str], None] = print, seconds: float = math.inf
) -> dict[str, Any]:
    """Measures and returns the result document; `out` is written after every process, so that a kill loses one.

    What `out` holds of the same options, code and machine is gone on with where it is unfinished or a method failed.

    Args:
        options: What is measured.
        out: JSON file.
        say: Gets a line of progress.
        seconds: No process begins later than this; the document is `unfinished` then, if any is left to run.

    Raises:
        LemoError: If a method, the model or a number cannot be honoured.
    """
    config = bench_config(options.model)
    methods, left_out = _able(options, config)
    # Read before anything is run: a wrong file is said at once.
    quality = read_json(options.perplexity) if options.perplexity else None
    if quality is not None and not quality.get("config", {}).get("arms"):
        raise LemoError(
            f"file is no quickstart's result; {str(options.perplexity)!r} has no arms; give benchmarks/results/quickstart--*.json"
        )
    began = time.monotonic()
    document = heading(options) | {"left_out": left_out, "rows": []}
    for name, reason in left_out.items():
        say(f"{name}: left out, {reason}")
    places = [(seq_len, chosen) for seq_len in options.seq_lens for chosen in methods]
    document["rows"] = [
        new_row(options.model, seq_len, chosen, chosen.settings(seq_len, options.float_type)) for seq_len, chosen in places
    ]
    if out is not None and not options.counts_only and (done := _done_before(out, document)) is not None:
        document["rows"] = done
        say(f"going on with {out}: {sum(len(row['repeats']) for row in done)} processes have run")
    planned = list(zip(places, document["rows"], strict=True))
    if options.counts_only:
        estimator = Estimator(config)
        for (seq_len, chosen), row in planned:
            row |= counted_step(estimator, chosen.settings(seq_len, options.float_type, options.batch_size))
            say(f"{seq_len} {chosen.name}: {row['estimated_bytes'] / 2**30:.2f} GiB")
    for repeat in range(0 if options.counts_only else options.repeats):
        for (seq_len, chosen), row in planned:
            if "out_of_memory" in row or "failed" in row or len(row["repeats"]) > repeat:
                continue
            if time.monotonic() - began > seconds:
                return document | {"unfinished": True}
            counts = options.counts and not row["repeats"]
            take_result(row, _run_process(options, chosen, seq_len, counts), seq_len * options.batch_size)
            say(f"{repeat + 1}/{options.repeats} {seq_len} {chosen.name}: {_progress(row)}")
            if out is not None:
                write_json(out, document | {"unfinished": True})
    if quality is not None:
        for row in document["rows"]:
            row["perplexity"] = with_perplexity(row, quality, Path(str(options.perplexity)).name)
    if out is not None:
        write_json(out, document)
    return document


def _able(options: BenchOptions, config: PreTrainedConfig) -> tuple[list[ChosenMethod], dict[str, str]]:
    able, left_out = [], {}
    for chosen in choose_methods(options.methods):
        reason = chosen.obstacle(options.on, stock_type(config))
        if options.counts_only:
            # Liger is computed from what its functions allocate; what offload leaves on the device is not.
            reason = "what offload leaves on the device is not estimated" if chosen.method.offloads else reason
            reason = None if reason == "liger_kernel is not installed" else reason
        if reason is None:
            able.append(chosen)
        elif options.methods.strip() != "all":
            raise LemoError(f"{chosen.name} cannot run here; {reason}; leave it out")
        else:
            left_out[chosen.name] = reason
    return able, left_out


def _done_before(out: Path, document: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Rows that `out` holds of this very measurement, without what failed; `None` if it holds none, or nothing is left to do."""
    if not out.is_file():
        return None
    try:
        found = read_json(out)
    except LemoError:
        return None  # it will be written anew
    rows: list[dict[str, Any]] = found.get("rows", [])
    if not found.get("unfinished") and not any("failed" in row for row in rows):
        return None
    same = [name for name in document if name not in ("date", "rows")]
    if any(found.get(name) != document[name] for name in same) or len(rows) != len(document["rows"]):
        return None
    return [{name: value for name, value in row.items() if name != "failed"} for row in rows]


def heading(options: BenchOptions) -> dict[str, Any]:
    """A result document without its rows: kind, date, where it comes from, and the whole config."""
    found: dict[str, Any] = {"kind": KIND, "date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance()}
    found["cuda"] = torch.version.cuda
    found["config"] = {
        "model": options.model,
        "seq_lens": list(options.seq_lens),
        "methods": options.methods,
        "steps": options.steps,
        "repeats": options.repeats,
        "batch_size": options.batch_size,
        "dtype": options.float_type,
        "device": "estimated for CUDA" if options.counts_only else str(options.on),
        "lora": "r=8 on attention's projections",
        "weights": "random",
    }
    if options.counts_only:
        found["machine"] = "any"
    return found


def new_row(model: str, seq_len: int, chosen: ChosenMethod, settings: StepSettings) -> dict[str, Any]:
    """A row before anything is measured."""
    return {
        "model": model,
        "method": chosen.name,
        "words": chosen.words,
        "seq_len": seq_len,
        "adapters": settings.adapter_dtype,
        "kept_share": chosen.keep,
        "offload": chosen.method.offloads,
        "perplexity": None,
        "repeats": [],
    }


def _run_process(options: BenchOptions, chosen: ChosenMethod, seq_len: int, counts: bool) -> dict[str, Any]:
    job = {
        "model": options.model,
        "method": chosen.name,
        "seq_len": seq_len,
        "batch_size": options.batch_size,
        "dtype": options.float_type,
        "device": str(options.on),
        "steps": options.steps,
        "counts": counts,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "job.json", Path(folder) / "result.json"
        given.write_text(json.dumps(job))
        command = [sys.executable, "-m", "lemo_hf.profiling.bench.step", str(given), str(found)]
        # It imports what this process does, from a checkout that is not installed too.
        paths = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, capture_output=True, text=True, env=paths)
        if done.returncode or not found.exists():
            return {"failed": f"exit code {done.returncode}: {' '.join(done.stderr.split()[-40:])}"}
        result: dict[str, Any] = json.loads(found.read_text())
    if "refused" in result:
        raise LemoError(result["refused"])
    return result


def take_result(row: dict[str, Any], result: dict[str, Any], tokens: int) -> None:
    """Puts one process's result into its row.

    Args:
        row: The row; changed.
        result: As [`measure_step`] returns it, with `settings`.
        tokens: Tokens of a step.
    """
    if "settings" in result:
        row["settings"] = result.pop("settings")
    if "out_of_memory" in result or "failed" in result:
        row |= result
        return
    counted = ("saved_bytes", "saved_by_part", "saved_by_layer", "flops", "flops_by_part", "live_peak_bytes", "resident_bytes")
    row |= {name: result.pop(name) for name in counted if name in result}
    row["repeats"].append(result)
    row["summary"] = summary(row["repeats"], tokens)
    if "peak_allocated_bytes" in row["summary"] and not row["offload"]:
        # What benchmarks/memory_estimate.py compares its estimates with.
        row |= {"estimate_settings": row["settings"], "peak_allocated_bytes": row["summary"]["peak_allocated_bytes"]}


def _progress(row: dict[str, Any]) -> str:
    if "out_of_memory" in row or "failed" in row:
        return "out of memory" if "out_of_memory" in row else f"failed, {row['failed']}"
    warned = "".join(f"; warned: {line}" for line in row["repeats"][-1].get("warnings", ()))
    return f"{row['summary']['median_seconds']:.2f} s a step{warned}"
