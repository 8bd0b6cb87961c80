"""How benchmarks/paper_figures.py draws: hatches, markers and lines besides colours, 8 points and more at 7.2 inches' width."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@contextmanager
def readable() -> Any:
    """Letters of 8 points and more, on a page as wide as the figure."""
    with rc_context({"font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "legend.fontsize": 8, "xtick.labelsize": 8,
                     "ytick.labelsize": 8, "hatch.linewidth": 0.6}):  # fmt: skip
        yield


@dataclass(frozen=True)
class Panel:
    """Bars in groups: one model's by length, say.

    Args:
        title: What the panel is of.
        groups: Groups of bars: lengths in tokens, or names.
        bars: By series one height a group, or `None`.
        marks: By series the paper's height, "OOM", or `None`.
        measured: By series and group whether the bar is measured; else it is estimated.
        line: A level and what it is.
        band: Two levels and what lies between.
        labels: Of the vertical axis where bars are estimated (`False`) and measured (`True`); empty takes the figure's. A panel that is cut out of its
            figure must still say which it shows.
        styles: By series a place among colours and hatches; none takes its place among series.
    """

    title: str
    groups: Sequence[int | str]
    bars: Mapping[str, Sequence[float | None]]
    marks: Mapping[str, Sequence[float | str | None]]
    measured: Mapping[str, Sequence[bool]]
    line: tuple[float, str] | None = None
    band: tuple[float, float, str] | None = None
    labels: Mapping[bool, str] = field(default_factory=dict)
    styles: Mapping[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> set[bool]:
        """Whether bars that stand are measured: one kind, or both."""
        return {real for name, heights in self.bars.items() for height, real in zip(heights, self.measured[name]) if height}

    @property
    def top(self) -> float:
        """The highest of what is drawn."""
        heights = [height for heights in self.bars.values() for height in heights if height]
        marks = [mark for marks in self.marks.values() for mark in marks if isinstance(mark, float | int)]
        return max(*heights, *marks, self.line[0] if self.line else 0, self.band[1] if self.band else 0)


@dataclass(frozen=True)
class Words:
    """What is said around bars.

    Args:
        label: Of the vertical axis.
        gpu: Where what is measured was.
        estimated: How the rest came about.
        marks: What diamonds are; "" without any.
    """

    label: str
    gpu: str
    estimated: str = "estimated, no GPU run"
    marks: str = ""

    def title(self, kinds: set[bool]) -> str:
        """What bars and diamonds are; where both kinds of bars stand, a letter at the foot of each says which it is."""
        source = f"measured on {self.gpu}" if kinds == {True} else self.estimated if kinds == {False} else (
            f"m measured on {self.gpu}, e {self.estimated}"
        )  # fmt: skip
        return f"bars: ours, {source}" + (f"; diamonds: {self.marks}" if self.marks else "")


def tokens(length: int | str) -> str:
    """A group for an axis: a name, or a length."""
    return length if isinstance(length, str) else f"{length // 1024}K" if length % 1024 == 0 else str(length)


def grouped_bars(rows: Sequence[Sequence[Panel]], words: Words, height: float = 6.4) -> Figure:
    """Bars in groups, rows of panels that share an axis; a legend below each row, or one for all if all have the same series."""
    panels = [panel for row in rows for panel in row]
    kinds = set().union(*(panel.kinds for panel in panels))
    alike = len({tuple(panel.bars) for panel in panels}) == 1
    with readable():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            axes = part.subplots(1, len(row), squeeze=False, sharey=True)[0]
            for place, (axis, panel) in enumerate(zip(axes, row, strict=True)):
                _bars(axis, panel, lettered=len(kinds) > 1)
                axis.set(ylim=(0, max(one.top for one in row) * 1.12), title=panel.title)
                if panel.band:
                    axis.axhspan(*panel.band[:2], color="0.9", zorder=0)
                level = panel.line or (panel.band and panel.band[1:])
                if panel.line:
                    axis.axhline(panel.line[0], color="0.3", linestyle=":", linewidth=1)
                if place == 0:
                    axis.set_ylabel(_axis_label(row, words))
                    if level:
                        below = panel.band is not None
                        axis.annotate(level[1], (0.01, level[0]), xycoords=("axes fraction", "data"), xytext=(0, -2 if below else 2),
                                      textcoords="offset points", va="top" if below else "bottom", fontsize=8, bbox=_LABEL)  # fmt: skip
            if part is parts[-1] or not alike:
                handles, labels = axes[0].get_legend_handles_labels()
                if words.marks:
                    handles.append(Line2D([], [], color="black", marker="D", linestyle="none", markerfacecolor="white"))
                    labels = [*labels, f"that method: {words.marks}"]
                over = figure if alike else part
                over.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(words.title(kinds), fontsize=9)
    return figure


def _axis_label(row: Sequence[Panel], words: Words) -> str:
    """What the axis that a row shares counts, by what kinds of bars stand on it."""
    labels, kinds = row[0].labels, set().union(*(panel.kinds for panel in row))
    if not labels:
        return words.label
    return labels[kinds == {True}] if len(kinds) == 1 else f"m {labels[True]},\ne {labels[False]}"


def _bars(axis: Axes, panel: Panel, lettered: bool) -> None:
    width = 0.84 / len(panel.bars)
    for index, (name, heights) in enumerate(panel.bars.items()):
        at = [group + (index - (len(panel.bars) - 1) / 2) * width for group in range(len(panel.groups))]
        look = panel.styles.get(name, index)
        style: dict[str, Any] = {"color": FILLS[look], "hatch": HATCHES[look], "edgecolor": "black", "linewidth": 0.6}
        # A series of marks alone: a filled diamond is its own entry of the legend.
        only_marks = not any(heights)
        if not only_marks:
            axis.bar(at, [height or 0 for height in heights], width, label=name, **style)
        for place, height, real in zip(at, heights, panel.measured[name], strict=True):
            if lettered and height:
                # At the bar's foot, where no mark stands.
                axis.annotate("m" if real else "e", (place, 0), xytext=(0, 2.5), textcoords="offset points", ha="center", va="bottom",
                              fontsize=8, weight="bold" if real else "normal", bbox=_LABEL)  # fmt: skip
        for place, mark in zip(at, panel.marks.get(name, ()), strict=False):
            if isinstance(mark, float | int):
                axis.plot(place, mark, marker="D", color="black", markerfacecolor="black" if only_marks else "white", markersize=4.5,
                          linestyle="none", label=name if only_marks and name not in axis.get_legend_handles_labels()[1] else None)  # fmt: skip
            elif mark:
                axis.annotate(f"paper: {mark}", (place, 0), xytext=(0, 15 if lettered else 4), textcoords="offset points", rotation=90,
                              ha="center", va="bottom", fontsize=8, bbox=_LABEL)  # fmt: skip
    axis.set_xticks(range(len(panel.groups)), [tokens(group) for group in panel.groups])
    if any(isinstance(group, int) for group in panel.groups):
        axis.set_xlabel("tokens")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def rising_lines(lines: Mapping[str, Sequence[float]], at: Sequence[int], labels: tuple[str, str], title: str) -> Figure:
    """Amounts by a count, both axes in powers of two."""
    with readable():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axis = figure.subplots()
        for index, (name, values) in enumerate(lines.items()):
            style: dict[str, Any] = {"color": SERIES[index], "linestyle": LINES[index % len(LINES)], "marker": MARKERS[index]}
            axis.plot(at, values, label=name, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(at, [str(count) for count in at])
        ticks = [
            2**power
            for power in range(
                int(min(map(min, lines.values()))).bit_length() - 1, int(max(map(max, lines.values()))).bit_length() + 1
            )
        ]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel=labels[0], ylabel=labels[1], title=title)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", frameon=False)
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
