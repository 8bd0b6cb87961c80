"""What the quickstart shows: the table, the plots, a model card per arm and results.json."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import default_data_collator

from ..evaluation.layer_scores import LayerScores, visit_layers
from ..evaluation.perplexity import Perplexity
from ..hub.model_card import Interval, RunResults, write_model_card
from ..models.lemo_config import LemoConfig
from ..models.pattern_predictor import predicted_block_scores
from ..models.sparse_decoder import sparse_backbone
from ..profiling.plots import plot_block_scores, plot_kept_share, plot_losses, plot_saved_bytes
from ..profiling.provenance import provenance


@dataclass
class Arm:
    """One of the runs compared."""

    name: str
    title: str
    lemo: LemoConfig | None


@dataclass
class Measured:
    """What one arm showed; times in seconds, of training steps alone."""

    title: str
    step_seconds: list[float] = field(default_factory=list)
    losses: list[tuple[float, float, float]] = field(default_factory=list)
    phase_seconds: float = 0.0
    saved_bytes: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    recall: list[float] | None = None
    chance: float | None = None
    steps_at_equal_time: int = 0
    perplexity: dict[str, float] = field(default_factory=dict)
    versus_stock: dict[str, Any] = field(default_factory=dict)
    kept_share: list[dict[str, float]] = field(default_factory=list)


def table(before: Perplexity, measured: dict[str, Measured], seconds: dict[str, float]) -> str:
    """The result as text, one column per arm."""
    arms = list(measured.values())
    stock = arms[0]
    rows: list[tuple[str, list[str]]] = [
        ("saved for backward (MiB)", [f"{sum(a.saved_bytes.values()) / 2**20:.0f}" for a in arms]),
        ("  of stock", [f"{sum(a.saved_bytes.values()) / sum(stock.saved_bytes.values()):.2f}" for a in arms]),
        ("FLOPs a step (G)", [f"{a.flops / 1e9:.0f}" for a in arms]),
        ("  of stock", [f"{a.flops / stock.flops:.2f}" for a in arms]),
        ("step time, median (s)", [f"{value:.2f}" for value in seconds.values()]),
        ("  speed of stock", [f"{seconds['stock'] / value:.2f}x" for value in seconds.values()]),
        ("predictor phase (s)", [f"{a.phase_seconds:.0f}" if a.recall else "-" for a in arms]),
        (
            "predictor recall (chance)",
            [f"{statistics.mean(a.recall):.3f} ({a.chance:.3f})" if a.recall else "-" for a in arms],
        ),
        ("dense perplexity before", [f"{before.perplexity:.3f}"] * len(arms)),
        (f"  after {len(stock.step_seconds)} steps", [f"{a.perplexity['equal_steps']:.3f}" for a in arms]),
        ("    against stock", [str(a.versus_stock.get("equal_steps", {}).get("text", "-")) for a in arms]),
        (
            "  at equal time, phases included (steps)",
            [
                f"{a.perplexity['equal_time']:.3f} ({a.steps_at_equal_time})" if "equal_time" in a.perplexity else "-"
                for a in arms
            ],
        ),
        ("    against stock", [str(a.versus_stock.get("equal_time", {}).get("text", "-")) for a in arms]),
    ]
    width = max(len(name) for name, _ in rows) + 2
    columns = [max(len(a.title), *(len(cells[i]) for _, cells in rows)) + 3 for i, a in enumerate(arms)]
    lines = [" " * width + "".join(a.title.rjust(c) for a, c in zip(arms, columns, strict=True))]
    for name, cells in rows:
        lines.append(name.ljust(width) + "".join(cell.rjust(c) for cell, c in zip(cells, columns, strict=True)))
    return "\n".join(lines)


def draw_plots(measured: dict[str, Measured], model: Any, sample: dict[str, torch.Tensor], folder: Path) -> None:
    """Draws saved bytes, losses and kept shares of the arms, and true over predicted block scores of one window.

    Args:
        measured: What each arm showed.
        model: The model whose predictors were trained.
        sample: The window.
        folder: Where the PNG files go.
    """
    plot_saved_bytes({found.title: found.saved_bytes for found in measured.values()}, folder / "saved_bytes.png")
    plot_losses({found.title: found.losses for found in measured.values()}, folder / "losses.png")
    plot_kept_share({found.title: found.kept_share for found in measured.values() if found.kept_share}, folder / "kept_share.png")
    backbone = sparse_backbone(model)
    layers = list(range(1, len(backbone.layers), 2))
    true, predicted = [], []

    def visit(found: LayerScores) -> None:
        if found.layer in layers:
            predictor = found.module.lemo_predictor
            query, key = predictor(found.hidden, found.documents)
            true.append(found.scores[0])
            predicted.append(predicted_block_scores(query, key, predictor.distance.by_distance(len(query))))

    visit_layers(backbone, default_data_collator([sample]), visit)
    plot_block_scores(true, predicted, layers, folder / "block_scores.png")


def write_card(
    arm: Arm,
    found: Measured,
    base: str,
    data: str,
    base_config: dict[str, Any],
    before: Perplexity,
    after: Perplexity,
    folder: Path,
) -> None:
    """Writes the model card of one arm's adapter.

    Args:
        arm: The arm.
        found: What it showed.
        base: Name of the base model.
        data: The training text, in words.
        base_config: Config fields that the base was loaded with.
        before, after: Dense perplexity without the adapter and with it, as it is saved.
        folder: The adapter's folder.
    """
    layers = [name for name in found.kept_share[0] if name != "step"] if found.kept_share else []
    results = RunResults(
        base_model=base,
        data=data,
        seq_len=base_config["max_position_embeddings"],
        lemo=(arm.lemo or LemoConfig(enabled=False)).to_dict(),
        base_config=base_config,
        steps=len(found.step_seconds),
        train_seconds=sum(found.step_seconds) + found.phase_seconds,
        kept_share=[statistics.fmean(entry[name] for entry in found.kept_share) for name in layers] or None,
        recall=list(found.recall) if found.recall else None,
        recall_chance=found.chance,
        perplexity_before=Interval.of(before),
        perplexity_after=Interval.of(after),
    )
    write_model_card(results, folder, f"Quickstart: {arm.title}")


def write_results(
    arms: Sequence[Arm],
    measured: dict[str, Measured],
    seconds: dict[str, float],
    before: Perplexity,
    config: dict[str, Any],
    folder: Path,
) -> None:
    """Writes results.json: configuration, provenance and everything measured."""
    results = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {**config, "arms": {arm.name: arm.lemo.to_dict() if arm.lemo else None for arm in arms}},
        "perplexity_before": before.perplexity,
        "step_seconds_in_turns": seconds,
        "arms": {name: asdict(found) for name, found in measured.items()},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
