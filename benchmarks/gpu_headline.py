"""Training steps on a GPU, for benchmarks/gpu_suite.py: methods side by side as `lemo bench` runs them, and the longest samples that train.

A group of methods is one result: each method in a process of its own, taking turns, the method that the others are held against first.
A group that no time is left for goes on where it stopped. Lengths whose steps take minutes have fewer steps and turns, and what is
counted is left to `--counts-only` there.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from agreement import require
from gpu_checks import Scale

from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.bench.run import SMALL_MODEL, BenchOptions, bench_config, heading, new_row, run_bench, take_result
from lemo_hf.profiling.bench.step import measure_step
from lemo_hf.profiling.estimate.estimator import CUDA_CONTEXT, LENGTH_STEP, Estimator
from lemo_hf.profiling.estimate.model_shapes import stock_type

MODEL = "Llama-3-8B"
KEEP = ("lemo-exact", "lemo-keys", "lemo-sparse")
ROWS = ("lemo-exact-rows", "lemo-keys-rows", "lemo-sparse-rows")
PATTERNS = ("lemo-sparse-groups-rows", "lemo-sparse-blocks-rows")
NEARBY = ("lemo-sparse-nearby-rows", "lemo-sparse-nearby-groups-rows", "lemo-sparse-nearby-blocks-rows")
# The artifact's adapters, as in benchmarks/paper_estimates.py, and ours with the adapters that its figures draw.
PAPER = ("stock", "longlora-float32", "lemo-artifact", "lemo-exact-float32", "lemo-keys-float32", "lemo-sparse-float32")
PAPER_SIZES = (
    ("Llama-3-8B", 8192), ("Llama-3-8B", 4096), ("Llama-2-7B", 4096), ("Llama-2-7B", 8192), ("Mistral-7B", 4096),
    ("OPT-6.7B", 4096), ("OPT-6.7B", 8192), ("OPT-2.7B", 4096), ("OPT-2.7B", 8192),
    *(("OPT-1.3B", tokens) for tokens in (2048, 4096, 8192, 16384, 32768)),
)  # fmt: skip
LONGEST = ("liger-checkpointing", *(f"{name}@{share}" for share in ("0.5", "0.3") for name in ROWS))
# Cards whose longest samples are looked for: what of this GPU's memory a process may take, GiB; `None`: all.
CARDS = {"80GB": 79.6, "141GB": None}
# Of the estimated longest sample, tried one after another until one fits.
SHARES = (1.0, 0.95, 0.9)


@dataclass(frozen=True)
class Group:
    """Methods that are measured together.

    Args:
        name: Of the part.
        model: A shape's name.
        tokens: Of a sample.
        methods: As `lemo bench` names them; the first is what the others are held against.
        first: Whether it comes before the kernels' times.
    """

    name: str
    model: str
    tokens: int
    methods: tuple[str, ...]
    first: bool = False

    @property
    def effort(self) -> tuple[int, int, bool]:
        """Timed steps of a process, processes of a method, and whether bytes and FLOPs are counted."""
        return (3, 3, True) if self.tokens <= 16384 else (1, 2, True) if self.tokens <= 65536 else (1, 1, False)

    @property
    def seconds(self) -> float:
        """Bound for one process on an H200, compilation included; none begins with less time left."""
        return 90 if self.tokens <= 16384 else 180 if self.tokens <= 65536 else 300


def _of(model: str, tokens: int, name: str, *methods: str, first: bool = False) -> Group:
    return Group(f"headline_{tokens}_{model}_{name}", model, tokens, methods, first)


def groups(tiny: bool) -> list[Group]:
    """All groups, in order: what all else is judged by first."""
    if tiny:
        return [Group("headline_256", SMALL_MODEL, 256, ("checkpointing", "tokentune", "lemo-sparse"), first=True)]
    found = [
        _of(MODEL, 8192, "first", "stock-bf16", *KEEP, "checkpointing", first=True),
        _of(MODEL, 65536, "first", "checkpointing", "liger-checkpointing", *ROWS, first=True),
        _of(MODEL, 65536, "shares", "liger-checkpointing", "checkpointing", "lemo-exact-rows@0.25", "lemo-exact-rows@0.1",
            "lemo-keys-rows@0.3", "lemo-keys-rows@0.25"),
        _of(MODEL, 8192, "liger", "liger", "stock-bf16", "liger-checkpointing", *KEEP),
        _of(MODEL, 8192, "default_adapters", "stock", "stock-bf16", *KEEP),
        _of(MODEL, 4096, "first", "stock-bf16", *KEEP),
        _of("OPT-1.3B", 4096, "first", "stock-bf16", *KEEP),
        _of("OPT-6.7B", 4096, "first", "stock-bf16", *KEEP),
        _of("Mistral-7B", 4096, "first", "stock-bf16", *KEEP),
        _of("Llama-2-7B", 4096, "first", "stock-bf16", *KEEP),
        _of(MODEL, 8192, "rows", "stock-bf16", "checkpointing", *ROWS, *PATTERNS),
        _of(MODEL, 8192, "others", "stock-bf16", "longlora", "random-ltd", "tokentune", "lemo-exact@0.3", "lemo-keys@0.3"),
        _of(MODEL, 131072, "first", "liger-checkpointing", *ROWS, "lemo-exact-rows@0.1", "lemo-keys-rows@0.1"),
        _of(MODEL, 65536, "patterns", "checkpointing", "lemo-sparse-rows", *PATTERNS, *NEARBY),
        _of(MODEL, 65536, "others", "checkpointing", "stock-bf16", "longlora", "random-ltd", "tokentune", *KEEP,
            "liger-checkpointing-offload", "lemo-exact-offload"),
    ]  # fmt: skip
    found += [Group(f"paper_{tokens}_{model}", model, tokens, PAPER) for model, tokens in PAPER_SIZES]
    # Longer steps of its Figure 13, which run layers again in backward.
    long = ("checkpointing", "lemo-exact-rows", "lemo-keys-rows", "lemo-sparse-rows")
    found += [Group(f"paper_{tokens}_Llama-2-7B", "Llama-2-7B", tokens, long) for tokens in (16384, 65536)]
    return found


def run_group(scale: Scale, group: Group, unfinished: Path, seconds: float) -> dict[str, Any]:
    """Goes on with a group's measurement for so many seconds; the result as `lemo bench` writes it, `unfinished` if some is left.

    Args:
        scale: Real sizes, or tiny ones.
        group: What is measured.
        unfinished: JSON file of what was measured so far.
        seconds: No process begins later.

    Raises:
        PartFailure: If a method failed; only such are run again with the same file.
    """
    architecture = stock_type(bench_config(group.model))
    obstacles = {one.name: one.obstacle(scale.device, architecture) for one in choose_methods(",".join(group.methods))}
    possible = [name for name, reason in obstacles.items() if reason is None]
    steps, repeats, counts = (1, 1, True) if scale.tiny else group.effort
    options = BenchOptions(
        group.model, (group.tokens,), ",".join(possible), steps, repeats, device=scale.device.type, counts=counts
    )
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()  # the processes need the whole GPU
    document = run_bench(options, unfinished, lambda line: print(f"  {line}", flush=True), seconds)
    found = [line for row in document["rows"] for repeat in row["repeats"] for line in repeat.get("warnings", ())]
    document["warned"] = list(dict.fromkeys(found))
    document["left_out"] = {name: reason for name, reason in obstacles.items() if reason is not None}
    document["repeat"] = f"python benchmarks/gpu_suite.py --out DIR --part {group.name}"
    failed = {row["method"]: row["failed"] for row in document["rows"] if "failed" in row}
    require(not failed, f"methods failed: {failed}")
    return document


def longest_parts() -> Iterator[tuple[str, str, float | None]]:
    """Name, method and GiB of each search for the longest sample."""
    for card, gib in CARDS.items():
        for name in LONGEST:
            yield f"longest_{card}_{name}", name, gib


def run_longest(scale: Scale, method: str, gib: float | None) -> dict[str, Any]:
    """The longest sample that trains in so much memory: the estimated length, or a little less if that does not fit.

    One step a try, AdamW's moments there already: at these lengths a step takes minutes, compilation seconds. What fits is a length that
    trains, not the longest of all.

    Args:
        scale: Real sizes, or tiny ones: 256 tokens, whatever fits.
        method: As `lemo bench` names it.
        gib: GiB that the process may take; all of the GPU if `None`.
    """
    model = SMALL_MODEL if scale.tiny else MODEL
    (chosen,) = choose_methods(method)
    if (reason := chosen.obstacle(scale.device, "llama")) is not None:
        return {"left_out": {chosen.name: reason}, "rows": []}
    memory, dtype = None, "float32" if scale.tiny else "bfloat16"
    config = bench_config(model)
    if scale.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        memory = total if gib is None else int(gib * 2**30)
        # The context lies outside what the allocator may take.
        torch.cuda.set_per_process_memory_fraction(min(1.0, (memory - CUDA_CONTEXT) / total))
    whole = 256 if memory is None else Estimator(config, memory=memory).longest(chosen.settings(1, dtype))
    rows = []
    try:
        for share in SHARES:
            tokens = int(whole * share) // LENGTH_STEP * LENGTH_STEP
            settings = chosen.settings(tokens, dtype)
            row = new_row(model, tokens, chosen, settings) | {"memory_bytes": memory, "of_estimated": share}
            found = measure_step(config, chosen, settings, scale.device, steps=1, counts=False, cold=True)
            take_result(row, found | {"settings": asdict(settings)}, tokens)
            rows.append(row)
            if "out_of_memory" not in row:
                break
    finally:
        if scale.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    options = BenchOptions(
        model, tuple(row["seq_len"] for row in rows), chosen.name, 1, 1, device=scale.device.type, counts=False
    )
    return heading(options) | {"repeat": f"python benchmarks/gpu_suite.py --out DIR --part longest_*_{method}", "rows": rows}
