"""The goals for speed and memory as a table: what arithmetic allows, what estimates say, what was measured. For update_readme.py.

Memory is the estimate's peak, FLOPs bound the speed as if every FLOP took the same time, seconds are the estimate's roofline for an
H100, first without and then with assumed efficiencies. What a GPU has measured in one run (benchmarks/gpu_suite.py) goes before all of
these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemo_hf.profiling.bench.methods import choose_methods
from lemo_hf.profiling.bench.table import peak_bytes

MODEL = "Llama-3-8B"
FILES = (
    "bench_counts_llama3_8b--*.json", "bench_long_llama3_8b--*.json", "memory_estimate--*.json", "paper_estimates--*.json",
    "longest_context--*.json", "quickstart--*.json", "headline_*.json",
)  # fmt: skip
# Methods of `lemo bench` as `lemo estimate` names them.
ESTIMATED = {
    "stock-bf16": "stock LoRA",
    "liger": "Liger",
    "liger-checkpointing": "Liger+checkpointing",
    "lemo-exact@0.5": "LeMo exact 0.5",
    "lemo-keys@0.5": "LeMo kept keys 0.5, 256 nearby tokens",
    "lemo-keys-rows@0.5": "LeMo kept keys 0.5, 256 nearby tokens, kept-row checkpointing",
    "lemo-exact-rows@0.5": "LeMo exact 0.5, kept-row checkpointing",
}


@dataclass(frozen=True)
class Goal:
    """A method against another in one run.

    Args:
        tokens: Of a sample.
        method, against: As `lemo bench` names them.
        memory: Times less peak memory; 1: no more.
        speed: Times faster; `None` where only memory is a goal.
        bound: What the goals say arithmetic allows; "" if nothing.
        ours: Whether the form came after the goals: it is held against those of the forms that they name.
    """

    tokens: int
    method: str
    against: str
    memory: float
    speed: float | None
    bound: str = ""
    ours: bool = False


GOALS = (
    Goal(8192, "lemo-sparse@0.5", "stock-bf16", 2.0, 1.4, "2.3x memory"),
    Goal(8192, "lemo-exact@0.5", "stock-bf16", 2.0, 1.25, "2.3x memory"),
    Goal(8192, "lemo-keys@0.5", "stock-bf16", 2.0, 1.25, ours=True),
    Goal(8192, "lemo-exact@0.5", "stock", 2.3, None),
    Goal(8192, "lemo-sparse@0.5", "liger", 1.35, 1.2),
    Goal(8192, "lemo-exact@0.5", "liger", 1.35, 1.2),
    Goal(8192, "lemo-keys@0.5", "liger", 1.35, 1.2, ours=True),
    Goal(65536, "lemo-sparse-rows@0.5", "liger-checkpointing", 1, 2.2, "2.6x speed"),
    Goal(65536, "lemo-exact-rows@0.25", "liger-checkpointing", 1, 2.2, "2.9x speed"),
    Goal(65536, "lemo-exact-rows@0.1", "liger-checkpointing", 1, 2.8, "3.5x speed"),
    Goal(65536, "lemo-keys-rows@0.5", "liger-checkpointing", 1, 2.2, ours=True),
    Goal(65536, "lemo-keys-rows@0.35", "liger-checkpointing", 1, 2.2, ours=True),
    Goal(131072, "lemo-sparse-rows@0.5", "liger-checkpointing", 1, 2.6),
    Goal(131072, "lemo-exact-rows@0.25", "liger-checkpointing", 1, 2.6),
    Goal(131072, "lemo-exact-rows@0.1", "liger-checkpointing", 1, 3.0, "3.8x speed"),
    Goal(131072, "lemo-keys-rows@0.25", "liger-checkpointing", 1, 2.6, ours=True),
)
# Longest sample: kept share -> how many times as long as the baseline's, at its tokens per second or more.
LONGEST = {"0.5": 1.5, "0.3": 2.0}


def goals(results: Mapping[str, Any]) -> str:
    """The goals as Markdown.

    Args:
        results: Committed results by stem; the files of `FILES`.
    """
    counts = [row for stem, found in results.items() if stem.startswith("bench_") for row in found["rows"]]
    measured = [found["rows"] for stem, found in results.items() if stem.startswith("headline_")]
    shapes = next(found["shapes"] for stem, found in results.items() if stem.startswith("memory_estimate--"))
    lines = [
        "| goal, Llama-3-8B | memory, estimated | FLOPs allow a speed of | speed, estimated | memory | speed | dense perplexity |",
        "| --- | ---: | ---: | ---: | --- | --- | --- |",
    ]
    lines += [_line(goal, counts, shapes, measured) for goal in GOALS]
    sources = sorted(stem for stem in results if not stem.startswith(("headline_", "quickstart")))
    commits = "; ".join(f"`{stem}.json`, {results[stem]['date']}, commit {results[stem]['commit']}" for stem in sources)
    parts = [
        "\n".join(lines),
        _words(counts, shapes, measured),
        _longest(results),
        _never_slower(results, measured),
        _perplexity(results),
        f"From {commits}; goals: benchmarks/goals.py. Repeat: the commands of those files, then `python benchmarks/update_readme.py`.",
    ]
    return "\n\n".join(parts)


def _row(rows: Sequence[Mapping[str, Any]], tokens: int, method: str, model: str = MODEL) -> Mapping[str, Any] | None:
    wanted = (model, tokens, method)
    return next((row for row in rows if (row["model"], row["seq_len"], row["method"]) == wanted), None)


def _words_of(method: str) -> str:
    return choose_methods(method)[0].words


def _memory(goal: Goal, rows: Sequence[Mapping[str, Any]]) -> float | None:
    pair = [_row(rows, goal.tokens, name) for name in (goal.against, goal.method)]
    sizes = [peak_bytes(row) if row else None for row in pair]
    return sizes[0] / sizes[1] if sizes[0] and sizes[1] else None


def _flops(goal: Goal, counts: Sequence[Mapping[str, Any]]) -> float:
    ours, other = (_row(counts, goal.tokens, name) for name in (goal.method, goal.against))
    assert ours is not None, f"{goal.method} is counted at {goal.tokens}"
    assert other is not None, f"{goal.against} is counted at {goal.tokens}"
    return float(other["flops"] / ours["flops"])


def _speed(goal: Goal, shapes: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Estimated times faster, without and with assumed efficiencies."""
    pair = [_row(shapes, goal.tokens, ESTIMATED.get(name, "")) for name in (goal.against, goal.method)]
    if pair[0] is None or pair[1] is None:
        return None
    return tuple(pair[0][name] / pair[1][name] for name in ("seconds_at_least", "seconds"))  # type: ignore[return-value]


def _measured(goal: Goal, runs: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[float | None, float] | None:
    """Times less memory and times faster, of a run that has both methods."""
    for rows in runs:
        pair = [_row(rows, goal.tokens, name) for name in (goal.against, goal.method)]
        if all(row and row.get("summary") for row in pair):
            seconds = [row["summary"]["median_seconds"] for row in pair if row]
            return _memory(goal, rows), seconds[0] / seconds[1]
    return None


def _state(value: float | None, wanted: float) -> str:
    return "reached" if value is not None and value >= wanted else "missed"


def _line(
    goal: Goal,
    counts: Sequence[Mapping[str, Any]],
    shapes: Sequence[Mapping[str, Any]],
    runs: Sequence[Sequence[Mapping[str, Any]]],
) -> str:
    memory, flops, speed, real = _memory(goal, counts), _flops(goal, counts), _speed(goal, shapes), _measured(goal, runs)
    assert memory is not None, f"{goal.method} and {goal.against} are estimated at {goal.tokens}"
    words = f"{goal.tokens}: {_words_of(goal.method)} against {_words_of(goal.against)}: "
    words += "no more memory" if goal.memory == 1 else f"{goal.memory:g}x less memory"
    words += f", {goal.speed:g}x faster" if goal.speed else ""
    words += f" (bound {goal.bound})" if goal.bound else " (ours: no goal names it)" if goal.ours else ""
    states = [f"{_state(memory, goal.memory)}, by estimate", "no goal" if goal.speed is None else "unmeasured"]
    if goal.speed is not None and flops < goal.speed:
        states[1] = "out of reach: fewer FLOPs would be needed"
    elif goal.speed is not None and speed is not None and max(speed) < goal.speed:
        states[1] = "unmeasured; missed by estimate"
    if real is not None:
        states = [
            f"{_state(real[0], goal.memory)}: {real[0]:.2f}x measured" if real[0] else states[0],
            "no goal" if goal.speed is None else f"{_state(real[1], goal.speed)}: {real[1]:.2f}x measured",
        ]
    shown = "-" if speed is None else f"{min(speed):.2f}x to {max(speed):.2f}x"
    return "| " + " | ".join([words, f"{memory:.2f}x", f"{flops:.2f}x", shown, *states, "unmeasured"]) + " |"


def _words(
    counts: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], runs: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
    """What of the table is short of its goal, in words."""
    said = [
        "Memory is estimated, speed is unmeasured for want of a GPU."
        if not runs
        else "Where nothing is measured, memory is estimated.",
        "Each is held against what the goals name: stock LoRA with bfloat16 adapters or PEFT's default ones, with Liger, with checkpointing and a "
        "fused loss (Liger's). Estimated speed: a roofline on an H100 with every operator at the card's peaks, and at assumed shares of "
        "them, operators one by one ([memory.md](memory.md)); where there are none, nothing on file estimates it.",
    ]
    short = []
    for goal in GOALS:
        memory, speed = _memory(goal, counts), _speed(goal, shapes)
        what = f"{_words_of(goal.method)} at {goal.tokens} tokens"
        if memory is not None and memory < goal.memory:
            wanted = "no more memory" if goal.memory == 1 else f"{goal.memory:g}x less"
            short.append(f"{what} needs {1 / memory:.2f}x the memory of {_words_of(goal.against)} ({wanted} is the goal)")
        if goal.speed is not None and speed is not None and min(speed) < goal.speed:
            short.append(
                f"{what} is {min(speed):.2f}x to {max(speed):.2f}x as fast as {_words_of(goal.against)} ({goal.speed:g}x is the goal; its "
                f"FLOPs allow {_flops(goal, counts):.2f}x)"
            )
    said.append("By estimate short of a goal, or on both sides of it: " + "; ".join(short) + "." if short else "")
    return " ".join(filter(None, said))


def _longest(results: Mapping[str, Any]) -> str:
    """The longest trainable samples beside their goals."""
    found = next(found for stem, found in results.items() if stem.startswith("longest_context--"))
    lines = [
        "| longest sample by estimate, kept-row checkpointing | tokens | of the baseline's | goal | tokens a second | of the baseline's "
        "| state | dense perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for card in dict.fromkeys(row["card"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["card"] == card]
        base = rows[0]
        for row in rows:
            share = row["method"].partition("@")[2]
            longer = row["longest"] / base["longest"]
            faster = sorted(row[name] / base[name] for name in ("tokens_per_second", "tokens_per_second_at_most"))
            wanted = LONGEST.get(share)
            state = "baseline" if row is base else "no goal"
            if wanted is not None:
                short = [word for word, is_short in (("length", longer < wanted), ("speed", faster[0] < 1)) if is_short]
                state = f"missed by estimate ({' and '.join(short)})" if short else "reached by estimate"
            cells = [f"{card}, {row['words']}", f"{row['longest']}", f"{longer:.2f}x", "-" if wanted is None else f"{wanted:g}x"]
            cells += [f"{row['tokens_per_second']:.0f}", f"{faster[0]:.2f}x to {faster[1]:.2f}x", state, "unmeasured"]
            lines.append("| " + " | ".join(cells) + " |")
    at_half = [row for row in found["rows"] if row["method"] in ("lemo-exact-rows@0.5", "lemo-keys-rows@0.5")]
    short = [
        f"{row['words']} {row['longest'] / base['longest']:.2f}x ({row['card']})"
        for row in at_half
        for base in found["rows"]
        if base["card"] == row["card"]
        and base["method"] == "liger-checkpointing"
        and row["longest"] < LONGEST["0.5"] * base["longest"]
    ]
    text = (
        "Missed, for the keys and values that they keep of every dropped token: "
        + ", ".join(short)
        + f", where {LONGEST['0.5']:g}x is "
        "the goal. "
        if short
        else ""
    )
    return "\n".join(lines) + (
        f"\n\n{text}Each at its own longest sample, whose steps cost more the longer it is; by the same roofline. No sample of these "
        "lengths has been trained on."
    )


def _never_slower(results: Mapping[str, Any], runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Models of a billion parameters and more at 4096 tokens: what FLOPs say, and what was measured."""
    rows = next(found["rows"] for stem, found in results.items() if stem.startswith("paper_estimates--"))
    allowed: dict[str, float] = {}
    for model in dict.fromkeys(row["model"] for row in rows if row["seq_len"] == 4096):
        stock = _row(rows, 4096, "stock", model)
        ours = [
            row
            for row in rows
            if (row["model"], row["seq_len"]) == (model, 4096) and row["method"].startswith("lemo-") and "@" in row["method"]
        ]
        assert stock is not None, f"stock on {model} is counted at 4096"
        allowed[model] = min(stock["flops"] / row["flops"] for row in ours)
    slower = [
        f"{row['words']} on {row['model']}"
        for run in runs
        for row in run
        if row["seq_len"] == 4096
        and row["method"].startswith("lemo-")
        and row.get("summary")
        and run[0].get("summary")
        and run[0]["summary"]["median_seconds"] < row["summary"]["median_seconds"]
    ]
    state = f"slower in a measured run: {', '.join(slower)}" if slower else "unmeasured" if not runs else "reached where measured"
    return (
        "Never slower than stock LoRA at 4096 tokens on models of a billion parameters and more: "
        f"{state}. FLOPs of stock over those of LeMo at 0.5, the smallest of its forms on file: "
        + ", ".join(f"{model} {ratio:.2f}" for model, ratio in allowed.items())
        + "; launches and movement, which a short sample on a small model feels most, are not in them."
    )


def _perplexity(results: Mapping[str, Any]) -> str:
    """What the same forms cost where a model was trained."""
    found = next(found for stem, found in results.items() if stem.startswith("quickstart--"))
    stock, seconds = found["arms"]["stock"], found["step_seconds_in_turns"]
    saved = sum(stock["saved_bytes"].values())
    arms = [
        f"{arm['title']} {sum(arm['saved_bytes'].values()) / saved:.2f} of the saved bytes, {arm['flops'] / stock['flops']:.2f} of the FLOPs, "
        f"{seconds['stock'] / seconds[name]:.2f}x as fast, dense perplexity {arm['versus_stock']['equal_steps']['text']} at equal steps"
        for name, arm in found["arms"].items()
        if name != "stock"
    ]
    return (
        f"No model of this size was trained, so no goal has its perplexity. On the CPU, the {found['config']['base']} model at "
        f"{found['config']['tokens']} tokens against stock LoRA ({found['date']}, commit {found['commit']}): "
        + "; ".join(arms)
        + "."
    )
