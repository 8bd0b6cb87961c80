"""What only a GPU can say about this package, in parts small enough for short leases of one.

    python benchmarks/gpu_suite.py --out results/            # again and again, until it says that all is there

Every part is one JSON file in `--out` and is skipped when that file is there; methods that take turns go on from
`<part>.unfinished.json`, process by process; a part that fails, or is killed, leaves
`<part>.failed.json` with the reason and is tried again, after those that were not tried yet. What the package warned of meanwhile
(a kernel that cannot run, and its reference does) stands in the file as `warnings`. Parts begin only while enough of `--seconds` is
left, and while the device answers: a kernel's fault ends its process, so the rest waits for the next call. Exit code 0: all there
and right; 1: a part failed; 3: parts are left to do. It runs from a checkout, whether the package is installed or not.

Parts by the beginning of their names, for `--part`. The order is that of a short lease: first that everything runs in bfloat16 and
is right, then the rows that all else is judged by, then the kernels' times, then the rest.

    runs                  every kernel compiles and runs at Llama-3-8B's sizes in bfloat16; one row each, with the reason of a failure
    training_<type>       every architecture in bfloat16, every form, both checkpointings, packed: first loss and gradients
                          against float32 on the CPU, then a few steps
    attention_*           flash operators and Triton kernels against dense float32 attention at real sizes, windows, offsets
                          beyond 2^31 elements, the same bits twice (ATen's where torch is to be deterministic)
    headline_<tokens>_<model>_*
                          methods of `lemo bench` on random weights of a model's shape, each in a process of its own, taking turns, what
                          they are held against among them (benchmarks/gpu_headline.py); peak bytes, tokens per second, phases
    times_*               benchmarks/kernel_times.py, one kernel at a time: times, memory, and whether goals are met
    movement_<tokens>     the share of a step that selection, prediction and movement take, beside its goal
    rows                  norms, LayerNorm included, gated MLP, rest rows and block features at real sizes against formulas, all gradients
    offsets               results of more than 2^31 numbers: taking, merging, norms, rotary positions, gated MLP
    waits                 a layer waits for the device nowhere in ratio and sampled mode, at most once with thresholds
    tests_*               the kernels' own tests on this device, bfloat16 included
    memory_check          some of these under compute-sanitizer; where that is not installed the file says so
    kept_keys             attention to kept and nearby keys, and the queries' gradient through dropped ones, against masks written out
    patterns              attention patterns among kept rows, flex attention's block masks among them, against masks written out
    paper_<tokens>_<model>
                          what the paper's figures draw, with PEFT's default adapters, likewise
    longest_<card>_*      the longest sample that trains in so much memory, from the estimated one down
    offload_equality      gradients with offload to the bit, before anything is timed
    offload_<tokens>_*    kept shares that fall with depth: no offload, sensitive, uniform at its peak; peak bytes, time, stalls
    quality_*             the quality bench's large base, trained in several parts, and its arms at 8192 tokens (docs/quality.md); base and
                          results stay in outputs/quality_gpu

`--tiny` runs the same code on the CPU with small sizes and triton's interpreter: that it runs, nothing else.
"""

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

# Both packages as they stand here.
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "torch-ext"))
sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # arms of different sizes follow one another

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
import gpu_headline
import gpu_memory_check
import gpu_movement
import gpu_offload
import kernel_times
from agreement import PartFailure, require
from gpu_attention import attention_offsets, run_attention, run_kept_keys, run_patterns
from gpu_checks import Scale, run_kernels, run_training
from gpu_rows import run_offsets, run_rows
from gpu_waits import run_waits
from kernel_cases import CASES

from lemo_hf.models import kernel_switch
from lemo_hf.profiling.estimate.model_shapes import shape_config
from lemo_hf.profiling.provenance import provenance
from lemo_hf.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "outputs" / "quality_gpu"
QUALITY_BASE_PARTS = 3
MODEL = gpu_headline.MODEL


@dataclass(frozen=True)
class Part:
    """One JSON file.

    Args:
        name: Its stem.
        seconds: How long it may take on an H200; of one that goes on later, a process of it.
        run: What makes it.
        goes_on: Whether `run` takes the file of what it has done so far and the seconds that it may begin processes in, and returns an
            `unfinished` document where some are left.
    """

    name: str
    seconds: float
    run: Callable[..., dict[str, Any]]
    goes_on: bool = False


def run_here(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, with the packages as they stand here."""
    paths = filter(None, [*sys.path[:2], os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def run_tests(path: Path, tiny: bool) -> dict[str, Any]:
    """One file's tests, the slow ones too, by pytest in a process of its own.

    It is the device that is asked here: what upstream releases warn of fails no test, as it does elsewhere.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-rf", "-m", "", str(path), *(("-k", "bits") if tiny else ())]
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        command += ["-W", f"ignore::{kind}"]
    if not tiny and importlib.util.find_spec("xdist"):
        command += ["-n", "6"]  # most of the time is compilation
    done = run_here(command, timeout=400)
    require(done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def headline_config(scale: Scale) -> Any:
    """The headline's shape, or a tiny one."""
    config = shape_config(MODEL)
    if scale.tiny:
        config = type(config)(**config.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160})  # fmt: skip
    return config


def run_quality(module: str, *options: str) -> dict[str, Any]:
    """A command of the quality bench, which keeps what it has done in `QUALITY` and goes on from there."""
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.quality.{module}", *options]
    done = run_here(command, timeout=500)
    require(done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:])
    results = sorted(QUALITY.glob("arms/*/*.json"), key=lambda path: path.stat().st_mtime) if module == "extension" else []
    return {"output": done.stdout[-2000:], "results": {path.name: json.loads(path.read_text()) for path in results[-1:]}}


def quality_parts() -> Iterator[Part]:
    """The large base, then its arms, the main ones with three seeds first."""
    base = str(QUALITY / "base_large")
    for number in range(1, QUALITY_BASE_PARTS + 1):
        training = partial(run_quality, "base", "--size", "large", "--out", base, "--minutes", "6.5")
        yield Part(f"quality_base_{number}", 480, training)
    common = ("--base", base, "--out", str(QUALITY), "--steps", "100", "--sizes", "full")
    arms = [f"{arm}:{seed}" for seed in (0, 1, 2) for arm in ("stock", "exact-0.5", "exact-0.3")]
    for arm in (
        *arms,
        *(f"exact-{share}:0" for share in (0.1, 0.2, 0.8, 0.05)),
        "keys-0.5:0",
        "keys-0.3:0",
        "sparse-0.5:0",
        "exact-0.5-true:0",
    ):
        yield Part(f"quality_{arm.replace(':', '_seed')}", 300, partial(run_quality, "extension", "--arms", arm, *common))


def run_offload(scale: Scale, mode: str, tokens: int, steps: int) -> dict[str, Any]:
    """One way to offload at the headline's shape."""
    return gpu_offload.run_offload(scale, headline_config(scale), MODEL, mode, tokens, steps)


def clock(scale: Scale) -> float:
    """Seconds, once the device is done."""
    if scale.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def run_times(scale: Scale, name: str) -> dict[str, Any]:
    """One kernel's times and peaks beside its goals, with its picture's data. What was measured before a failure stays."""
    found: dict[str, Any] = {"copy_bytes_per_second": kernel_times.copy_bandwidth(scale.device), "rows": []}
    try:
        for row in kernel_times.measure_all([name], scale.tiny, found["copy_bytes_per_second"]):
            found["rows"].append(row)
    except torch.AcceleratorError as error:
        raise PartFailure(f"the device failed; {kernel_times.reason_of(error)}", found) from error
    bad = [row for row in found["rows"] if not kernel_times.good(row)]
    if bad:
        raise PartFailure(json.dumps(bad), found)
    return found


def headline_parts(scale: Scale, first: bool) -> Iterator[Part]:
    """Groups of methods, those that come first or the others and the longest samples."""
    for group in gpu_headline.groups(scale.tiny):
        if group.first == first:
            yield Part(group.name, group.seconds, partial(gpu_headline.run_group, scale, group), goes_on=True)
    if not first and not scale.tiny:
        for name, method, gib in gpu_headline.longest_parts():
            yield Part(name, 480, partial(gpu_headline.run_longest, scale, method, gib))


def parts(scale: Scale) -> Iterator[Part]:
    """All parts in order; the seconds are bounds for an H200, compilation included."""
    types = ["mistral"] if scale.tiny else sorted(ARCHITECTURES, key=lambda model_type: model_type != "llama")
    training = [Part(f"training_{model_type}", 120, partial(run_training, scale, model_type)) for model_type in types]
    sizes = (16,) if scale.tiny else (128, 64, 256)
    attention = [Part(f"attention_{size}", 150, partial(run_attention, scale, size)) for size in sizes]
    yield Part("runs", 150, partial(run_kernels, scale))
    yield from (training[0], attention[0])
    yield from headline_parts(scale, first=True)
    for name in ("scatter_add",) if scale.tiny else CASES:
        yield Part(f"times_{name}", 170, partial(run_times, scale, name))
    for tokens, steps, seconds in ((64, 1, 60),) if scale.tiny else ((8192, 3, 120), (65536, 1, 200)):
        movement = partial(gpu_movement.run_movement, scale, headline_config(scale), tokens, steps)
        yield Part(f"movement_{tokens}", seconds, movement)
    yield from headline_parts(scale, first=False)
    yield from (*training[1:], *attention[1:])
    yield Part("attention_offsets", 60, partial(attention_offsets, scale))
    yield Part("rows", 120, partial(run_rows, scale))
    yield Part("offsets", 120, partial(run_offsets, scale))
    yield Part("waits", 120, partial(run_waits, scale))
    yield Part("kept_keys", 120, partial(run_kept_keys, scale))
    yield Part("patterns", 240, partial(run_patterns, scale))
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        # That kernels compile without a GPU is no question here.
        if path.stem == "test_loss_kernel" if scale.tiny else path.stem != "test_compiles_for_gpu":
            yield Part(path.stem.replace("test_", "tests_", 1), 240, partial(run_tests, path, scale.tiny))
    check = partial(gpu_memory_check.run_memory_check, ROOT / "tests" / "kernels", run_here, scale.tiny)
    yield Part("memory_check", 470, check)
    yield Part("offload_equality", 60, partial(gpu_offload.run_equality, scale))
    for mode in gpu_offload.MODES:
        tokens = 64 if scale.tiny else 65536
        yield Part(f"offload_{tokens}_{mode}", 300, partial(run_offload, scale, mode, tokens, 1))
    if not scale.tiny:
        yield from quality_parts()


class Warned(logging.Handler):
    """What the package warns of within its block, one line each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Warned":
        kernel_switch._say_once.cache_clear()  # each part says it for itself
        logging.getLogger("lemo_hf").addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger("lemo_hf").removeHandler(self)


def answers(scale: Scale) -> bool:
    """Whether the device still works: after an illegal access nothing does in this process."""
    try:
        clock(scale)
    except RuntimeError:
        return False
    return True


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a result whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1, default=str) + "\n")
    unfinished.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts that are not there yet and that time is left for; see the exit codes above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the result files")
    parser.add_argument("--part", action="append", help="parts whose names begin so; may be repeated")
    parser.add_argument("--seconds", type=float, default=520, help="time for this call (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("the suite is for a GPU; none is there; use --tiny to see that it runs")
    args.out.mkdir(parents=True, exist_ok=True)
    scale, began = Scale(args.tiny), time.monotonic()
    failed, left, works = [], [], True
    # What failed before comes last: it must not use up the time of every call.
    for part in sorted(parts(scale), key=lambda part: (args.out / f"{part.name}.failed.json").exists()):
        path, failure, unfinished = (args.out / f"{part.name}{kind}.json" for kind in ("", ".failed", ".unfinished"))
        if path.exists() or (args.part and not part.name.startswith(tuple(args.part))):
            continue
        spare = args.seconds - (time.monotonic() - began) - part.seconds
        if not works or spare < 0:
            left.append(part.name)
            continue
        start = time.monotonic()
        versions = {"torch_cuda": torch.version.cuda, "triton": kernel_times.triton_version()}
        document: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), **versions, "part": part.name}
        write(failure, document | {"failure": "it did not come to an end: killed, or the process died"})
        with Warned() as warned:
            try:
                document |= part.run(unfinished, spare) if part.goes_on else part.run()
            except Exception as error:  # whatever it is: the other parts still have something to say
                document |= getattr(error, "found", {})
                document["failure"] = "".join(traceback.format_exception(error))[-8000:]
                failed.append(part.name)
                path, works = failure, answers(scale)
        if path != failure and document.get("unfinished"):
            left.append(part.name)
            failure.unlink()
            print(f"{part.name}: goes on next time", flush=True)
            continue
        document["warnings"] = [*document.pop("warned", ()), *warned.lines]  # in processes of its own, and here
        document["seconds"] = time.monotonic() - start
        write(path, document)
        if path != failure:
            failure.unlink()
            unfinished.unlink(missing_ok=True)
        print(f"{part.name}: {'FAILED' if part.name in failed else 'there'} after {document['seconds']:.0f} s", flush=True)
    print(f"failed: {', '.join(failed) or 'none'}; left to do: {', '.join(left) or 'none'}")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
