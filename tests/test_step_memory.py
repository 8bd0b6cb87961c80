import logging
from dataclasses import replace

import pytest
import torch
from references.tiny_models import lemo_model, stock_model
from torch.distributed.fsdp import FSDPModule
from training_runs import RandomText, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import TrainerCallback

from lemo_hf import LemoTrainer
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import read_lemo_files
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.estimate.estimator import Estimator
from lemo_hf.training import memory_warning as warning_module
from lemo_hf.training import step_memory
from lemo_hf.training.step_memory import memory_warning, step_settings

pytestmark = pytest.mark.usefixtures("traced_once")

SAMPLED = {"selection": "sampled"}


class Ask(TrainerCallback):
    """Estimates within a run, where the run is attached."""

    def __init__(self, *memory):
        self.memory, self.lines = memory, []

    def on_step_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            self.settings = step_settings(self.run, args)
            self.lines = [memory_warning(self.run, args, size, on_gpu=False) for size in self.memory]


def asked(trainer, *memory):
    ask = Ask(*memory)
    ask.run = trainer.lemo_run
    trainer.add_callback(ask)
    trainer.train()
    return ask


def needed(trainer, settings, share):
    estimator = Estimator(trainer.model.config, on_gpu=False)
    return estimator.estimate(replace(settings, lemo=replace(settings.lemo, keep_ratio=share))).total_bytes


@pytest.fixture(scope="module")
def need(tmp_path_factory):
    """Bytes that a step of the tiny run needs, by kept share."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("need"), SAMPLED, max_steps=1)
    settings = asked(trainer).settings
    return {share: needed(trainer, settings, share) for share in (0.01, 0.5)}


def test_a_step_is_described_as_it_is(tmp_path):
    settings = asked(tiny_trainer(tmp_path, SAMPLED, max_steps=1)).settings
    assert (settings.seq_len, settings.batch_size, settings.lora_r) == (96, 2, 2)
    assert settings.targets == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert (settings.dtype, settings.adapter_dtype, settings.autocast) == ("float32", "float32", False)
    assert settings.lemo.keep_ratio == 0.5


def test_a_step_that_does_not_fit_is_said_with_the_share_that_fits(tmp_path, monkeypatch, need):
    def share(estimator, settings):
        if estimator.memory < need[0.01]:
            raise LemoError("none")
        assert (estimator.memory, settings.lemo.keep_ratio) == (need[0.5] - 1, 0.5)
        return 0.37

    monkeypatch.setattr(Estimator, "kept_share", share)
    monkeypatch.setattr(step_memory, "_SURE", 0.0)  # estimate whatever the bound says
    assert need[0.01] < need[0.5]
    fits, short, none = asked(tiny_trainer(tmp_path, SAMPLED, max_steps=1), need[0.5], need[0.5] - 1, need[0.01] - 1).lines
    assert fits is None
    assert "not expected to fit" in short
    assert "2 x 96 tokens at keep_ratio=0.5" in short
    assert "set keep_ratio=0.37, the largest that fits" in short
    assert "no kept share fits" in none
    assert "set checkpoint='kept_rows'" in none


def test_what_surely_fits_is_not_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(Estimator, "estimate", lambda *_: pytest.fail("traced"))
    assert asked(tiny_trainer(tmp_path, SAMPLED, max_steps=1), 2**40).lines == [None]


def test_the_bound_is_above_the_estimate(tmp_path):
    trainer = tiny_trainer(tmp_path, SAMPLED, max_steps=1)
    settings = asked(trainer).settings
    assert step_memory._bound(trainer.lemo_run, settings) > needed(trainer, settings, 1.0)


def test_the_warning_comes_before_the_first_step_on_cuda_only(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(warning_module, "memory_of", lambda device: 2**20)
    monkeypatch.setattr(warning_module, "memory_warning", lambda run, args, memory, on_gpu: f"{memory} bytes do not fit")
    callback = warning_module.WarnOfMemory(tiny_trainer(tmp_path, SAMPLED).lemo_run)
    trainer = tiny_trainer(tmp_path, SAMPLED, max_steps=1)
    trainer.train()
    assert "do not fit" not in caplog.text

    class OnCuda:
        device = torch.device("cuda")

    callback.run = trainer.lemo_run
    callback.begin(OnCuda(), trainer.state)
    assert "1048576 bytes do not fit" in caplog.text


def test_signed_means_without_rotary_positions_are_estimated(tmp_path, monkeypatch):
    """OPT's predictors ask what their pairs of features hold, which shapes do not say."""
    lemo = {"selection": "ratio", "attention_forward": "kept_keys", "block_reduction": "mean"}
    model = lemo_model(stock_model(architecture="opt", vocab_size=128), {"targets": "attention"}, segment_size=64, **lemo)
    trainer = LemoTrainer(model=model, args=tiny_arguments(tmp_path, max_steps=1), train_dataset=RandomText())
    monkeypatch.setattr(step_memory, "_SURE", 0.0)
    roomy, short = asked(trainer, 2**30, 2**16).lines
    assert roomy is None
    assert "not expected to fit the device" in short
    model = lemo_model(
        stock_model(architecture="opt", vocab_size=128), {"targets": "attention"}, memory_budget="1GiB", segment_size=64, **lemo
    )
    LemoTrainer(model=model, args=tiny_arguments(tmp_path, max_steps=1), train_dataset=RandomText()).train()
    assert sparse_backbone(model).config.lemo.keep_ratio == 1


# The budget.


def budgeted(folder, budget, **changes):
    return tiny_trainer(folder, {**SAMPLED, "memory_budget": budget}, max_steps=2, **changes)


def test_a_budget_chooses_the_share_that_fits_and_records_it(tmp_path, monkeypatch, caplog):
    asked_for = []

    def share(estimator, settings):
        asked_for.append((estimator.memory, estimator.on_gpu, settings.seq_len, settings.batch_size))
        return 0.42

    monkeypatch.setattr(Estimator, "kept_share", share)  # the search itself: test_memory_estimate.py
    with caplog.at_level(logging.INFO, "lemo_hf"):
        trainer = budgeted(tmp_path, "1.5 MiB", save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_model()
    assert asked_for == [(3 * 2**19, False, 96, 2)]
    assert trainer.lemo_run.lemo.keep_ratio == 0.42
    block, _ = read_lemo_files(tmp_path)
    assert (block.keep_ratio, block.memory_budget) == (0.42, "1.5 MiB")
    assert "every layer keeps 0.42 of the blocks" in caplog.text
    shares = [logs["kept_share"] for logs in trainer.state.log_history if "kept_share" in logs]
    assert shares == [0.5, 0.5]  # 6 of 12 blocks: 0.42 of them, rounded up
    # Resumed it goes on with the same share, whatever a new estimate would say.
    monkeypatch.setattr(Estimator, "kept_share", lambda *_: 0.1)
    resumed = budgeted(tmp_path, "1.5 MiB")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.lemo_run.lemo.keep_ratio == 0.42


def test_a_budget_that_no_share_fits_is_refused_with_the_smallest_that_would(tmp_path, need):
    with pytest.raises(
        LemoError, match=r"memory_budget fits no kept share; '1KiB', 2 x 96 tokens need (.*) MiB at the smallest"
    ) as error:
        budgeted(tmp_path, "1KiB").train()
    smallest = float(str(error.value).partition("need ")[2].partition(" MiB")[0])
    assert smallest == pytest.approx(need[0.01] / 2**20, abs=0.051)


def test_a_budget_for_a_step_that_is_not_estimated_is_refused(tmp_path):
    whole = tiny_lemo_model(lora=False, memory_budget="1GiB", **SAMPLED)
    trainer = LemoTrainer(model=whole, args=tiny_arguments(tmp_path, max_steps=1), train_dataset=RandomText())
    with pytest.raises(LemoError, match=r"memory_budget cannot be kept.*all weights are trained.*set keep_ratio"):
        trainer.train()
    with pytest.raises(LemoError, match=r"layers are checkpointed"):
        budgeted(tmp_path, "1GiB", activation_checkpointing=True).train()
    offloaded = tiny_trainer(tmp_path, {**SAMPLED, "memory_budget": "1GiB", "offload": "sensitive"}, max_steps=1)
    with pytest.raises(
        LemoError, match=r"cannot be kept, what stays on the device with offload='sensitive' follows .* measure; leave"
    ):
        offloaded.train()
    by_layer = tiny_trainer(tmp_path, {**SAMPLED, "memory_budget": "1GiB", "keep_ratio": [0.5, 0.4]}, max_steps=1)
    with pytest.raises(LemoError, match="keep_ratio lists 2; leave one out"):
        by_layer.train()


def test_a_step_that_an_engine_spreads_is_not_estimated(tmp_path):
    """`accelerate launch` says so neither in args.fsdp nor in args.deepspeed."""
    trainer = tiny_trainer(tmp_path, SAMPLED, max_steps=1)
    run, args = trainer.lemo_run, trainer.args
    run.model, run.backbone = trainer.model, sparse_backbone(trainer.model)
    args.deepspeed_plugin = object()
    with pytest.raises(LemoError, match="an engine spreads the step"):
        step_settings(run, args)
    args.deepspeed_plugin = None
    run.model.__class__ = type("Sharded", (FSDPModule, type(run.model)), {})
    with pytest.raises(LemoError, match="an engine spreads the step"):
        step_settings(run, args)
