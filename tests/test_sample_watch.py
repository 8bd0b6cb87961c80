"""Samples that would spoil a run are named, or survived."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from training_runs import KillAt, Killed, RandomText, tiny_arguments, tiny_lemo_model, tiny_trainer
from transformers import TrainerCallback

from lemo_hf import LemoTrainer
from lemo_hf.errors import LemoError, LemoRunError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.faults.sample_checks import require_sound

SPARSE = {"selection": "ratio", "attention_forward": "sparse"}
SAMPLED = {"selection": "sampled"}


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


def test_a_mask_that_remote_code_refuses_is_named_too(tmp_path):
    trainer = tiny_trainer(tmp_path, SAMPLED, predictor_documents=0, max_steps=1)
    own = type("PaddingMaskError", (ValueError,), {})  # not the package's, as that of transformers_modules

    def refuse(*args, **kwargs):
        raise own("the attention mask may pad a row's ends only")

    trainer.model.get_base_model().model._documents = refuse
    with pytest.raises(LemoError, match=r"ends only \(samples \d+, \d+ of the training set\)"):
        trainer.train()


def test_documents_in_a_row_may_together_be_longer_than_learned_positions():
    config = SimpleNamespace(vocab_size=128, max_position_embeddings=32)
    row = {"input_ids": torch.full((1, 60), 5)}
    with pytest.raises(LemoError, match="longer than the model's 32 positions; 60 tokens"):
        require_sound(row, config, str)
    require_sound({**row, "position_ids": torch.arange(30).repeat(2)[None]}, config, str)
    require_sound({**row, "seq_idx": torch.arange(60)[None] // 30}, config, str)


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
    changes = {"per_device_train_batch_size": batch, "max_steps": 12 // batch, "predictor_documents": 11, "predictor_steps": 1}
    data = Poisoned(change, samples=12)
    model = tiny_lemo_model(**lemo)
    model.get_input_embeddings().weight.data[9] = 0  # repeats are rows of zeros, the hardest of all to be alike
    trainer = LemoTrainer(model=model, args=tiny_arguments(tmp_path, **changes), train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 12 // batch
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
