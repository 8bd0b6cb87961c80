"""The paper's figures: ours beside the paper's, nothing invented, readable in print."""

import json
import shutil

import paper_figures
import paper_tables
import pytest
from matplotlib.text import Text
from paper_data import RESULTS, Results, read_results
from paper_figures import FIGURES, page
from paper_tables import mlp_in_words

from lemo_hf.errors import LemoError
from lemo_hf.profiling.bench.table import NOT_MEASURED


@pytest.fixture(scope="module")
def committed():
    """The committed results, without what a GPU may have added."""
    found = read_results()
    return Results(found.paper, found.estimates)


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def test_without_a_gpu_only_memory_is_drawn_and_the_rest_is_listed(committed):
    figures = {shown.number: shown.draw(committed) for shown in FIGURES}
    assert [number for number, figure in figures.items() if figure is not None] == [12, 14, 15, 19]
    for number in (12, 14, 19):
        assert any("estimated" in text.get_text() for text in texts(figures[number])), number
    for number in (12, 14, 15, 19):
        assert min(text.get_fontsize() for text in texts(figures[number])) >= 8, number
        assert figures[number].get_figwidth() <= 7.3, "8 points are 8 points on a page of that width"
    written = page(committed, [12, 14, 15, 19])
    assert "no GPU was at hand" in written
    unmeasured = written.partition("## Unmeasured")[2]
    for number in (12, 13, 14, 18, 20, 21):
        assert f"Figure {number}," in unmeasured
    assert "images/paper/step_time.png" not in written
    assert written.count(NOT_MEASURED) == 5, "memory never stands alone: four figures and table 1"


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


def test_what_a_gpu_has_measured_replaces_estimates_and_adds_figures(tmp_path):
    shutil.copy(RESULTS / "paper_estimates--any.json", tmp_path)
    (tmp_path / "headline_8192_stock.json").write_text(json.dumps(gpu_result()))
    kernels = [
        {"kernel": "scatter_add", "right": True, "keep": 0.5, "rows": rows, "speed_up": {"naive": 12.0}} for rows in (1024, 4096)
    ]
    (tmp_path / "times_scatter_add.json").write_text(json.dumps(gpu_result(kind="", part="times_scatter_add", rows=kernels)))
    results = read_results(tmp_path)
    assert results.memory("Llama-3-8B", 8192, "stock") == (30 * 2**30, True)
    drawn = {shown.number: shown.draw(results) for shown in FIGURES if shown.number in (13, 18)}
    assert any("Some GPU" in text.get_text() for text in texts(drawn[13]))
    labels = [text.get_text() for text in texts(drawn[13])]
    assert "paper, A800: lora, checkpointing" in labels
    assert any("10 to 50 times" in text.get_text() for text in texts(drawn[18]))
    assert all(text.get_fontsize() >= 8 for figure in drawn.values() for text in texts(figure))
    assert "measured on Some GPU" in page(results, [13])
    (tmp_path / "headline_8192_other.json").write_text(json.dumps(gpu_result(commit="def")))
    with pytest.raises(LemoError, match="different commits"):
        read_results(tmp_path)


def test_one_measured_bar_does_not_make_the_others_measured(tmp_path, committed):
    def words(results):
        drawn = next(shown for shown in FIGURES if shown.number == 12).draw(results)
        return drawn, [text.get_text() for text in texts(drawn)]

    assert not {"m", "e"} & set(words(committed)[1]), "all bars are of one kind: the title says it"
    shutil.copy(RESULTS / "paper_estimates--any.json", tmp_path)
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
