"""Features that change what a step stores or computes, two at a time: gradients are those without LeMo's or the feature's doing."""

from itertools import combinations

import pytest
import torch
from memory_features import FEATURES, IMPOSSIBLE, Step, batch_for, step
from peft import (
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    OFTConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from references.tiny_models import NEARBY, assert_same_gradients, lemo_model, loss_and_gradients, stock_model, trainable_gradients
from training_runs import curve, tiny_trainer

from lemo_hf.models.sparse_decoder import sparse_backbone

FORMS = ["exact", "kept_keys", "sparse"]
# In every `make test`; the others are slow. Each feature once, and the pairs in which something was or could be wrong.
CHOSEN = {
    ("checkpointing", "bf16"): "autocast within the second run",
    ("checkpointing", "dropout"): "the second run draws what the first drew",
    ("reentrant", "new_tokens"): "the embeddings' output is no leaf",
    ("every_2_layers", "offload"): "hooks of some layers see a checkpoint, of others all",
    ("selective", "mlp"): "operators are counted, and choosing runs once only",
    ("kept_rows", "4bit"): "quantised weights in the second run",
    ("kept_rows", "8bit"): "the same",
    ("kept_rows", "float32_norms"): "the stream gets wider within the layer",
    ("kept_rows", "offload"): "what is stored is copied, weights are not",
    ("kept_rows", "dropout"): "the second run draws what the first drew",
    ("kept_rows", "dora"): "reads base weights",
    ("kept_rows", "full"): "all weights are inputs of the checkpoint",
    ("offload", "bf16_base"): "copies of 16 bits",
    ("accumulation", "head"): "the divisor is that of all micro-batches",
    ("accumulation", "fp16"): "in 16 bits",
    ("4bit", "dora"): "weights are unpacked for their norm",
    ("4bit", "float32_norms"): "16-bit embeddings, float32 sums",
    ("8bit", "bf16"): "autocast around quantised matrices",
    ("head", "tied"): "an adapter on one of two tied ends",
    ("new_tokens", "tied"): "one trained row in two places",
    ("embeddings", "tied"): "an adapter on the other end",
    ("kept_rows", "tied_adapters"): "one adapter in two places",
    ("head", "rslora"): "a fused loss could leave the adapter out",
    ("trained_ends", "neftune"): "noise on a wrapped module",
}
# Of these features the chosen pairs are in every `make test` with kept keys too.
KEPT_KEYS_TOO = {"kept_rows", "bf16", "fp16"}


def all_pairs():
    for first, second in combinations(FEATURES, 2):
        pair = first, second
        if FEATURES[first].choice == FEATURES[second].choice or pair in IMPOSSIBLE or pair[::-1] in IMPOSSIBLE:
            continue
        marks = [] if pair in CHOSEN or pair[::-1] in CHOSEN else [pytest.mark.slow]
        yield pytest.param(*pair, marks=marks, id=f"{first}-{second}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")


def rounding(names) -> float:
    """One rounding in the type in which the features multiply matrices."""
    types = {kind for name in names for kind in (FEATURES[name].autocast, FEATURES[name].dtype) if kind is not None}
    return max((torch.finfo(kind).eps for kind in types), default=torch.finfo(torch.float32).eps)


def assert_same(got: Step, wanted: Step, tolerance: float) -> None:
    """Loss and gradients; of these every one within `tolerance` of the largest, and together within it of their length."""
    assert got.gradients.keys() == wanted.gradients.keys()
    assert len(wanted.gradients) > 0
    torch.testing.assert_close(got.loss, wanted.loss, rtol=tolerance, atol=tolerance)
    largest = max(gradient.abs().max().item() for gradient in wanted.gradients.values())
    assert largest > 0
    for name, gradient in wanted.gradients.items():
        assert (got.gradients[name].float() - gradient.float()).abs().max() <= 2 * tolerance * largest, name
    differences = [(got.gradients[name].float() - gradient.float()).square().sum() for name, gradient in wanted.gradients.items()]
    length = torch.stack([gradient.float().square().sum() for gradient in wanted.gradients.values()]).sum().sqrt()
    assert torch.stack(differences).sum().sqrt() <= tolerance * length


def check(names, form, folder) -> None:
    neutral = tuple(name for name in names if FEATURES[name].neutral)
    others = tuple(name for name in names if name not in neutral)
    # A micro-batch is a forward of its own and draws anew; a compiled model is not to be compiled for each draw.
    selection = "ratio" if {"accumulation", "compile"} & set(names) else "sampled"
    # Draws of each layer's own would be others in a second run that chose again; shared ones are the default.
    draws = "by_layer" if form == "sparse" else "shared"
    lemo = {"keep_ratio": 0.4, "attention_forward": form, "selection": selection, "draws": draws}
    lemo |= {"nearby_tokens": NEARBY} if form == "kept_keys" else {}
    got = step(names, folder, lemo)
    assert all(0 < share < 0.5 for share in got.shares)
    assert got.shares

    # Micro-batches draw adapter dropout in another order, with stock models too.
    if neutral and not {"accumulation", "dropout"} <= set(names):
        regrouped = 4 if "accumulation" in names else 1
        assert_same(got, step(others, folder, lemo, beside=names), regrouped * rounding(names))
    if "compile" in names:
        return

    dense = step(names, folder, {"enabled": False})
    assert got.bytes < dense.bytes
    if {"checkpointing", "reentrant", "selective"} & set(names) and "offload" not in names:
        assert got.layer_bytes == dense.layer_bytes  # one input a layer, of all rows
    elif "offload" in names:
        # Of whole-layer checkpoints the inputs, of all rows.
        apart = step(tuple(name for name in names if name != "offload"), folder, lemo, beside=names)
        # All of it and each once; rows' numbers, and what else is no float, stay.
        assert got.copied_bytes + got.layer_bytes == apart.layer_bytes
        assert got.layer_bytes <= 0.05 * apart.layer_bytes
        whole = {"checkpointing", "reentrant", "selective"} & set(names)
        assert 0 < got.copied_bytes <= dense.copied_bytes - (0 if whole else 1)
    else:
        assert got.layer_bytes < dense.layer_bytes

    # The head's dropout is drawn for rows with a label, the stock model's for all.
    if not ("dropout" in names and {"head", "tied_adapters"} & set(names)):
        whole = step(names, folder, {**lemo, "keep_ratio": 1.0})
        stock = step(tuple(name for name in names if name != "kept_rows"), folder, None, beside=names)
        # Rows are multiplied in other groups than the stock model's, through two layers and back.
        assert_same(whole, stock, (4 if rounding(names) > 1e-4 else 16) * rounding(names))


def pairs_in_every_form():
    """With kept keys most are slow: what is apart from the exact form's step is attention's forward."""
    for pair in all_pairs():
        for form in FORMS if "compile" not in pair.values else ():
            quick = form != "kept_keys" or KEPT_KEYS_TOO & set(pair.values)
            yield pytest.param(
                *pair.values, form, marks=pair.marks or ([] if quick else [pytest.mark.slow]), id=f"{pair.id}-{form}"
            )


@pytest.mark.parametrize(("first", "second", "form"), list(pairs_in_every_form()))
def test_pair(first, second, form, folder):
    check((first, second), form, folder)


OTHER_METHODS = {
    "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "encoded prompts": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "norms": LNTuningConfig(task_type="CAUSAL_LM"),
    "vera": VeraConfig(task_type="CAUSAL_LM", r=4),
    "oft": OFTConfig(task_type="CAUSAL_LM", r=0, oft_block_size=4),
    "hra": HRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "tokens": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[4, 5]),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_methods_of_peft_train(method, form):
    batch = batch_for(())

    def trained(**lemo):
        model = lemo_model(stock_model(), **lemo) if lemo else stock_model()
        torch.manual_seed(0)
        model = get_peft_model(model, OTHER_METHODS[method]).train()
        torch.manual_seed(3)
        loss, gradients = loss_and_gradients(model, batch)
        return Step(loss, gradients, 0, 0, 0, sparse_backbone(model).lemo_kept_shares if lemo else ())

    stock = trained()
    assert_same(trained(keep_ratio=1.0, attention_forward=form), stock, 32 * torch.finfo(torch.float32).eps)
    got, again = (trained(keep_ratio=0.4, attention_forward=form, checkpoint=checkpoint) for checkpoint in ("none", "kept_rows"))
    assert max(got.shares) < 0.5
    assert_same(again, got, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_a_float16_scaler_scales_every_gradient(form, checkpoint):
    """Gradients that the loss forms in its forward pass, before the scaler's factor, included."""
    batch = batch_for(())
    gradients = []
    for scale in (None, 2.0**12):
        model = lemo_model(
            stock_model(), {"targets": "all-linear"}, keep_ratio=0.4, attention_forward=form, checkpoint=checkpoint
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(trainable_gradients(model))
    largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
    assert_same_gradients(gradients[1], gradients[0], rtol=1e-2, atol=2 * torch.finfo(torch.float16).eps * largest)


def compiled_pairs():
    """In the forms by turns: tracing takes seconds."""
    pairs = [pair.values for pair in all_pairs() if "compile" in pair.values]
    return [(*pair, FORMS[place % len(FORMS)]) for place, pair in enumerate(pairs)]


# Dynamo instantiates an autograd.Function while it traces; torch warns of that, to itself.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "form"), compiled_pairs())
def test_pair_with_compile(first, second, form, folder):
    check((first, second), form, folder)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_a_compiled_run_has_the_curve_of_an_uncompiled_one(tmp_path):
    lemo = {"selection": "ratio", "keep_ratio": 0.4}
    curves = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = tiny_trainer(tmp_path / str(len(curves)), lemo, max_steps=3, predictor_documents=2, probe_steps=2, **compiled)
        trainer.train()
        curves.append(curve(trainer))
        assert trainer.state.log_history[-2]["kept_share"] < 0.5
        assert ("saved_bytes" in trainer.state.log_history[-2]) == (not compiled)
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    torch._dynamo.reset()
