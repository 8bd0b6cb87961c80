"""The paper's figures from this repository's results, ours beside the paper's: pictures in docs/images/paper, docs/paper_figures.md.

    python benchmarks/paper_figures.py [--check]

The paper's figures are benchmarks/paper_results.json. Ours are GPU measurements of `lemo bench` where committed results hold them;
where they do not, each bar is what the estimator says (benchmarks/paper_estimates.py), named so in every picture, and what would
measure it is listed as unmeasured. `--check` only says whether the page is what the committed results say.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import paper_plots
import sparsity_page
import sparsity_plots
import speed_figures
from matplotlib.figure import Figure
from paper_data import ROOT, Results, read_results
from paper_tables import ATTENTION, MEMORY_ALONE, MLP, mlp_in_words, savings, table_1, table_8

from lemo_hf.profiling.plots import save_figure

PAGE = ROOT / "docs" / "paper_figures.md"
IMAGES = ROOT / "docs" / "images" / "paper"
# The paper's method -> what it is compared with.
SAME_METHOD = {"lora": "stock", "longlora": "longlora-float32", "lemo": "lemo-artifact"}
SUITE = "`python benchmarks/gpu_suite.py --out benchmarks/results"


@dataclass(frozen=True)
class Shown:
    """A figure of the paper.

    Args:
        number: Its number in the paper; no table has a figure's.
        stem: Name of the picture.
        title: What it shows.
        draw: Returns the picture, or `None` if nothing of ours can be drawn.
        caption: What the reader must know of it.
        missing: What is not measured, and what would measure it; "" if nothing once the picture is drawn.
        kind: "Figure", or "Table" for one that is drawn too.
    """

    number: int
    stem: str
    title: str
    draw: Callable[[Results], Figure | None]
    caption: str | Callable[[Results], str]
    missing: str = ""
    kind: str = "Figure"

    @property
    def name(self) -> str:
        """As the paper calls it."""
        return f"{self.kind} {self.number}"


def memory_by_length(results: Results) -> Figure:
    """Peak memory by length, one panel a model; the paper's figures as marks over ours."""
    panels = []
    models = dict.fromkeys(row["model"] for row in results.estimates["rows"] if row["model"] != "Mistral-7B")
    for model in models:
        lengths = sorted({row["seq_len"] for row in results.estimates["rows"] if row["model"] == model})
        bars: dict[str, list[float | None]] = {}
        real: dict[str, list[bool]] = {}
        for method, words in results.words.items():
            found = [results.memory(model, seq_len, method) for seq_len in lengths]
            bars[words] = [None if one is None else one[0] / 2**30 for one in found]
            real[words] = [one is not None and one[1] for one in found]
        marks: dict[str, list[float | str | None]] = {}
        for theirs, ours in SAME_METHOD.items():
            logged = {row["seq_len"]: row for row in results.paper["memory"] if (row["model"], row["method"]) == (model, theirs)}
            marks[results.words[ours]] = [_mark(logged.get(seq_len)) for seq_len in lengths]
        panels.append(paper_plots.Panel(model, lengths, bars, marks, real, (81920 / 1024, "A800: 80 GiB")))
    rows = [[panel for panel in panels if (len(panel.groups) > 2) == many] for many in (False, True)]
    said = paper_plots.Words("peak memory, GiB", results.gpu, marks="the paper's logs")
    return paper_plots.grouped_bars([row for row in rows if row], said)


def _mark(row: Mapping[str, Any] | None) -> float | str | None:
    if row is None:
        return None
    return "OOM" if row["out_of_memory"] else row["peak_allocated_mib"] / 1024


def memory_breakdown(results: Results) -> Figure:
    """Bytes at the highest moment by part, two models at 8192 tokens."""
    groups = {
        "weights": ("weights", "adapter", "predictors", "optimizer", "gradients", "inputs"),
        "attention": ATTENTION,
        "MLP": MLP,
        "norms, residual": ("norm", "residual"),
        "loss": ("loss",),
        "workspace, other": ("workspace", "other", "embedding", "selection", "predictor"),
    }
    panels = {}
    for model in ("Llama-2-7B", "OPT-6.7B"):
        rows = {results.words[method]: results.estimate(model, 8192, method)["estimated_parts"] for method in results.words}
        panels[model] = {
            words: {name: sum(parts.get(part, 0) for part in of) / 2**30 for name, of in groups.items()}
            for words, parts in rows.items()
        }
    return paper_plots.stacked_bars(panels, "GiB at the highest moment, 8192 tokens (estimated, no GPU run)")


def saved_by_layer(results: Results) -> Figure:
    """MiB that each layer saves for backward."""
    panels = {
        model: {
            words: [size / 2**20 for size in results.estimate(model, 8192, method)["saved_by_layer"]]
            for method, words in results.words.items()
        }
        for model in ("Llama-2-7B", "OPT-6.7B")
    }
    return paper_plots.lines_by_layer(panels, "MiB saved for backward, 8192 tokens")


def loss_peak(results: Results) -> Figure:
    """Bytes alive over a step with whole logits and with the loss by segments."""
    lines = {
        ("whole logits" if one["segment_size"] == one["seq_len"] else f"segments of {one['segment_size']} tokens"): [
            size / 2**30 for size in one["bytes"]
        ]
        for one in results.estimates["loss_timeline"]
    }
    one = results.estimates["loss_timeline"][0]
    return paper_plots.timeline(lines, f"{one['model']}, {one['seq_len']} tokens, LeMo exact, 0.5 kept: estimated, no GPU run")


def of_models(draw: Callable[[dict[str, Any], Any], Figure]) -> Callable[[Results], Figure | None]:
    """A picture of every model whose sparsity was measured, from what `draw` makes of them and of the paper's figures."""
    return lambda results: None if results.sparsity is None else draw(results.sparsity["models"], results.paper["paper"])


def of_sparsity(caption: Callable[[dict[str, Any], Any], str]) -> Callable[[Results], str]:
    """What `caption` makes of the measured sparsity and of the paper's figures."""
    return lambda results: "" if results.sparsity is None else caption(results.sparsity, results.paper["paper"])


def of_predictors(draw: Callable[[Any, Any], Figure]) -> Callable[[Results], Figure | None]:
    """A picture of the model whose predictors were measured."""

    def drawn(results: Results) -> Figure | None:
        found = sparsity_page.with_predictors(results.sparsity["models"]) if results.sparsity is not None else None
        return None if found is None else draw(found[1], results.paper["paper"])

    return drawn


def _table_3(models: dict[str, Any], paper: dict[str, Any]) -> Figure:
    return sparsity_plots.sparsity_by_length(models, paper["table3_sparsity_ratio"])


def _figure_17(model: dict[str, Any], paper: dict[str, Any]) -> Figure:
    return sparsity_plots.predicted_informativeness(model, paper["predictor_recall"])


SPARSITY = (
    Shown(3, "sparsity_by_length", "sparsity by length", of_models(_table_3), of_sparsity(sparsity_page.sparsity_by_length), kind="Table"),
    Shown(4, "score_maps", "score maps by layer and input", of_models(lambda models, _: sparsity_plots.score_maps(models)),
          of_sparsity(sparsity_page.score_maps)),
    Shown(7, "unimportant_blocks", "blocks without important tokens",
          of_models(lambda models, _: sparsity_plots.unimportant_blocks(models)), of_sparsity(sparsity_page.unimportant_blocks)),
    Shown(16, "predicted_maps", "predicted beside true scores", of_predictors(lambda model, _: sparsity_plots.predicted_maps(model)),
          of_sparsity(sparsity_page.predicted_maps)),
    Shown(17, "predicted_informativeness", "predicted beside true informativeness", of_predictors(_figure_17),
          of_sparsity(sparsity_page.predicted_informativeness)),
)  # fmt: skip
FIGURES = (
    *SPARSITY[:3],
    Shown(12, "memory_by_length", "memory by length", memory_by_length,
          "Bars: ours. Diamonds: the paper's logs of the same method on an A800 (stock LoRA, LongLoRA, LeMo; the bar for LeMo is our "
          "clean-room version of the artifact). Logs of stock LoRA equal the estimate on Llama-3-8B and lie 8 to 12 % "
          "above it on the other models, those of LongLoRA 14 to 19 %; those of LeMo lie 7 % below to 2 % above it on Llama and 11 to "
          "32 % above it on OPT, for reasons not known: compare bars with bars and diamonds with diamonds. OPT-350M normalises after its sublayers and is left out. "
          f"{MEMORY_ALONE}", f"Peaks on a GPU: {SUITE} --part paper`, every model and length."),
    Shown(13, "step_time", "step time", speed_figures.step_time, speed_figures.step_time_words,
          f"Seconds of a step on a GPU: {SUITE} --part paper_8192 --part paper_16384_Llama-2-7B --part paper_65536_Llama-2-7B`."),
    Shown(14, "memory_breakdown", "memory by part of the model", memory_breakdown,
          f"The paper's average savings stand in the table below. {MEMORY_ALONE}",
          f"Peaks and the time breakdown, `phases` of each row: {SUITE} --part paper_8192_Llama-2-7B --part paper_8192_OPT-6.7B`."),
    Shown(15, "saved_by_layer", "memory by layer", saved_by_layer,
          "The artifact's profile keeps most blocks in early layers; ours keep the same share everywhere (sparse: the first layer "
          f"dense). {MEMORY_ALONE}"),
    *SPARSITY[3:],
    Shown(18, "movement_kernels", "movement kernels", speed_figures.movement_kernels,
          speed_figures.movement_words,
          f"Kernel times on a GPU: {SUITE} --part times`; the paper reports 10 to 50 times."),
    Shown(19, "loss_peak", "the loss's peak over time", loss_peak,
          f"The paper saves 15 % of the peak by segments. {MEMORY_ALONE}"),
    Shown(20, "extensions", "extensions", speed_figures.extensions, speed_figures.extensions_words,
          f"Times on a GPU of two-dimensional sparsity (paper: up to 2.04 times): {SUITE} --part headline_65536_Llama-3-8B_patterns`, the methods of "
          "`lemo bench --model Llama-3-8B --seq-len 65536 --methods checkpointing,lemo-sparse-rows,lemo-sparse-groups-rows,lemo-sparse-blocks-rows,"
          "lemo-sparse-nearby-rows,lemo-sparse-nearby-groups-rows,lemo-sparse-nearby-blocks-rows`; of offload by kept share (paper: 1.22 times on "
          f"average): {SUITE} --part offload`."),
    Shown(21, "scaling", "scaling over GPUs", speed_figures.scaling, speed_figures.scaling_words, "Several GPUs: no such run."),
)  # fmt: skip


def _source(times: Mapping[str, Any] | None) -> str:
    if times is None:
        return "none"
    return f"for an {times['card']}, {times['date']}, commit {times['commit']}; repeat: `python benchmarks/paper_times.py --part short`, and `long`"


def page(results: Results, drawn: Sequence[int]) -> str:
    """docs/paper_figures.md: every figure that is drawn, tables, and what is unmeasured.

    Args:
        results: What is shown.
        drawn: Numbers of the figures that are.
    """
    made = results.estimates
    text = [
        "# The paper's figures, ours beside the paper's",
        "Written by `python benchmarks/paper_figures.py` from committed results; do not edit. The paper's figures: "
        f"`benchmarks/paper_results.json`. {results.paper['source']} Ours: the same adapters (PEFT's default, float32), bf16 base, no autocast, "
        + (f"measured on {results.gpu} where a picture says so, else " if results.measured else "no GPU was at hand: ")
        + f"estimated from shapes ({made['date']}, commit {made['commit']}, torch {made['versions']['torch']}, transformers "
        f"{made['versions']['transformers']}; repeat: `python benchmarks/paper_estimates.py`; times: "
        + _source(results.times)
        + "). [memory.md](memory.md) says what an estimate is worth.",
    ]
    for shown in FIGURES:
        if shown.number in drawn:
            text += [
                f"## {shown.name}: {shown.title}",
                f"![{shown.title}](images/paper/{shown.stem}.png)",
                shown.caption if isinstance(shown.caption, str) else shown.caption(results),
            ]
        if shown.number == 14:
            text += [savings(results), mlp_in_words(results)]
    text += [
        "## Table 1: memory at 4096 tokens",
        table_1(results),
        "## Table 8: predictor sizes",
        table_8(results),
        "## Unmeasured",
    ]
    left = [(shown, shown.missing) for shown in FIGURES if shown.missing]
    left += [(shown, "`python benchmarks/sparsity_figures.py`.") for shown in SPARSITY if shown.number not in drawn]
    text.append("\n".join(f"- {shown.name}, {shown.title}. {missing}" for shown, missing in left))
    return "\n\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Draws the figures and writes the page; with `--check` compares the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args(arguments)
    results = read_results()
    figures = {shown: shown.draw(results) for shown in FIGURES}
    drawn = [shown.number for shown, figure in figures.items() if figure is not None]
    fresh = page(results, drawn)
    if args.check:
        current = PAGE.exists() and PAGE.read_text() == fresh
        missing = [name for name in re.findall(r"images/paper/(\S+?)\)", fresh) if not (IMAGES / name).exists()]
        print(
            "docs/paper_figures.md: current"
            if current and not missing
            else "docs/paper_figures.md: stale; run benchmarks/paper_figures.py"
        )
        return int(not current or bool(missing))
    for shown, figure in figures.items():
        if figure is not None:
            save_figure(figure, IMAGES / f"{shown.stem}.png", f"{shown.name} of the paper: {shown.title}")
    PAGE.write_text(fresh)
    print(f"wrote {PAGE} and figures {', '.join(map(str, drawn))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
