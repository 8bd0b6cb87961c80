"""Plots of docs/quality.md: perplexity against what it costs, by position, and retrieval by depth.

Colours are told apart by the colour-blind and in grey print, as those of `lemo_hf.profiling.plots`; markers and lines differ too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.quality.extension import EQUAL_STEPS, EQUAL_TIME
from benchmarks.quality.report import runs_in
from lemo_hf.profiling.plots import LINES, MARKERS, SERIES, new_figure, save_figure

# Form and point -> how it is drawn.
_SERIES = {
    (form, point): place
    for place, (form, point) in enumerate(
        ((form, point) for form in ("exact", "kept_keys", "sparse") for point in (EQUAL_STEPS, EQUAL_TIME)), start=1
    )
}


def style(place: int) -> dict[str, Any]:
    """Colour, line and marker of a series, which differ together."""
    return {
        "color": SERIES[place % len(SERIES)],
        "linestyle": LINES[place % len(LINES)],
        "marker": MARKERS[place % len(MARKERS)],
        "markerfacecolor": "none",
        "capsize": 3,
    }


def share_points(arms: Mapping[str, Any], form: str, point: str) -> list[tuple[dict[str, float], float, float]]:
    """Of a form's arms by kept share: the costs as shares of stock's, the difference to stock in percent, and its larger error."""
    found = []
    for arm in arms.values():
        lemo, cost, measured = arm["arm"]["lemo"], arm["cost"], arm["points"].get(point)
        plain = arm["arm"]["group"] in ("core", "shares")
        if not plain or lemo is None or cost is None or measured is None or lemo["attention_forward"] != form:
            continue
        versus = measured["versus_stock"].get("perplexity")
        if versus is not None:
            costs = {
                "kept share of the layers": cost["kept_share"],
                "FLOPs of a step, of stock's": cost["flops"] / cost["stock_flops"],
                "time of a step, of stock's": cost["mean_time_ratio"],
                "saved bytes, of stock's": cost["saved_bytes"] / cost["stock_saved_bytes"],
            }
            found.append((costs, versus["mean"], max(versus["spread"] or 0.0, (versus["high"] - versus["low"]) / 2)))
    return sorted(found, key=lambda each: each[0]["kept share of the layers"])


def draw_shares(setting: Mapping[str, Any]) -> Figure | None:
    """Perplexity against kept share, FLOPs, time and bytes; `None` if no arm has two shares of a form."""
    series = {key: share_points(setting["arms"], *key) for key in _SERIES}
    series = {key: points for key, points in series.items() if len(points) > 1}
    if not series:
        return None
    names = list(next(iter(series.values()))[0][0])
    figure, axes = new_figure(2, 2, (10, 7.5), sharey=True)
    for axis, name in zip(axes.flat, names, strict=True):
        for (form, point), points in series.items():
            ordered = sorted((costs[name], mean, error) for costs, mean, error in points)
            x, y, errors = zip(*ordered, strict=True)
            axis.errorbar(
                x, y, yerr=errors, label=f"{form.replace('_', ' ')}, {point.replace('_', ' ')}", **style(_SERIES[form, point])
            )
        axis.axhline(0, color=SERIES[0], linewidth=1)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
        # The sparse form's low shares would flatten everything else.
        axis.set_yscale("symlog", linthresh=10)
        axis.set_yticks([-10, -5, 0, 5, 10, 30, 100], ["-10", "-5", "0 (stock)", "5", "10", "30", "100"])
    for row in axes:
        row[0].set_ylabel("dense perplexity against stock, %")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_positions(setting: Mapping[str, Any], arms: Sequence[str]) -> Figure | None:
    """Perplexity by position of the main arms, at equal steps."""
    tokens = setting["setting"]["tokens"]
    figure, ((axis,),) = new_figure(1, 1, (6.5, 4))
    drawn = 0
    for place, name in enumerate(arms):
        found = setting["arms"].get(name, {}).get("points", {}).get(EQUAL_STEPS)
        if found is not None:
            stretches = found["by_stretch"]
            middles = [tokens * (part + 0.5) / len(stretches) for part in range(len(stretches))]
            errors = [each["spread"] or 0.0 for each in stretches]
            axis.errorbar(middles, [each["mean"] for each in stretches], yerr=errors, label=name, **style(place))
            drawn += 1
    axis.set(xlabel="position in the window, tokens", ylabel="dense perplexity of the stretch", xlim=(0, tokens))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure if drawn else None


def draw_retrieval(setting: Mapping[str, Any], arms: Sequence[str]) -> Figure | None:
    """Accuracy by depth of the line asked for, of the main arms at equal steps."""
    figure, ((axis,),) = new_figure(1, 1, (6.5, 4))
    drawn = 0
    for place, name in enumerate(arms):
        scores = setting["arms"].get(name, {}).get("points", {}).get(EQUAL_STEPS, {}).get("retrieval")
        if scores is not None:
            points = sorted(
                (float(key.removeprefix("depth_")), value) for key, value in scores.items() if key.startswith("depth_")
            )
            axis.errorbar(*zip(*points, strict=True), label=f"{name} ({scores['questions']} questions)", **style(place))
            drawn += 1
    axis.set(xlabel="depth of the line asked for, share of the context", ylabel="answers right", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure if drawn else None


def draw_plots(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Writes the plots of each kind of machine: shares by today's code, positions and retrieval of the most runs; returns their paths."""
    written = []
    arms = ("stock", "exact-0.5", "exact-0.3", "keys-0.5", "sparse-0.5", "before")
    for suffix in ("", "-gpu"):
        of_machine = [result for result in results if ("gpu" in result["machine"]) == bool(suffix)]
        settings = [
            max(result["settings"].values(), key=runs_in) for result in sorted(of_machine, key=lambda each: "note" in each)
        ]
        if not settings:
            continue
        most = max(settings, key=runs_in)
        figures = {
            "shares": next(filter(None, map(draw_shares, settings)), None),
            "positions": draw_positions(most, arms),
            "retrieval": draw_retrieval(most, arms),
        }
        written += [save_figure(figure, folder / f"{name}{suffix}.png") for name, figure in figures.items() if figure is not None]
    return written
