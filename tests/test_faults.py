"""What a run does about checkpoints that are cut off, memory that runs out, and samples that would spoil it."""

import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from training_runs import RandomText, curve, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import Trainer, TrainerCallback

from lemo_hf import LemoTrainer, cli, last_whole_checkpoint, lemo_callbacks
from lemo_hf.errors import LemoError, LemoRunError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.whole_checkpoints import SEAL_FILE, damage

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}


def is_one_line(error):
    return "\n" not in str(error) and str(error).count("; ") >= 2 and len(str(error)) < 800


# --- Checkpoints that are cut off ---


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


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


# --- Memory ---


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which"
    )


class WhenTraining(TrainerCallback):
    """Puts hooks in as the steps begin, when the phases are over."""

    def __init__(self, put):
        self.put = put

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            self.put(sparse_backbone(model), model, kwargs["optimizer"])


def in_forward(backbone, model, optimizer):
    backbone.layers[1].self_attn.o_proj.register_forward_pre_hook(out_of_memory)


def in_backward(backbone, model, optimizer):
    # The input's gradient is asked for when layer 1 has all of its own.
    backbone.layers[0].mlp.down_proj.register_full_backward_hook(out_of_memory)


def in_recomputation(backbone, model, optimizer):
    # The first run stands in a function of autograd's, which turns it off.
    backbone.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda *args: (torch.is_grad_enabled() and out_of_memory()) or None
    )


def in_loss(backbone, model, optimizer):
    model.get_base_model().lm_head.register_forward_pre_hook(out_of_memory)


def in_optimizer(backbone, model, optimizer):
    getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(out_of_memory)


def in_evaluation(backbone, model, optimizer):
    backbone.layers[1].register_forward_pre_hook(lambda layer, args: None if layer.training else out_of_memory())


PLACES = {
    "forward": (in_forward, {}, "sparse phase, forward, layer 1", "kept share 0.50", 'set checkpoint="kept_rows"'),
    "backward": (in_backward, {}, "sparse phase, backward, layer 0", "kept share 0.50", "per_device_train_batch_size=1"),
    "recomputation": (
        *(in_recomputation, {"checkpoint": "kept_rows"}, "sparse phase, backward, layer 0", "kept share 0.50"),
        "lower keep_ratio to 0.25",
    ),
    "loss": (in_loss, {}, "sparse phase, loss", "kept share 0.50", "lower segment_size (now 64)"),
    "optimizer": (in_optimizer, {}, "sparse phase, optimizer step", "kept share 0.50", 'optim="adamw_8bit"'),
    "evaluation": (
        in_evaluation,
        {},
        "sparse phase, evaluation, layer 1",
        "every token kept",
        "lower per_device_eval_batch_size",
    ),
}


def fails_in_memory(trainer):
    with pytest.raises(LemoRunError) as failed:
        trainer.train()
    message = str(failed.value)
    assert is_one_line(failed.value)
    assert message.startswith("out of memory in the ")
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB)" in message
    assert isinstance(failed.value.__cause__, torch.OutOfMemoryError)
    # The command line that it proposes is one that `lemo estimate` takes.
    command = shlex.split(re.search(r"`(.*)`", message)[1])
    known = {option for part in typer.main.get_command(cli.app).commands["estimate"].params for option in part.opts}
    assert command[:2] == ["lemo", "estimate"]
    assert {word for word in command if word.startswith("--")} <= known
    return message


@pytest.mark.parametrize("place", PLACES)
def test_memory_that_runs_out_is_placed(tmp_path, place):
    put, lemo, where, kept, fix = PLACES[place]
    evaluates = {"eval_strategy": "steps", "eval_steps": 2} if place == "evaluation" else {}
    trainer = LemoTrainer(
        model=tiny_lemo_model(**SAMPLED, **lemo),
        args=tiny_arguments(tmp_path, predictor_documents=0, **evaluates),
        train_dataset=RandomText(),
        eval_dataset=RandomText(samples=2),
        callbacks=[WhenTraining(put)],
    )
    message = fails_in_memory(trainer)
    assert message.startswith(f"out of memory in the {where}; 2 x 96 tokens, {kept}")
    assert fix in message
    assert "--seq-len 96" in message


@pytest.mark.parametrize("phase", ["predictor", "calibrate"])
def test_memory_that_runs_out_in_a_phase_is_placed_with_any_trainer(tmp_path, phase):
    lemo = {"selection": "threshold", "attention_forward": "sparse"}
    args = tiny_arguments(tmp_path, predictor_documents=1 if phase == "predictor" else 0, auto_find_batch_size=True)
    model = tiny_lemo_model(**lemo)
    trainer = Trainer(model=model, args=args, train_dataset=RandomText(), callbacks=lemo_callbacks(args))
    sparse_backbone(model).layers[1].self_attn.o_proj.register_forward_pre_hook(out_of_memory)
    message = fails_in_memory(trainer)
    assert message.startswith(f"out of memory in the {phase} phase, layer 1; 1 x 96 tokens, ")


def test_a_batch_size_is_still_found(tmp_path):
    def too_large(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            out_of_memory()

    trainer = tiny_trainer(tmp_path / "a", SAMPLED, auto_find_batch_size=True, predictor_documents=0)
    trainer.model.register_forward_pre_hook(too_large, with_kwargs=True)
    trainer.train()
    assert trainer.state.train_batch_size == 1
    assert len(curve(trainer)) == 6
    hopeless = tiny_trainer(tmp_path / "b", SAMPLED, auto_find_batch_size=True, predictor_documents=0)
    hopeless.model.register_forward_pre_hook(out_of_memory)
    with pytest.raises(LemoRunError, match=r"No executable batch size found"):
        hopeless.train()


def test_other_errors_pass_as_they_are(tmp_path):
    def wrong(*args):
        raise RuntimeError("shapes do not match")

    trainer = tiny_trainer(tmp_path, SAMPLED, predictor_documents=0)
    trainer.model.register_forward_pre_hook(wrong)
    with pytest.raises(RuntimeError, match="shapes do not match") as failed:
        trainer.train()
    assert not isinstance(failed.value, LemoError)


# --- Poisoned samples ---

POISONED = 13


class Poisoned(RandomText):
    """One sample of 24 is another than the rest."""

    def __init__(self, change=None, samples=24, seq_len=96):
        super().__init__(samples, seq_len)
        self.tokens[self.tokens == 9] = 10
        self.change = change

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
        if index == POISONED % len(self) and self.change is not None:
            sample = {name: value.clone() for name, value in sample.items()}
            self.change(sample)
        return sample


def put(name, place, value):
    return lambda sample: sample[name].__setitem__(place, value)


def cut_to(tokens):
    return lambda sample: sample.update({name: value[:tokens] for name, value in sample.items()})


REFUSED = {
    "token": (
        put("input_ids", 3, 128),
        2,
        "token is outside the vocabulary of 128; 128 at place 3, sample 13 of the training set",
    ),
    "negative token": (put("input_ids", 0, -5), 2, "token is outside the vocabulary of 128; -5 at place 0, sample 13"),
    "label": (put("labels", 95, 500), 2, "label is outside the vocabulary of 128; 500 at place 95, sample 13"),
    "negative label": (put("labels", 7, -1), 2, "label is outside the vocabulary of 128; -1 at place 7, sample 13"),
    "no token": (cut_to(0), 1, "sample has no token; sample 13 of the training set"),
    "float labels": (
        lambda s: s.update(labels=s["labels"] / 2),
        1,
        "labels must be whole numbers, (batch, tokens); got torch.float32",
    ),
    "labels of others": (
        lambda s: s.update(labels=s["labels"][:50]),
        1,
        "labels and tokens differ in shape; (1, 50) labels for (1, 96)",
    ),
    "hole": (put("attention_mask", slice(20, 30), 0), 2, "got padding between the tokens of row"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda name: name.replace(" ", "-"))
def test_a_poisoned_sample_is_named_before_it_is_read(tmp_path, case):
    change, batch, says = REFUSED[case]
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1}
    trainer = LemoTrainer(
        model=tiny_lemo_model(**SAMPLED),
        args=tiny_arguments(tmp_path / "a", predictor_documents=0, **changes),
        train_dataset=Poisoned(change),
    )
    with pytest.raises(LemoError) as refused:
        trainer.train()
    message = str(refused.value)
    assert "\n" not in message
    assert says in message
    # Its own index, though the order is shuffled; where no row is to blame alone, the batch.
    assert re.search(r"\b13\b.* of the training set|micro-batch \d of step \d+", message)
    assert refused.value.exit_code == 2
    # The phases read the one sample that is poisoned, too.
    lonely = LemoTrainer(
        model=tiny_lemo_model(**SPARSE),
        args=tiny_arguments(tmp_path / "b", predictor_documents=1),
        train_dataset=Poisoned(change, samples=1),
    )
    with pytest.raises(LemoError, match="sample 0 of the training set"):
        lonely.train()


def test_the_index_is_right_in_a_later_epoch_and_after_resuming(tmp_path):
    def trainer(change):
        args = tiny_arguments(tmp_path, predictor_documents=0, max_steps=24, save_strategy="steps", save_steps=13)
        return LemoTrainer(model=tiny_lemo_model(**SAMPLED), args=args, train_dataset=Poisoned(change))

    whole = trainer(None)
    whole.add_callback(KillAt(13))
    with pytest.raises(Killed):
        whole.train()
    with pytest.raises(LemoError, match="500 at place 3, sample 13 of the training set"):
        trainer(put("labels", 3, 500)).train(resume_from_checkpoint=True)


def with_nan_embedding(model):
    model.get_input_embeddings().weight.data[9, 3] = math.nan
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_an_embedding_that_is_nan_names_the_sample_and_the_token(tmp_path, batch):
    data = Poisoned(put("input_ids", 5, 9))
    changes = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": batch, "max_steps": 24}
    trainer = LemoTrainer(
        model=with_nan_embedding(tiny_lemo_model(**SAMPLED)),
        args=tiny_arguments(tmp_path, predictor_documents=0, **changes),
        train_dataset=data,
    )
    with pytest.raises(LemoError) as found:
        trainer.train()
    assert re.match(
        r"loss is not finite; nan at step \d+, from sample 13 of the training set, whose token 9 has an embedding that is not finite "
        r"alone, last good checkpoint: \S+checkpoint-\d+; repair or leave out what is named, then resume$",
        str(found.value),
    )
    assert found.value.exit_code == 2


def test_a_phase_names_the_sample_whose_embedding_is_nan(tmp_path):
    trainer = LemoTrainer(
        model=with_nan_embedding(tiny_lemo_model(**SPARSE)),
        args=tiny_arguments(tmp_path, predictor_documents=21),
        train_dataset=Poisoned(put("input_ids", 5, 9)),
    )
    with pytest.raises(LemoError, match="embedding that is not finite; token 9, sample 13 of the training set; initialise"):
        trainer.train()


def test_spoilt_weights_blame_no_sample(tmp_path):
    trainer = tiny_trainer(tmp_path, SAMPLED, predictor_documents=0)
    trainer.model.get_base_model().model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(
        LemoRunError, match="loss is not finite; nan at step 1, last good checkpoint: none yet; lower learning_rate"
    ):
        trainer.train()
    predictors = tiny_trainer(tmp_path / "b", SPARSE)
    predictors.model.get_base_model().model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(LemoRunError, match=r"attention input is not finite; layer 1; .*sample \d+ of the training set"):
        predictors.train()


def repeat(sample):
    sample["input_ids"][:] = 9
    sample["labels"][:] = 9


SURVIVED = {
    "one token": (cut_to(1), 1),
    "two tokens": (cut_to(2), 1),
    "repeats": (repeat, 2),
    "all padding": (lambda s: (s["attention_mask"].zero_(), s["labels"].fill_(-100)), 2),
    "no labels": (lambda s: s["labels"].fill_(-100), 2),
}


@pytest.mark.parametrize("case", SURVIVED, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("lemo", [SPARSE, SAMPLED], ids=["sparse", "sampled"])
def test_a_strange_sample_is_survived_in_every_phase(tmp_path, case, lemo):
    change, batch = SURVIVED[case]
    changes = {"per_device_train_batch_size": batch, "max_steps": 24 // batch, "predictor_documents": 23, "predictor_steps": 1}
    data = Poisoned(change)
    model = tiny_lemo_model(**lemo)
    model.get_input_embeddings().weight.data[9] = 0  # repeats are rows of zeros, the hardest of all to be alike
    trainer = LemoTrainer(model=model, args=tiny_arguments(tmp_path, **changes), train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 24 // batch
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_a_first_document_of_one_token_does_not_set_the_scale(tmp_path):
    """The features of such a document are equal but for rounding, which once set a scale of 1e7."""
    # The document that is fitted first, behind one that is probed and two that calibration would read.
    first = torch.randperm(24, generator=torch.Generator().manual_seed(42)).tolist()[3]
    largest = []
    for value in (None, 9):
        data = Poisoned()
        if value is not None:
            data.tokens[first] = value
        trainer = LemoTrainer(
            model=tiny_lemo_model(**SPARSE), args=tiny_arguments(tmp_path / str(value), max_steps=1), train_dataset=data
        )
        trainer.train()
        layers = sparse_backbone(trainer.model).layers
        largest.append(max(weight.abs().max().item() for layer in layers for weight in layer.lemo_predictor.parameters()))
    assert largest[1] < 3 * largest[0]


# --- float16 ---


def test_a_float16_run_whose_every_step_is_skipped_stops(tmp_path):
    trainer = tiny_trainer(tmp_path, SAMPLED, predictor_documents=0, max_steps=40)
    steps = []

    class Skips(TrainerCallback):
        """What accelerate's optimizer says when the scaler has found an infinite gradient."""

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            optimizer._is_overflow = True
            type(optimizer).step_was_skipped = property(lambda self: True)
            steps.append(1)

    from accelerate.optimizer import AcceleratedOptimizer

    untouched = AcceleratedOptimizer.step_was_skipped
    trainer.add_callback(Skips())
    try:
        with pytest.raises(LemoRunError, match=r"float16 gradient of the last 33 steps is not finite; .*; lower learning_rate"):
            trainer.train()
    finally:
        AcceleratedOptimizer.step_was_skipped = untouched
    assert len(steps) == 33
