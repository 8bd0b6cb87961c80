"""Plots of a run that a person looks at: kept shares, block scores, losses, saved bytes; `draw_...` gives the figure, `plot_...` a PNG.

Colours are told apart by the colour-blind and in grey print (viridis for maps, the Okabe-Ito palette for series).
matplotlib is imported here and this module only where a plot is drawn; pyplot is not, which would change the windows of a person's
notebook.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

SERIES = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D")
# From so many points on a curve is drawn as its running mean too.
_MANY_POINTS = 80

# Step, seconds of training so far (`None` if not known), loss.
Point = tuple[float, float | None, float]


def save_figure(figure: Figure, path: Path, description: str = "") -> Path:
    """Writes a figure as PNG, the same bytes for the same plot; `description` becomes the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without matplotlib's own entry, which names its version: the same plot is the same file.
    metadata = {"Software": None} | ({"Description": description} if description else {})
    figure.savefig(path, format="png", dpi=130, bbox_inches="tight", metadata=metadata)
    return path


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, `axes[row][column]`; its size is in inches."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def plot_kept_by_layer(
    shares: Sequence[float | None],
    path: Path,
    recall: Sequence[float | None] | None = None,
    chance: float | None = None,
    description: str = "",
) -> Path:
    """Kept share of each layer, and under it the recall of its predictor where there is one.

    Args:
        shares: Share of tokens that each layer computed on, in [0, 1]; `None` draws nothing.
        path: PNG file.
        recall: Recall of each layer's predictor, in [0, 1].
        chance: Recall of a choice at random.
        description: Stored in the file as its description.
    """
    known = [(layer, value) for layer, value in enumerate(recall or []) if value is not None]
    rows = 2 if known else 1
    figure, axes = new_figure(rows, 1, (7.0, 2.4 * rows + 0.3), sharex=True)
    kept = [(layer, share) for layer, share in enumerate(shares) if share is not None]
    axis = axes[0][0]
    # Told apart by the hatch in grey print.
    for dense, color, hatch, label in ((False, SERIES[1], "", "some left out"), (True, SERIES[6], "///", "every token kept")):
        bars = [(layer, share) for layer, share in kept if (share >= 1) is dense]
        if bars:
            axis.bar(*zip(*bars, strict=True), width=0.8, color=color, hatch=hatch, edgecolor="white", label=label)
    mean = sum(share for _, share in kept) / len(kept)
    axis.axhline(mean, color=SERIES[0], linestyle="--", linewidth=1, label=f"mean {mean:.2f}")
    axis.set(ylabel="share of tokens\ncomputed on")
    if known:
        axis = axes[1][0]
        axis.plot(*zip(*known, strict=True), color=SERIES[2], marker="o", linestyle="none", label="pattern predictor")
        if chance is not None:
            axis.axhline(chance, color=SERIES[0], linestyle=":", linewidth=1.5, label=f"chance {chance:.2f}")
        axis.set(ylabel="recall of\nkept blocks")
    for (axis,) in axes:
        axis.set(ylim=(0, 1.05))
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.set(xlabel="layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return save_figure(figure, path, description)


def plot_kept_share(shares: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """As [`draw_kept_share`], written to the PNG file `path`."""
    return save_figure(draw_kept_share(shares), path)


def draw_kept_share(shares: Mapping[str, Sequence[Mapping[str, float]]], size: tuple[float, float] = (5.5, 3.2)) -> Figure:
    """Kept share by layer over time, one map per arm.

    Args:
        shares: Arm name to log entries; an entry holds `step` and `kept_share/layer_<l>` in [0, 1], NaN draws nothing.
        size: Width and height of one map, inches.
    """
    figure, axes = new_figure(1, len(shares), (size[0] * len(shares), size[1]))
    image = ScalarMappable(Normalize(0, 1), "viridis")
    for axis, (arm, entries) in zip(axes[0], shares.items(), strict=True):
        names = sorted((name for name in entries[0] if name != "step"), key=lambda name: int(name.rsplit("_", 1)[1]))
        grid = torch.tensor([[entry[name] for entry in entries] for name in names])
        axis.imshow(grid.numpy(), aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        ticks = range(0, len(entries), max(1, len(entries) // 6))
        axis.set_xticks(list(ticks), [f"{entries[tick]['step']:.0f}" for tick in ticks])
        rows = range(0, len(names), max(1, len(names) // 12))
        axis.set_yticks(list(rows), [names[row].rsplit("_", 1)[1] for row in rows])
        axis.set(title=f"{arm}: mean {float(grid.nanmean()):.2f}", xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=list(axes[0]), label="share of tokens kept")
    return figure


def plot_block_scores(true: Sequence[Tensor], predicted: Sequence[Tensor], layers: Sequence[int], path: Path) -> Path:
    """As [`draw_block_scores`], written to the PNG file `path`."""
    return save_figure(draw_block_scores(true, predicted, layers), path)


def draw_block_scores(true: Sequence[Tensor], predicted: Sequence[Tensor], layers: Sequence[int]) -> Figure:
    """True block-score maps over their predictions, one column per layer.

    Args:
        true, predicted: S of one document per layer, `(blocks, blocks)`.
        layers: Their layer numbers.
    """
    figure, axes = new_figure(2, len(layers), (3.1 * len(layers), 6.2))
    for column, (layer, *pair) in enumerate(zip(layers, true, predicted, strict=True)):
        for row, (scores, name) in enumerate(zip(pair, ("true", "predicted"), strict=True)):
            blocks = scores.shape[0]
            # A block's score with itself decides nothing, and is not predicted.
            above = torch.ones(blocks, blocks, dtype=torch.bool).triu()
            lower = scores.float().masked_fill(above, torch.nan)
            # The attention sink's column would leave one colour for everything else.
            bulk = lower[1:][:, 1:]
            limits = torch.quantile(bulk[~bulk.isnan()], torch.tensor([0.02, 0.98])).tolist() if blocks > 2 else (None, None)
            axis = axes[row][column]
            image = axis.imshow(lower.cpu().numpy(), cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axis.set(title=f"layer {layer}, {name}")
            axis.set_xlabel("key block")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_ylabel("query block" if column == 0 else "")
            figure.colorbar(image, ax=axis, shrink=0.75)
    return figure


def plot_losses(losses: Mapping[str, Sequence[Point]], path: Path) -> Path:
    """As [`draw_losses`], written to the PNG file `path`."""
    return save_figure(draw_losses(losses), path)


def draw_losses(losses: Mapping[str, Sequence[Point]], evaluations: Mapping[str, Sequence[Point]] | None = None) -> Figure:
    """Training loss by step and by time; of many points, which scatter, the running mean stands out.

    Args:
        losses: Arm name to `(step, seconds of training so far, loss)`; without any time known there is no plot by time.
        evaluations: The same of held-out text, drawn as points.
    """
    timed = any(seconds is not None for points in losses.values() for _, seconds, _ in points)
    figure, (axes,) = new_figure(1, 2 if timed else 1, (10, 3.6), sharey=True)
    longest = max((seconds or 0 for points in losses.values() for _, seconds, _ in points), default=0)
    unit, word = time_unit(longest)
    for axis, name in zip(axes, ("step", "seconds")):
        for index, (arm, points) in enumerate(losses.items()):
            style = {"color": SERIES[index % len(SERIES)], "linestyle": LINES[index % len(LINES)]}
            _draw_series(axis, _along(points, name, unit), arm, **style)
            held_out = _along((evaluations or {}).get(arm, []), name, unit)
            if held_out:
                style = {"linestyle": "none", "marker": MARKERS[index % len(MARKERS)], "markerfacecolor": "none"}
                axis.plot(*zip(*held_out, strict=True), color=SERIES[index % len(SERIES)], label=f"{arm}, held-out text", **style)
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="step", ylabel="loss (nats per token)", title="at equal steps" if len(losses) > 1 else "by step")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if timed:
        axes[1].set(xlabel=f"{word} of training", title="at equal time" if len(losses) > 1 else "by time")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _along(points: Sequence[Point], name: str, unit: float) -> list[tuple[float, float]]:
    if name == "step":
        return [(step, loss) for step, _, loss in points]
    return [(seconds / unit, loss) for _, seconds, loss in points if seconds is not None]


def _draw_series(axis: Any, points: list[tuple[float, float]], label: str, color: str, linestyle: str) -> None:
    if not points:
        return
    places, values = zip(*points, strict=True)
    if len(points) < _MANY_POINTS:
        axis.plot(places, values, color=color, linestyle=linestyle, label=label)
        return
    window = len(points) // (_MANY_POINTS // 4)
    means = torch.tensor(values, dtype=torch.float64).unfold(0, window, 1).mean(1).tolist()
    axis.plot(places, values, color=color, linewidth=0.6, alpha=0.35)
    axis.plot(places[window - 1 :], means, color=color, linestyle=linestyle, label=f"{label}, mean of {window}")


def time_unit(longest: float) -> tuple[float, str]:
    """Seconds of the unit that reads well for times up to `longest` seconds, and its name."""
    return (1.0, "seconds") if longest < 180 else (60.0, "minutes") if longest < 3 * 3600 else (3600.0, "hours")


def plot_saved_bytes(parts: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """What each arm saves for backward, by part of the model, as stacked bars in the PNG file `path`.

    Args:
        parts: Arm name to bytes by part; the parts of the first arm give the order.
        path: PNG file.
    """
    return save_figure(draw_parts(parts, 2**20, "MiB", "MiB saved for backward, one step"), path)


def draw_parts(parts: Mapping[str, Mapping[str, float]], unit: float, unit_name: str, xlabel: str) -> Figure:
    """Amounts by part as stacked bars, their sum beside each.

    Args:
        parts: Arm name to amounts by part; the parts of the first arm give the order.
        unit: What an amount is divided by for `unit_name`.
        unit_name: Stands beside each sum.
        xlabel: What is measured, with its unit.
    """
    names = list(dict.fromkeys(name for arm in parts.values() for name in arm))
    hatches = ("", "//", "..", "xx", "\\\\", "++", "oo")
    figure, ((axis,),) = new_figure(1, 1, (8, 0.7 * len(parts) + 1.6))
    left = [0.0] * len(parts)
    for index, name in enumerate(names):
        widths = [arm.get(name, 0.0) / unit for arm in parts.values()]
        style: dict[str, Any] = {"color": SERIES[1:][index % 6], "hatch": hatches[index % 7], "edgecolor": "white"}
        axis.barh(list(parts), widths, left=left, label=name, **style)
        left = [base + width for base, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:.{0 if total >= 10 else 1}f} {unit_name}", va="center")
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, xlim=(0, max(left) * 1.15))
    axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.25), frameon=False)
    return figure
