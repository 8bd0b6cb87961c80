"""LeMo in trl's SFTTrainer: its own one with the callbacks, and LemoSFTTrainer."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from chat_runs import (
    LORA,
    UNMARKED,
    conversations,
    losses,
    model,
    prompts_and_completions,
    sft_trainer,
    sft_values,
    steps,
    texts,
    tokenizer,
)
from hub_server import HubServer, hub_client
from peft import LoraConfig, get_peft_model
from references.tiny_models import add_lora, batches_of, chosen_blocks
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig

from lemo_hf import LemoSFTConfig, LemoSFTTrainer, LemoTrainingArguments, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import predictor_tensors, read_json
from lemo_hf.hub.model_card import BEGIN
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}
CASES = {
    "chat": (conversations, {}),
    "assistant only": (conversations, {"assistant_only_loss": True}),
    "completion only": (prompts_and_completions, {}),
    "bfd": (texts, {"packing": True}),
    "bfd_split": (texts, {"packing": True, "packing_strategy": "bfd_split", "max_length": 96}),
    "wrapped": (texts, {"packing": True, "packing_strategy": "wrapped"}),
    "padding free": (texts, {"padding_free": True, "max_length": None}),
    "padding free chat": (conversations, {"padding_free": True, "max_length": None, "assistant_only_loss": True}),
    "dft": (conversations, {"loss_type": "dft"}),
    "accumulated": (conversations, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
}


def trained(*args, **changes):
    trainer = sft_trainer(*args, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_sft_is_sparse_and_switched_off_is_the_stock_run(tmp_path, case):
    data, changes = CASES[case]
    stock = trained(tmp_path / "stock", None, data(), **changes)
    off = trained(tmp_path / "off", {"enabled": False}, data(), **changes)
    whole = trained(tmp_path / "whole", {**SAMPLED, "keep_ratio": 1.0}, data(), **changes)
    half = trained(tmp_path / "half", SAMPLED, data(), **changes)
    assert torch.equal(losses(off), losses(stock))  # bit for bit: the stock path
    torch.testing.assert_close(losses(whole), losses(stock), rtol=1e-5, atol=0)
    # The exact form's forward is the dense one, so only after the first step do the losses part.
    torch.testing.assert_close(losses(half)[:1], losses(stock)[:1], rtol=1e-5, atol=0)
    assert (losses(half)[1:] != losses(stock)[1:]).all()
    for few, many in zip(steps(half), steps(whole), strict=True):
        assert 0.45 < few["kept_share"] < 0.55
        assert many["kept_share"] == 1.0
        for layer in (0, 1):
            assert few[f"saved_bytes/layer_{layer}"] < 0.62 * many[f"saved_bytes/layer_{layer}"]


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_saved_bytes_fall_against_the_stock_model(tmp_path, loss):
    saved = {}
    for name, lemo in (("off", {"enabled": False}), ("half", SAMPLED), ("kept rows", {**SAMPLED, "checkpoint": "kept_rows"})):
        trainer = sft_trainer(tmp_path, lemo, conversations(), assistant_only_loss=True, loss_type=loss)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        with ActivationMemory(trainer.model) as memory:
            loss_and_graph = trainer.compute_loss(trainer.model, batch)
        saved[name] = sum(memory.saved.by("layer").get(layer, 0) for layer in (0, 1))
        assert loss_and_graph.requires_grad  # and what it saves is alive
    assert saved["half"] < 0.6 * saved["off"]
    assert saved["kept rows"] < 0.25 * saved["off"]


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": None}], ids=["smoothing", "function"])
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_losses_on_whole_logits_are_sparse_too(tmp_path, changes):
    def summed(outputs, labels, num_items_in_batch=None):
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        return (
            torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), shifted.flatten(), reduction="sum")
            / num_items_in_batch
        )

    def run(name, lemo):
        if "compute_loss_func" not in changes:
            return trained(tmp_path / name, lemo, conversations(), **changes)
        trainer = sft_trainer(tmp_path / name, lemo, conversations())
        trainer.compute_loss_func = summed
        trainer.train()
        return trainer

    stock, off, half = run("stock", None), run("off", {"enabled": False}), run("half", SAMPLED)
    assert torch.equal(losses(off), losses(stock))
    torch.testing.assert_close(losses(half)[:1], losses(stock)[:1], rtol=1e-5, atol=0)
    assert all(0.45 < logs["kept_share"] < 0.55 for logs in steps(half))


def test_adapters_given_to_the_trainer_and_wrapped_before_are_the_same(tmp_path):
    given = trained(tmp_path / "given", SAMPLED, conversations())
    torch.manual_seed(42)  # the seed that trl sets before it wraps a model
    wrapped = trained(tmp_path / "wrapped", SAMPLED, conversations(), model=get_peft_model(model(SAMPLED), LoraConfig(**LORA)))
    assert torch.equal(losses(given), losses(wrapped))
    assert not any("lemo_predictor" in name for name, weight in given.model.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
@pytest.mark.parametrize("layout", ["bfd", "padding free"])
def test_a_packed_document_is_as_alone(tmp_path, form, layout):
    """Through trl's own preparation and collator; its packing without FlashAttention is what contaminates elsewhere."""
    lemo = {"selection": "ratio", "attention_forward": form, "nearby_tokens": 7 if form == "kept_keys" else None}
    data, packing = (texts, {"packing": True}) if layout == "bfd" else (texts, {"padding_free": True, "max_length": None})
    trainer = sft_trainer(tmp_path, lemo, data(6), model=add_lora(model(lemo)), **packing)
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    packed = trainer.data_collator(rows)
    ends = packed["cu_seq_lens_q"].tolist()
    assert len(ends) == 7
    trainer.model.train()
    with batches_of(trainer.model) as seen:
        together = trainer.model(**packed, fused_lm_head=True).log_probs[0]
        alone = []
        for start, end in pairwise(ends):
            single = {name: packed[name][:, start:end] for name in ("input_ids", "labels")}
            alone.append(trainer.model(**single, fused_lm_head=True).log_probs[0])
    for (start, end), log_probs in zip(pairwise(ends), alone, strict=True):
        torch.testing.assert_close(together[start : end - 1], log_probs, rtol=0, atol=2e-5)
        assert log_probs.abs().sum() > 0
    for layer, documents in enumerate(chosen_blocks(seen[0])):
        assert documents == [chosen_blocks(batch)[layer][0] for batch in seen[1:]]
    # A token of another document changes nothing in the first.
    packed["input_ids"][0, ends[1] :] = packed["input_ids"][0, ends[1] :].flip(0)
    changed = trainer.model(**packed, fused_lm_head=True).log_probs[0]
    torch.testing.assert_close(changed[: ends[1] - 1], together[: ends[1] - 1], rtol=0, atol=2e-5)


class StopAfter(TrainerCallback):
    """Ends a run at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_trls_own_trainer_resumes_and_leaves_lemos_files(tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trained(tmp_path / "straight", SPARSE, conversations(), **changes)
    cut = sft_trainer(tmp_path / "cut", SPARSE, conversations(), **changes)
    cut.add_callback(StopAfter(3))
    cut.train()
    resumed = sft_trainer(tmp_path / "cut", SPARSE, conversations(), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert torch.equal(losses(resumed), losses(straight))
    resumed.save_model()
    assert (tmp_path / "cut" / "adapter_model.safetensors").is_file()
    wanted = predictor_tensors(sparse_backbone(straight.model))
    stored = load_file(tmp_path / "cut" / "lemo_predictors.safetensors")
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], value) for name, value in wanted.items())


def lemo_sft_trainer(folder, lemo=SPARSE, data=None, **changes):
    kinds = {name: changes.pop(name) for name in ("callbacks", "eval_dataset", "compute_metrics") if name in changes}
    values = {"predictor_documents": 2, "predictor_steps": 2, "probe_steps": 0, **sft_values(folder, **changes)}
    return LemoSFTTrainer(
        model=model(lemo),
        args=LemoSFTConfig(**values),
        train_dataset=data or conversations(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
        **kinds,
    )


def test_lemo_sft_trainer_trains_as_trls_with_the_callbacks(tmp_path):
    ours = lemo_sft_trainer(tmp_path / "ours", SAMPLED, predictor_documents=None)
    ours.train()
    theirs = trained(tmp_path / "theirs", SAMPLED, conversations())
    assert torch.equal(losses(ours), losses(theirs))
    assert {"entropy", "mean_token_accuracy", "kept_share/layer_1", "saved_bytes"} <= steps(ours)[-1].keys()


def test_lemo_sft_trainer_saves_and_resumes(tmp_path):
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "assistant_only_loss": True}
    straight = lemo_sft_trainer(tmp_path / "straight", **changes)
    straight.train()
    straight.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_model.safetensors", "lemo_predictors.safetensors", "lemo_config.json", "results.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert BEGIN in (tmp_path / "final" / "README.md").read_text()
    state = read_json(tmp_path / "straight" / "checkpoint-2" / "lemo_state.json")
    assert state["finished"] == ["predictor", "calibrate"]

    cut = lemo_sft_trainer(tmp_path / "cut", callbacks=[StopAfter(3)], **changes)
    cut.train()
    resumed = lemo_sft_trainer(tmp_path / "cut", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(losses(resumed), losses(straight))
    with pytest.raises(LemoError, match="output folder holds another run"):
        lemo_sft_trainer(tmp_path / "cut", **changes).train()


def test_evaluation_in_lemo_sft_trainer(tmp_path):
    changes = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    evaluated = lemo_sft_trainer(
        tmp_path / "a",
        eval_dataset=conversations(4),
        eval_sparse=True,
        metric_for_best_model="eval_sparse_forward_loss",
        callbacks=[EarlyStoppingCallback(2)],
        **changes,
    )
    evaluated.train()
    quiet = lemo_sft_trainer(tmp_path / "b")
    quiet.train()
    assert torch.equal(losses(evaluated), losses(quiet))
    metrics = [logs for logs in evaluated.state.log_history if "eval_loss" in logs]
    assert len(metrics) == 3
    for logs in metrics:
        assert logs["eval_sparse_forward_loss"] != logs["eval_loss"]
        assert abs(logs["eval_sparse_forward_loss"] - logs["eval_loss"]) < 0.5
    assert evaluated.state.best_metric == min(logs["eval_sparse_forward_loss"] for logs in metrics)
    dense = lemo_sft_trainer(tmp_path / "c", eval_dataset=conversations(4))
    dense.model.load_state_dict(evaluated.model.state_dict())
    kept = {name: value for name, value in evaluated.evaluate().items() if name in ("eval_entropy", "eval_mean_token_accuracy")}
    assert kept == {name: value for name, value in dense.evaluate().items() if name in kept}


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4, as in test_push.py
def test_lemo_sft_trainer_pushes_predictors_and_our_card(tmp_path, monkeypatch):
    with HubServer() as hub:
        hub_client(monkeypatch, hub, hub.token)
        changes = {"push_to_hub": True, "hub_model_id": "me/sft", "hub_token": hub.token, "hub_strategy": "checkpoint"}
        trainer = lemo_sft_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, **changes)
        trainer.train()
        trainer.push_to_hub(dataset_name="org/talks")
        repo = hub.repos["me/sft"]
    assert repo.private
    last = {f"last-checkpoint/{name}" for name in ("lemo_predictors.safetensors", "lemo_state.json", "optimizer.pt")}
    assert {"lemo_predictors.safetensors", "lemo_config.json", "adapter_model.safetensors", *last} <= repo.files.keys()
    card = repo.files["README.md"].decode()
    assert BEGIN in card
    assert "# sft" in card
    assert "org/talks" in card
    assert not any(hub.token.encode() in data for data in repo.files.values())


@pytest.mark.filterwarnings("ignore:`return_outputs=True`, and the logits:FutureWarning")
def test_metrics_of_the_user_in_lemo_sft_trainer(tmp_path):
    def rows(outputs):
        return {"rows": float(len(outputs.predictions)), "vocabulary": float(outputs.predictions.shape[-1])}

    trainer = lemo_sft_trainer(tmp_path, eval_dataset=conversations(4), compute_metrics=rows, max_steps=1)
    trainer.train()
    assert {"eval_rows": 4.0, "eval_vocabulary": 300.0}.items() <= trainer.evaluate().items()
    assert trainer.predict(trainer.eval_dataset).predictions.shape[::2] == (4, 300)


def test_configs_of_both_in_one():
    config = LemoSFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", hub_token="hf_secret")
    assert config.learning_rate == SFTConfig.learning_rate  # trl's defaults
    assert config.predictor_steps == LemoTrainingArguments.predictor_steps
    assert config.activation_checkpointing is False
    assert config.hub_private_repo is True
    assert "hf_secret" not in repr(config)
    assert isinstance(config, SFTConfig | LemoTrainingArguments)
    with pytest.raises(LemoError, match="dense_tail_share must be"):
        LemoSFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", dense_tail_share=1.0)
    asked = LemoSFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", activation_checkpointing=True)
    assert asked.activation_checkpointing is True


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl's config sets it
def test_trls_default_checkpointing_is_said(tmp_path, caplog):
    default = {"activation_checkpointing": None}
    with caplog.at_level("WARNING", logger="lemo_hf"):
        hidden = trained(tmp_path / "a", SAMPLED, conversations(), max_steps=1, **default)
        assert "gradient_checkpointing=True; set gradient_checkpointing=False, as LemoSFTConfig does" in caplog.text
        caplog.clear()
        trained(tmp_path / "b", SAMPLED, conversations(), max_steps=1)
        lemo_sft_trainer(tmp_path / "c", activation_checkpointing=True)
        assert "LemoSFTConfig" not in caplog.text
    whole = trained(tmp_path / "d", {**SAMPLED, "keep_ratio": 1.0}, conversations(), max_steps=1, **default)
    assert steps(hidden)[0]["saved_bytes/layer_1"] == steps(whole)[0]["saved_bytes/layer_1"]  # what is said is so


def test_what_is_refused_at_start(tmp_path):
    with pytest.raises(LemoError, match=r"LemoSFTTrainer needs LemoSFTConfig; got SFTConfig; replace the class"):
        LemoSFTTrainer(model=model(SPARSE), args=SFTConfig(**sft_values(tmp_path)), train_dataset=conversations())
    with pytest.raises(LemoError, match=r"needs a model; got the name 'some/model'; load it with AutoLemoModel"):
        LemoSFTTrainer(model="some/model", args=LemoSFTConfig(**sft_values(tmp_path)), train_dataset=conversations())
    phase = lemo_callbacks(LemoTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))[0]
    without = sft_trainer(tmp_path, None, conversations())
    without.add_callback(phase)
    with pytest.raises(LemoConfigError, match="the model carries no LeMo"):
        without.train()
    with pytest.raises(LemoError, match="a search trains a new model in each trial; LemoSFTTrainer was given a model"):
        lemo_sft_trainer(tmp_path).hyperparameter_search()
    with pytest.raises(ValueError, match=r"`{% generation %}` markers.*manually modify the chat template"):  # trl's own
        sft_trainer(tmp_path, SPARSE, conversations(), template=UNMARKED, assistant_only_loss=True)


def test_the_user_guide_s_snippet_runs(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "user_guide.md").read_text()
    snippet = guide.split("## Trainer, SFTTrainer, recipes")[1].split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet, "user_guide.md", "exec"), names)
    assert all(0 < logs["kept_share"] < 0.7 for logs in steps(names["trainer"]))
    assert (tmp_path / "out" / "final" / "lemo_predictors.safetensors").is_file()
