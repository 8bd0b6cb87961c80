import json
from pathlib import Path

import goals
import pytest
import update_readme

from lemo_hf.errors import LemoError
from lemo_hf.profiling.bench.methods import choose_methods


@pytest.mark.parametrize("page", update_readme.TABLES)
def test_tables_are_those_of_the_committed_results(page):
    text = (Path(__file__).parents[1] / page).read_text()
    assert update_readme.updated(text, page) == text


def test_a_page_without_a_place_for_a_table_is_named():
    with pytest.raises(ValueError, match=r"docs/benchmarks\.md has 0 places for table headline; it needs 1; add"):
        update_readme.updated("nothing", "docs/benchmarks.md")


def test_what_a_gpu_measured_is_shown_and_that_it_measured_nothing(tmp_path, monkeypatch):
    page = Path(__file__).parents[1].joinpath("docs/benchmarks.md").read_text()
    for path in update_readme.RESULTS.glob("*--*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(update_readme, "RESULTS", tmp_path)
    assert "Nothing was measured on a GPU yet" in update_readme.updated(page, "docs/benchmarks.md")
    config = {"model": "M", "seq_lens": [8], "methods": "stock", "steps": 1, "repeats": 1, "batch_size": 1, "dtype": "bfloat16",
              "device": "cuda", "lora": "r=8"}  # fmt: skip
    summary = {"median_seconds": 1.0, "fastest_seconds": 1.0, "slowest_seconds": 1.0, "tokens_per_second": 8.0, "phases": {},
               "peak_allocated_bytes": 3 * 2**30, "peak_reserved_bytes": 4 * 2**30}  # fmt: skip
    row = {"model": "M", "seq_len": 8, "method": "stock", "words": "stock", "adapters": "bfloat16", "saved_bytes": 2**30}
    fell = row | {"method": "longlora", "words": "LongLoRA", "out_of_memory": "too much"}
    document = {"kind": "lemo bench", "date": "today", "commit": "c", "machine": {"gpu": "Some GPU", "threads": 1}, "config": config,
                "versions": dict.fromkeys(("torch", "transformers", "peft"), "1"), "repeat": "python some.py",
                "rows": [row | {"summary": summary}, fell]}  # fmt: skip
    (tmp_path / "headline_8_M_first.json").write_text(json.dumps(document))
    for kind in ("failed", "unfinished"):
        (tmp_path / f"headline_8_M_others.{kind}.json").write_text("{}")
    shown = update_readme.updated(page, "docs/benchmarks.md")
    assert "| method | adapters | peak memory | reserved | saved for backward |" in shown
    assert (
        "| stock | bfloat16 | 3072 MiB (1.00) | 4096 MiB (1.00) | 1024 MiB (1.00) | - | 1 [1, 1] (1.00x) | 8 | not measured |"
        in shown
    )
    assert "| LongLoRA | bfloat16 | out of memory | - | - | - | - | - | not measured |" in shown
    assert "machine: Some GPU, 1 threads" in shown
    (tmp_path / "headline_9_M_first.json").write_text(json.dumps(document | {"commit": "d"}))
    with pytest.raises(LemoError, match="results of different commits in one table; c and d"):
        update_readme.updated(page, "docs/benchmarks.md")


def committed():
    return {path.stem: json.loads(path.read_text()) for pattern in goals.FILES for path in update_readme.RESULTS.glob(pattern)}


def test_goals_say_what_is_missed_and_what_nobody_has_measured():
    results = {stem: found for stem, found in committed().items() if not stem.startswith("headline_")}
    shown = goals.goals(results)
    table = [line for line in shown.splitlines() if line.startswith(("| 8192", "| 65536", "| 131072"))]
    assert len(table) == len(goals.GOALS)
    assert all(line.endswith("| unmeasured |") for line in table), "no figure without perplexity"
    states = [line.split("|")[6].strip() for line in table]
    assert set(states) <= {
        "no goal", "unmeasured", "unmeasured; missed by estimate", "out of reach: fewer FLOPs would be needed"
    }  # fmt: skip
    assert "LeMo exact, kept-row checkpointing, 0.5 kept 0.90x (H100-80GB)" in shown
    assert "LeMo kept keys, kept-row checkpointing, 0.5 kept 0.90x (H100-80GB)" in shown
    assert "LeMo exact, 0.5 kept at 8192 tokens is 1.08x to 1.13x as fast as + Liger (1.2x is the goal" in shown


def test_what_a_gpu_measured_decides_a_goal():
    def row(method, seconds, gib):
        summary = {"median_seconds": seconds, "peak_allocated_bytes": gib * 2**30}
        words = choose_methods(method)[0].words
        return {"model": "Llama-3-8B", "seq_len": 8192, "method": method, "words": words, "summary": summary}

    results = committed() | {"headline_8192": {"rows": [row("stock-bf16", 3.0, 60), row("lemo-exact@0.5", 2.0, 40)]}}
    exact = next(
        line for line in goals.goals(results).splitlines() if line.startswith("| 8192: LeMo exact, 0.5 kept against stock")
    )
    assert "| missed: 1.50x measured | reached: 1.50x measured | unmeasured |" in exact


def test_how_far_estimates_are_is_counted():
    rows = [("python-llama-4m", 100), ("small llama", 102), ("small opt", 90)]
    found = [{"model": model, "estimated_bytes": estimated, "allocator_bytes": 100} for model, estimated in rows]
    result = {"cpu": found, "gpu": [], "date": "today", "commit": "c"}
    said = update_readme.estimate_error(result)
    assert "within 10.0 % of the allocator's peak, half of the time within 2.0 %, on 3 real steps of 2 families" in said
    assert "no GPU has been compared yet" in said
    assert "within 10.0 % of the peak" in update_readme.estimate_error(result | {"gpu": found})
