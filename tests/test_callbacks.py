import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import TrainerCallback, default_data_collator

from lemo_hf import LemoTrainer
from lemo_hf.errors import LemoError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.callbacks import all_finite
from lemo_hf.training.phases.phase_documents import PhaseDocuments
from lemo_hf.training.phases.predictor_training import PredictorTraining

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}


class NoisyText(RandomText):
    """Reading a sample draws from every global generator, as augmentation would."""

    def __getitem__(self, index):
        torch.rand(1)
        random.random()
        np.random.rand()  # noqa: NPY002
        return super().__getitem__(index)


class Watch(TrainerCallback):
    """What the model looked like at each step."""

    def __init__(self):
        self.draws, self.dense = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        backbone = sparse_backbone(model)
        self.draws.append(backbone.lemo_draw - 1)
        self.dense.append(backbone.config.lemo.dense_layers)


def trained(folder, lemo, data=None, **changes):
    trainer = LemoTrainer(
        model=tiny_lemo_model(**lemo), args=tiny_arguments(folder, **changes), train_dataset=data or RandomText()
    )
    trainer.train()
    return trainer


def test_each_epochs_log_has_layer_metrics(tmp_path):
    def with_shares(trainer):
        return [logs["step"] for logs in trainer.state.log_history if "kept_share/layer_1" in logs]

    epochs = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 5}
    assert with_shares(trained(tmp_path / "a", SAMPLED, **epochs)) == [3, 6]
    assert with_shares(trained(tmp_path / "b", SAMPLED, logging_strategy="epoch", max_steps=5)) == [5]
    assert with_shares(trained(tmp_path / "c", SAMPLED, Stream(24), logging_strategy="epoch", max_steps=5)) == [5]
    assert with_shares(trained(tmp_path / "d", SAMPLED, logging_strategy="no")) == []


class Listen(TrainerCallback):
    def __init__(self):
        self.heard = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.heard.append(dict(logs))


@pytest.mark.parametrize("bar", [False, True])
def test_the_terminal_shows_means_and_every_callback_has_all(tmp_path, capsys, bar):
    listen = Listen()
    trainer = tiny_trainer(tmp_path, SAMPLED, disable_tqdm=not bar)
    trainer.add_callback(listen)
    trainer.train()
    assert sum("kept_share/layer_1" in logs for logs in listen.heard) == 6
    shown = capsys.readouterr()
    assert "kept_share" in shown.out + shown.err
    assert "/layer_" not in shown.out + shown.err
    assert "kept_share/layer_1" in next(logs for logs in trainer.state.log_history if "loss" in logs)


def recalls(trainer):
    return [(logs["step"], logs["recall"]) for logs in trainer.state.log_history if "recall" in logs]


def test_probes_do_not_disturb_the_curve(tmp_path):
    quiet = trained(tmp_path / "a", SPARSE, NoisyText())
    probed = trained(tmp_path / "b", SPARSE, NoisyText(), probe_steps=2, refit_limit=0)
    assert [step for step, _ in recalls(quiet)] == [0]
    assert [step for step, _ in recalls(probed)] == [0, 2, 4, 6]
    assert curve(quiet) == curve(probed)


def test_phases_do_not_disturb_the_curve(tmp_path):
    # The uniform draw reads no predictors: with and without the phase the steps are the same.
    without = trained(tmp_path / "a", SAMPLED, NoisyText(), predictor_documents=0)
    with_phase = trained(tmp_path / "b", SAMPLED, NoisyText(), predictor_documents=3)
    assert not recalls(without)
    assert recalls(with_phase)
    assert curve(without) == curve(with_phase)


def test_a_phase_draws_nothing_from_global_generators(tmp_path):
    documents = PhaseDocuments(NoisyText(), default_data_collator, seed=0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    documents.span(0, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


def test_documents_have_their_own_order_and_start_again():
    data = RandomText(samples=5)
    documents, other = (PhaseDocuments(data, default_data_collator, seed=seed) for seed in (0, 1))
    rows = torch.cat([batch["input_ids"] for batch in documents.span(0, 5)])
    assert sorted(rows.tolist()) == sorted(data.tokens.tolist())
    assert torch.equal(documents[5]["input_ids"], documents[0]["input_ids"])
    assert not torch.equal(rows, torch.cat([batch["input_ids"] for batch in other.span(0, 5)]))


def test_gradients_may_lie_on_several_devices():
    class Elsewhere(torch.Tensor):
        """A CPU tensor that says it is on the meta device, and refuses company like one that is."""

        device = torch.device("meta")

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.stack:
                assert len({type(part) for part in args[0]}) == 1, "tensors on several devices"
            return super().__torch_function__(function, types, args, kwargs or {})

    here, bad = torch.ones(2), torch.tensor([1.0, float("inf")])
    assert all_finite([])
    assert all_finite([here, here.as_subclass(Elsewhere), here])
    assert not all_finite([here, bad.as_subclass(Elsewhere)])
    assert not all_finite([here.as_subclass(Elsewhere), bad])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_on_cpu_and_gpu():
    assert all_finite([torch.ones(2), torch.ones(2, device="cuda")])
    assert not all_finite([torch.ones(2), torch.full((2,), float("nan"), device="cuda")])


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        data = RandomText()
        return (data[index] for index in range(self.samples))


def test_streams_are_read_from_their_start():
    documents = PhaseDocuments(Stream(3), default_data_collator, seed=0)
    wanted = RandomText().tokens
    for index, row in ((1, 1), (0, 0), (2, 2), (4, 1)):
        assert torch.equal(documents[index]["input_ids"][0], wanted[row])
    with pytest.raises(LemoError, match="the training set is empty"):
        PhaseDocuments(Stream(0), default_data_collator, seed=0)[0]


def test_processes_with_unequal_parts_of_a_stream_probe_equally_many_documents():
    class Processes(list):
        def gather(self, value):
            return [*self, value]

    documents = PhaseDocuments(Stream(9), default_data_collator, seed=0, probes=4)
    documents.agree(Processes([3]))
    assert (documents.probe_count, len(documents.probes()), documents.fitting_count(100)) == (2, 2, 7)
    documents.agree(Processes([1]))
    assert (documents.probe_count, len(documents.probes())) == (0, 1)
    for part in (Stream(0), Stream(9)):  # on both of them
        documents = PhaseDocuments(part, default_data_collator, seed=0, probes=4)
        with pytest.raises(LemoError, match="the training set is empty on rank 0; 0 samples; give each process at least one"):
            documents.agree(Processes([0]))


def test_a_stream_can_be_trained_on(tmp_path):
    assert len(curve(trained(tmp_path, SPARSE, Stream(24)))) == 6


def rows(batches):
    return {tuple(batch["input_ids"][0].tolist()) for batch in batches}


@pytest.mark.parametrize("samples", [2, 3, 6, 40])
@pytest.mark.parametrize("data", [RandomText, Stream], ids=["set", "stream"])
def test_nothing_is_fitted_on_probe_documents(data, samples):
    samples = min(samples, 24) if data is Stream else samples
    documents = PhaseDocuments(data(samples), default_data_collator, seed=0, probes=2, profile=3)
    probes, profile = rows(documents.probes()), rows(documents.profile())
    assert len(probes) == min(2, samples - 1)
    assert len(profile) == min(3, samples - len(probes))
    assert documents.fitting_count(100) == samples - len(probes)
    fitted = rows(documents.fitting(index) for index in range(50))
    assert len(fitted) == samples - len(probes)
    assert not probes & (profile | fitted)
    first = rows(documents.fitting(index) for index in range(max(samples - 5, 0)))
    assert not first & profile


def test_too_few_documents_are_said(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="lemo_hf"):
        trained(tmp_path / "a", SPARSE, RandomText(samples=6), predictor_documents=64)
        assert "predictor_documents=64 is more than the training set has; fitting on 5, 1 more measure recall" in caplog.text
        trained(tmp_path / "b", SPARSE, RandomText(samples=1), predictor_documents=1)
    assert "training set has one document" in caplog.text


def test_the_share_of_the_phases_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lemo_hf"):
        trained(tmp_path / "a", {**SPARSE, "selection": "threshold"})
        # Fitting 4 * 1.2; 2 documents * (1 + 2 * 2 layers * 2 rounds * 0.9); 6 steps of 2 samples * (0.9 + 0.5).
        share = (4.8 + 16.4) / (4.8 + 16.4 + 16.8)
        said = next(record for record in caplog.records if "of the run's compute" in record.message)
        assert said.levelname == "WARNING"
        assert said.message.startswith(f"{share:.1%} of the run's compute goes into the phases before the first step (predictor ")
        assert "4 documents to fit on, 2 profiled in 2 rounds, 12 training samples; lower predictor_documents" in said.message
        caplog.clear()
        trained(tmp_path / "b", SPARSE, predictor_documents=1, gradient_accumulation_steps=2)
        said = next(record for record in caplog.records if "of the run's compute" in record.message)
        assert said.levelname == "INFO"
        assert said.message.startswith(f"{1.2 / 34.8:.1%} of")
        caplog.clear()
        trained(tmp_path / "c", SPARSE, predictor_documents=0)
    assert "of the run's compute" not in caplog.text


def test_samples_below_a_block_are_refused(tmp_path, caplog):
    with pytest.raises(LemoError) as error:
        trained(tmp_path / "a", SAMPLED, RandomText(seq_len=7))
    assert str(error.value) == "seq_len 7 is shorter than one block (block_size=8); lower block_size or use longer samples"
    trained(tmp_path / "b", {"enabled": False}, RandomText(seq_len=7))
    trained(tmp_path / "c", {**SAMPLED, "keep_ratio": 1.0}, RandomText(seq_len=7))
    with caplog.at_level("WARNING", logger="lemo_hf"):
        trained(tmp_path / "d", SAMPLED, RandomText(seq_len=24))
        assert "no document has a block that can be left out" not in caplog.text
        trained(tmp_path / "e", SAMPLED, RandomText(seq_len=16))
    assert "no document has a block that can be left out, so training is dense" in caplog.text


@pytest.mark.parametrize("accumulation", [1, 3])
def test_draws_follow_the_step(tmp_path, accumulation):
    watch = Watch()
    # Evaluation between the steps draws nothing.
    args = tiny_arguments(tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=1)
    data = {"train_dataset": RandomText(), "eval_dataset": RandomText(samples=2)}
    LemoTrainer(model=tiny_lemo_model(**SAMPLED), args=args, callbacks=[watch], **data).train()
    assert watch.draws == [0, 1, 2]


def test_the_dense_tail_keeps_everything_and_leaves_the_config_alone(tmp_path):
    watch = Watch()
    trainer = tiny_trainer(tmp_path, {**SPARSE, "dense_layers": [0]}, dense_tail_share=0.34)
    trainer.add_callback(watch)
    trainer.train()
    shares = [logs["kept_share/layer_1"] for logs in trainer.state.log_history if "kept_share" in logs]
    assert shares == [0.5] * 4 + [1.0] * 2
    assert watch.dense == [[0]] * 6


def test_refits_at_every_probe_end_at_the_limit(tmp_path):
    trainer = tiny_trainer(tmp_path, SPARSE, probe_steps=1, recall_drop=-1, refit_limit=2, refit_documents=1)
    before = []

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            before.append(sparse_backbone(model).layers[0].lemo_predictor.key.matrices[0].clone())

    trainer.add_callback(Remember())
    trainer.train()
    assert sum("recall_before_refit" in logs for logs in trainer.state.log_history) == 2
    changed = [not torch.equal(one, other) for one, other in pairwise(before)]
    assert changed == [True, True, False, False, False]


def test_shipped_predictors_are_the_start(tmp_path):
    first = trained(tmp_path / "first", SPARSE)
    first.save_model(str(tmp_path / "shipped"))
    second = tiny_trainer(tmp_path / "second", SPARSE, predictors=str(tmp_path / "shipped"), predictor_documents=0)
    second.train()
    assert curve(second) == curve(first)
    with pytest.raises(LemoError, match="does not exist"):
        tiny_trainer(tmp_path / "third", SPARSE, predictors=str(tmp_path / "nowhere")).train()


def test_only_drawn_predictors_start_anew(tmp_path, monkeypatch):
    fresh = []
    untouched = PredictorTraining.__init__

    def watched(self, *args, **kwargs):
        fresh.append(kwargs["fresh"])
        untouched(self, *args, **kwargs)

    monkeypatch.setattr(PredictorTraining, "__init__", watched)
    first = trained(tmp_path / "first", SPARSE, probe_steps=3, recall_drop=-1, refit_limit=1, refit_documents=1)
    assert fresh == [True, False]
    first.save_model(str(tmp_path / "shipped"))
    first.train()
    trained(tmp_path / "second", SPARSE, predictors=str(tmp_path / "shipped"))
    assert fresh[2] is fresh[-1] is False
    continued = LemoTrainer(model=first.model, args=tiny_arguments(tmp_path / "third"), train_dataset=RandomText())
    continued.train()
    assert fresh[-1] is False


def test_thresholds_are_searched_again_after_a_fit(tmp_path):
    # Thresholds of predictors of another scale: every block would pass them.
    lemo = {"selection": "threshold", "attention_forward": "sparse", "thresholds": [-1e6, -1e6]}
    trainer = trained(tmp_path / "a", lemo)
    shares = [logs["kept_share"] for logs in trainer.state.log_history if "kept_share" in logs]
    assert len(shares) == 6
    assert max(shares) < 0.8
    trainer.lemo_run.lemo.update(thresholds=[-1e6, -1e6])
    trainer.train()
    assert [logs["calibrated_share"] for logs in trainer.state.log_history if "calibrated_share" in logs][-1] < 0.6


def test_thresholds_stay_where_nothing_was_fitted(tmp_path):
    lemo = {"selection": "threshold", "attention_forward": "sparse", "thresholds": [-5.0, 6.0]}
    trainer = trained(tmp_path, lemo, predictor_documents=0)
    assert trainer.lemo_run.lemo.thresholds == [-5.0, 6.0]


def test_switched_off_is_the_stock_run(tmp_path):
    trainer = trained(tmp_path, {"enabled": False}, probe_steps=1)
    assert len(curve(trainer)) == 6
    assert not any(
        name.startswith(("kept_share", "recall", "saved_bytes")) for logs in trainer.state.log_history for name in logs
    )


def test_skipped_phases_are_said(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lemo_hf"):
        trained(tmp_path / "a", SAMPLED, predictor_documents=None)
        trained(tmp_path / "b", SPARSE, predictor_documents=0)
    assert "predictor phase skipped: selection='sampled' does not read predictors" in caplog.text
    assert "calibrate phase skipped: selection='ratio' has no thresholds" in caplog.text
    assert "selection reads the predictors as they are" in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("predictor_documents", -1),
        ("predictor_passes", 0),
        ("calibrate_eta", 0.0),
        ("recall_drop", 1.5),
        ("prune_share", 0.0),
        ("dense_tail_share", 1.0),
        ("probe_steps", -1),
    ],
)
def test_arguments_outside_their_domain_are_refused(tmp_path, name, value):
    with pytest.raises(LemoError, match=f"{name} must be .*; got {value}; ") as error:
        tiny_arguments(tmp_path, **{name: value})
    assert "\n" not in str(error.value)
