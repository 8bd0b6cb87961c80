"""What a run does about checkpoints that are cut off, and the exit codes of the command."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_recipe import write_source
from training_runs import KillAt, Killed, RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer

from lemo_hf import LemoTrainer, cli, last_whole_checkpoint, lemo_callbacks
from lemo_hf.errors import LemoError, LemoStopped
from lemo_hf.training.faults.whole_checkpoints import SEAL_FILE, STATE_FILE, damage
from lemo_hf.training.phases.predictor_training import PredictorTraining
from lemo_hf.training.phases.threshold_search import ThresholdSearch

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}


def is_one_line(error):
    return "\n" not in str(error) and str(error).count("; ") >= 2 and len(str(error)) < 800


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that stopped after its checkpoints of steps 2 and 4 of 6."""
    folder = tmp_path_factory.mktemp("run") / "out"
    trainer = tiny_trainer(folder, SPARSE, save_strategy="steps", save_steps=2)
    trainer.add_callback(KillAt(4))
    with pytest.raises(Killed):
        trainer.train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "out"))


def spoilt(path):
    """Ways to spoil a file, by name."""
    whole = path.read_bytes()
    yield "missing", path.unlink
    yield "empty", lambda: path.write_bytes(b"")
    yield "half", lambda: path.write_bytes(whole[: len(whole) // 2])
    yield "a byte short", lambda: path.write_bytes(whole[:-1])
    yield "zeros at the end", lambda: path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))


# Nothing in them is needed to go on, and a seal is what tells that they are cut.
NOT_NEEDED = "README.md", "training_args.bin", "adapter_config.json", "lemo_config.json"


@pytest.mark.parametrize("sealed", [True, False])
def test_every_way_to_cut_a_checkpoint_is_seen(copy, sealed):
    newest = copy / "checkpoint-4"
    if not sealed:
        (newest / SEAL_FILE).unlink()
    assert damage(newest) is None
    seen = 0
    for path in sorted(newest.iterdir()):
        if path.name == SEAL_FILE or (not sealed and path.name in NOT_NEEDED):
            continue
        whole = path.read_bytes()
        for way, spoil in spoilt(path):
            if way == "zeros at the end" and not sealed and path.suffix == ".safetensors":
                continue  # right length, right header: only a checksum tells
            if way == "a byte short" and not sealed and path.suffix == ".json":
                continue  # the line's end
            spoil()
            reason = damage(newest)
            assert reason is not None, (path.name, way)
            assert path.name in reason or "weights" in reason or not sealed, (path.name, way, reason)
            path.write_bytes(whole)
            seen += 1
    assert seen >= (50 if sealed else 28)
    assert damage(newest) is None


@pytest.mark.parametrize("processes", [4, None])
def test_a_missing_random_state_of_one_of_several_processes_is_seen(copy, processes):
    """An older version did not write their number; then the last rank's cannot be missed."""
    newest = copy / "checkpoint-4"
    (newest / SEAL_FILE).unlink()
    state = json.loads((newest / STATE_FILE).read_text())
    assert state["processes"] == 1
    (newest / STATE_FILE).write_text(json.dumps({**state, "processes": processes}))
    whole = (newest / "rng_state.pth").read_bytes()
    if processes:
        assert damage(newest) == "rng_state_0.pth is missing"
    (newest / "rng_state.pth").unlink()
    for rank in range(4):
        (newest / f"rng_state_{rank}.pth").write_bytes(whole)
    assert damage(newest) is None
    for rank in range(4 if processes else 3):
        (newest / f"rng_state_{rank}.pth").unlink()
        assert damage(newest) == f"rng_state_{rank}.pth is missing"
        (newest / f"rng_state_{rank}.pth").write_bytes(whole)
    for name in (*(f"rng_state_{rank}.pth" for rank in range(4)), "optimizer.pt", "scheduler.pt"):  # as save_only_model leaves it
        (newest / name).unlink()
    assert damage(newest) is None


def test_the_last_whole_checkpoint_is_taken_and_said(copy, caplog):
    (copy / "checkpoint-4" / "optimizer.pt").write_bytes(b"PK")
    (copy / "checkpoint-9").mkdir()
    assert last_whole_checkpoint(copy) == str(copy / "checkpoint-2")
    (said,) = [record.message for record in caplog.records]
    assert re.fullmatch(
        r"checkpoint-9 is not whole: the folder is empty; checkpoint-4 is not whole: optimizer.pt has 2 of \d+ bytes; "
        rf"going on from {copy / 'checkpoint-2'}",
        said,
    )
    with pytest.raises(LemoError) as refused:
        tiny_trainer(copy, SPARSE).train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert is_one_line(refused.value)
    assert str(refused.value).startswith("checkpoint is not whole: optimizer.pt has 2 of")
    assert str(refused.value).endswith(f"resume from {copy / 'checkpoint-2'}")
    (copy / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(copy) is None
    with pytest.raises(LemoError, match="no run to go on from"):
        tiny_trainer(copy, SPARSE).train(resume_from_checkpoint=True)


def test_resuming_past_a_cut_checkpoint_gives_the_same_run_and_replaces_it(run, copy):
    whole = tiny_trainer(copy.parent / "straight", SPARSE, max_steps=6)
    whole.train()
    (copy / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"")
    resumed = tiny_trainer(copy, SPARSE, save_strategy="steps", save_steps=2, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(whole)
    assert sorted(path.name for path in copy.glob("*checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert damage(copy / "checkpoint-4") is damage(copy / "checkpoint-6") is None
    for name in ("adapter_model.safetensors", "lemo_predictors.safetensors"):
        assert (copy / "checkpoint-4" / name).read_bytes() == (run / "checkpoint-4" / name).read_bytes()


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_rotation_never_deletes_the_last_whole_checkpoint_for_a_cut_one(copy, kind):
    """Trainer keeps the checkpoint of the highest step, whatever is in it, where file times do not tell."""
    (copy / "checkpoint-4").rename(copy / "checkpoint-5")
    (copy / "checkpoint-5" / "rng_state.pth").unlink()
    os.utime(copy / "checkpoint-5", (time.time() + 3600,) * 2)  # as a file server's clock may have it
    args = tiny_arguments(copy, save_strategy="steps", save_steps=2, save_total_limit=1)
    data = {"train_dataset": RandomText()}
    if kind == "ours":
        trainer = LemoTrainer(model=tiny_lemo_model(**SPARSE), args=args, callbacks=[KillAt(4)], **data)
    else:
        trainer = Trainer(model=tiny_lemo_model(**SPARSE), args=args, callbacks=[KillAt(4), *lemo_callbacks(args)], **data)
    with pytest.raises(Killed):
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(copy))
    assert last_whole_checkpoint(copy) == str(copy / "checkpoint-4")


def test_a_stock_trainer_does_not_go_beyond_the_last_step(copy):
    args = tiny_arguments(copy, max_steps=4)
    trainer = Trainer(model=tiny_lemo_model(**SPARSE), args=args, train_dataset=RandomText(), callbacks=lemo_callbacks(args))
    with pytest.raises(LemoError, match="a stock trainer would take one more; step 4"):
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(copy))


def test_a_signal_after_a_training_that_failed_goes_to_who_had_it_before(tmp_path):
    """A stock trainer does not say that its loop has ended by an error."""
    heard, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *args: heard.append(1))
    try:
        args = tiny_arguments(tmp_path, predictor_documents=0)
        callbacks = [*lemo_callbacks(args), KillAt(0)]
        with pytest.raises(Killed):
            Trainer(model=tiny_lemo_model(**SPARSE), args=args, train_dataset=RandomText(), callbacks=callbacks).train()
        signal.raise_signal(signal.SIGTERM)
        assert heard == [1]
        signal.raise_signal(signal.SIGTERM)
        assert heard == [1, 1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_before_the_rounds_of_calibration_is_heard_and_the_phase_goes_on(tmp_path, monkeypatch):
    def trainer():
        return tiny_trainer(
            tmp_path, {**SPARSE, "selection": "threshold"}, predictor_documents=1, phase_save_documents=9, max_steps=1
        )

    begin = ThresholdSearch.begin
    with monkeypatch.context() as patch:
        patch.setattr(ThresholdSearch, "begin", lambda search: (begin(search), signal.raise_signal(signal.SIGTERM)))
        patch.setattr(ThresholdSearch, "step", lambda search: pytest.fail("a round has begun"))
        with pytest.raises(LemoStopped) as stopped:
            trainer().train()
    assert stopped.value.code == 143
    # The predictor phase, whose document no save had come after, is not done again.
    monkeypatch.setattr(PredictorTraining, "fit", None)
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert len(curve(again)) == 1


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_signal_is_heard_where_only_the_best_model_is_saved(tmp_path, strategy):
    """Trainer does not save what an evaluation finds no better, whatever callbacks ask for."""
    changes = {
        "eval_strategy": strategy,
        "eval_steps": 1,
        "max_steps": 24,
        "save_strategy": "best",
        "metric_for_best_model": "loss",
    }
    args = tiny_arguments(tmp_path, predictor_documents=0, **changes)
    trainer = LemoTrainer(model=tiny_lemo_model(**SAMPLED), args=args, train_dataset=RandomText(), eval_dataset=RandomText(1))
    evaluations, evaluate = [], trainer.evaluate

    def evaluate_and_stop(*args, **kwargs):
        evaluations.append(trainer.state.global_step)
        if len(evaluations) == 2:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    trainer.evaluate = evaluate_and_stop
    trainer._determine_best_metric = lambda metrics, trial: len(evaluations) == 1
    with pytest.raises(LemoStopped) as stopped:
        trainer.train()
    assert stopped.value.code == 143
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{evaluations[-1 if strategy == 'steps' else 0]}")


@pytest.mark.parametrize("only_model", [True, False])
def test_a_signal_says_whether_the_optimizer_was_saved(tmp_path, caplog, only_model):
    changes = {"save_strategy": "steps", "save_only_model": only_model, "predictor_documents": 0}
    trainer = tiny_trainer(tmp_path, SPARSE, **changes)
    forward = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (signal.raise_signal(signal.SIGTERM), forward(*args, **kwargs))[1]
    with pytest.raises(LemoStopped):
        trainer.train()
    (said,) = [record.message for record in caplog.records if record.message.startswith("stopped by SIGTERM")]
    assert str(tmp_path / "checkpoint-1") in said
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").is_file() is not only_model
    assert ("no optimizer (save_only_model=True)" in said) is only_model
    assert ("go on with resume_from_checkpoint" in said) is not only_model


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
    )


def test_the_command_ends_with_the_codes_that_it_says(tmp_path, monkeypatch, capfd):
    recipe = str(write_source(tmp_path) / "recipe.yaml")

    def ends_with(code, *more):
        with pytest.raises(SystemExit) as end:
            cli.main(["train", recipe, "--resume_from_checkpoint", "auto", *more])
        assert end.value.code == code

    def stops(self, *args, **kwargs):
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return untouched(self, *args, **kwargs)

    untouched, before = LemoTrainer.compute_loss, signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(LemoTrainer, "compute_loss", stops)
        ends_with(143)
    assert last_whole_checkpoint(tmp_path / "out") == str(tmp_path / "out" / "checkpoint-2")
    assert "lemo: SIGTERM received; saving at the end of this step, then leaving" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    with monkeypatch.context() as patch:
        patch.setattr(LemoTrainer, "compute_loss", out_of_memory)
        ends_with(1)
    assert "lemo: out of memory in the sparse phase, forward; 1 x 128 tokens" in capfd.readouterr().err
    ends_with(0)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    for path in (tmp_path / "out").glob("checkpoint-*"):
        (path / "rng_state.pth").unlink()
    ends_with(2)
    assert "lemo: no whole checkpoint to go on from" in capfd.readouterr().err
