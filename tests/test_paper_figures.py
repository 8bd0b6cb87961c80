"""The paper's figures: ours beside the paper's, nothing invented, readable in print."""

import json
import re
import shutil

import gpu_headline
import paper_figures
import paper_tables
import pytest
from matplotlib.text import Text
from paper_data import RESULTS, Results, read_results
from paper_figures import FIGURES, page
from paper_tables import mlp_in_words
from speed_figures import LINK, all_reduce_seconds

from lemo_hf.errors import LemoError
from lemo_hf.profiling.bench.table import NOT_MEASURED


@pytest.fixture(scope="module")
def committed():
    """The committed results, without what a GPU may have added."""
    found = read_results()
    return Results(found.paper, found.estimates, patterns=found.patterns, offload=found.offload, times=found.times)


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def test_without_a_gpu_estimates_are_drawn_and_what_would_measure_them_is_listed(committed):
    figures = {shown.number: shown.draw(committed) for shown in FIGURES}
    numbers = [12, 13, 14, 15, 18, 19, 20, 21]
    assert [number for number, figure in figures.items() if figure is not None] == numbers
    for number in numbers:
        assert number == 15 or any("estimated" in text.get_text() for text in texts(figures[number])), number
        assert not any("measured on" in text.get_text() for text in texts(figures[number])), number
        assert min(text.get_fontsize() for text in texts(figures[number])) >= 8, number
        assert figures[number].get_figwidth() <= 7.3, "8 points are 8 points on a page of that width"
    written = page(committed, numbers)
    assert "no GPU was at hand" in written
    unmeasured = written.partition("## Unmeasured")[2]
    for number in (12, 13, 14, 18, 20, 21):
        assert f"Figure {number}," in unmeasured
    assert written.count(NOT_MEASURED) == 9, "memory, time and FLOPs never stand alone: eight figures and table 1"
    assert written.count("Time alone: perplexity not measured for this configuration, nor is memory.") == 2
    assert f"commit {committed.offload['commit']}" in written
    # Parts that are named are there, and measure what the figures draw.
    parts = [group.name for group in gpu_headline.groups(tiny=False)]
    named = re.findall(r"--part ((?:headline|paper)[^\s`]*)", written)
    assert {name.split("_")[0] for name in named} == {"headline", "paper"}
    assert all(any(part.startswith(name) for part in parts) for name in named)
    assert "cost 2 to 7 % of perplexity" in written, "nor do patterns: what they cost was measured"


def test_a_panel_that_is_cut_out_says_what_it_counts(committed):
    drawn = {shown.number: shown.draw(committed) for shown in FIGURES if shown.number in (13, 18, 20)}
    labels = {number: [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] for number, figure in drawn.items()}
    assert labels == {
        13: ["seconds of a step (estimated)"] * 2,
        18: ["times fewer bytes (estimated)"],
        20: ["times fewer FLOPs, estimated", "times faster, simulated"],
    }


def test_a_method_has_one_colour_and_what_has_no_bar_no_patch(committed):
    figure = next(shown for shown in FIGURES if shown.number == 13).draw(committed)
    above, below = ({bars.get_label(): bars[0].get_facecolor() for bars in axis.containers} for axis in figure.axes)
    assert len(above) == 5
    assert len(set(above.values())) == 5
    for name, colour in below.items():
        (same,) = (
            one for words, one in above.items() if words.split(",")[0] == name.split(",")[0].removesuffix(" + checkpointing")
        )
        assert colour == same, name
    handles, names = figure.axes[1].get_legend_handles_labels()
    (only,) = (handle for handle, name in zip(handles, names, strict=True) if name not in below)
    assert only.get_marker() == "D", "the paper's LeMo with checkpointing is marks alone"


def test_bars_and_lines_are_told_apart_without_colour(committed):
    by_number = {shown.number: shown.draw(committed) for shown in FIGURES if shown.number in (12, 15)}
    panel = by_number[12].axes[0]
    assert len({bars[0].get_hatch() for bars in panel.containers}) == len(panel.containers) == 5
    lines = by_number[15].axes[0].lines
    assert len({line.get_marker() for line in lines}) == len(lines) == 5


def test_the_papers_marks_are_its_own_numbers(committed):
    panel = next(shown for shown in FIGURES if shown.number == 12).draw(committed).axes[0]
    marks = sorted(float(line.get_ydata()[0]) for line in panel.lines if line.get_marker() == "D")
    logged = [row["peak_allocated_mib"] / 1024 for row in committed.paper["memory"] if row["model"] == "Llama-2-7B"]
    assert marks == sorted(logged)
    # The estimate of what the artifact's logs call LoRA, where transformers computes alike.
    stock, real = committed.memory("Llama-3-8B", 8192, "stock")
    assert not real
    (row,) = (r for r in committed.paper["memory"] if (r["model"], r["seq_len"], r["method"]) == ("Llama-3-8B", 8192, "lora"))
    assert stock / 2**20 == pytest.approx(row["peak_allocated_mib"], rel=0.001)


def gpu_result(**changes):
    summary = {"median_seconds": 1.5, "peak_allocated_bytes": 30 * 2**30}
    row = {"model": "Llama-3-8B", "seq_len": 8192, "method": "stock", "words": "stock LoRA", "summary": summary}
    return {"kind": "lemo bench", "commit": "abc", "machine": {"gpu": "Some GPU"}, "rows": [row]} | changes


def committed_estimates(folder):
    """The committed results that no GPU made, in a folder of their own."""
    for name in ("paper_estimates", "paper_times_short", "paper_times_long", "sensitive_offload", "pattern_counts_llama3_8b"):
        shutil.copy(RESULTS / f"{name}--any.json", folder)


def bars_of(figure):
    """Letters at the feet of bars, and the bars' heights, by axis."""
    found = []
    for axis in figure.axes:
        for container in axis.containers:
            for bar in container:
                middle = bar.get_x() + bar.get_width() / 2
                letters = [t.get_text() for t in axis.texts if t.get_text() in ("m", "e") and t.xy[0] == pytest.approx(middle)]
                if bar.get_height():
                    found.append((round(bar.get_height(), 6), "".join(letters)))
    return found


def test_what_a_gpu_has_measured_replaces_estimates_bar_by_bar(tmp_path):
    committed_estimates(tmp_path)
    (tmp_path / "headline_8192_stock.json").write_text(json.dumps(gpu_result()))
    kernels = [
        {"kernel": "scatter_add", "right": True, "keep": 0.5, "rows": rows, "speed_up": {"naive": 12.0}} for rows in (1024, 4096)
    ]
    kernels.append({"kernel": "gather_norm", "right": False, "keep": 0.5, "rows": 1024})
    (tmp_path / "times_scatter_add.json").write_text(json.dumps(gpu_result(kind="", part="times_scatter_add", rows=kernels)))
    results = read_results(tmp_path)
    assert results.memory("Llama-3-8B", 8192, "stock") == (30 * 2**30, True)
    assert results.seconds("Llama-3-8B", 8192, "stock") == (1.5, True)
    drawn = {shown.number: shown.draw(results) for shown in FIGURES if shown.number in (13, 18)}
    for number, height in ((13, 1.5), (18, 12.0)):
        bars = bars_of(drawn[number])
        assert [bar for bar in bars if bar[1] == "m"] == [(height, "m")]
        assert {letter for _, letter in bars} == {"m", "e"}
        assert any("m measured on Some GPU, e estimated" in text.get_text() for text in texts(drawn[number]))
    assert any("10 to 50 times" in text.get_text() for text in texts(drawn[18]))
    assert all(text.get_fontsize() >= 8 for figure in drawn.values() for text in texts(figure))
    assert "measured on Some GPU" in page(results, [12])
    (tmp_path / "headline_8192_other.json").write_text(json.dumps(gpu_result(commit="def")))
    with pytest.raises(LemoError, match="different commits"):
        read_results(tmp_path)
    (tmp_path / "headline_8192_other.json").write_text(json.dumps(gpu_result(machine={"gpu": "Another GPU"})))
    with pytest.raises(LemoError, match="different GPUs on one page"):
        read_results(tmp_path)


def test_extensions_are_measured_where_both_sides_are(tmp_path):
    committed_estimates(tmp_path)

    def row(method, seconds, seq_len=65536, words="", lemo=None):
        changes = {"model": "Llama-3-8B", "seq_len": seq_len, "method": method, "words": words, "settings": {"lemo": lemo}}
        return changes | {"summary": {"median_seconds": seconds, "peak_allocated_bytes": 2**30}}

    rows = [row("checkpointing", 9.0), row("lemo-sparse-groups-rows@0.5", 3.0)]
    rows += [row("lemo-exact@0.5", 7.0, words="LeMo exact, 0.9 to 0.1 kept, sensitive offload", lemo={"keep_ratio": [0.9, 0.1]})]
    rows += [row("lemo-exact@0.5", 7.7, words="LeMo exact, 0.9 to 0.1 kept, uniform offload", lemo={"keep_ratio": [0.9, 0.1]})]
    (tmp_path / "gpu.json").write_text(json.dumps(gpu_result(rows=rows)))
    results = read_results(tmp_path)
    figure = next(shown for shown in FIGURES if shown.number == 20).draw(results)
    assert [height for height, letter in bars_of(figure) if letter == "m"] == [3.0, pytest.approx(1.1)]
    assert results.seconds("Llama-3-8B", 65536, "lemo-exact@0.5") is None, "unlike shares are another configuration"


def test_a_ring_hands_nearly_every_byte_on_twice():
    assert all_reduce_seconds(100, 1) == 0
    assert all_reduce_seconds(100, 8) * LINK[1] == pytest.approx(175)


def test_plain_operators_move_what_their_passes_say(committed):
    rows = {(row["kernel"], row["keep"]): row for row in committed.times["movement"]}
    row = 4096 * 2
    # Zeros are written; index_copy reads them and the kept half and writes; the sum reads two streams and writes one.
    found = rows["scatter_add", 0.5]
    assert found["naive_bytes"] / row / found["rows"] == pytest.approx(1 + 2.5 + 3, rel=0.01)
    assert found["bytes"] / row / found["rows"] == pytest.approx(1.5)
    assert all(one["naive_bytes"] > 3 * one["bytes"] for one in rows.values())


def test_one_measured_bar_does_not_make_the_others_measured(tmp_path, committed):
    def words(results):
        drawn = next(shown for shown in FIGURES if shown.number == 12).draw(results)
        return drawn, [text.get_text() for text in texts(drawn)]

    assert not {"m", "e"} & set(words(committed)[1]), "all bars are of one kind: the title says it"
    committed_estimates(tmp_path)
    (tmp_path / "headline_8192_stock.json").write_text(json.dumps(gpu_result()))
    figure, said = words(read_results(tmp_path))
    bars = [bar for axis in figure.axes for container in axis.containers for bar in container if bar.get_height()]
    assert (said.count("m"), said.count("e")) == (1, len(bars) - 1)
    (mark,) = (text for text in texts(figure) if text.get_text() == "m")
    (measured,) = (bar for bar in mark.axes.patches if bar.get_height() == 30)
    assert mark.xy[0] == pytest.approx(measured.get_x() + measured.get_width() / 2)
    assert "bars: ours, m measured on Some GPU, e estimated, no GPU run; diamonds: the paper's logs" in said
    assert [text for text in said if "measured" in text] == [next(text for text in said if "measured" in text)]


def test_the_artifacts_mlp_row_is_accounted_for(committed, monkeypatch):
    said = mlp_in_words(committed)
    assert "80% less" in said
    assert "60% less" in said
    assert "the paper's 51.1% and 54.8%" in said
    monkeypatch.setattr(paper_tables, "KEPT_CHANNELS", 0.25)
    with pytest.raises(LemoError, match=r"does not fit the estimates; 80\.0% on Llama-2-7B"):
        mlp_in_words(committed)


def test_the_committed_page_is_what_the_committed_results_say():
    assert paper_figures.main(["--check"]) == 0
