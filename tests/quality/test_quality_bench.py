"""The quality bench end to end on a model of two layers: arms, both points, resuming, comparisons, tables and plots."""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_texts import TOKENS, TinyTexts

from benchmarks.quality import extension, plots, report, summary
from benchmarks.quality.arms import Arm, all_arms, chosen, exact
from benchmarks.quality.choices import CHOICES
from benchmarks.quality.comparing import Difference
from benchmarks.quality.extension import EQUAL_STEPS, EQUAL_TIME, Points, claimed, mean_ratio, steps_at_equal_time
from benchmarks.quality.setting import Setting, arguments, load, reads_predictors
from lemo_hf.errors import LemoError
from lemo_hf.models.sparse_decoder import sparse_backbone

ARMS = (
    "stock",
    "exact-0.5",
    "exact-0.3",
    "before",
    "sparse-0.5-paper",
    "exact-0.5-true",
    "keys-0.5-tail-0.15",
    "keys-ramp-0.3-0.7",
)


def narrow_arms(layers):
    """The arms, with predictors that fit into a tiny model."""
    wide = all_arms(layers)
    return {
        name: arm if arm.lemo is None else replace(arm, lemo={**arm.lemo, "predictor_features": 32}) for name, arm in wide.items()
    }


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Two seeds of two arms, one of the others, by the command."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "Rows", lambda tokenizer, setting: TinyTexts())
        # What a step takes here says nothing: everything costs half of stock's.
        measured = extension.measure_cost
        patch.setattr(extension, "measure_cost", lambda *args, **kwargs: measured(*args, **kwargs) | {"time_ratio": 0.5})
        patch.setattr(extension, "all_arms", narrow_arms)
        common = ["--base", base, "--steps", "4", "--tokens", str(TOKENS), "--out", str(out)]
        assert extension.main(["--arms", *ARMS, "--seeds", "0", *common]) == 0
        assert extension.main(["--arms", "stock", "exact-0.5", "--seeds", "0", "1", *common]) == 0
        patch.setattr(extension, "run_arm", lambda *args: pytest.fail("it was there"))
        assert extension.main(["--arms", *ARMS, "--seeds", "0", *common]) == 0
    return out


def run_of(finished, arm, seed=0):
    (path,) = finished.glob(f"arms/*/{arm}--seed{seed}.json")
    return json.loads(path.read_text())


def test_both_points_come_from_the_arms_own_runs(finished):
    steps = {arm: {point: found["steps"] for point, found in run_of(finished, arm)["points"].items()} for arm in ARMS}
    assert steps["stock"] == {EQUAL_STEPS: 4}
    assert steps["before"] == {EQUAL_STEPS: 0}
    assert steps["exact-0.5"] == steps["exact-0.3"] == {EQUAL_STEPS: 4, EQUAL_TIME: 8}
    # Their predictors are fitted in steps of their time, and 15 % of the steps of one take stock's time.
    for arm, ratio in (("keys-ramp-0.3-0.7", 0.5), ("keys-0.5-tail-0.15", 0.85 * 0.5 + 0.15), ("sparse-0.5-paper", 0.5)):
        phase = run_of(finished, arm)["phase_steps"]
        assert phase > 0
        assert steps[arm] == {EQUAL_STEPS: 4, EQUAL_TIME: steps_at_equal_time(4, ratio, phase)}
    assert steps["exact-0.5-true"] == {EQUAL_STEPS: 4}  # must first win at equal steps
    assert len(run_of(finished, "exact-0.5")["losses"]) == 8
    measured = {(arm, point) for arm in ARMS for point, found in run_of(finished, arm)["points"].items() if "retrieval" in found}
    assert measured == {(arm, EQUAL_STEPS) for arm in ("stock", "exact-0.5", "exact-0.3", "before", "sparse-0.5-paper")}


def test_costs_are_counted_beside_stocks(finished):
    costs = {arm: run_of(finished, arm)["cost"] for arm in ("exact-0.5", "exact-0.3", "sparse-0.5-paper")}
    for cost in costs.values():
        assert cost["saved_bytes"] < cost["stock_saved_bytes"]
        assert cost["flops"] < cost["stock_flops"]
        assert len(cost["time_ratios"]) == Setting.cost_rounds
    assert costs["exact-0.5"]["kept_share"] == 0.5
    assert costs["sparse-0.5-paper"]["kept_share"] == 0.75  # the first of two layers is dense


def test_a_ramp_moves_the_share_and_its_cost_is_that_of_both_ends(finished):
    cost = run_of(finished, "keys-ramp-0.3-0.7")["cost"]
    assert cost["kept_share"] == pytest.approx(0.5 * (0.5 + 0.75))  # ceil(0.3 * 4) and ceil(0.7 * 4) of 4 blocks
    assert mean_ratio(Arm("ramp", "x", exact(0.5), ramp=(0.3, 0.7)), 0.4, 0.8) == pytest.approx(0.6)
    shares = []

    class Model:
        config = SimpleNamespace(lemo=SimpleNamespace(update=lambda keep_ratio: shares.append(keep_ratio)))

    arm = Arm("ramp", "x", exact(0.5), ramp=(0.3, 0.7))
    callback = Points(arm, lambda _: {EQUAL_STEPS: 5}, TinyTexts().measures(0))
    callback.on_train_begin(None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "sparse_backbone", lambda model: Model)
        for step in range(5):
            callback.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=5), None)
    assert shares == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])


def test_a_result_of_other_settings_is_refused(finished, base, capsys, monkeypatch):
    (path,) = finished.glob("arms/*/stock--seed1.json")
    kept = path.read_text()
    path.write_text(json.dumps(json.loads(kept) | {"base": "another"}))
    command = ["--arms", "stock", "--seeds", "1", "--base", base, "--steps", "4", "--tokens", str(TOKENS), "--out", str(finished)]
    assert extension.main(command) == 2
    assert "of another base" in capsys.readouterr().err
    path.write_text(kept)
    assert extension.main(["--arms", "nothing", "--base", base]) == 2
    assert "no such arm; 'nothing'" in capsys.readouterr().err


def test_arms_run_in_the_order_asked_for():
    arms = all_arms(2)
    found = [(arm.name, seed) for arm, seed in extension.in_order(["exact-0.3:4", "core:1,0", "stock"], [0], arms)]
    core = [arm.name for arm in chosen(["core"], arms)]
    assert found == [("exact-0.3", 4), *((name, 1) for name in core), *((name, 0) for name in core)]
    with pytest.raises(LemoError, match="seeds are whole numbers; 'x' of core"):
        extension.in_order(["core:x"], [0], arms)


def test_no_time_left_begins_nothing(finished, base, monkeypatch):
    monkeypatch.setattr(extension, "run_one", lambda *args: pytest.fail("no time was left"))
    assert extension.main(["--arms", "stock", "--base", base, "--seconds", "0", "--out", str(finished)]) == 3


def test_processes_share_the_work(tmp_path):
    path = tmp_path / "arm--seed0.json"
    with claimed(path) as mine, claimed(path) as theirs:
        assert mine
        assert not theirs
    claim = path.with_suffix(".claim")
    assert not claim.exists()
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    claim.write_text(str(dead))
    with claimed(path) as mine:
        assert mine, "whoever claimed it is gone"
    path.write_text("{}")
    with claimed(path) as mine:
        assert not mine, "it is there"


def test_equal_time_counts_the_phases():
    assert steps_at_equal_time(32, 0.5, 0) == 64
    assert steps_at_equal_time(32, 0.6, 0) == 53
    assert steps_at_equal_time(32, 0.5, 8) == 48
    assert steps_at_equal_time(3, 0.1, 3) == 1
    assert steps_at_equal_time(30, 0.3, 0) == 100  # and not 99, by rounding


def test_all_arms_of_a_seed_begin_alike_and_seeds_differ(base):
    setting = Setting(base, TOKENS)
    arms = all_arms(2)
    first, second = (load(arms[name], setting, 0) for name in ("stock", "exact-0.5"))
    weights = {name: weight for name, weight in first.named_parameters() if "lora" in name}
    assert weights
    theirs = dict(second.named_parameters())
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items())
    other = dict(load(arms["stock"], setting, 1).named_parameters())
    assert not all(torch.equal(weight, other[name]) for name, weight in weights.items())
    assert sparse_backbone(load(arms["exact-0.5"], setting, 3)).config.lemo.seed == 3


def test_arms_are_sound():
    arms = all_arms(6)
    assert [arm.name for arm in chosen(["core"], arms)] == ["stock", "exact-0.5", "exact-0.3", "before"]
    for arm in arms.values():
        assert arm.config is None or arm.config.validate_for(6, 256) is None
        assert arm.choice is None or arm.choice in CHOICES
        assert arm.plain is None or arm.plain in arms
        assert arm.reference in arms
    assert reads_predictors(arms["sparse-0.5"])
    assert reads_predictors(arms["exact-0.5-predicted"])
    assert not reads_predictors(arms["sparse-0.5-true"])
    assert not reads_predictors(arms["exact-0.5"])


def test_predictors_are_fitted_where_they_are_read(base, tmp_path):
    setting = Setting(base, TOKENS, predictors="somewhere")
    arms = all_arms(2)
    assert arguments(arms["exact-0.5"], setting, 0, str(tmp_path), 4).predictor_documents is None
    assert arguments(arms["sparse-0.5-paper"], setting, 0, str(tmp_path), 4).predictors == "somewhere"


# What is written of it.


@pytest.fixture(scope="module")
def written(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    page = folder / "quality.md"
    page.write_text(
        "".join(f"# {name}\n<!-- table:{name} -->\n<!-- /table:{name} -->\n" for name in (*report.TABLES, *report.NOISE_TABLES))
    )
    command = ["--runs", str(finished), "--results", str(folder), "--page", str(page), "--images", str(folder / "images")]
    assert summary.main(command) == 0
    assert summary.main([*command, "--check"]) == 0
    page.write_text(page.read_text().replace("exact-0.5", "exact-0.6"))
    assert summary.main([*command, "--check"]) == 1
    assert summary.main(command) == 0
    return folder


def test_the_result_says_what_the_runs_said(finished, written):
    (path,) = written.glob("quality_extension--*.json")
    result = json.loads(path.read_text())
    (setting,) = result["settings"].values()
    assert setting["arms"].keys() == set(ARMS)
    assert setting["arms"]["stock"]["seeds"] == [0, 1]
    arm = setting["arms"]["exact-0.5"]["points"][EQUAL_TIME]
    perplexities = []
    for seed in (0, 1):
        text = run_of(finished, "exact-0.5", seed)["points"][EQUAL_TIME]["text"]
        perplexities.append(math.exp(sum(map(sum, text["nll"])) / sum(map(sum, text["tokens"]))))
    assert arm["perplexity"]["by_seed"] == pytest.approx(perplexities)
    assert arm["steps"] == 8
    assert len(arm["by_stretch"]) == 4
    assert arm["versus_stock"].keys() == {"perplexity", *(f"stretch_{part}" for part in range(4))}
    earlier = setting["arms"]["exact-0.5"]["points"][EQUAL_STEPS]
    assert earlier["retrieval"]["questions"] == 6
    assert earlier["versus_stock"].keys() == arm["versus_stock"].keys() | {"retrieval", "retrieval_loss", "repositories"}
    # At equal time too the reference is stock after its own steps.
    stock = setting["arms"]["stock"]["points"][EQUAL_STEPS]["perplexity"]["by_seed"]
    expected = [100 * (mine / theirs - 1) for mine, theirs in zip(perplexities, stock, strict=True)]
    assert arm["versus_stock"]["perplexity"]["by_seed"] == pytest.approx(expected)
    choice = setting["arms"]["exact-0.5-true"]["points"][EQUAL_STEPS]
    assert choice["versus_plain"]["by_seed"] != choice["versus_stock"]["perplexity"]["by_seed"]


def test_tables_and_plots_show_it(written):
    page = (written / "quality.md").read_text()
    core = page.split("# quality_core")[1].split("# quality_")[0]
    assert "| exact-0.5 | 2 |" in core
    assert "(8 steps)" in core
    assert "one seed" in page
    assert "CPU" in page.split("# quality_goals")[1]
    assert "Not measured yet." in page.split("# quality_blocks")[1].split("# ")[0]
    assert "most informative, true scores" in page.split("# quality_choices")[1]
    for name in ("shares", "positions", "retrieval"):
        assert (written / "images" / f"{name}.png").stat().st_size > 10_000
    (path,) = written.glob("quality_extension--*.json")
    (setting,) = json.loads(path.read_text())["settings"].values()
    points = plots.share_points(setting["arms"], "exact", EQUAL_STEPS)
    assert [round(costs["kept share of the layers"], 2) for costs, _, _ in points] == [0.5, 0.5]  # 0.3 of 4 blocks are 2


def test_of_several_rates_the_one_of_most_runs_is_shown(written):
    (path,) = written.glob("quality_extension--*.json")
    result = json.loads(path.read_text())
    (most,) = result["settings"].values()
    tried = {"setting": most["setting"] | {"learning_rate": 0.5}, "arms": {"stock": most["arms"]["stock"]}}
    longer = {"setting": most["setting"] | {"steps": 99}, "arms": tried["arms"]}
    several = [result | {"settings": {"a": tried, "b": most, "c": longer}}]
    assert [setting["setting"]["steps"] for _, setting in report.main_settings(several)] == [4, 99]
    assert "rate 0.5" not in report.TABLES["quality_core"](several)
    assert "constant 0.5" in report.TABLES["quality_settings"](several)


@pytest.mark.parametrize(
    ("arm", "point", "mean", "low", "high", "word", "measure"),
    [
        ("exact-0.5", EQUAL_STEPS, 0.8, 0.6, 0.9, "met", "perplexity"),
        ("exact-0.5", EQUAL_STEPS, 0.8, 0.4, 1.2, "met by the mean", "perplexity"),
        ("exact-0.5", EQUAL_STEPS, 1.2, 0.9, 1.5, "missed", "perplexity"),
        ("exact-0.5", EQUAL_TIME, -1.5, -2.5, -0.5, "missed", "perplexity"),
        ("exact-0.3", EQUAL_TIME, -0.3, -0.5, -0.1, "met", "perplexity"),
        ("exact-0.3", EQUAL_TIME, -0.3, -0.7, 0.1, "missed", "perplexity"),
        ("exact-0.5", EQUAL_STEPS, 3.0, -4.0, 11.0, "none shown", "retrieval"),
        ("exact-0.5", EQUAL_STEPS, 3.0, 1.0, 5.0, "met", "retrieval"),
        ("exact-0.5", EQUAL_STEPS, 3.0, 1.0, 5.0, "missed", "retrieval_loss"),
    ],
)
def test_when_a_goal_is_met(arm, point, mean, low, high, word, measure):
    found = Difference(mean, low, high, 0.1, (mean, mean)).to_dict()
    setting = {
        "setting": {"steps": 9, "tokens": 8, "text": "python", "schedule": "constant", "accumulation": 1, "base": "b"},
        "arms": {arm: {"seeds": [0, 1], "points": {point: {"versus_stock": {measure: found}}}}},
    }
    assert report.goals_table([{"machine": {}, "settings": {"a": setting}}]).endswith(f"| {word} |")


def test_a_page_without_a_tables_place_is_refused(written):
    with pytest.raises(LemoError, match="page has 0 places for table"):
        report.updated_page("no table here", [])


def test_no_results_are_no_summary(tmp_path):
    with pytest.raises(LemoError, match="no results"):
        summary.read_runs(tmp_path)
