"""Options that do not go together: each pair is refused before the first step by one line, in whichever trainer."""

from pathlib import Path

import pytest
import torch
from memory_features import EVERY_N, make_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from references.tiny_models import checkpoint_stock_layers
from torch.autograd.graph import saved_tensors_hooks
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTConfig

from lemo_hf import LemoTrainer, LemoTrainingArguments, lemo_callbacks
from lemo_hf.errors import LemoError
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.training.compatible_options import PAIRS, as_markdown, require_compatible

# Its name in this release of transformers.
CHECKPOINTING = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
KWARGS = f"{CHECKPOINTING}_kwargs"
# trl's default and the option's alias, which a user may still write.
of_its_old_name = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
RATIO = {"selection": "ratio", "keep_ratio": 0.4}
KEPT_ROWS = {**RATIO, "checkpoint": "kept_rows"}


def with_prefix(folder):
    return get_peft_model(tiny_lemo_model(lora=False), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def with_dropout(folder):
    model = tiny_lemo_model()
    model.config.attention_dropout = 0.1
    return model


def checkpointed(folder):
    model = tiny_lemo_model(**KEPT_ROWS)
    checkpoint_stock_layers(model)
    return model


def of(**lemo):
    return lambda folder: tiny_lemo_model(**lemo)


# Place in PAIRS, the model, the arguments, and what the line says of values and fix.
CASES = {
    "checkpointing, kept rows": (
        0,
        of(**KEPT_ROWS),
        {CHECKPOINTING: True},
        "activation_checkpointing=True, checkpoint='kept_rows'",
    ),
    "by its old name": (0, of(**KEPT_ROWS), {"gradient_checkpointing": True}, "kept rows store less"),
    "of every second layer": (
        0,
        of(**KEPT_ROWS),
        {CHECKPOINTING: True, KWARGS: {"every_n_layers": 2}},
        "{'every_n_layers': 2}",
    ),
    "set on the model": (0, checkpointed, {}, "activation_checkpointing=True, checkpoint='kept_rows'"),
    "compile, sampled": (1, of(selection="sampled"), {"torch_compile": True}, "selection='sampled'; set selection='ratio'"),
    "compile, threshold": (1, of(selection="threshold", thresholds=[0.0, 0.0]), {"torch_compile": True}, "selection='threshold'"),
    "compiled before": (
        1,
        lambda folder: torch.compile(tiny_lemo_model(selection="sampled"), backend="eager"),
        {},
        "selection='sampled'; set selection='ratio'",
    ),
    "compile, offload": (
        4,
        of(**RATIO, offload="sensitive"),
        {"torch_compile": True},
        "torch_compile=True, offload='sensitive'; leave",
    ),
    "two offloads": (
        5,
        of(**RATIO, offload="uniform"),
        {CHECKPOINTING: True, KWARGS: {"offload": True}},
        "offload='uniform', activation_checkpointing_kwargs={'offload': True}",
    ),
    "checkpoints' offload on a cpu": (
        6,
        of(**RATIO),
        {CHECKPOINTING: True, KWARGS: {"offload": True}},
        "{'offload': True} on cpu",
    ),
    "liger": (8, of(), {"use_liger_kernel": True}, "model type 'lemo_llama'; leave it out"),
    "label smoothing": (
        9,
        of(enabled=False),
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor=0.1; set label_smoothing_factor=0",
    ),
    "prefix": (10, with_prefix, {}, "peft_type=PREFIX_TUNING; use LoRA"),
    "dora on 8 bits": (
        11,
        lambda folder: make_model(("8bit", "dora"), folder, RATIO),
        {},
        "load_in_8bit=True on cpu; set load_in_4bit",
    ),
    "attention dropout": (12, with_dropout, {}, "attention_dropout=0.1 in the model's config; set"),
}


def test_every_refused_pair_has_a_case():
    refused = {place for place, pair in enumerate(PAIRS) if pair.is_refused}
    assert refused == {place for place, *_ in CASES.values()}


@of_its_old_name
@pytest.mark.parametrize("case", CASES)
def test_a_refused_pair_is_named_as_the_trainer_is_made(case, tmp_path):
    place, make, changes, says = CASES[case]
    folder = tmp_path / "run"
    own = tiny_arguments(folder, **changes)
    stock = TrainingArguments(str(folder), use_cpu=True, report_to="none", **changes)
    model = make(tmp_path)
    for make_trainer in (
        lambda: LemoTrainer(model, own, train_dataset=RandomText()),
        lambda: Trainer(model, stock, train_dataset=RandomText(), callbacks=lemo_callbacks(own)),
    ):
        with pytest.raises(LemoError) as error:
            make_trainer()
        line = str(error.value)
        assert says in line
        assert PAIRS[place].first in line
        assert PAIRS[place].second in line
        assert "\n" not in line
        assert line.count("; ") >= 2
    assert not list(Path(folder).glob("**/*.*")), "nothing may be written"


def test_options_that_changed_since_are_looked_at_again(tmp_path):
    trainer = tiny_trainer(tmp_path, RATIO, **{CHECKPOINTING: True})
    trainer.model.config.lemo.update(checkpoint="kept_rows")
    with pytest.raises(LemoError, match="kept rows store less"):
        trainer.train()
    trainer.model.config.lemo.update(enabled=False)  # nothing of LeMo's is left to conflict
    trainer.train()


@of_its_old_name
def test_trls_default_is_named(tmp_path):
    args = SFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(LemoError, match="trl's SFTConfig and PEFT's prepare_model_for_kbit_training turn it on"):
        require_compatible(args, LemoTrainingArguments(str(tmp_path), use_cpu=True), tiny_lemo_model(**KEPT_ROWS))
    offloads = SFTConfig(str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=False, activation_offloading=True)
    with pytest.raises(LemoError, match="offload='sensitive', activation_offloading=True"):
        require_compatible(offloads, LemoTrainingArguments(str(tmp_path), use_cpu=True), tiny_lemo_model(offload="sensitive"))


def test_what_gains_little_is_said_and_works(tmp_path):
    compiled = tiny_arguments(tmp_path, torch_compile=True, **{CHECKPOINTING: True})
    (line,) = require_compatible(compiled, compiled, tiny_lemo_model(**RATIO))
    assert "torch_compile=True, activation_checkpointing=True" in line
    kept = tiny_arguments(tmp_path, torch_compile=True)
    assert require_compatible(kept, kept, tiny_lemo_model(**KEPT_ROWS)) == []
    dropping = LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
    (line,) = require_compatible(kept, kept, get_peft_model(tiny_lemo_model(lora=False, **KEPT_ROWS), dropping))
    assert "torch_compile=True, checkpoint='kept_rows', dropout 0.1; set lora_dropout=0.0" in line
    plain = tiny_arguments(tmp_path)
    (line,) = require_compatible(plain, plain, tiny_lemo_model(offload="sensitive"))
    assert "offload='sensitive' on cpu" in line
    assert require_compatible(plain, plain, tiny_lemo_model(**KEPT_ROWS)) == []


def test_the_user_guide_has_the_table():
    guide = Path(__file__).parents[1] / "docs" / "memory_features.md"
    assert as_markdown() in guide.read_text(encoding="utf-8")


def test_why_label_smoothing_is_refused(tmp_path, monkeypatch):
    """The day Trainer shifts the labels of other classes too, the pair can go."""
    model = tiny_lemo_model(enabled=False)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1, report_to="none"))
    batch = {name: values[None] for name, values in RandomText()[0].items()}
    got = trainer.compute_loss(model, dict(batch))
    logits = {"logits": model(input_ids=batch["input_ids"]).logits}
    shifted, unshifted = (LabelSmoother(0.1)(logits, batch["labels"], shift_labels=shift) for shift in (True, False))
    torch.testing.assert_close(got, unshifted)
    assert not torch.allclose(got, shifted)


def test_checkpointing_by_the_trainers_arguments_changes_no_curve_and_saves_bytes(tmp_path):
    curves, saved = {}, {}
    ways: dict[str, dict] = {
        "none": {},
        "all": {CHECKPOINTING: True},
        "reentrant": {CHECKPOINTING: True, KWARGS: {"use_reentrant": True}},
        "every second": {CHECKPOINTING: True, KWARGS: {"every_n_layers": 2}},
        "kept rows": {},
    }
    for name, changes in ways.items():
        if name == "every second" and not EVERY_N:
            continue
        lemo = {**KEPT_ROWS, "attention_forward": "sparse"} if name == "kept rows" else {**RATIO, "attention_forward": "sparse"}
        trainer = tiny_trainer(tmp_path / name, lemo, max_steps=3, predictor_documents=0, **changes)
        trainer.train()
        curves[name] = curve(trainer)
        saved[name] = trainer.state.log_history[0]["saved_bytes"]
        assert trainer.state.log_history[0]["kept_share"] < 0.5
    assert all(each == curves["none"] for each in curves.values())
    assert saved["kept rows"] < saved["all"] == saved["reentrant"] < saved.get("every second", saved["none"] - 1) < saved["none"]


def test_an_offload_around_the_forward_goes_on_while_saved_bytes_are_measured():
    batch = {name: values[None] for name, values in RandomText()[0].items()}
    wanted = tiny_lemo_model(**RATIO)
    wanted(**batch).loss.backward()
    model = tiny_lemo_model(**RATIO)
    elsewhere = []
    hooks = saved_tensors_hooks(lambda tensor: elsewhere.append(tensor) or len(elsewhere) - 1, lambda place: elsewhere[place])
    with hooks, ActivationMemory(model) as memory:
        loss = model(**batch).loss
    assert len(elsewhere) > 20
    assert memory.saved.total == 0
    loss.backward()
    for (name, got), (_, reference) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert (got.grad is None and reference.grad is None) or torch.equal(got.grad, reference.grad), name
