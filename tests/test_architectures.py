"""What must hold for every architecture: each test runs for every row of references/tiny_models.ARCHITECTURES."""

import functools
import inspect
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from references.one_layer import layer_under_test, run_layer, slowly
from references.tiny_models import (
    ARCHITECTURES,
    NEARBY,
    add_lora,
    assert_close_gradients,
    assert_same_gradients,
    batches_of,
    checkpoint_stock_layers,
    chosen_blocks,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    text,
    trainable_gradients,
    with_varied_vectors,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from training_runs import curve, tiny_arguments
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.opt.modeling_opt import OPTDecoder

from lemo_hf import AutoLemoModelForCausalLM, LemoTrainer, registry
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.estimate.fake_model import fake_model

FORMS = ["sparse", "exact", "kept_keys"]
CHECKPOINTS = ["none", "kept_rows"]
LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]
BATCH = {"input_ids": text(), "labels": text()}
pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def draws_for_layerdrop():
    source = inspect.getsource(OPTDecoder.forward)
    return "torch.rand" in source and "self.layerdrop > 0" not in source


def stock_of(architecture, **changes):
    return with_varied_vectors(stock_model(architecture=architecture, **changes))


def test_what_others_read_of_its_classes(architecture):
    """The registry its types; Trainer and generate the names of forward's arguments, by which they drop columns and options."""
    assert set(registry.ARCHITECTURES) == set(ARCHITECTURES)
    stock_class = ARCHITECTURES[architecture][0]
    config_class, model_class = registry.ARCHITECTURES[architecture]
    assert config_class.model_type == f"lemo_{architecture}"
    assert issubclass(model_class, stock_class)
    assert model_class.config_class is config_class
    stock, mine = (inspect.signature(each.forward).parameters for each in (stock_class, model_class))
    assert list(mine) == list(stock)
    assert [p.default for p in mine.values()] == [p.default for p in stock.values()]
    for each in (config_class, model_class):
        assert len(Path(inspect.getfile(each)).read_text().splitlines()) < 150, "a file holds what differs, nothing else"


# --- The stock model, wherever LeMo is not training ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "layout"), [("eval", "left"), ("eval", "right"), ("disabled", "left"), ("disabled", "packed_positions")]
)
def test_without_training_logits_are_the_stock_ones_bit_for_bit(architecture, case, layout, dtype):
    stock = stock_of(architecture).to(dtype)
    model = lemo_model(stock, enabled=case == "eval")
    model.train(case == "disabled")
    batch = place([random_tokens(length, length) for length in (40, 7, 23)], layout).batch
    got, wanted = model(**batch), stock(**batch)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.8}], ids=str
)
def test_generation_with_a_cache_is_the_stock_one(architecture, training, options):
    """Left padding too; and in training mode, since a cache means inference."""
    stock = stock_of(architecture)
    model = lemo_model(stock, keep_ratio=0.1, attention_forward="sparse").train(training)
    stock.train(training)  # older releases of stock OPT draw a number per layer in training, for LayerDrop
    batch = place([random_tokens(30, 1), random_tokens(11, 2)], "left").batch
    results = []
    for each in (model, stock):
        torch.manual_seed(0)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        results.append(each.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, output_logits=True, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))
    assert sparse_backbone(model).lemo_draw == 0


def test_arguments_by_place_and_results_as_a_tuple(architecture):
    stock = stock_of(architecture)
    batch = place([random_tokens(30, 1), random_tokens(11, 2)], "left").batch
    arguments = batch["input_ids"], batch["attention_mask"]
    model = lemo_model(stock)
    assert torch.equal(model.eval()(*arguments).logits, stock(*arguments).logits)
    wanted = model.train()(**batch).loss
    names = list(inspect.signature(model.forward).parameters)
    by_place = [batch.get(name) for name in names[: names.index("labels") + 1]]
    sparse_backbone(model).lemo_draw = 0
    (loss,) = model(*by_place, return_dict=False)
    assert torch.equal(loss, wanted)
    loss, logits, *_ = model.eval()(*by_place, return_dict=False)
    assert torch.equal(loss, stock(**batch).loss)
    assert logits.shape[:2] == batch["input_ids"].shape


# --- Training that keeps everything, and the exact form ---


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("layout", ["right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_keeping_every_block_equals_stock_training(architecture, form, layout, checkpoint):
    stock = stock_of(architecture)
    model = lemo_model(stock, keep_ratio=1.0, attention_forward=form, segment_size=7, checkpoint=checkpoint)
    batch = place([random_tokens(length, length) for length in (40, 7, 23)], layout).batch
    loss, got = loss_and_gradients(model, batch)
    wanted_loss, wanted = loss_and_gradients(stock.train(), batch, use_cache=False)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    assert_close_gradients(got, wanted)


@pytest.mark.parametrize("layout", ["packed_positions", "packed_seq_idx", "packed_cu"])
def test_keeping_every_block_of_packed_documents_equals_stock_training_on_each(architecture, layout):
    stock = stock_of(architecture)
    documents = [random_tokens(length, length) for length in (40, 7, 23)]
    loss, got = loss_and_gradients(lemo_model(stock, keep_ratio=1.0), place(documents, layout).batch, num_items_in_batch=1)
    alone = [loss_and_gradients(stock.train(), place([each], "right").batch, num_items_in_batch=1) for each in documents]
    torch.testing.assert_close(loss, sum(each for each, _ in alone), rtol=1e-5, atol=1e-5)
    assert_close_gradients(got, {name: sum(grads[name] for _, grads in alone) for name in got})


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("selection", ["sampled", "ratio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_forward_is_the_dense_one_bit_for_bit(architecture, dtype, selection, checkpoint):
    stock = stock_of(architecture).to(dtype)
    model = lemo_model(stock, attention_forward="exact", keep_ratio=0.4, selection=selection, checkpoint=checkpoint)
    output, wanted = model(text(), labels=text()), stock(text(), labels=text())
    assert output.logits is None
    assert torch.equal(model(text()).logits, wanted.logits)
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    wanted.loss.backward()
    (name,) = (name for name, _ in stock.named_parameters() if name.endswith("layers.0.self_attn.q_proj.weight"))
    mine, dense = (trainable_gradients(each)[name] for each in (model, stock))
    assert not torch.allclose(mine, dense, rtol=1e-2), "the gradient must be a restricted one"


def test_under_autocast_the_exact_forward_is_still_the_dense_one(architecture):
    stock = stock_of(architecture)
    model = lemo_model(stock, attention_forward="exact", keep_ratio=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(text()).logits, stock(text()).logits)


def test_gradients_in_bfloat16_are_as_good_as_the_stock_model_s(architecture):
    """Rounding differs in places, so both are held against float32."""
    wide, narrow = stock_of(architecture), stock_of(architecture).bfloat16()
    batch = place([random_tokens(length, length) for length in (40, 7, 23)], "right").batch
    _, wanted = loss_and_gradients(wide.train(), batch)
    _, stock = loss_and_gradients(narrow.train(), batch)
    _, got = loss_and_gradients(lemo_model(narrow, keep_ratio=1.0), batch)
    mine, theirs = (torch.stack([(grads[name] - wanted[name]).norm() for name in wanted]).norm() for grads in (got, stock))
    assert 0 < mine < 1.3 * theirs


# --- One layer against the slow reference ---


@pytest.mark.parametrize("lora", [None, {}, {"targets": ["q_proj", "up_proj", "fc1"]}], ids=["full", "all-linear", "some"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_equals_the_slow_reference_with_all_its_gradients(architecture, form, checkpoint, lora):
    layer, hidden, rotary, batch = layer_under_test(lora, form, checkpoint, architecture)
    weights = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    # From the row, not from the layer: the layer's own reading of its window is under test too.
    nearby = NEARBY if form == "kept_keys" else 0
    wanted = slowly(layer, hidden, rotary, batch, form, ARCHITECTURES[architecture][1].get("sliding_window"), nearby)
    wanted_grads = torch.autograd.grad(wanted, [hidden, *weights.values()], upstream)
    got = layer.sparse_forward(hidden, rotary, batch)
    got_grads = torch.autograd.grad(got, [hidden, *weights.values()], upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)
    for name, mine, reference in zip(["input", *weights], got_grads, wanted_grads, strict=True):
        # The softmax does not see what every key adds alike.
        assert reference.abs().max() > 1e-3 or name == "self_attn.k_proj.bias", name
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_saves_kept_rows_and_nothing_of_the_whole_stream(architecture, form, checkpoint, dtype):
    result, saved, _, kept = run_layer(form, checkpoint, 0.5, architecture, dtype)
    assert result.requires_grad
    assert 0 < kept < 0.6 * 2 * 61
    assert saved
    # Where attention is shared, kept queries owe a part of their gradient to the other rows' keys and values.
    of_rest = [tensor for tensor in saved if tensor.shape[0] == 2 * 61 - kept]
    heads = ARCHITECTURES[architecture][1].get("num_key_value_heads", 4)
    assert [tensor.shape[1] for tensor in of_rest] == ([] if form == "sparse" else [heads] * 2)
    for tensor in saved:
        assert tensor.shape[0] == kept or any(tensor is each for each in of_rest), tuple(tensor.shape)
        # Not a view of something longer either.
        assert tensor.untyped_storage().nbytes() <= tensor.nbytes, tuple(tensor.shape)


# --- A document, wherever it lies ---

# Longer and shorter than a block of 4, one token, equal lengths, ragged ends.
DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((21, 3, 40, 8, 1, 17, 8))]
SELECTIONS = {
    "uniform": {},
    "true_scores": {"selection": "ratio", "score_source": "true"},
    "predicted": {"selection": "ratio"},
}


@functools.cache
def model_for(architecture, selection, form):
    return lemo_model(stock_of(architecture), {}, attention_forward=form, block_size=4, keep_ratio=0.4, **SELECTIONS[selection])


def run(model, batch):
    sparse_backbone(model).lemo_draw = 5
    with batches_of(model) as batches:
        loss, grads = loss_and_gradients(model, batch, num_items_in_batch=1)
    return loss, grads, chosen_blocks(batches[0])


@functools.cache
def each_alone(architecture, selection, form):
    return [run(model_for(architecture, selection, form), place([each], "packed_positions").batch) for each in DOCUMENTS]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "selection", ["true_scores", *(pytest.param(s, marks=pytest.mark.slow) for s in ("uniform", "predicted"))]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_document_is_trained_the_same_wherever_it_lies(architecture, form, selection, layout):
    alone = each_alone(architecture, selection, form)
    loss, grads, chosen = run(model_for(architecture, selection, form), place(DOCUMENTS, layout, extra=3).batch)
    shares = [block for layer in chosen for document in layer for block in document[1:-1]]
    assert 0 < sum(shares) < len(shares), "a selection of all or nothing proves nothing"
    for index, (_, _, chosen_alone) in enumerate(alone):
        assert [layer[index] for layer in chosen] == [layer[0] for layer in chosen_alone]
    torch.testing.assert_close(loss, sum(result[0] for result in alone), rtol=1e-4, atol=1e-4)
    wanted = {name: sum(result[1].get(name, torch.zeros(())) for result in alone) for name in grads}
    assert_close_gradients(grads, wanted, rtol=1e-3, share=1e-4)


# --- Weights ---


@pytest.mark.parametrize("tied", [False, True])
def test_trained_and_tied_heads_get_the_stock_gradient(architecture, tied):
    stock = stock_of(architecture, tie_word_embeddings=tied)
    model = lemo_model(stock, keep_ratio=1.0, segment_size=9)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    (_, got), (_, wanted) = (loss_and_gradients(each.train(), BATCH) for each in (model, stock))
    assert ("lm_head.weight" in got) != tied
    assert_close_gradients(got, wanted)


LORA = {
    "attention": {"targets": "attention"},
    "all-linear": {"targets": "all-linear"},
    "embeddings_and_head": {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    "saved_embeddings_and_head": {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_adapters_get_the_stock_gradient_and_the_same_evaluation(architecture, lora, checkpoint):
    stock = stock_of(architecture)
    model = lemo_model(stock, LORA[lora], keep_ratio=1.0, segment_size=9, checkpoint=checkpoint)
    stock = add_lora(stock, **LORA[lora])
    (_, got), (_, wanted) = (loss_and_gradients(each.train(), BATCH) for each in (model, stock))
    assert not any("lemo" in name for name in got)
    assert_close_gradients(got, wanted)
    assert torch.equal(model.eval()(text()).logits, stock.eval()(text()).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_through_auto_and_as_stock(architecture, tied, tmp_path):
    stock = stock_of(architecture, tie_word_embeddings=tied)
    model = lemo_model(stock, keep_ratio=0.3, selection="ratio").eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.lemo == model.config.lemo
    assert all(torch.equal(weight, again.get_parameter(name)) for name, weight in model.named_parameters())
    for each in (again, AutoLemoModelForCausalLM.from_pretrained(tmp_path), type(stock).from_pretrained(tmp_path)):
        assert torch.equal(each(text()).logits, stock(text()).logits)
    assert torch.equal(again.train()(text(), labels=text()).loss, model.train()(text(), labels=text()).loss)


def test_a_stock_checkpoint_loads_with_its_weights_under_their_names(architecture, tmp_path):
    stock = stock_of(architecture)
    stock.save_pretrained(tmp_path)
    model = AutoLemoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is registry.ARCHITECTURES[architecture][1]
    assert {name for name in model.state_dict() if "lemo_predictor" not in name} == set(stock.state_dict())
    assert torch.equal(model(text()).logits, stock(text()).logits)


def test_the_code_that_travels_with_a_model_is_whole_and_trains_alike(architecture, tmp_path):
    """What `trust_remote_code` runs, imported from the saved folder's files; test_remote_code.py does it without this package."""
    model = lemo_model(stock_of(architecture), selection="ratio", keep_ratio=0.4)
    model.save_pretrained(tmp_path)
    name = f"modeling_lemo_{architecture}.{type(model).__name__}"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"] == name
    remote = get_class_from_dynamic_module(name, str(tmp_path)).from_pretrained(tmp_path)
    assert not isinstance(remote, type(model))
    assert torch.equal(remote(text()).logits, model.eval()(text()).logits)
    (loss, got), (wanted_loss, wanted) = (loss_and_gradients(each.train(), BATCH) for each in (remote, model))
    assert torch.equal(loss, wanted_loss)
    assert_same_gradients(got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_run_trains_predictors_and_adapter(architecture, form, tmp_path):
    lemo = {"attention_forward": form, "selection": "threshold", "checkpoint": "kept_rows"}
    model = lemo_model(stock_of(architecture), {"targets": "attention"}, **lemo)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    samples = [{"input_ids": random_tokens(48, seed), "labels": random_tokens(48, seed)} for seed in range(12)]
    trainer = LemoTrainer(model=model, args=tiny_arguments(tmp_path, max_steps=3), train_dataset=samples)
    trainer.train()
    assert len(curve(trainer)) == 3
    assert len(sparse_backbone(model).config.lemo.thresholds) == 2
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert all("lora_" in name or "lemo_predictor" in name for name in changed)
    assert {"lora_" in name for name in changed} == {True, False}
    trainer.save_model(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(stock_of(architecture), tmp_path / "adapter")
    assert torch.equal(stock.eval()(text()).logits, model.eval()(text()).logits)


@pytest.mark.parametrize("form", ["exact", "kept_keys"])
def test_shapes_alone_suffice_for_a_training_step(architecture, form):
    """Estimates and benchmarks run on fake tensors: nothing may depend on their values."""
    if architecture == "opt" and draws_for_layerdrop():
        pytest.skip("this transformers' stock OPT compares a drawn number with layerdrop=0 in training")
    stock = stock_of(architecture, max_position_embeddings=1024)
    config = lemo_model(stock, checkpoint="kept_rows", attention_forward=form).config
    mode = FakeTensorMode()
    model = fake_model(lambda: registry.ARCHITECTURES[architecture][1](config).train(), mode)
    with mode:  # longer than a strip of windowed attention
        model.model(input_ids=torch.zeros(2, 700, dtype=torch.long)).last_hidden_state.sum().backward()
    assert all(weight.grad is not None for weight in model.model.parameters() if weight.requires_grad)


# --- Checkpointing ---


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_no_way_of_checkpointing_changes_a_gradient(architecture, form, dropout):
    stock = stock_of(architecture)
    if hasattr(stock.config, "dropout"):
        stock.config.dropout = dropout
    batch = place([random_tokens(length, length) for length in (37, 50, 9)], "right").batch
    results = []
    for checkpoint, stock_checkpointing in (("none", None), ("kept_rows", None), ("none", False), ("kept_rows", True)):
        model = lemo_model(stock, {"lora_dropout": dropout}, attention_forward=form, checkpoint=checkpoint, keep_ratio=0.4)
        if stock_checkpointing is not None:
            checkpoint_stock_layers(model, stock_checkpointing)
            model.enable_input_require_grads()
        torch.manual_seed(13)
        results.append(loss_and_gradients(model, batch))
    (loss, wanted), *others = results
    for got_loss, got in others:
        assert torch.equal(got_loss, loss)
        # Dropout drawn anew, or a selection made anew, would be off by far more than rounding.
        assert_close_gradients(got, wanted, rtol=1e-5, share=1e-6)
