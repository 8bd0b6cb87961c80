"""The goals of the kernels, and whether a row of benchmarks/kernel_times.py meets them.

| kernel | goal |
| --- | --- |
| gather and norm, forward and backward; rotary; scatter-add | 85 % of the copy bandwidth for the bytes they must move |
| scatter-add of at most half of the rows | 2.5 times as fast as the compiled formula |
| taking and merging, forward and backward | 80 % of the bound |
| block scores | at most 1.3 times the QK half of the flash forward |
| loss | time and memory within 10 % of the best library |
"""

from collections.abc import Iterator
from typing import Any

MOVING = ("gather_norm", "gather_norm_backward", "rotary", "scatter_add")
LIBRARIES = ("liger", "cut-cross-entropy")


def verdicts(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of a kernel at one setting.

    Args:
        row: A result of `kernel_times.measure` on a GPU.

    Returns:
        Of each goal its words (`goal`), the `value` held against it, its `bound`, and whether it is `met`. Where something that it
        needs was not measured, `met` is `None` and `reason` says what.
    """
    return [_verdict(*found) for found in _goals(row)]


def _verdict(goal: str, value: float | None, bound: float, at_least: bool, lacks: str) -> dict[str, Any]:
    if value is None:
        return {"goal": goal, "value": None, "bound": bound, "met": None, "reason": lacks}
    return {"goal": goal, "value": value, "bound": bound, "met": value >= bound if at_least else value <= bound}


def _goals(row: dict[str, Any]) -> Iterator[tuple[str, float | None, float, bool, str]]:
    name, seconds = row["kernel"], {label: times["median"] for label, times in row.get("seconds", {}).items()}
    if name in MOVING:
        yield "share of the copy bandwidth", row.get("share_of_bound"), 0.85, True, "the kernel was not timed"
    if name == "scatter_add" and row["keep"] <= 0.5:
        yield "speed over the compiled formula", row.get("speed_up", {}).get("compiled"), 2.5, True, "the formula did not compile"
    if name == "take_and_merge":
        yield "share of its bound", row.get("share_of_bound"), 0.8, True, "the kernel was not timed"
    if name == "block_scores":
        flash = seconds.get("whole flash forward")
        ratio = seconds["ours"] / (flash / 2) if flash and "ours" in seconds else None
        yield "time over the flash forward's QK half", ratio, 1.3, False, "one of the two was not timed"
    if name == "loss":
        lacks = "; ".join(f"{label}: {reason}" for label, reason in (row.get("missing", {}) | row.get("failures", {})).items())
        for words, amounts in (("time", seconds), ("memory", row.get("peak_bytes", {}))):
            best = min((amounts[label] for label in LIBRARIES if label in amounts), default=None)
            ratio = amounts["ours"] / best if best and "ours" in amounts else None
            yield f"{words} over the best library's", ratio, 1.1, False, lacks or "nothing was measured"


def in_words(verdict: dict[str, Any]) -> str:
    """A verdict as it is printed."""
    at_least = verdict["goal"].startswith(("share", "speed"))
    wanted = f"{verdict['goal']}, wanted {'at least' if at_least else 'at most'} {verdict['bound']:g}"
    if verdict["met"] is None:
        return f"NOT JUDGED {wanted}: {verdict['reason']}"
    return f"{'met' if verdict['met'] else 'MISSED'} {wanted}: {verdict['value']:.3g}"
