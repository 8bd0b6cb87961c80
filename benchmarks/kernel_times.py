"""The kernels beside what they replace: right first, then how fast, as a share of what this device can copy.

    python benchmarks/kernel_times.py --out results.json --plot kernels.png        # on a GPU
    python benchmarks/kernel_times.py --tiny --out results.json                    # anywhere: sizes that an interpreter can bear

For each kernel, number of rows and kept share: set up, verify against the plain PyTorch formula, then time the kernel, the
formula ("naive": index, norm, zeros, scatter, add) and what `torch.compile` makes of the formula. A kernel that is wrong gets no
time, and the program ends with code 1; so it does where a setting fails, whose row then holds the reason (`failure`). What fails
beside a kernel (its formula, another library) has its reason in `failures`, a library that is not here in `missing`. The JSON is
written after each row. Seconds are medians with the 20th and 80th percentile, caches flushed between runs
(`triton.testing.do_bench`). `bytes` are what must move at least; their time at the bandwidth of a device-to-device copy,
measured in the same run, is the bound that `share_of_bound` compares with. Block scores are compared with the QK half of the
flash forward instead, the loss with the best library at hand, attention with ATen's flash operators. `peak_bytes` are the most
that a run allocates beside its inputs. Against the goals (kernel_goals.py) each row says met, missed or why that is not known.

(Not called kernels.py: `transformers` looks for a package of that name on the path.)
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import kernel_goals
from agreement import ALLOWED, error_ratio
from kernel_cases import CASES, settings_of
from kernel_setting import Case, Setting

from lemo_hf.profiling.live_bytes import LiveBytes
from lemo_hf.profiling.provenance import provenance


def error_of(case: Case, dtype: torch.dtype) -> tuple[float, bool]:
    """Largest error ratio of a kernel's results, and of the formula's that is compiled, and whether all are as they must be."""
    worst, right = 0.0, True
    wanted = case.naive()
    for run in (case.ours, case.formula):
        for one, other in zip(run(), wanted, strict=True) if run is not None else ():
            if case.exact:
                right &= torch.equal(one, other)
            worst = max(worst, error_ratio(one, other))
    return worst, right and worst <= case.allowed * ALLOWED[dtype]


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


def peak_bytes_of(run: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a run allocates at one time, its result among them; its inputs are there already."""
    if device.type == "cpu":
        with LiveBytes(torch.nn.Module()) as live:
            run()
        return live.peak_bytes
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def reason_of(failure: Exception) -> str:
    """A failure in one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:500]}"


def set_up(name: str, setting: Setting) -> Case:
    """A kernel's case, the same numbers every time; what earlier ones left behind is returned first."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    return CASES[name](setting)


def arms_of(case: Case, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    runs = {"ours": case.ours, "naive": case.naive}
    if case.compiles:
        # For these sizes alone: after the other settings it would be compiled for any size, then no more, and run as it is.
        torch.compiler.reset()
        # Anew at each size, or it would give up after eight. Away from a GPU only that it can be compiled: code for the CPU
        # would compare nothing.
        torch._dynamo.reset()
        backend = "inductor" if device.type == "cuda" else "eager"
        runs["compiled"] = torch.compile(case.formula or case.naive, backend=backend, dynamic=False)
    return runs | case.libraries | case.others


def measure(name: str, setting: Setting, bandwidth: float) -> dict[str, Any]:
    """One row of the result: sizes, error, and times and memory unless it is wrong.

    Args:
        name: Of the kernel.
        setting: The sizes.
        bandwidth: Bytes per second of a device's copy, read and written together.

    Raises:
        torch.AcceleratorError: If the device does not work any more; every other failure stands in the row.
    """
    row: dict[str, Any] = {
        "kernel": name, "rows": setting.rows, "keep": setting.keep, "dtype": str(setting.dtype).removeprefix("torch."),
        "right": False,
    }  # fmt: skip
    try:
        case = set_up(name, setting)
        row["bytes"], row["flops"] = case.bytes, case.flops
        row["error"], row["right"] = error_of(case, setting.dtype)
    except torch.AcceleratorError:
        raise  # nothing runs in this process any more
    except Exception as failure:  # whatever it is: the other settings still have something to say
        return row | {"failure": reason_of(failure)}
    if not row["right"]:
        return row
    if case.missing:
        row["missing"] = case.missing
    failures: dict[str, str] = {}
    row |= {"seconds": {}, "peak_bytes": {}}
    for label, run in arms_of(case, setting.device).items():
        try:
            if label in case.libraries:
                errors = [error_ratio(one, other) for one, other in zip(run(), case.naive(), strict=True)]
                row.setdefault("library_errors", {})[label] = max(errors)
            run()  # compiled, and with what it keeps for the next time
            row["peak_bytes"][label] = peak_bytes_of(run, setting.device)
            row["seconds"][label] = seconds_of(run, setting.device)
        except torch.AcceleratorError:
            raise
        except Exception as failure:
            failures[label] = reason_of(failure)
    if failures:
        row["failures"] = failures
    if "ours" in failures:
        return row | {"failure": failures["ours"]}
    median = row["seconds"]["ours"]["median"]
    if case.bytes:
        row["share_of_bound"] = case.bytes / bandwidth / median
    row["speed_up"] = {label: times["median"] / median for label, times in row["seconds"].items() if label != "ours"}
    if case.flops:
        row["flops_per_second"] = case.flops / median
    if setting.device.type == "cuda":  # in an interpreter a time is no measure of anything
        row["goals"] = kernel_goals.verdicts(row)
    return row


def measure_all(names: list[str], tiny: bool, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each setting of each kernel, printed as it comes. After a fault of the device its row is the last.

    Raises:
        torch.AcceleratorError: After that row.
    """
    for name in names:
        for setting in settings_of(name, tiny):
            fault = None
            try:
                row = measure(name, setting, bandwidth)
            except torch.AcceleratorError as error:
                fault = error
                row = {"kernel": name, "rows": setting.rows, "keep": setting.keep, "right": False, "failure": reason_of(error)}
            print("\n".join(lines_of(row)), flush=True)
            yield row
            if fault is not None:
                raise fault


def good(row: dict[str, Any]) -> bool:
    """Whether a kernel was right and timed."""
    return bool(row["right"]) and "failure" not in row


def lines_of(row: dict[str, Any]) -> list[str]:
    """A row as it is printed: times, then what is missing, then the goals."""
    head = f"{row['kernel']:20s} rows {row['rows']:6d} keep {row['keep']:.1f} "
    if "error" in row:
        head += f"error {row['error']:.1e} "
    if "failure" in row:
        return [f"{head}FAILED: {row['failure']}"]
    if not row["right"]:
        return [f"{head}WRONG: not timed"]
    peaks = row["peak_bytes"]
    times = (f"{label} {1e3 * times['median']:.3f} ms {peaks[label] / 2**20:.0f} MiB" for label, times in row["seconds"].items())
    lines = [head + ", ".join(times)]
    lines += [f"    {label} is not here: {reason}" for label, reason in row.get("missing", {}).items()]
    lines += [f"    {label} failed: {reason}" for label, reason in row.get("failures", {}).items()]
    return lines + [f"    {kernel_goals.in_words(verdict)}" for verdict in row.get("goals", [])]


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a result whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(document, indent=1, default=str) + "\n")
    unfinished.replace(path)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against rows, one panel a kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({row["kernel"] for row in rows if good(row)})
    figure, panels = pyplot.subplots(1, max(1, len(names)), figsize=(3.2 * max(1, len(names)), 3), squeeze=False)
    for panel, name in zip(panels[0], names, strict=False):
        keeps = {row["keep"] for row in rows if row["kernel"] == name and good(row)}
        keep = 0.5 if 0.5 in keeps else max(keeps)
        chosen = sorted(
            (row for row in rows if row["kernel"] == name and good(row) and row["keep"] == keep), key=lambda row: row["rows"]
        )
        for label in dict.fromkeys(label for row in chosen for label in row["seconds"]):
            timed = [row for row in chosen if label in row["seconds"]]
            places = [row["rows"] for row in timed]
            panel.plot(places, [1e3 * row["seconds"][label]["median"] for row in timed], marker="o", label=label)
        panel.set(title=f"{name}, keep {keep:g}", xlabel="rows", ylabel="ms", xscale="log", yscale="log")
        panel.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes JSON and the plot; 1 if a kernel is wrong or a setting failed."""
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
    rows: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "triton": triton_version(),
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
    }
    for row in measure_all(args.only or list(CASES), args.tiny, bandwidth):
        rows.append(row)
        write(args.out, document)  # what comes next may end the process
    if args.plot:
        plot(rows, args.plot)
    return 0 if all(good(row) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
