"""The kernels beside what they replace: right first, then how fast, as a share of what this device can copy.

    python benchmarks/kernel_times.py --out results.json --plot kernels.png        # on a GPU
    python benchmarks/kernel_times.py --tiny --out results.json                    # anywhere: sizes that an interpreter can bear

For each kernel, number of rows and kept share: set up, verify against the plain PyTorch formula, then time the kernel, the
formula ("naive": index, norm, zeros, scatter, add) and what `torch.compile` makes of the formula. A kernel that is wrong gets no
time, and the program ends with code 1. Seconds are medians with the 20th and 80th percentile, caches flushed between runs
(`triton.testing.do_bench`). `bytes` are what must move at least; their time at the bandwidth of a device-to-device copy,
measured in the same run, is the bound that `share_of_bound` compares with. Block scores are compared with the QK half of the
flash forward instead, the loss with the best library at hand, attention with ATen's flash operators.

(Not called kernels.py: `transformers` looks for a package of that name on the path.)
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from kernel_cases import CASES, Case, Setting, settings_of

from lemo_hf.profiling.provenance import provenance

ALLOWED = {torch.float32: 1e-5, torch.float16: 0.002, torch.bfloat16: 0.005}  # root-mean-square error over root mean square


def error_of(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    """Largest error ratio of a kernel's results, and whether all of them are as they must be."""
    worst, right = 0.0, True
    for got, wanted in zip(case.ours(), case.naive(), strict=True):
        if case.exact:
            right &= torch.equal(got, wanted)
        scale = wanted.double().square().mean().sqrt().clamp_min(1e-12)
        ratio = ((got.double() - wanted.double()).square().mean().sqrt() / scale).item()
        worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst, right and worst <= ALLOWED[dtype]


def seconds_of(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Median and 20th and 80th percentile of the run time."""
    if device.type == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(run, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8])
        return {"median": median / 1e3, "p20": low / 1e3, "p80": high / 1e3}
    run()
    start = time.perf_counter()
    run()
    taken = time.perf_counter() - start
    return {"median": taken, "p20": taken, "p80": taken}


def triton_version() -> str:
    """The triton in use."""
    import triton

    return triton.__version__


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a device-to-device copy reads and writes together."""
    size = 2**30 if device.type == "cuda" else 2**20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)["median"]


def measure(name: str, setting: Setting, bandwidth: float) -> dict[str, Any]:
    """One row of the result: sizes, error, and times unless it is wrong."""
    torch.manual_seed(0)
    case = CASES[name](setting)
    error, right = error_of(case, setting.dtype)
    row: dict[str, Any] = {
        "kernel": name, "rows": setting.rows, "keep": setting.keep, "dtype": str(setting.dtype).removeprefix("torch."),
        "error": error, "right": right, "bytes": case.bytes, "flops": case.flops,
    }  # fmt: skip
    if not right:
        return row
    runs = {"ours": case.ours, "naive": case.naive}
    if case.compiles:
        # For these sizes alone: after the other settings it would be compiled for any size, then no more, and run as it is.
        torch.compiler.reset()
        # Anew at each size, or it would give up after eight. Away from a GPU only that it can be compiled: code for the CPU
        # would compare nothing.
        torch._dynamo.reset()
        backend = "inductor" if setting.device.type == "cuda" else "eager"
        runs["compiled"] = torch.compile(case.naive, backend=backend, dynamic=False)
    runs |= case.others
    row["seconds"] = {label: seconds_of(run, setting.device) for label, run in runs.items()}
    median = row["seconds"]["ours"]["median"]
    if case.bytes:
        row["share_of_bound"] = case.bytes / bandwidth / median
    row["speed_up"] = {label: times["median"] / median for label, times in row["seconds"].items() if label != "ours"}
    if case.flops:
        row["flops_per_second"] = case.flops / median
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against rows, one panel a kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({row["kernel"] for row in rows if row["right"]})
    figure, panels = pyplot.subplots(1, max(1, len(names)), figsize=(3.2 * max(1, len(names)), 3), squeeze=False)
    for panel, name in zip(panels[0], names, strict=False):
        keeps = {row["keep"] for row in rows if row["kernel"] == name}
        keep = 0.5 if 0.5 in keeps else max(keeps)
        chosen = sorted(
            (row for row in rows if row["kernel"] == name and row["right"] and row["keep"] == keep), key=lambda row: row["rows"]
        )
        for label in chosen[0]["seconds"]:
            places = [row["rows"] for row in chosen]
            panel.plot(places, [1e3 * row["seconds"][label]["median"] for row in chosen], marker="o", label=label)
        panel.set(title=f"{name}, keep {keep:g}", xlabel="rows", ylabel="ms", xscale="log", yscale="log")
        panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes JSON and the plot; 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="picture of time against rows")
    parser.add_argument("--only", choices=sorted(CASES), action="append", help="this kernel only; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="sizes for triton's interpreter; the times then mean nothing")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("timing needs a GPU; none is there; use --tiny to see that it runs")
    device = torch.device("cpu" if args.tiny else "cuda")
    bandwidth = copy_bandwidth(device)
    rows = []
    for name in args.only or CASES:
        for setting in settings_of(name, args.tiny):
            rows.append(measure(name, setting, bandwidth))
            row = rows[-1]
            times = ", ".join(f"{label} {1e3 * times['median']:.3f} ms" for label, times in row.get("seconds", {}).items())
            print(
                f"{name:20s} rows {row['rows']:6d} keep {row['keep']:.1f} error {row['error']:.1e} {times or 'WRONG: not timed'}",
                flush=True,
            )
    document = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "triton": triton_version(),
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
