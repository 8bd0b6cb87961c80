"""The same documents give the same run, however they are laid into batches and whatever is recomputed.

In float64, whole runs of `LemoTrainer` with adapters on every linear layer: what is left between two ways of summing is 1e-12,
so nothing that differs hides behind a tolerance. Beside these stand, in float32, one forward and backward of each way (a document
alone, padded, batched, packed: test_architectures.py, test_modeling_lemo_llama.py; checkpointed or not: test_sparse_decoder.py)
and resumed runs (test_trainer.py), which are equal bit for bit.
"""

import functools
import tempfile

import pytest
import torch
from references.tiny_models import checkpoint_stock_layers, lemo_model, place, random_tokens, stock_model, with_varied_vectors
from training_runs import tiny_arguments

from lemo_hf import LemoTrainer
from lemo_hf.models.sparse_decoder import sparse_backbone

# One token, less than a block of 4, ragged ends, repeated lengths.
SAMPLES = [random_tokens(length, seed) for seed, length in enumerate((21, 3, 40, 8, 1, 17, 8, 33, 12, 25, 2, 29))]
SELECTIONS = {
    "uniform": {},
    "informed": {"sampling_temperature": 1.0},
    "ratio": {"selection": "ratio"},
    "true": {"selection": "ratio", "score_source": "true"},
    "threshold": {"selection": "threshold"},
}
# Near the medians of what the predictors say of these samples.
THRESHOLDS = {"llama": [7.0, 3.0], "mistral": [7.0, 3.0], "opt": [-2.0, 1.0], "qwen2": [5.0, -0.5], "qwen3": [4.0, 1.0]}
# How the twelve samples of three steps reach the model, beside the run of batches of 4 padded on the right.
WAYS = {
    "accumulated from single samples": {"accumulation": 4},
    "accumulated from pairs": {"accumulation": 2},
    "padded on the left": {"layout": "left"},
    "padded further": {"layout": "right", "extra": 9},
    "packed, by positions": {"layout": "packed_positions"},
    "packed, by numbers": {"layout": "packed_seq_idx"},
    "packed, by lengths": {"layout": "packed_cu"},
    "stock checkpointing": {"stock_checkpointing": True},
    "kept-row checkpointing": {"checkpoint": "kept_rows"},
    "packed pairs, kept-row checkpointing": {"layout": "packed_cu", "accumulation": 2, "checkpoint": "kept_rows"},
}


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return len(SAMPLES)

    def __getitem__(self, index):
        return {"tokens": SAMPLES[index]}


def trained(folder, architecture, selection, form, layout="right", extra=0, accumulation=1, stock_checkpointing=False, **lemo):
    """The adapter after three steps, and the loss of four samples in evaluation."""
    thresholds = THRESHOLDS[architecture] if selection == "threshold" else None
    lemo = {
        "block_size": 4,
        "keep_ratio": 0.4,
        "attention_forward": form,
        "thresholds": thresholds,
        **SELECTIONS[selection],
        **lemo,
    }
    model = lemo_model(with_varied_vectors(stock_model(architecture=architecture)), {}, **lemo).double()
    if stock_checkpointing:
        checkpoint_stock_layers(model)
    args = tiny_arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=4,
        learning_rate=0.1,
        optim="sgd",
        predictor_documents=0,
        calibrate_documents=len(SAMPLES),  # on which thresholds have to choose
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = LemoTrainer(
        model=model,
        args=args,
        train_dataset=Samples(),
        eval_dataset=torch.utils.data.Subset(Samples(), range(4)),
        data_collator=lambda samples: place([sample["tokens"] for sample in samples], layout, extra).batch,
    )
    trainer.train()
    shares = sparse_backbone(model).lemo_kept_shares
    assert 0 < sum(shares) < len(shares), "a run that keeps all or nothing proves nothing"
    adapter = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}
    return adapter, trainer.evaluate()["eval_loss"]


@functools.cache
def reference(architecture, selection, form):
    with tempfile.TemporaryDirectory() as folder:
        return trained(folder, architecture, selection, form)


def assert_the_same(folder, architecture, selection, form, way):
    (wanted, wanted_loss), (got, loss) = (
        reference(architecture, selection, form),
        trained(folder, architecture, selection, form, **WAYS[way]),
    )
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert loss == pytest.approx(wanted_loss, rel=1e-6)


OTHERS = [
    "accumulated from single samples",
    "padded on the left",
    "packed, by positions",
    "packed pairs, kept-row checkpointing",
]


@pytest.mark.parametrize(
    ("architecture", "selection", "form", "way"),
    [
        *[("llama", "uniform", "exact", way) for way in WAYS],
        *[("mistral", "ratio", "sparse", way) for way in OTHERS],
        *[("qwen2", "ratio", "kept_keys", way) for way in OTHERS],
        *[("opt", "informed", "exact", way) for way in OTHERS],
    ],
)
def test_every_way_of_feeding_the_same_samples_gives_the_same_run(architecture, selection, form, way, tmp_path):
    assert_the_same(tmp_path, architecture, selection, form, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "qwen2", "qwen3"])
def test_every_combination_gives_the_same_run(architecture, selection, form, way, tmp_path):
    assert_the_same(tmp_path, architecture, selection, form, way)


def test_runs_of_other_samples_or_draws_differ(tmp_path):
    """What the equalities would miss, if these were equal too."""
    wanted, _ = reference("llama", "uniform", "exact")
    for name, changes in (("seed", {"seed": 1}), ("ratio", {"keep_ratio": 0.3}), ("form", {"attention_forward": "sparse"})):
        got, _ = trained(tmp_path / name, "llama", "uniform", "exact", **changes)
        assert not all(torch.allclose(got[weight], wanted[weight], rtol=1e-6, atol=1e-9) for weight in wanted), name
