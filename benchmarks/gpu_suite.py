"""What only a GPU can say about this package, in parts small enough for short leases of one.

    python benchmarks/gpu_suite.py --out results/            # again and again, until it says that all is there

Every part is one JSON file in `--out` and is skipped when that file is there; a part that fails, or is killed, leaves
`<part>.failed.json` and is tried again, after those that were not tried yet. Parts begin only while enough of `--seconds` is left,
and while the device answers: a kernel's fault ends its process, so the rest waits for the next call. Exit code 0: all there and
right; 1: a part failed; 3: parts are left to do. Parts, in order, by the beginning of their names for `--part`:

    tests_*               the kernels' own tests on this device, bfloat16 included
    attention_*           flash operators and Triton kernels against dense float32 attention at real sizes, windows, offsets
                          beyond 2^31 elements, the same bits twice
    training_<type>       every architecture in bfloat16, both forms, both checkpointings, packed: first loss and gradients
                          against float32 on the CPU, then a few steps
    headline_<tokens>_*   Llama-3-8B's shape with random weights: LeMo's arms beside stock LoRA with and without activation
                          checkpointing, and with Liger where it is installed; peak bytes, tokens per second, saved bytes
    times_*               benchmarks/kernel_times.py, one kernel at a time

`--tiny` runs the same code on the CPU with small sizes and triton's interpreter: that it runs, nothing else.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # arms of different sizes follow one another

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
import kernel_times
from gpu_checks import Scale, attention_offsets, require, run_attention, run_training
from kernel_cases import CASES
from torch import nn

from lemo_hf import LemoConfig
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.model_shapes import shape_config
from lemo_hf.profiling.provenance import provenance
from lemo_hf.profiling.step_model import StepSettings, build_model
from lemo_hf.registry import ARCHITECTURES

ROOT = Path(__file__).parents[1]
MODEL = "Llama-3-8B"


@dataclass(frozen=True)
class Part:
    """One JSON file: how long it may take on an H200, and what makes it."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


def run_tests(path: Path, tiny: bool) -> dict[str, Any]:
    """One file's tests, the slow ones too, by pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-rf", "-m", "", str(path), *(("-k", "bits") if tiny else ())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    require(done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def arms(tokens: int, tiny: bool) -> dict[str, StepSettings]:
    """The configurations of a headline row; base bfloat16, adapters float32 as PEFT makes them."""
    dtype = "float32" if tiny else "bfloat16"
    stock = {name: StepSettings(tokens, name.replace("_", "+"), dtype=dtype) for name in ("stock", "checkpointing")}
    if not tiny and has_liger():
        stock |= {name.replace("+", "_"): StepSettings(tokens, name, dtype=dtype) for name in ("liger", "liger+checkpointing")}
    ours = {}
    for form, selection in (("exact", "sampled"), ("sparse", "ratio")):
        for checkpoint in ("none", "kept_rows"):
            lemo = LemoConfig(attention_forward=form, selection=selection, keep_ratio=0.5, checkpoint=checkpoint)  # type: ignore[arg-type]
            ours[f"{form}_{checkpoint}"] = StepSettings(tokens, "lemo", lemo, dtype=dtype)
    return stock | ours


def has_liger() -> bool:
    """Whether Liger's kernels are installed."""
    return find_spec("liger_kernel") is not None


def headline_model(settings: StepSettings, scale: Scale) -> nn.Module:
    """The model on the device, with random weights."""
    config = shape_config(MODEL)
    if scale.tiny:
        config = type(config)(**config.to_dict() | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160})  # fmt: skip
    method = settings.method.replace("liger+", "").replace("liger", "stock")
    with scale.device:
        model = build_model(config, replace(settings, method=method), list(range(config.num_hidden_layers)))
    if settings.method.startswith("liger"):
        # The library itself; what step_model.py has in its place only allocates as it does.
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model.base_model.model)
    return model


def run_headline(scale: Scale, settings: StepSettings, steps: int) -> dict[str, Any]:
    """Time and memory of training steps; out of memory is a result."""
    torch.manual_seed(0)
    row: dict[str, Any] = {"model": MODEL, "method": settings.name, "estimate_settings": asdict(settings), "tiny": scale.tiny}
    cuda = scale.device.type == "cuda"
    try:
        model = headline_model(settings, scale)
        collect(cuda)
        row["resident_bytes"] = torch.cuda.memory_allocated() if cuda else None
        row |= timed_steps(model, settings, scale, steps)
    except torch.cuda.OutOfMemoryError as error:
        row["out_of_memory"] = " ".join(str(error).split())[:300]
    if cuda:
        row["peak_allocated_bytes"], row["peak_reserved_bytes"] = (
            torch.cuda.max_memory_allocated(),
            torch.cuda.max_memory_reserved(),
        )
        if "out_of_memory" in row:
            row["peak_before_failure_bytes"] = row.pop("peak_allocated_bytes")
    model = None  # type: ignore[assignment]  # before the next arm is built
    collect(cuda)
    return {"rows": [row]}


def timed_steps(model: nn.Module, settings: StepSettings, scale: Scale, steps: int) -> dict[str, Any]:
    """Runs steps of AdamW on the adapters: the first warms up and counts saved bytes, the last one (on a GPU) is profiled."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    shape = (settings.batch_size, settings.seq_len)
    tokens = torch.randint(0, 150, shape, device=scale.device)
    seconds, losses = [], []

    def step() -> None:
        start = clock(scale)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(clock(scale) - start)
        losses.append(loss.item())

    with ActivationMemory(model) as memory:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    saved = memory.saved.total
    loss.backward()
    optimizer.zero_grad(set_to_none=True)
    for _ in range(1 + steps):
        step()
    require(all(value == value for value in losses), f"a loss is not a number: {losses}")
    result = {
        "saved_bytes": saved, "losses": losses, "seconds": seconds[1:],
        "tokens_per_second": shape[0] * shape[1] / min(seconds[1:]), "kernel_seconds": profiled(step, scale),
    }  # fmt: skip
    return result


def profiled(step: Callable[[], None], scale: Scale) -> dict[str, float]:
    """Device seconds of the step's 60 most expensive kernels, by name: what selection, prediction and movement cost."""
    if scale.tiny:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        step()
    spent = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)[:60]
    return {event.key[:120]: event.self_device_time_total / 1e6 for event in spent}


def clock(scale: Scale) -> float:
    """Seconds, once the device is done."""
    if scale.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def collect(cuda: bool) -> None:
    """Returns what nobody holds, and begins peaks anew."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_times(scale: Scale, name: str) -> dict[str, Any]:
    """One kernel's times, with its picture's data."""
    device = scale.device
    bandwidth = kernel_times.copy_bandwidth(device)
    rows = [kernel_times.measure(name, setting, bandwidth) for setting in kernel_times.settings_of(name, scale.tiny)]
    require(all(row["right"] for row in rows), json.dumps([row for row in rows if not row["right"]]))
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


def parts(scale: Scale) -> Iterator[Part]:
    """All parts in order; the seconds are bounds for an H200, compilation included."""
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        if not scale.tiny or path.stem == "test_loss_kernel":
            yield Part(path.stem.replace("test_", "tests_", 1), 240, partial(run_tests, path, scale.tiny))
    for head_dim in (16,) if scale.tiny else (64, 128, 256):
        yield Part(f"attention_{head_dim}", 150, partial(run_attention, scale, head_dim))
    yield Part("attention_offsets", 60, partial(attention_offsets, scale))
    for model_type in ("mistral",) if scale.tiny else ARCHITECTURES:
        yield Part(f"training_{model_type}", 120, partial(run_training, scale, model_type))
    for tokens, steps, seconds in ((64, 1, 60),) if scale.tiny else ((8192, 3, 75), (65536, 1, 170)):
        chosen = arms(tokens, scale.tiny)
        for name, settings in [*chosen.items()][1::3] if scale.tiny else chosen.items():
            yield Part(f"headline_{tokens}_{name}", seconds, partial(run_headline, scale, settings, steps))
    for name in ("scatter_add",) if scale.tiny else CASES:
        yield Part(f"times_{name}", 170, partial(run_times, scale, name))


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
        path, failure = args.out / f"{part.name}.json", args.out / f"{part.name}.failed.json"
        if path.exists() or (args.part and not part.name.startswith(tuple(args.part))):
            continue
        if not works or args.seconds - (time.monotonic() - began) < part.seconds:
            left.append(part.name)
            continue
        start = time.monotonic()
        versions = {"torch_cuda": torch.version.cuda, "triton": kernel_times.triton_version()}
        document: dict[str, Any] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", **provenance(), **versions, "part": part.name}
        write(failure, document | {"failure": "it did not come to an end: killed, or the process died"})
        try:
            document |= part.run()
        except Exception as error:  # whatever it is: the other parts still have something to say
            document["failure"] = "".join(traceback.format_exception(error))[-8000:]
            failed.append(part.name)
            path, works = failure, answers(scale)
        document["seconds"] = time.monotonic() - start
        write(path, document)
        if path != failure:
            failure.unlink()
        print(f"{part.name}: {'FAILED' if part.name in failed else 'there'} after {document['seconds']:.0f} s", flush=True)
    print(f"failed: {', '.join(failed) or 'none'}; left to do: {', '.join(left) or 'none'}")
    return 1 if failed else 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
