"""What the quickstart shows: the table, the plots, a model card per arm and results.json."""

import json
import math
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
from ..hub.model_card import Interval, PerplexityComparison, RunResults, StockRun, write_model_card
from ..models.lemo_config import LemoConfig
from ..models.pattern_predictor import predicted_block_scores
from ..models.sparse_decoder import sparse_backbone
from ..profiling.plots import plot_block_scores, plot_kept_share, plot_losses, plot_saved_bytes
from ..profiling.provenance import provenance
from ..profiling.report.data import RunData, read_run
from ..profiling.report.page import REPORT_FILE, write_report


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
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
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
            query, key = found.features()
            true.append(found.scores[0])
            predicted.append(predicted_block_scores(query, key, predictor.distance.by_distance(len(query))))

    visit_layers(backbone, default_data_collator([sample]), visit)
    plot_block_scores(true, predicted, layers, folder / "block_scores.png")


def arm_results(results: dict[str, Any], name: str) -> RunResults:
    """One arm's content of results.json as a model card takes it.

    Args:
        results: What `write_results` wrote.
        name: Name of the arm.
    """
    config, arm, stock = results["config"], results["arms"][name], results["arms"]["stock"]
    lemo, seconds = config["arms"][name], results["step_seconds_in_turns"]
    layers = [key for key in arm["kept_share"][0] if key != "step"] if arm["kept_share"] else []
    last = list(arm["perplexity"])[-1]  # the adapter on disk is that of the last step
    recall = [None if math.isnan(value) else value for value in arm["recall"] or []]
    return RunResults(
        base_model=config["base"],
        data=f"Python sources of {', '.join(config['train'])}",
        seq_len=config["tokens"],
        lemo=lemo or LemoConfig(enabled=False).to_dict(),
        base_config=config["base_config"],
        adapter=f"LoRA {config['lora']}",
        precision=config["dtype"],
        steps=len(arm["step_seconds"]),
        train_seconds=sum(arm["step_seconds"]) + arm["phase_seconds"],
        batch=config["batch"],
        saved_bytes=sum(arm["saved_bytes"].values()),
        step_flops=arm["flops"],
        step_seconds=seconds[name],
        kept_share=[statistics.fmean(entry[key] for entry in arm["kept_share"]) for key in layers] or None,
        recall=recall or None,
        recall_chance=arm["chance"],
        perplexity_before=_interval(results["perplexity_before"], results.get("perplexity_before_interval")),
        perplexity_after=_interval(arm["perplexity"][last], arm.get("intervals", {}).get(last)),
        evaluation_data=f"Python sources of {', '.join(config['evaluation'])}",
        stock=None
        if lemo is None
        else StockRun(
            comparisons=[_comparison(when, arm, stock) for when in arm["versus_stock"]],
            saved_bytes=sum(stock["saved_bytes"].values()),
            step_flops=stock["flops"],
            step_seconds=seconds["stock"],
        ),
        language=["code"],
        license=config["license"],
        provenance={part: results[part] for part in ("commit", "versions", "machine")},
    )


def _interval(value: float, interval: dict[str, Any] | None) -> Interval:
    # Result files of before 2026-11-21 hold the value alone.
    return Interval(**interval) if interval else Interval(value, None, None, None)


def _comparison(when: str, arm: dict[str, Any], stock: dict[str, Any]) -> PerplexityComparison:
    found, steps = arm["versus_stock"][when], len(stock["step_seconds"])
    return PerplexityComparison(
        equal="steps" if when == "equal_steps" else "time",
        steps=steps if when == "equal_steps" else arm["steps_at_equal_time"],
        stock_steps=steps,
        perplexity=arm["perplexity"][when],
        stock_perplexity=stock["perplexity"]["equal_steps"],
        percent=found["percent"],
        low=found["low"],
        high=found["high"],
    )


def write_results(
    arms: Sequence[Arm],
    measured: dict[str, Measured],
    seconds: dict[str, float],
    before: Perplexity,
    config: dict[str, Any],
    folder: Path,
) -> None:
    """Writes results.json, configuration, provenance and everything measured, and from it each adapter's model card."""
    results = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "config": {**config, "arms": {arm.name: arm.lemo.to_dict() if arm.lemo else None for arm in arms}},
        "perplexity_before": before.perplexity,
        "perplexity_before_interval": asdict(Interval.of(before)),
        "step_seconds_in_turns": seconds,
        "arms": {name: asdict(found) for name, found in measured.items()},
    }
    text = json.dumps(results, indent=1)
    (folder / "results.json").write_text(text + "\n")
    for arm in arms:
        write_model_card(arm_results(json.loads(text), arm.name), folder / arm.name, f"Quickstart: {arm.title}")


def write_page(folder: Path) -> Path:
    """Writes report.html, LeMo's arms beside the stock one, from results.json and what the arms' trainers left; returns its path.

    Args:
        folder: What `write_results` and the arms wrote.
    """
    results = json.loads((folder / "results.json").read_text())
    runs = [_arm_data(results, name, folder) for name in results["arms"]]
    title = f"Quickstart: {results['config']['base']}, {results['config']['tokens']} tokens"
    return write_report([run for run in runs if run.lemo is not None], folder / REPORT_FILE, runs[0], title)


def _arm_data(results: dict[str, Any], name: str, folder: Path) -> RunData:
    arm, seconds = results["arms"][name], results["step_seconds_in_turns"][name]
    if results["config"]["arms"][name] is None:
        history = [{"step": step, "seconds/training": 0.0, "loss": loss} for step, _, loss in arm["losses"]]
        run = RunData(arm["title"], name, history, max_steps=len(history))
    else:
        run = read_run(folder / name, name)
        run.name = arm["title"]
    # Memory is that of the process, which ran all arms; steps are timed in turns, since the arms ran one after the other and
    # the machine may have had other work beside one of them.
    run.history = [
        {
            key: entry["step"] * seconds if key == "seconds/training" else entry[key]
            for key in entry
            if not key.startswith("memory/")
        }
        for entry in run.history
    ]
    run.memory_note = (
        "Not shown: the arms ran in one process, so its memory is no arm's own. Bytes saved for backward compare them."
    )
    run.results = arm_results(results, name)
    return run
