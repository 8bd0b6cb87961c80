"""The quickstart on windows of 256 tokens and two steps: everything it prints and writes, in seconds."""

import json

import pytest

from lemo_hf.quickstart import comparison as quickstart


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "SEQ_LEN", 512)
        patch.setattr(quickstart, "BASE_CONTEXT", 256)
        patch.setattr(quickstart, "TRAIN_PACKAGES", ("accelerate",))
        patch.setattr(quickstart, "EVALUATION_PACKAGES", ("evaluate",))
        patch.setattr(quickstart, "EVALUATION_WINDOWS", 3)
        patch.setattr(quickstart, "PHASES", {**quickstart.PHASES, "predictor_documents": 2})
        quickstart.main(["--steps", "2", "--out", str(folder)])
    return folder


def test_every_arm_leaves_an_adapter_and_the_lemo_arms_their_files(finished):
    for arm in ("stock", "exact", "kept_keys"):
        assert (finished / arm / "adapter_model.safetensors").is_file()
    for arm in ("exact", "kept_keys"):
        for name in ("lemo_predictors.safetensors", "lemo_config.json", "README.md"):
            assert (finished / arm / name).is_file(), (arm, name)


def test_each_adapter_has_its_card(finished):
    for arm in ("stock", "exact", "kept_keys"):
        card = (finished / arm / "README.md").read_text()
        assert "Perplexity on held-out text at 512 tokens" in card
        assert ("none: every token was computed on" in card) == (arm == "stock")


def test_plots_are_written(finished):
    for name in ("saved_bytes", "losses", "kept_share", "block_scores"):
        assert (finished / f"{name}.png").stat().st_size > 10_000


def test_the_report_shows_the_arms_beside_stock(finished):
    page = (finished / "report.html").read_text()
    results = json.loads((finished / "results.json").read_text())
    assert '<th scope="col">exact</th><th scope="col">kept_keys</th><th scope="col">stock</th>' in page
    for arm in results["arms"].values():
        assert f"{list(arm['perplexity'].values())[-1]:.3f}" in page
    assert "no arm&#39;s own" in page
    assert "not measured</td></tr>" in page  # stock has no recall
    assert page.count("<svg") == 7  # losses, two maps of kept shares, recall, block scores, time, saved bytes


def test_elimination_was_active_and_measured(finished):
    arms = json.loads((finished / "results.json").read_text())["arms"]
    for arm in ("exact", "kept_keys"):
        assert sum(arms[arm]["saved_bytes"].values()) < 0.8 * sum(arms["stock"]["saved_bytes"].values())
        assert arms[arm]["flops"] < arms["stock"]["flops"]
        for layer in range(6):
            assert all(entry[f"kept_share/layer_{layer}"] == 0.5 for entry in arms[arm]["kept_share"])
        assert set(arms[arm]["versus_stock"]) >= {"equal_steps"}
    assert len(arms["kept_keys"]["recall"]) == 6
    assert arms["stock"]["perplexity"]["equal_steps"] > 1
