"""Evaluation, best models, early stopping, batch-size and hyper-parameter search, in LemoTrainer and in the stock Trainer."""

import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.hyperparameter_search import OptunaBackend
from transformers.trainer_utils import BestRun

from lemo_hf import LemoTrainer, LemoTrainingArguments, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import read_json
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.sparse_decoder import sparse_backbone

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}
THRESHOLD = {"selection": "threshold", "attention_forward": "sparse"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
BEST = {**EVALUATED, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}


def with_dropout(**lemo):
    """A model whose adapter draws from torch's global generator at every step."""
    base = tiny_lemo_model(lora=False, **lemo)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.2))


def evaluated(folder, lemo, model=None, callbacks=None, metrics=None, **changes):
    return LemoTrainer(
        model=model or tiny_lemo_model(**lemo),
        args=tiny_arguments(folder, **changes),
        train_dataset=RandomText(),
        eval_dataset=RandomText(samples=4),
        callbacks=callbacks,
        compute_metrics=metrics,
    )


@pytest.mark.parametrize(
    "lemo", [SAMPLED, {**SAMPLED, "sampling_temperature": 1.0}, THRESHOLD], ids=["uniform", "drawn", "threshold"]
)
def test_evaluation_disturbs_nothing(tmp_path, lemo):
    changes = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4, "probe_steps": 2, "eval_sparse": True}
    with_it = evaluated(tmp_path / "a", lemo, with_dropout(**lemo), **changes, **EVALUATED, eval_on_start=True)
    with_it.train()
    without = evaluated(tmp_path / "b", lemo, with_dropout(**lemo), **changes)
    without.train()
    assert len(curve(without)) == 6
    assert curve(with_it) == curve(without)
    for ours, theirs in zip(with_it.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert sum("eval_sparse_forward_loss" in logs for logs in with_it.state.log_history) == 7


def test_evaluation_is_dense_and_the_sparse_loss_is_named_so(tmp_path):
    trainer = evaluated(tmp_path, SPARSE, eval_sparse=True)
    trainer.train()
    metrics = trainer.evaluate()
    stock = Trainer(model=trainer.model, args=trainer.args, eval_dataset=RandomText(samples=4)).evaluate()
    assert metrics["eval_loss"] == stock["eval_loss"]
    backbone = sparse_backbone(trainer.model)
    with torch.no_grad():
        trainer.model.train()
        losses = [trainer.model(**{name: value[None] for name, value in sample.items()}).loss for sample in RandomText(samples=4)]
    assert metrics["eval_sparse_forward_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert metrics["eval_sparse_forward_loss"] != metrics["eval_loss"]
    assert not backbone.lemo_sparse_evaluation
    backbone.config.lemo.update(attention_forward="exact")
    exact = trainer.evaluate()
    assert exact["eval_sparse_forward_loss"] == pytest.approx(exact["eval_loss"], rel=1e-6)
    assert "eval_sparse_forward_loss" not in trainer.predict(RandomText(samples=4)).metrics


class InOneRow(RandomText):
    """Two of the samples a row, told apart by positions only."""

    def __getitem__(self, index):
        row, places = self.tokens[2 * index : 2 * index + 2], torch.arange(self.tokens.shape[1])
        labels = torch.cat((torch.full((2, 1), -100), row[:, 1:]), 1)
        return {"input_ids": row.flatten(), "labels": labels.flatten(), "position_ids": places.repeat(2)}

    def __len__(self):
        return len(self.tokens) // 2


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_are_evaluated_as_alone(tmp_path, batch):
    trainer = evaluated(tmp_path, SPARSE, eval_sparse=True, per_device_eval_batch_size=batch)
    alone, packed = trainer.evaluate(RandomText(samples=4)), trainer.evaluate(InOneRow(samples=4))
    for name in ("eval_loss", "eval_sparse_forward_loss"):
        assert packed[name] == pytest.approx(alone[name], rel=1e-6)


def test_the_progress_bar_survives_the_second_pass(tmp_path, capsys):
    evaluated(tmp_path, SPARSE, eval_sparse=True, disable_tqdm=False, max_steps=1).evaluate()
    err = capsys.readouterr().err
    assert "2/1 " not in err


def test_metrics_of_the_user_and_predict(tmp_path):
    def accuracy(outputs):
        return {"accuracy": float((outputs.predictions[:, :-1].argmax(-1) == outputs.label_ids[:, 1:]).mean())}

    trainer = evaluated(tmp_path, SPARSE, metrics=accuracy, **EVALUATED)
    trainer.train()
    assert all(0 <= logs["eval_accuracy"] <= 1 for logs in trainer.state.log_history if "eval_loss" in logs)
    outcome = trainer.predict(RandomText(samples=3))
    assert outcome.predictions.shape == (3, 96, 128)
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=RandomText(samples=3).tokens).logits
    torch.testing.assert_close(torch.tensor(outcome.predictions), logits)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_the_best_model_stops_early_and_has_its_predictors(tmp_path, kind):
    changes = {**BEST, "greater_is_better": True, "metric_for_best_model": "eval_loss"}  # the first one: loss falls
    changes |= {"probe_steps": 2, "recall_drop": -1.0, "refit_limit": 1, "refit_documents": 2}
    args = tiny_arguments(tmp_path, **changes)
    data = {"train_dataset": RandomText(), "eval_dataset": RandomText(samples=4)}
    stop = EarlyStoppingCallback(early_stopping_patience=3)
    if kind == "ours":
        trainer = LemoTrainer(model=tiny_lemo_model(**THRESHOLD), args=args, callbacks=[stop], **data)
    else:
        trainer = Trainer(model=tiny_lemo_model(**THRESHOLD), args=args, callbacks=[stop, *lemo_callbacks(args)], **data)
    trainer.train()
    assert trainer.state.global_step == 4
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    backbone = sparse_backbone(trainer.model)
    refitted = load_file(tmp_path / "checkpoint-4" / "lemo_predictors.safetensors")
    stored = load_file(best / "lemo_predictors.safetensors")
    assert any(not torch.equal(refitted[name], value) for name, value in stored.items())
    for name, value in stored.items():
        layer, part = name.removeprefix("layers.").split(".", 1)
        assert torch.equal(backbone.layers[int(layer)].lemo_predictor.get_parameter(part), value), name
    assert backbone.config.lemo.thresholds == read_json(best / "lemo_config.json")["thresholds"]
    if kind == "stock":
        # Where `save_model()` puts the adapter.
        final = load_file(tmp_path / "lemo_predictors.safetensors")
        assert all(torch.equal(final[name], value) for name, value in stored.items())


class OutOfMemoryAt(TrainerCallback):
    """Raises CUDA's error at a step, as long as batches are larger than `fits`."""

    def __init__(self, step, fits):
        self.step, self.fits = step, fits
        self.batches = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.hooks = [model.register_forward_pre_hook(self.before, with_kwargs=True)]
        self.now = state.global_step

    def before(self, model, args, kwargs):
        rows = kwargs["input_ids"].shape[0]
        self.batches.append(rows)
        if self.now >= self.step and rows > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def on_step_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()


def test_auto_find_batch_size_begins_anew_and_clean(tmp_path, monkeypatch):
    from lemo_hf.training.phases import predictor_training

    fitted = []
    untouched = predictor_training.PredictorTraining.fit
    monkeypatch.setattr(
        predictor_training.PredictorTraining, "fit", lambda self, *args: fitted.append(1) or untouched(self, *args)
    )
    oom = OutOfMemoryAt(step=5, fits=3)
    trainer = tiny_trainer(
        tmp_path, {**SPARSE, "dense_layers": [0]}, auto_find_batch_size=True, per_device_train_batch_size=4, dense_tail_share=0.2
    )
    trainer.add_callback(oom)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.train_batch_size <= 3
    assert len(fitted) == 4  # once
    logs = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert [entry["kept_share/layer_1"] for entry in logs] == [0.5] * 5 + [1.0]
    assert sparse_backbone(trainer.model).config.lemo.dense_layers == [0]  # the tail that the error cut short is over
    hooks = trainer.model._forward_pre_hooks
    assert len(hooks) == 1  # the callback's own, of the step that failed; none of LeMo's


class Trial:
    """What transformers reads of an optuna trial."""

    def __init__(self, number):
        self.number, self.params, self.study = number, {}, None


def search_two(trainer, n_trials, direction, **kwargs):
    objectives = []
    for number in range(n_trials):
        trainer.objective = None
        trainer.train(resume_from_checkpoint=None, trial=Trial(number))
        objectives.append(trainer.compute_objective(trainer.evaluate()))
    best = min(range(n_trials), key=objectives.__getitem__)
    return BestRun(str(best), objectives[best], {}, objectives)


@pytest.fixture
def optuna(monkeypatch):
    stand_in = types.ModuleType("optuna")
    stand_in.__spec__ = ModuleSpec("optuna", None)
    stand_in.TrialPruned = type("TrialPruned", (Exception,), {})
    stand_in.trial = types.SimpleNamespace(BaseTrial=Trial)
    monkeypatch.setitem(sys.modules, "optuna", stand_in)
    monkeypatch.setattr(OptunaBackend, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(OptunaBackend, "run", staticmethod(lambda trainer, *args, **kwargs: search_two(trainer, *args, **kwargs)))


def searched(trainer):
    rates = {0: 1e-2, 1: 0.0}
    return trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": rates[trial.number]},
        compute_objective=lambda metrics: metrics["eval_loss"],
        backend="optuna",
        n_trials=2,
        direction="minimize",
    )


def test_a_search_trains_a_new_model_through_its_own_phases_in_every_trial(tmp_path, optuna):
    made = []

    def model_init(trial):
        # Settings may be searched too, and the number of a trial is None before the search begins.
        ratio = 0.25 if trial is not None and trial.number else 0.5
        made.append(tiny_lemo_model(**THRESHOLD, keep_ratio=ratio))
        return made[-1]

    trainer = LemoTrainer(
        model_init=model_init,
        args=tiny_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, calibrate_rounds=1),
        train_dataset=RandomText(),
        eval_dataset=RandomText(samples=4),
    )
    (tmp_path / "lemo_phases.safetensors").write_bytes(b"of a trial that was cut short")
    trainer._has_trained = True
    best = searched(trainer)
    assert len(made) == 3
    assert best.run_id == "0"
    assert all(math.isfinite(value) for value in best.run_summary)
    for number, ratio in ((0, 0.5), (1, 0.25)):
        checkpoint = tmp_path / f"run-{number}" / "checkpoint-2"
        assert read_json(checkpoint / "lemo_state.json")["finished"] == ["predictor", "calibrate"]
        block = read_json(checkpoint / "lemo_config.json")
        assert block["keep_ratio"] == ratio
        assert (checkpoint / "lemo_predictors.safetensors").is_file()
        assert (
            block["thresholds"] == made[number + 1].config.lemo.thresholds if hasattr(made[number + 1].config, "lemo") else True
        )
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_a_stock_trainer_cannot_do_is_refused_before_the_first_step(tmp_path, optuna):
    own = tiny_arguments(tmp_path, eval_sparse=True)
    stock = Trainer(model=tiny_lemo_model(**SAMPLED), args=own, train_dataset=RandomText(), callbacks=lemo_callbacks(own))
    with pytest.raises(LemoError, match="a stock trainer evaluates densely only; eval_sparse=True; use LemoTrainer"):
        stock.train()
    own = tiny_arguments(tmp_path, save_strategy="steps", save_steps=1)
    stock = Trainer(
        model_init=lambda: tiny_lemo_model(**SAMPLED), args=own, train_dataset=RandomText(), callbacks=lemo_callbacks(own)
    )
    with pytest.raises(
        LemoError, match="callbacks cannot tell where a search saves its trials; save_strategy='steps'; set it to"
    ):
        searched(stock)
    with pytest.raises(
        LemoError, match=r"a search trains a new model in each trial; LemoTrainer was given a model; use LemoTrainer\(model"
    ):
        tiny_trainer(tmp_path).hyperparameter_search()
    with pytest.raises(LemoConfigError, match="the model carries no LeMo"):
        LemoTrainer(model_init=lambda: torch.nn.Linear(2, 2), args=tiny_arguments(tmp_path))


def test_positional_arguments_are_those_of_trainer(tmp_path):
    def collate(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    trainer = LemoTrainer(tiny_lemo_model(**SAMPLED), tiny_arguments(tmp_path, max_steps=1), collate, RandomText())
    trainer.train()
    assert trainer.data_collator is collate
    assert len(curve(trainer)) == 1


def test_stock_arguments_and_callbacks_of_one_run_may_differ(tmp_path):
    own = LemoTrainingArguments(output_dir=str(tmp_path / "unused"), report_to="none", use_cpu=True, predictor_documents=2)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model=tiny_lemo_model(**SPARSE), args=args, train_dataset=RandomText(), callbacks=lemo_callbacks(own)).train()
    assert (tmp_path / "run" / "lemo_predictors.safetensors").is_file()
    assert not (tmp_path / "unused").exists()
