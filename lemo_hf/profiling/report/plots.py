"""Plots of how a run went: recall of its predictors, its memory over time, and what each layer saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plots import LINES, MARKERS, SERIES, new_figure, time_unit

MIB, GIB = 2**20, 2**30
_BARS = ("", "///", "...", "xxx")


@dataclass(frozen=True)
class RecallSeries:
    """Recall of one run's predictors.

    Args:
        steps: When it was measured.
        layers: Layer numbers.
        values: By time and layer, in [0, 1], NaN where a layer was not measured.
        chance: Recall of a choice at random.
        positions: Recall of a predictor that knows positions only.
        refits: Steps after which the predictors were fitted again.
    """

    steps: list[int]
    layers: list[int]
    values: list[list[float]]
    chance: float | None = None
    positions: float | None = None
    refits: list[int] = field(default_factory=list)


def draw_recall(recall: RecallSeries) -> Figure:
    """Recall by layer at the first and the last probe, and its mean over the steps where there is more than one probe."""
    several = len(recall.steps) > 1
    figure, (axes,) = new_figure(1, 2 if several else 1, (10 if several else 6, 3.4), sharey=True)
    shown = {"first": 0, "last": len(recall.steps) - 1} if several else {"": 0}
    for index, (which, place) in enumerate(shown.items()):
        label = f"{which} probe, step {recall.steps[place]}" if which else f"predictor, step {recall.steps[place]}"
        style = {"linestyle": "none", "marker": MARKERS[index], "color": SERIES[(1, 2)[index]]}
        axes[0].plot(recall.layers, recall.values[place], label=label, markersize=6 + 3 * (len(shown) - 1 - index), **style)
    axes[0].set(xlabel="layer", ylabel="recall of kept blocks (share)", ylim=(0, 1.03), title="by layer")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if several:
        means, low, high = zip(*(_spread(values) for values in recall.values), strict=True)
        axes[1].fill_between(recall.steps, low, high, color=SERIES[6], alpha=0.35, linewidth=0, label="lowest to highest layer")
        axes[1].plot(recall.steps, means, color=SERIES[1], marker="o", label="mean over layers")
        for number, step in enumerate(recall.refits):
            named = {"label": "predictors fitted again"} if not number else {}
            axes[1].axvline(step, color=SERIES[4], linestyle="-.", linewidth=1, **named)
        axes[1].set(xlabel="step", title="over the run")
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        for value, line, name in ((recall.chance, ":", "chance"), (recall.positions, "--", "positions only")):
            if value is not None:
                axis.axhline(value, color=SERIES[0], linestyle=line, linewidth=1.2, label=f"{name} {value:.2f}")
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*_without_repeats(axes), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    known = [value for value in values if value == value]
    return (sum(known) / len(known), min(known), max(known)) if known else (float("nan"),) * 3


def _without_repeats(axes: Sequence[Any]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


@dataclass(frozen=True)
class MemorySeries:
    """Memory of one run.

    Args:
        peak: `(seconds since the start, the most bytes so far)`.
        after_forward: `(seconds since the start, bytes at the end of a logged step's forward)`.
        phases: Name, begin and end in seconds of what came before the first step.
    """

    peak: list[tuple[float, float]]
    after_forward: list[tuple[float, float]] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)


def draw_memory(runs: Mapping[str, MemorySeries]) -> Figure:
    """Highest memory so far over time as stairs, memory at the end of logged forwards as points, phases as bands."""
    figure, ((axis,),) = new_figure(1, 1, (10, 3.4))
    longest = max(seconds for run in runs.values() for seconds, _ in run.peak)
    unit, word = time_unit(longest)
    most = max(size for run in runs.values() for _, size in run.peak)
    scale, name = (GIB, "GiB") if most >= 2 * GIB else (MIB, "MiB")
    shaded = next((run.phases for run in runs.values() if run.phases), [])
    for index, (phase, begin, end) in enumerate(shaded):
        axis.axvspan(begin / unit, end / unit, color=SERIES[(6, 5)[index % 2]], alpha=0.22, linewidth=0, label=f"{phase} phase")
    for index, (label, run) in enumerate(runs.items()):
        seconds, sizes = zip(*run.peak, strict=True)
        style = {"color": SERIES[index % len(SERIES)], "linestyle": LINES[index % len(LINES)]}
        places = [place / unit for place in seconds]
        axis.step(places, [size / scale for size in sizes], where="post", label=f"{label}, highest so far", **style)
        if run.after_forward:
            seconds, sizes = zip(*run.after_forward, strict=True)
            points = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3.5, "linestyle": "none", "markerfacecolor": "none"}
            places = [place / unit for place in seconds]
            axis.plot(
                places, [size / scale for size in sizes], color=SERIES[index % 7], label=f"{label}, after a forward", **points
            )
    axis.set(xlabel=f"{word} since the start", ylabel=f"memory ({name})")
    axis.set_ylim(0, most / scale * 1.1)
    axis.set_xlim(0, longest / unit * 1.02)
    axis.grid(alpha=0.3)
    figure.legend(*_without_repeats([axis]), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_saved_by_layer(runs: Mapping[str, Mapping[int, float]]) -> Figure:
    """Bytes that each layer saved for backward, one bar a run.

    Args:
        runs: Name to bytes by layer.
    """
    figure, ((axis,),) = new_figure(1, 1, (10, 3.2))
    most = max(size for layers in runs.values() for size in layers.values())
    scale, name = (GIB, "GiB") if most >= 2 * GIB else (MIB, "MiB") if most >= MIB else (1024, "KiB")
    width = 0.8 / len(runs)
    for index, (label, layers) in enumerate(runs.items()):
        places = [layer - 0.4 + width * (index + 0.5) for layer in layers]
        style: dict[str, Any] = {"color": SERIES[1 + index % 6], "hatch": _BARS[index % 4], "edgecolor": "white", "linewidth": 0}
        axis.bar(places, [size / scale for size in layers.values()], width=width, label=label, **style)
    axis.set(xlabel="layer", ylabel=f"saved for backward ({name})")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
