"""How benchmarks/paper_figures.py draws: hatches, markers and lines besides colours, 8 points and more at 7.2 inches' width."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lemo_hf.profiling.plots import LINES, SERIES

WIDTH = 7.2
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Light enough for a dark hatch and a black mark to show, in grey print too.
FILLS = ("#B9B9B9", "#56B4E9", "#E69F00", "#7FD6BC", "#F2C4DC", "#D9D9D9", "#F4E27A")
_LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
Points = Mapping[tuple[str, str], Sequence[tuple[int, float]]]


@contextmanager
def readable() -> Any:
    """Letters of 8 points and more, on a page as wide as the figure."""
    with rc_context({"font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 8, "xtick.labelsize": 8,
                     "ytick.labelsize": 8, "hatch.linewidth": 0.6}):  # fmt: skip
        yield


@dataclass(frozen=True)
class Panel:
    """One model's bars.

    Args:
        title: The model.
        lengths: Groups of bars, in tokens.
        bars: By method one height a length, or `None`.
        marks: By method the paper's height, "OOM", or `None`.
        measured: By method and length whether the bar is measured; else it is estimated.
    """

    title: str
    lengths: Sequence[int]
    bars: Mapping[str, Sequence[float | None]]
    marks: Mapping[str, Sequence[float | str | None]]
    measured: Mapping[str, Sequence[bool]]

    @property
    def kinds(self) -> set[bool]:
        """Whether bars that stand are measured: one kind, or both."""
        return {real for name, heights in self.bars.items() for height, real in zip(heights, self.measured[name]) if height}


def tokens(length: int) -> str:
    """A length for an axis."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def grouped_bars(panels: Sequence[Panel], label: str, limit: float, limit_label: str, gpu: str) -> Figure:
    """Bars by length and method, panels side by side: as wide as their groups, two rows.

    Where some bars are measured and some estimated, a letter at the foot of each says which: "m" or "e".
    """
    kinds = set().union(*(panel.kinds for panel in panels))
    source = f"measured on {gpu}" if kinds == {True} else "estimated, no GPU run" if kinds == {False} else (
        f"m measured on {gpu}, e estimated, no GPU run"
    )  # fmt: skip
    with readable():
        figure = Figure(figsize=(WIDTH, 6.4), layout="constrained")
        many = [panel for panel in panels if len(panel.lengths) > 2]
        few = [panel for panel in panels if len(panel.lengths) <= 2]
        rows = [row for row in (few, many) if row]
        top = max(height for panel in panels for heights in panel.bars.values() for height in heights if height)
        axes = []
        for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            for place, (axis, panel) in enumerate(
                zip(part.subplots(1, len(row), squeeze=False, sharey=True)[0], row, strict=True)
            ):
                axes.append(axis)
                _bars(axis, panel, lettered=len(kinds) > 1)
                axis.axhline(limit, color="0.3", linestyle=":", linewidth=1)
                axis.set(ylim=(0, max(top, limit) * 1.12), title=panel.title)
                if place == 0:
                    axis.set_ylabel(label)
                    axis.annotate(limit_label, (0.01, limit), xycoords=("axes fraction", "data"), xytext=(0, 2),
                                  textcoords="offset points", fontsize=8)  # fmt: skip
        figure.suptitle(f"bars: ours, {source}; diamonds: the paper's logs", fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        handles.append(Line2D([], [], color="black", marker="D", linestyle="none", markerfacecolor="white"))
        figure.legend(handles, [*labels, "paper's logs of that method"], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bars(axis: Axes, panel: Panel, lettered: bool) -> None:
    width = 0.84 / len(panel.bars)
    for index, (name, heights) in enumerate(panel.bars.items()):
        at = [group + (index - (len(panel.bars) - 1) / 2) * width for group in range(len(panel.lengths))]
        style: dict[str, Any] = {"color": FILLS[index], "hatch": HATCHES[index], "edgecolor": "black", "linewidth": 0.6}
        axis.bar(at, [height or 0 for height in heights], width, label=name, **style)
        for place, height, real in zip(at, heights, panel.measured[name], strict=True):
            if lettered and height:
                # At the bar's foot, where no mark stands.
                axis.annotate("m" if real else "e", (place, 0), xytext=(0, 2.5), textcoords="offset points", ha="center", va="bottom",
                              fontsize=8, weight="bold" if real else "normal", bbox=_LABEL)  # fmt: skip
        for place, mark in zip(at, panel.marks.get(name, ()), strict=False):
            if isinstance(mark, float | int):
                axis.plot(place, mark, marker="D", color="black", markerfacecolor="white", markersize=4.5, linestyle="none")
            elif mark:
                top = axis.get_ylim()[1]
                axis.annotate(f"paper: {mark}", (place, 0), xytext=(0, 15 if lettered else 4), textcoords="offset points", rotation=90,
                              ha="center", va="bottom", fontsize=8, bbox=_LABEL)  # fmt: skip
                axis.set_ylim(top=top)
    axis.set_xticks(range(len(panel.lengths)), [tokens(length) for length in panel.lengths])
    axis.set_xlabel("tokens")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def times_by_length(models: Sequence[str], ours: Points, theirs: Points, gpu: str) -> Figure:
    """Seconds by length, one panel a model, both axes logarithmic; the paper's thin and grey."""
    with readable():
        figure = Figure(figsize=(WIDTH, 3.6 * len(models)), layout="constrained")
        for place, model in enumerate(models):
            axis = figure.add_subplot(len(models), 1, place + 1)
            for group, style in ((theirs, {"color": "0.45", "linewidth": 1.0}), (ours, {"linewidth": 1.6})):
                lines = [(words, sorted(points)) for (of, words), points in group.items() if of == model]
                for index, (words, points) in enumerate(lines):
                    color = {} if group is theirs else {"color": SERIES[index % len(SERIES)]}
                    marker, line = MARKERS[index % len(MARKERS)], LINES[index % len(LINES)]
                    axis.plot(*zip(*points, strict=True), marker=marker, linestyle=line, label=words, **style, **color)
            lengths = sorted(
                {length for lines in (ours, theirs) for (of, _), points in lines.items() if of == model for length, _ in points}
            )
            axis.set(xscale="log", yscale="log", ylabel="seconds of a step", title=f"{model}: ours on {gpu}")
            axis.set_xticks(lengths, [tokens(length) for length in lengths])
            axis.minorticks_off()
            axis.set_xlabel("tokens")
            axis.grid(alpha=0.3)
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def stacked_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], label: str) -> Figure:
    """Parts of a whole by method, one panel a model."""
    with readable():
        figure = Figure(figsize=(WIDTH, 1.9 * len(panels) + 0.8), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
        for (axis,), (title, methods) in zip(axes, panels.items(), strict=True):
            left = [0.0] * len(methods)
            for index, name in enumerate(next(iter(methods.values()))):
                widths = [parts[name] for parts in methods.values()]
                style: dict[str, Any] = {"color": FILLS[index], "hatch": HATCHES[index], "edgecolor": "black", "linewidth": 0.6}
                axis.barh(list(methods), widths, 0.7, left=left, label=name, **style)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            for row, total in enumerate(left):
                axis.annotate(f"{total:.1f}", (total, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
            axis.invert_yaxis()
            axis.set_title(title)
            axis.margins(x=0.09)
            axis.grid(axis="x", alpha=0.3)
            axis.set_axisbelow(True)
        axes[-1][0].set_xlabel(label)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def lines_by_layer(panels: Mapping[str, Mapping[str, Sequence[float]]], label: str) -> Figure:
    """A number of each layer by method, one panel a model."""
    with readable():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, methods) in zip(axes, panels.items(), strict=True):
            for index, (name, values) in enumerate(methods.items()):
                style: dict[str, Any] = {"color": SERIES[index], "linestyle": LINES[index % len(LINES)], "marker": MARKERS[index]}
                axis.plot(values, markersize=4, markevery=(index, 5), label=name, **style)
            axis.set(title=f"{title}: exact count", xlabel="layer", ylim=(0, None))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(label)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def speed_ups(shown: Mapping[str, Sequence[tuple[int, float]]], paper: Sequence[float], gpu: str) -> Figure:
    """Speed-ups by rows, with the paper's range."""
    with readable():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.axhspan(*paper, color="0.88", label=f"paper: {paper[0]} to {paper[1]} times")
        for index, (name, points) in enumerate(shown.items()):
            style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "linestyle": LINES[index % len(LINES)]}
            axis.plot(*zip(*sorted(points), strict=True), marker=MARKERS[index % len(MARKERS)], label=name, **style)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="rows",
            ylabel="times faster than\nindex, zeros, scatter, add",
            title=f"ours on {gpu}",
        )
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def timeline(lines: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Amounts over a step."""
    with readable():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        axis = figure.subplots()
        for index, (name, values) in enumerate(lines.items()):
            share = [100 * place / len(values) for place in range(len(values))]
            style: dict[str, Any] = {
                "color": (SERIES[1], SERIES[2])[index % 2],
                "linestyle": ("-", "--")[index % 2],
                "linewidth": 1.4,
            }
            axis.plot(share, values, label=f"{name}: peak {max(values):.1f} GiB", **style)
        axis.set(xlabel="share of the step's allocations and releases, % (forward, loss, backward)", ylabel="GiB of tensors alive",
                 title=title, ylim=(0, None), xlim=(0, 100))  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", frameon=False)
    return figure
