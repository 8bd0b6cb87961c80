"""Memory by length for every method, with the card's limit: one PNG that reads in grey print and for the colour-blind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...errors import LemoError
from ..plots import LINES, SERIES, save_figure
from .cards import GIB
from .estimator import Estimator
from .step_model import StepSettings
from .tables import method_settings

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")


def plot_memory(estimator: Estimator, settings: StepSettings, path: Path, longest: int) -> Path:
    """Draws what every method needs by length.

    Marks are lengths that are traced, four of them up to `longest`; lines join them.

    Args:
        estimator: Of the model; its limit is drawn if it has one.
        settings: The step; LeMo's kept share and the adapters are taken from it.
        path: PNG file.
        longest: Last length of the axis, in tokens; at least 8.
    """
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axis = figure.subplots()
    lengths = [longest >> halvings for halvings in (3, 2, 1, 0)]
    top = 0.0
    for index, variant in enumerate(method_settings(settings)):
        try:
            needed = [estimator.estimate(replace(variant, seq_len=length)).total_bytes / GIB for length in lengths]
        except LemoError:
            continue  # Liger has no functions for every architecture
        style: dict[str, Any] = {"color": SERIES[index % len(SERIES)], "linestyle": LINES[index % len(LINES)]}
        axis.plot(lengths, needed, marker=_MARKERS[index], label=variant.name, **style)
        top = max(top, *needed)
    if estimator.memory is not None:
        limit = estimator.memory / GIB
        name = estimator.card.name if estimator.card is not None and estimator.card.memory == estimator.memory else "limit"
        axis.axhline(limit, color="0.35", linewidth=1.5)
        label = f"{name}: {limit:.1f} GiB"
        axis.annotate(label, (longest, limit), xytext=(0, 4), textcoords="offset points", ha="right", color="0.25")
        top = min(top, 1.7 * limit)
    axis.set(ylim=(0, top * 1.05), xlabel="tokens of the sequence", ylabel="GiB needed, slack and context included")
    axis.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths])
    title = f"{estimator.model}, batch {settings.batch_size}, LoRA r={settings.lora_r}, {settings.adapter_dtype} adapters"
    axis.set_title(
        title
        + (", autocast" if settings.autocast else "")
        + ": estimated, not measured\nmemory alone: neither perplexity nor speed is in it",
        fontsize=10,
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return save_figure(figure, path)
