"""Predictors on other lengths and other text than they were fitted on: the benchmark's parts, and what a run says about it."""

import dataclasses
import json
import logging
from types import SimpleNamespace

import predictor_transfer
import pytest
import torch
from training_runs import RandomText, tiny_arguments, tiny_lemo_model

from lemo_hf import LemoTrainer
from lemo_hf.evaluation.block_recall import RecallReport, document_recall, positions_of_others
from lemo_hf.hub.lemo_files import load_predictors, save_lemo_files
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.text_data import PackedDocuments, TextDocument
from lemo_hf.training.phases.predictor_training import PredictorTraining
from lemo_hf.training.phases.recall_probe import say_if_text_is_foreign

MEAN = {"block_reduction": "mean", "predictor_features": 16}


def windows(count, seq_len=160):
    return PackedDocuments([RandomText(count, seq_len)[index] for index in range(count)], seq_len)


def test_position_only_recall_leaves_the_document_itself_out():
    slope = torch.arange(20.0)
    same = [slope, slope + 5, 3 * slope]
    assert positions_of_others([same, same], [0.5, 0.5]) == [1.0, 1.0]
    odd = [slope, slope, -slope]
    wanted = [document_recall(odd[0], torch.zeros(20), 0.5)[0], 0.0]
    # Document 2 is foretold by its opposites; documents 0 and 1 by ties, which resolve to the earlier block.
    assert positions_of_others([odd], [0.5])[0] == pytest.approx((2 * wanted[0] + wanted[1]) / 3)
    assert positions_of_others([same[:1]], [0.5])[0] != positions_of_others([same[:1]], [0.5])[0], "no others: NaN"


@pytest.mark.parametrize(
    ("recall", "positions", "warns"), [(0.9, 0.8, False), (0.79, 0.8, True), (0.52, 0.3, True), (float("nan"), 0.8, False)]
)
def test_a_warning_names_recall_positions_and_chance_once(recall, positions, warns, caplog):
    run = SimpleNamespace(said_foreign=False, lemo=SimpleNamespace(needs_predictors=True))
    report = RecallReport([recall, recall], [positions, positions], 0.5)
    for _ in range(2):
        say_if_text_is_foreign(run, report)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warns
    if warns:
        assert f"they find {recall:.3f} of the blocks, their positions alone {positions:.3f}, chance 0.500; fit them" in said[0]
        assert "\n" not in said[0]


def test_uniform_draws_say_nothing(caplog):
    run = SimpleNamespace(said_foreign=False, lemo=SimpleNamespace(needs_predictors=False))
    say_if_text_is_foreign(run, RecallReport([0.1], [0.9], 0.5))
    assert not caplog.records


@pytest.mark.parametrize("fitted", [True, False])
def test_a_run_says_that_its_predictors_come_from_elsewhere(fitted, tmp_path, caplog):
    """Predictors that know this text are taken silently, others with a warning before the first step."""
    model = tiny_lemo_model(selection="ratio", **MEAN)
    backbone = sparse_backbone(model)
    training = PredictorTraining(backbone, 4, 1, 1e-3)
    for index in range(4):
        training.fit({"input_ids": RandomText()[index]["input_ids"][None]})
    if not fitted:
        for layer in backbone.layers:  # as wrong as can be
            layer.lemo_predictor.key.matrices[0].neg_()
    save_lemo_files(model, tmp_path / "predictors")
    fresh = tiny_lemo_model(selection="ratio", **MEAN)
    load_predictors(sparse_backbone(fresh), tmp_path / "predictors")
    changes = {
        "predictors": str(tmp_path / "predictors"),
        "predictor_documents": 0,
        "max_steps": 1,
        "probe_steps": 4,
        "probe_documents": 4,
    }
    args = tiny_arguments(tmp_path / "run", **changes)
    with caplog.at_level(logging.WARNING, "lemo_hf"):
        LemoTrainer(model=fresh, args=args, train_dataset=RandomText()).train()
    assert any("predictors do not know this text" in record.getMessage() for record in caplog.records) == (not fitted)


def test_recall_of_recorded_windows_is_that_of_the_predictors_asked_about():
    backbone, other = (sparse_backbone(tiny_lemo_model(lora=False, **MEAN)) for _ in range(2))
    recorded = predictor_transfer.record(backbone, windows(4), "record")
    training = predictor_transfer.fitted(backbone, recorded)
    assert training.done == 4
    for layer in other.layers:
        layer.lemo_predictor.reset_parameters(torch.Generator().manual_seed(5))
    known, foreign = (predictor_transfer.recall(each, recorded) for each in (backbone, other))
    assert known["recall"] > known["chance"] + 0.2 > foreign["recall"]
    assert known["positions"] == foreign["positions"]
    moved = predictor_transfer.with_predictors_of(other, backbone)
    assert predictor_transfer.recall(moved, recorded) == known
    assert known["windows"] == 4


def test_predictors_fitted_short_serve_long_documents():
    """Rotary frequencies are read from the model, so features turn as they should at places that fitting never saw."""
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **MEAN))
    predictor_transfer.fitted(backbone, predictor_transfer.record(backbone, windows(8, 64), "short"))
    long = predictor_transfer.record(backbone, windows(6, 250), "long")
    as_fitted = predictor_transfer.recall(backbone, long)
    assert as_fitted["recall"] > as_fitted["positions"] + 0.1
    # The same features with positions standing still.
    still = [
        [dataclasses.replace(found, block_rotary=tuple(torch.ones_like(p) * (i == 0) for i, p in enumerate(found.block_rotary)))
         for found in layers] for layers in long
    ]  # fmt: skip
    assert predictor_transfer.recall(backbone, still)["recall"] < as_fitted["recall"] - 0.05


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pruning_shrinks_and_reports_what_is_left(kind):
    lemo = MEAN if kind == "mean" else {}
    backbone = sparse_backbone(tiny_lemo_model(lora=False, **lemo))
    recorded = predictor_transfer.record(backbone, windows(4), "record")
    predictor_transfer.fitted(backbone, recorded)
    before = predictor_transfer.recall(backbone, recorded)
    predictors = [layer.lemo_predictor for layer in backbone.layers]
    for predictor in predictors:  # something to remove
        predictor.query.matrices[0][:, :2] = 0
        if kind == "mean":
            predictor.query.matrices[0][:, 8:10] = 0
    zeroed = predictor_transfer.recall(backbone, recorded)
    found = predictor_transfer.pruned(backbone, recorded, recorded, 0.99999)
    assert found["removed"] >= 4
    assert found["sizes"] == [predictor.sizes for predictor in predictors]
    assert found["recall"] == pytest.approx(zeroed["recall"], abs=0.02)
    assert found["chance"] == before["chance"]


class Counted(predictor_transfer.Transfer):
    """Measures nothing, and says what it was asked for."""

    asked: list[str] = []

    def __init__(self, kind, *given):
        self.kind, self.fits = kind, {4096: None}

    def measure(self, result, section, name):
        self.asked.append(f"{section} {name}")
        found = result[section].setdefault("fitted at 4096", {}) if section == "lengths" else result[section]
        found[name] = {"recall": len(self.asked)}


def test_parts_that_a_result_has_are_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(predictor_transfer, "Transfer", Counted)
    monkeypatch.setattr(predictor_transfer, "parameter_share", lambda backbone: 0.04)
    monkeypatch.setattr(Counted, "asked", [])
    output = tmp_path / "predictor_transfer_max--any.json"

    def asked_for(*more):
        Counted.asked.clear()
        predictor_transfer.main(["--kinds", "max", "--output", str(tmp_path), *more])
        return Counted.asked, json.loads(output.read_text())

    parts, first = asked_for("--lengths", "1024")
    assert len(parts) == 7
    assert "continued" not in first
    del first["text"]["JSON"]
    output.write_text(json.dumps(first))
    parts, second = asked_for("--lengths", "1024", "4096")
    assert parts == ["lengths 4096", "text JSON"]
    assert [(run["parts"], "commit" in run) for run in second["continued"]] == [(parts, True)]
    assert second["text"].items() > first["text"].items()
    assert second["pruning"] == first["pruning"]
    assert asked_for("--lengths", "1024", "4096") == ([], second)
    parts, other = asked_for("--lengths", "1024", "--features", "8")
    assert len(parts) == 7, "another config is another result"
    assert "continued" not in other


def test_other_text_is_read_without_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(predictor_transfer.sysconfig, "get_path", lambda name: str(tmp_path))
    long = "\n".join(f"line {number} of a text" for number in range(800))
    (tmp_path / "a.rst").write_text(long)
    (tmp_path / "b.rst").write_text(long)
    (tmp_path / "c.h").write_text(long[::-1])
    (tmp_path / "short.rst").write_text("short")
    assert predictor_transfer.other_text((".rst",)) == [TextDocument(str(tmp_path / "a.rst"), long)]
