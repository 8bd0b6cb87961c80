"""How benchmarks/paper_figures.py draws what benchmarks/sparsity_figures.py measured: Table 3, Figures 4, 7, 16 and 17 of the paper.

Everything comes from the JSON, a row or a panel for each model in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from paper_plots import MARKERS, WIDTH, readable, tokens
from torch import Tensor

from lemo_hf.profiling.plots import LINES, SERIES

# What the JSON calls a reading, for people.
READINGS = {
    "probabilities": "softmax probabilities, of their query's largest",
    "token_scores": "token scores s, of the map's largest",
    "block_scores": "block scores S, of the map's largest",
    "tokens": "tokens' informativeness, of the largest",
    "blocks": "blocks' informativeness I, of the largest",
}
Models = Mapping[str, Mapping[str, Any]]


def sparsity_by_length(models: Models, paper: Mapping[str, Any]) -> Figure:
    """Table 3 as lines: share below the criterion by length, a panel a model, the paper's models in each."""
    with readable():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, (name, model) in zip(axes, models.items(), strict=True):
            lengths = [row["length"] for row in model["sparsity"]]
            for index, (reading, words) in enumerate(READINGS.items()):
                means = [row[reading]["mean"] for row in model["sparsity"]]
                spreads = [row[reading]["spread"] or 0 for row in model["sparsity"]]
                style: dict[str, Any] = {
                    "color": SERIES[1 + index],
                    "linestyle": LINES[index % len(LINES)],
                    "marker": MARKERS[index],
                }
                axis.errorbar(lengths, means, spreads, label=f"ours: {words}", markersize=4, capsize=2, linewidth=1.2, **style)
            for index, (key, words) in enumerate((("llama2", "Llama-2-7B"), ("llama3", "Llama-3-8B"))):
                style = {"color": "black", "linestyle": ("-", "--")[index], "marker": ("X", "P")[index], "linewidth": 1.6}
                axis.plot(paper["seq_len"], paper[key], label=f"paper: {words}", markersize=5, **style)
            axis.set(title=name, xlabel="tokens", ylim=(-0.03, 1.03))
            axis.set_xticks([4096, 8192, 12288, 16384], [tokens(length) for length in (4096, 8192, 12288, 16384)])
            axis.axvline(model["own_context"], color="0.5", linewidth=0.8, linestyle=":")
            axis.annotate(f"trained at {tokens(model['own_context'])}", (model["own_context"], 0.30), xytext=(3, 0), rotation=90,
                          textcoords="offset points", fontsize=8, va="center", color="0.3")  # fmt: skip
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("share below 0.3 of the maximum")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def score_maps(models: Models) -> Figure:
    """Figure 4: block-score maps, a column a layer, a row an input."""
    inputs = [
        (name, document) for name, model in models.items() for document in dict.fromkeys(m["document"] for m in model["maps"])
    ]
    columns = max(len([m for m in models[name]["maps"] if m["document"] == document]) for name, document in inputs)
    with readable():
        figure = Figure(figsize=(WIDTH, 2.35 * len(inputs)), layout="constrained")
        axes = figure.subplots(len(inputs), columns, squeeze=False)
        for row, (name, document) in zip(axes, inputs, strict=True):
            entries = [m for m in models[name]["maps"] if m["document"] == document]
            for axis, entry in zip(row, entries, strict=True):
                title = f"layer {entry['layer']}"
                if axis is row[0]:
                    title = f"{name}, {document.rpartition('/')[2]}\n{title}"
                _map(figure, axis, square(entry["scores"]), title)
            row[0].set_ylabel("query block")
        for axis in axes[-1]:
            axis.set_xlabel("key block")
    return figure


def predicted_maps(model: Mapping[str, Any]) -> Figure:
    """Figure 16: true block scores over predicted ones, a column a layer, one input."""
    first = model["maps"][0]["document"]
    entries = [entry for entry in model["maps"] if entry["document"] == first]
    with readable():
        figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
        axes = figure.subplots(2, len(entries), squeeze=False)
        for column, entry in enumerate(entries):
            for row, (field, words) in enumerate((("scores", "true"), ("predicted_scores", "predicted"))):
                _map(figure, axes[row][column], square(entry[field]), f"layer {entry['layer']}, {words}")
            axes[1][column].set_xlabel("key block")
        for row in axes:
            row[0].set_ylabel("query block")
    return figure


def _map(figure: Figure, axis: Axes, scores: Tensor, title: str) -> None:
    """A map of pairs of different blocks, in a scale of its own that the attention sink and the diagonal do not fix."""
    hidden = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(), torch.nan)
    bulk = hidden[1:][:, 1:]
    low, high = torch.quantile(bulk[~bulk.isnan()], torch.tensor([0.02, 0.98])).tolist()
    image = axis.imshow(hidden.numpy(), cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.colorbar(image, ax=axis, shrink=0.85)


def square(triangle: Sequence[float]) -> Tensor:
    """S from its entries on and below the diagonal, row by row; 0 above."""
    blocks = round(((8 * len(triangle) + 1) ** 0.5 - 1) / 2)
    scores = torch.zeros(blocks, blocks)
    scores[torch.ones(blocks, blocks, dtype=torch.bool).tril()] = torch.tensor(triangle)
    return scores


def unimportant_blocks(models: Models) -> Figure:
    """Figure 7: share of blocks of 64 without important tokens, by the share of tokens called important."""
    with readable():
        figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axis, (name, model) in zip(axes, models.items(), strict=True):
            found = model["unimportant_blocks"]
            shares = [float(share) for share in found["by_share"]]
            layers = list(zip(*(each["by_layer"] for each in found["by_share"].values()), strict=True))
            for layer, values in enumerate(layers):
                style: dict[str, Any] = {"color": SERIES[layer % len(SERIES)], "linestyle": LINES[layer % len(LINES)]}
                axis.plot(shares, values, marker=MARKERS[layer % len(MARKERS)], markersize=4, label=f"layer {layer}", **style)
            axis.plot(shares, list(found["by_chance"].values()), color="0.45", linewidth=2.5, label="thrown anywhere")
            axis.set(title=name, xscale="log", xlabel="share of tokens called important, %", ylim=(-0.03, 1.0))
            axis.set_xticks(shares, [f"{100 * share:g}" for share in shares])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("share of blocks of 64\nwithout any")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def predicted_informativeness(model: Mapping[str, Any], paper_recall: float) -> Figure:
    """Figure 17: recall by layer, and true and predicted informativeness by block, a panel a layer."""
    first = model["maps"][0]["document"]
    entries = [entry for entry in model["maps"] if entry["document"] == first]
    found = model["prediction"]
    with readable():
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        above, below = figure.subfigures(2, 1)
        axis = above.subplots()
        for (name, words), marker, line, color in zip(
            (("recall", "shipped predictors"), ("recall_of_positions", "positions alone")),
            "os",
            ("-", "--"),
            SERIES[1:3],
            strict=True,
        ):
            axis.plot(found[name]["by_layer"], marker=marker, linestyle=line, color=color, label=words)
        axis.axhline(paper_recall, color="black", linestyle="-.", label=f"paper: {paper_recall:.1%}")
        axis.axhline(found["recall_of_chance"], color="0.5", linestyle=":", label="chance")
        axis.set(xlabel="layer", ylabel="recall of the half kept", ylim=(0.4, 1.0))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        panels = below.subplots(1, len(entries), squeeze=False)[0]
        for panel, entry in zip(panels, entries, strict=True):
            for name, words, style in (
                ("informativeness", "true", {"color": "black", "linewidth": 1.6}),
                ("predicted_informativeness", "predicted", {"color": SERIES[2], "linestyle": "--", "linewidth": 1.3}),
            ):
                panel.plot(range(1, len(entry[name]) - 1), entry[name][1:-1], label=words, **style)
            panel.set(title=f"layer {entry['layer']}", xlabel="block", ylim=(0, None))
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("informativeness I")
        below.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure
