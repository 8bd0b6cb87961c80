"""The figures of a run's report: what is drawn of which runs, and what to see in it."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..plots import draw_block_scores, draw_kept_share, draw_losses, draw_parts, time_unit
from .data import TIME_PARTS, Entry, RunData
from .plots import MemorySeries, RecallSeries, draw_memory, draw_recall, draw_saved_by_layer
from .words import amount

# A curve or a map has no more places than a screen shows.
_MOST_POINTS = 2000
_MOST_COLUMNS = 400
# Smaller shares of a run's time are counted as other.
_SMALL = 0.005
# What is measured as memory, by the device that trains.
_MEMORY_OF = {
    "cuda": "Tensors on the GPU",
    "cpu": "Resident memory of the process, with the interpreter and libraries in it",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page.

    Args:
        svg: The figure as inline SVG, in the page's text colour.
        title: What it is, for who cannot see it.
        caption: What to see in it, and what its parts mean.
    """

    svg: Markup
    title: str
    caption: str


def figure_svg(figure: Figure, name: str) -> Markup:
    """A figure as an SVG element without fixed size, black being the text colour of the page that it stands in.

    Args:
        figure: The figure.
        name: Makes the identifiers within it differ from those of other figures of the page.
    """
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", dpi=160, transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    # The one colour of the palette that is too dark for a dark page.
    text = re.sub(r"(fill|stroke): #0072b2", r"\1: var(--blue)", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height|version)="[^"]*"', "", head)
    # Letters of the same size in all figures: a figure of ten inches is as wide as the page.
    inches = figure.get_size_inches()[0]
    size_of_it = f"width: {min(inches * 10, 100):.0f}%; min-width: {inches * 3.4:.1f}rem"
    return Markup(f'{head} style="{size_of_it}" aria-hidden="true">{rest}')  # matplotlib escapes the text in it


def losses(runs: Sequence[RunData]) -> Drawing | None:
    """Training losses by step and by time."""
    points = {run.label: thin(run.points("loss"), _MOST_POINTS) for run in runs if run.points("loss")}
    if not points:
        return None
    held_out = {run.label: run.points("eval_loss") for run in runs if run.points("eval_loss")}
    caption = "Lower is better; look whether the curves part. " if len(points) > 1 else "Lower is better; single steps scatter. "
    caption += "Time is that of steps, phases and probes: evaluation and saving are left out."
    if any(run.points("loss") and not run.seconds() and run.training_seconds for run in runs):
        caption += " Where a log does not say when its steps were made, an even pace is assumed."
    return Drawing(figure_svg(draw_losses(points, held_out), "losses"), "Loss by step and by time", caption)


def kept_share(run: RunData) -> Drawing | None:
    """Kept share, layer by step."""
    layers, entries = run.by_layer("kept_share")
    if not layers or run.lemo is None:
        return None
    names = [f"kept_share/layer_{layer}" for layer in layers]
    shown = [{"step": entry["step"], **{name: entry.get(name, float("nan")) for name in names}} for entry in entries]
    caption = "Bright layers computed on more tokens. "
    if run.lemo.selection == "threshold":
        caption += (
            "A column that is bright throughout is text that the thresholds found informative; layers differ by calibration."
        )
    else:
        caption += "One even colour is as it should be: this selection keeps a fixed share of a document's blocks, and a little more of short ones."
    if run.lemo.dense_layers:
        caption += " Layers set to keep every token are at 1."
    drawn = draw_kept_share({run.label: thin(shown, _MOST_COLUMNS)}, (10.0, 1.6 + min(0.12 * len(layers), 3.0)))
    return Drawing(figure_svg(drawn, f"kept_share {run.label}"), f"Share of tokens kept by layer and step, {run.label}", caption)


def recall(run: RunData) -> Drawing | None:
    """Recall of the predictors."""
    layers, entries = run.by_layer("recall")
    if not layers:
        return None
    entries = thin(entries, _MOST_POINTS)
    values = [[entry.get(f"recall/layer_{layer}", float("nan")) for layer in layers] for entry in entries]
    refits = [int(entry["step"]) for entry in run.entries("recall_before_refit")]
    chance, positions = run.last("recall_of_chance"), run.last("recall_of_positions")
    series = RecallSeries([int(entry["step"]) for entry in entries], layers, values, chance, positions, refits)
    caption = (
        "Of the blocks that the true scores keep, the share that the predictors find. Layers should lie well above chance, and above "
        "what positions alone tell; over the run they should stay level: a fall means that training moves the model away from them."
    )
    return Drawing(figure_svg(draw_recall(series), f"recall {run.label}"), f"Recall of the predictors, {run.label}", caption)


def block_scores(run: RunData) -> Drawing | None:
    """Block-score maps beside their predictions."""
    maps = run.maps
    if maps is None:
        return None
    cells = len(maps.true[0])
    grid = f" A cell is the mean of {maps.blocks / cells:.1f} blocks." if maps.blocks > cells else ""
    caption = (
        f"One document of {maps.blocks} blocks of {maps.block_size} tokens, at step {maps.step}: the true scores above, the predicted "
        f"ones below. Bright columns are blocks that many later tokens attend to; they should be bright in both. The diagonal decides nothing and is left out. Each map has a "
        f"scale of its own; only the order of blocks within a map decides what is kept.{grid}"
    )
    drawn = draw_block_scores(maps.true, maps.predicted, maps.layers)
    return Drawing(figure_svg(drawn, f"block_scores {run.label}"), f"True and predicted block scores, {run.label}", caption)


def memory(runs: Sequence[RunData]) -> Drawing | None:
    """Memory over time."""
    series = {run.label: found for run in runs if (found := _memory_of(run)) is not None}
    if not series:
        return None
    measured: dict[str, list[str]] = {}
    for run in runs:
        if run.label in series:
            measured.setdefault(_MEMORY_OF.get(run.device, "Memory as the run logged it, of what it does not say"), []).append(
                run.label
            )
    # One kind is said once; of several it is said whose each is, for they cannot be held against one another.
    what = "; ".join(kind if len(measured) == 1 else f"{kind} ({', '.join(labels)})" for kind, labels in measured.items())
    apart = " They measure different things: their heights cannot be compared." if len(measured) > 1 else ""
    caption = (
        f"{what}.{apart} The stairs are the highest so far, loading of the model included: where they rise, something needed more than all "
        "before it. Points are measured when a logged step's forward ends, when all that its backward needs is there."
    )
    return Drawing(figure_svg(draw_memory(series), "memory"), "Memory over time", caption)


def _memory_of(run: RunData) -> MemorySeries | None:
    timed = [entry for entry in run.history if any(name.startswith("seconds/") for name in entry)]
    peaks = [(_elapsed(entry), entry["memory/peak_bytes"]) for entry in timed if "memory/peak_bytes" in entry]
    if not peaks:
        return None
    name = "memory/after_forward_bytes"
    forward = [(_elapsed(entry), entry[name]) for entry in timed if name in entry]
    phases, begin = [], 0.0
    for phase in ("predictor", "calibrate"):
        spent = run.seconds().get(phase, 0.0)
        if spent > 0:
            phases.append((phase, begin, begin + spent))
            begin += spent
    return MemorySeries(thin(peaks, _MOST_POINTS), thin(forward, _MOST_POINTS), phases)


def _elapsed(entry: Entry) -> float:
    return sum(entry.get(f"seconds/{part}", 0.0) for part in TIME_PARTS)


def time_breakdown(runs: Sequence[RunData]) -> Drawing | None:
    """Where the time went."""
    parts = {run.label: run.seconds() for run in runs if run.seconds()}
    if not parts:
        return None
    unit, word = time_unit(max(sum(spent.values()) for spent in parts.values()))
    names = [part for part in TIME_PARTS if any(spent.get(part, 0) >= _SMALL * sum(spent.values()) for spent in parts.values())]
    ordered = {label: {name: spent.get(name, 0.0) for name in names} for label, spent in parts.items()}
    for label, spent in parts.items():
        rest = sum(spent.values()) - sum(ordered[label].values())
        if rest > 0:
            ordered[label]["other"] = ordered[label].get("other", 0.0) + rest
    short = {"seconds": "s", "minutes": "min", "hours": "h"}[word]
    caption = "Training should be most of it; “other” is loading data and callbacks of others."
    drawn = draw_parts(ordered, unit, short, f"{word} of the run")
    return Drawing(figure_svg(drawn, "time"), "Time by phase", caption)


def saved_by_layer(runs: Sequence[RunData]) -> Drawing | None:
    """Bytes saved for backward by layer."""
    saved = {run.label: layers for run in runs if (layers := run.mean_by_layer("saved_bytes"))}
    if not saved:
        return None
    caption = "Mean over the logged steps of what autograd keeps for backward in one forward pass; it follows the kept share."
    for run in runs:
        whole = run.mean("saved_bytes")
        if run.label in saved and whole is not None:
            rest = whole - sum(saved[run.label].values())
            caption += f" {run.label}: {amount(whole)}, of which {amount(rest)} outside the layers (embedding, last norm, loss)."
    return Drawing(figure_svg(draw_saved_by_layer(saved), "saved_by_layer"), "Bytes saved for backward by layer", caption)


def thin(entries: Sequence[Any], most: int) -> list[Any]:
    """At most about `most` of the entries, evenly, the last one among them."""
    stride = -(-len(entries) // most)
    return list(entries[::-1][:: max(stride, 1)][::-1])
