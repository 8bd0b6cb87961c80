"""Training moves a model away from its predictors: probes see it, refits answer it, and both cost next to nothing."""

import logging

import phase_flops
import pytest
import torch
from references.tiny_models import SIXTEENTH_OF_8B
from training_runs import BLOCK, curve, tiny_arguments, tiny_lemo_model

from lemo_hf import LemoConfig, LemoTrainer
from lemo_hf.evaluation.block_recall import RecallReport, measure_recall
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.live_bytes import LiveBytes
from lemo_hf.training.arguments import LemoTrainingArguments
from lemo_hf.training.phases.phase_cost import LARGE_PROBE_SHARE, estimate_probe_cost
from lemo_hf.training.phases.predictor_training import PredictorTraining
from lemo_hf.training.phases.recall_probe import RecallProbe, threshold_search

SELECTIONS = {
    "ratio": {"selection": "ratio", "attention_forward": "sparse"},
    "threshold": {"selection": "threshold", "attention_forward": "exact"},
    "informed": {"selection": "sampled", "sampling_temperature": 1.0, "attention_forward": "exact"},
}
# Adapters that move as far in four steps as a sane run never does.
ABSURD = 0.1


class Topics(torch.utils.data.Dataset):
    """Blocks about one token each, so that what makes a block informative can be read off it."""

    def __init__(self, samples=40, blocks=32):
        generator = torch.Generator().manual_seed(3)
        topics = torch.randint(3, 60, (samples, blocks, 1), generator=generator)
        others = torch.randint(3, 128, (samples, blocks, BLOCK), generator=generator)
        on_topic = torch.rand(others.shape, generator=generator) < 0.75
        self.tokens = torch.where(on_topic, topics, others).flatten(1)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index].clone()}


def run(folder, lemo, **changes):
    values = {"max_steps": 4, "probe_steps": 4, "probe_documents": 2, "learning_rate": ABSURD, "predictor_learning_rate": 1e-2}
    values |= {"predictor_documents": 32, "predictor_steps": 4, "refit_documents": 16, "lr_scheduler_type": "constant"}
    model = tiny_lemo_model(predictor_rank=16, predictor_features=16, **lemo)
    trainer = LemoTrainer(model=model, args=tiny_arguments(folder, **{**values, **changes}), train_dataset=Topics())
    trainer.train()
    return trainer


def logged(trainer, name):
    return [logs[name] for logs in trainer.state.log_history if name in logs]


@pytest.mark.parametrize("selection", ["ratio", "threshold", pytest.param("informed", marks=pytest.mark.slow)])
def test_recall_falls_with_the_model_and_a_refit_raises_it_again(selection, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        trainer = run(tmp_path, SELECTIONS[selection], refit_limit=1)
    fitted, after = logged(trainer, "recall")
    (before,) = logged(trainer, "recall_before_refit")
    assert fitted > 0.65, "chance is 0.47"
    assert before < fitted - 0.05
    assert after > before + 0.03
    lemo_run = trainer.lemo_run
    assert (lemo_run.refits, lemo_run.fitted_recall, lemo_run.refits_over) == (1, pytest.approx(after), False)
    said = f"mean recall is {before:.3f}, it was {fitted:.3f} when the predictors were last fitted; fitted again on 16 documents"
    assert f"{said}: {after:.3f}" in caplog.text
    if selection == "threshold":
        calibrated = [logged(trainer, f"threshold/layer_{layer}")[0] for layer in (0, 1)]
        thresholds = sparse_backbone(trainer.model).config.lemo.thresholds
        assert all(abs(new - old) > 1e-3 for new, old in zip(thresholds, calibrated, strict=True)), "thresholds follow"


def test_a_sane_run_is_left_alone(tmp_path):
    trainer = run(tmp_path, SELECTIONS["ratio"], learning_rate=1e-4, probe_steps=2, predictor_documents=8)
    assert trainer.lemo_run.refits == 0
    fitted, *later = logged(trainer, "recall")
    assert len(later) == 2
    assert min(later) >= fitted - trainer.args.recall_drop


def test_kept_shares_stay_where_thresholds_follow(tmp_path, monkeypatch):
    """Counted by the predictors of before and of after, on the same text."""
    shares = []
    untouched = RecallProbe._refit

    def count(lemo_run):
        search = threshold_search(lemo_run)
        search.begin(keep_thresholds=True)
        shares.append(search.kept_shares())

    def watched(self):
        count(self.run)
        untouched(self)
        count(self.run)

    monkeypatch.setattr(RecallProbe, "_refit", watched)
    few = {"predictor_documents": 4, "refit_documents": 4, "max_steps": 1, "probe_steps": 1, "recall_drop": -1}
    run(tmp_path, SELECTIONS["threshold"], **few)
    before, after = shares
    assert all(0.3 < share < 0.7 for share in before)
    assert after == pytest.approx(before, abs=1 / 60)  # a block of the two profile documents


def test_refits_end_where_they_do_not_help_and_it_is_said_once(tmp_path, monkeypatch, caplog):
    fallen = iter([0.8, 0.7, 0.7, 0.6, 0.5])
    monkeypatch.setattr("lemo_hf.training.phases.recall_probe.probe", lambda *_: RecallReport([next(fallen)], [], 0.5))
    monkeypatch.setattr("lemo_hf.training.callbacks.probe", lambda *_: RecallReport([next(fallen)], [0.5], 0.5))
    few = {"predictor_documents": 1, "refit_documents": 1, "max_steps": 3, "probe_steps": 1, "learning_rate": 0.0}
    with caplog.at_level(logging.WARNING, logger="lemo_hf.training.phases.recall_probe"):
        trainer = run(tmp_path, SELECTIONS["ratio"], refit_limit=5, **few)
    assert trainer.lemo_run.refits == 1
    assert logged(trainer, "recall") == [0.8, 0.7, 0.6, 0.5]
    assert caplog.text.count("fitting again on 1 documents did not help: 0.700; raise refit_documents") == 1
    caplog.clear()
    fallen = iter([0.8, 0.7, 0.75, 0.6, 0.5])
    with caplog.at_level(logging.WARNING, logger="lemo_hf.training.phases.recall_probe"):
        trainer = run(tmp_path / "b", SELECTIONS["ratio"], refit_limit=1, **few)
    assert trainer.lemo_run.refits == 1
    said = "mean recall is 0.600, it was 0.750 when the predictors were last fitted; refit_limit=1 is used up"
    assert caplog.text.count("is used up") == caplog.text.count(said) == 1


def test_a_resumed_run_remembers_the_recall_that_it_compares_with(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "predictor_documents": 8, "refit_limit": 0}
    whole = run(tmp_path, SELECTIONS["ratio"], **changes)
    model = tiny_lemo_model(predictor_rank=16, predictor_features=16, **SELECTIONS["ratio"])
    again = LemoTrainer(model=model, args=whole.args, train_dataset=Topics())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.lemo_run.fitted_recall == whole.lemo_run.fitted_recall == logged(whole, "recall")[0]
    assert again.lemo_run.refits_over == whole.lemo_run.refits_over
    assert curve(again) == curve(whole)


def test_predictors_that_came_with_the_model_are_probed_before_the_first_step(tmp_path):
    first = run(tmp_path / "first", SELECTIONS["ratio"], max_steps=1, predictor_documents=8)
    first.save_model(str(tmp_path / "shipped"))
    given = {"predictors": str(tmp_path / "shipped"), "predictor_documents": 0}
    second = run(tmp_path / "second", SELECTIONS["ratio"], max_steps=1, **given)
    assert second.lemo_run.fitted_recall == first.lemo_run.fitted_recall == logged(first, "recall")[0]


# --- What it costs ---


@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_probes_and_refits_take_less_than_a_hundredth_of_a_normal_run(form):
    """The real ones on one layer with the proportions of an 8B model, with the default arguments."""
    shape = phase_flops.LLAMA_3_8B | SIXTEENTH_OF_8B
    lemo = LemoConfig(attention_forward=form, selection="threshold", predictor_rank=8, predictor_features=4)
    found = phase_flops.measure(shape, 512, lemo, LemoTrainingArguments.predictor_steps)
    shares = phase_flops.probe_shares(found, LemoTrainingArguments)
    estimated = phase_flops.estimated_probe_share(lemo, LemoTrainingArguments)
    assert 0 < shares["probes"] < shares["refits"]
    assert sum(shares.values()) == pytest.approx(estimated, rel=0.3)
    assert sum(shares.values()) < LARGE_PROBE_SHARE == 0.01


def test_the_estimate_counts_probes_and_refits():
    lemo = LemoConfig(selection="threshold", attention_forward="exact", keep_ratio=0.5)
    documents = {"probed_documents": 10, "refit_documents": 8, "probe_documents": 3, "profile_documents": 4}
    cost = estimate_probe_cost(lemo, 32, refits=2, **documents, samples=1000)
    assert cost.probes == pytest.approx(11.5)
    assert cost.refits == pytest.approx(2 * (8 * 1.2 + 3 * 1.15 + 8))
    assert cost.steps == pytest.approx(1500)
    assert str(cost) == "recall probes take 0.74% of the run's compute, 2 refits at most 2.71% (estimated)"
    alone = estimate_probe_cost(lemo, 32, refits=0, **documents, samples=1000)
    assert str(alone) == "recall probes take 0.76% of the run's compute (estimated)"


def test_the_share_is_said_before_the_first_step(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        run(tmp_path / "a", SELECTIONS["ratio"], predictor_documents=1, max_steps=1, probe_steps=1, refit_documents=1)
    said = next(record for record in caplog.records if record.message.startswith("recall probes take"))
    # 2 documents * 1.15; 1 refit of 1.2 and 2 documents again; 1 step of 2 samples * (0.9 + 0.5).
    assert said.levelname == "WARNING"
    whole = 2.3 + 3.5 + 2.8
    assert f"take {2.3 / whole:.2%} of the run's compute, 1 refits at most {3.5 / whole:.2%} (estimated)" in said.message
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="lemo_hf"):
        run(tmp_path / "b", SELECTIONS["ratio"], predictor_documents=1, max_steps=1, probe_steps=100)
    assert "recall probes" not in caplog.text


@pytest.mark.parametrize("checkpoint", [pytest.param("none", marks=pytest.mark.slow), "kept_rows"])
def test_a_probe_and_a_refit_need_no_more_memory_than_a_sparse_step(checkpoint):
    """6 layers; an 8B has 32, and a probe holds one of them."""
    shape = {**phase_flops.LLAMA_3_8B, "hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8}
    lemo = LemoConfig(selection="ratio", checkpoint=checkpoint, predictor_rank=8, predictor_features=8)
    model = phase_flops.layers(6, shape | {"num_key_value_heads": 2, "vocab_size": 512}, lemo)
    backbone = sparse_backbone(model)
    ids = torch.randint(0, 512, (1, 512), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    training = PredictorTraining(backbone, documents=1, steps=4, learning_rate=1e-3)

    def peak(act):
        with LiveBytes(model) as live:
            act()
        return live.peak_bytes

    step = peak(lambda: model.train()(**batch).loss.backward())
    model.zero_grad()
    assert peak(lambda: measure_recall(backbone, [batch])) < step
    assert peak(lambda: training.fit(batch)) < step
