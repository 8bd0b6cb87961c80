"""Plots of a run, as PNG files a person looks at: kept shares, block scores, losses, saved bytes.

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


def save_figure(figure: Figure, path: Path, description: str = "") -> Path:
    """Writes a figure as PNG, the same bytes for the same plot; `description` becomes the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without matplotlib's own entry, which names its version: the same plot is the same file.
    metadata = {"Software": None} | ({"Description": description} if description else {})
    figure.savefig(path, format="png", dpi=130, bbox_inches="tight", metadata=metadata)
    return path


def _figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
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
    figure, axes = _figure(rows, 1, (7.0, 2.4 * rows + 0.3), sharex=True)
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
    """Kept share by layer over time, one map per arm.

    Args:
        shares: Arm name to log entries; an entry holds `step` and `kept_share/layer_<l>` in [0, 1].
        path: PNG file.
    """
    figure, axes = _figure(1, len(shares), (5.5 * len(shares), 3.2))
    image = ScalarMappable(Normalize(0, 1), "viridis")
    for axis, (arm, entries) in zip(axes[0], shares.items(), strict=True):
        names = sorted((name for name in entries[0] if name != "step"), key=lambda name: int(name.rsplit("_", 1)[1]))
        grid = torch.tensor([[entry[name] for entry in entries] for name in names])
        axis.imshow(grid.numpy(), aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        ticks = range(0, len(entries), max(1, len(entries) // 6))
        axis.set_xticks(list(ticks), [f"{entries[tick]['step']:.0f}" for tick in ticks])
        axis.set_yticks(range(len(names)))
        axis.set(title=f"{arm}: mean {float(grid.mean()):.2f}", xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=list(axes[0]), label="share of tokens kept")
    return save_figure(figure, path)


def plot_block_scores(true: Sequence[Tensor], predicted: Sequence[Tensor], layers: Sequence[int], path: Path) -> Path:
    """True block-score maps over their predictions, one column per layer.

    Args:
        true, predicted: S of one document per layer, `(blocks, blocks)`.
        layers: Their layer numbers.
        path: PNG file.
    """
    figure, axes = _figure(2, len(layers), (3.1 * len(layers), 6.2))
    for column, (layer, *pair) in enumerate(zip(layers, true, predicted, strict=True)):
        for row, (scores, name) in enumerate(zip(pair, ("true", "predicted"), strict=True)):
            blocks = scores.shape[0]
            above = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
            lower = scores.float().masked_fill(above, torch.nan)
            # The attention sink's column would leave one colour for everything else.
            bulk = lower[1:][:, 1:]
            limits = torch.quantile(bulk[~bulk.isnan()], torch.tensor([0.02, 0.98])).tolist() if blocks > 2 else (None, None)
            axis = axes[row][column]
            image = axis.imshow(lower.cpu().numpy(), cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axis.set(title=f"layer {layer}, {name}")
            axis.set_xlabel("key block")
            axis.set_ylabel("query block" if column == 0 else "")
            figure.colorbar(image, ax=axis, shrink=0.75)
    return save_figure(figure, path)


def plot_losses(losses: Mapping[str, Sequence[tuple[float, float, float]]], path: Path) -> Path:
    """Training loss by step and by time.

    Args:
        losses: Arm name to `(step, seconds of training so far, loss)`.
        path: PNG file.
    """
    figure, (axes,) = _figure(1, 2, (10, 3.6), sharey=True)
    for index, (arm, points) in enumerate(losses.items()):
        steps, seconds, values = zip(*points, strict=True)
        style = {"color": SERIES[index], "linestyle": LINES[index % len(LINES)], "label": arm}
        axes[0].plot(steps, values, **style)
        axes[1].plot(seconds, values, **style)
    axes[0].set(xlabel="step", ylabel="training loss (nats per token)", title="at equal steps")
    axes[1].set(xlabel="seconds of training", title="at equal time")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    return save_figure(figure, path)


def plot_saved_bytes(parts: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """What each arm saves for backward, by part of the model, as stacked bars.

    Args:
        parts: Arm name to bytes by part; the parts of the first arm give the order.
        path: PNG file.
    """
    names = list(dict.fromkeys(name for arm in parts.values() for name in arm))
    hatches = ("", "//", "..", "xx", "\\\\", "++", "oo")
    figure, ((axis,),) = _figure(1, 1, (8, 0.7 * len(parts) + 1.6))
    left = [0.0] * len(parts)
    for index, name in enumerate(names):
        widths = [arm.get(name, 0.0) / 2**20 for arm in parts.values()]
        style: dict[str, Any] = {"color": SERIES[1:][index % 6], "hatch": hatches[index % 7], "edgecolor": "white"}
        axis.barh(list(parts), widths, left=left, label=name, **style)
        left = [base + width for base, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:.0f} MiB", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="MiB saved for backward, one step", xlim=(0, max(left) * 1.15))
    axis.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.25), frameon=False)
    return save_figure(figure, path)
