import contextlib
import dataclasses

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from references.one_layer import layer_under_test, run_layer
from references.tiny_models import (
    add_lora,
    assert_same_gradients,
    checkpoint_stock_layers,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    trainable_gradients,
)
from torch import nn

from lemo_hf.models import sparse_decoder
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone, sparse_evaluation
from lemo_hf.models.token_elimination import selection_of_blocks

FORMS = ["sparse", "exact", "kept_keys"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_a_layer_whose_input_needs_no_gradient_trains_its_weights(form, checkpoint):
    layer, hidden, rotary, batch = layer_under_test({}, form, checkpoint)
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    wanted = torch.autograd.grad(layer.sparse_forward(hidden, rotary, batch).square().sum(), weights)
    got = torch.autograd.grad(layer.sparse_forward(hidden.detach(), rotary, batch).square().sum(), weights)
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_the_sparse_layer_passes_gradcheck():
    layer, hidden, rotary, batch = layer_under_test({}, "sparse", "none", lengths=(5, 13), block_size=2)
    layer.mlp.requires_grad_(False)
    # Rest rows' MLP output is a constant to backward by design: without it, the layer is a plain function.
    layer.feed_forward = lambda rows: torch.zeros_like(rows)
    small = hidden.detach()[:, -6:].clone()[:2].requires_grad_()
    documents = find_documents(2, 6, 2, small.device)
    marks = torch.tensor([True, False, True, True, False, True])
    batch = SparseBatch(documents, batch.config, 2, 0, selections={1: selection_of_blocks(marks, documents)})
    assert torch.autograd.gradcheck(lambda stream: layer.sparse_forward(stream, tuple(p[:, :6] for p in rotary), batch), (small,))


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_saved_bytes_are_a_constant_per_kept_row_and_a_small_one_per_dropped_row(form, checkpoint):
    """Keys and values of the rows that are dropped, where kept ones see them: 2 heads of 8 float32 numbers each."""
    per_row = []
    for keep_ratio in (0.25, 0.5, 1.0):
        _, _, storages, kept = run_layer(form, checkpoint, keep_ratio)
        dropped = 0 if form == "sparse" else (2 * 61 - kept) * 2 * 2 * 8 * 4
        per_row.append((sum(storages.values()) - dropped) / kept)
    # Index tensors aside, which a dense layer shares.
    assert max(per_row) - min(per_row) <= 24


def test_kept_row_checkpointing_saves_what_the_documentation_says():
    row, head_rows, keys_and_values = 32 * 4, 4 * 4, 2 * 2 * 8 * 4
    for form, wanted, of_dropped in (
        ("sparse", row, 0),
        *((form, 2 * row + head_rows, keys_and_values) for form in ("exact", "kept_keys")),
    ):
        _, _, storages, kept = run_layer(form, "kept_rows", 0.5)
        assert sum(storages.values()) == kept * wanted + (2 * 61 - kept) * of_dropped, form


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


VARIANTS = {
    "lora": {},
    "full": {"lora": None},
    "dropout": {"lora": {"lora_dropout": 0.4}},
    "autocast": {"context": autocast},
    "autocast_dropout": {"lora": {"lora_dropout": 0.4}, "context": autocast},
    "bf16_base": {"dtype": torch.bfloat16},
    "input_gradients": {"inputs": True},
    "hidden_states": {"extra": {"output_hidden_states": True}},
    "true_scores_dropout": {"lora": {"lora_dropout": 0.4}, "lemo": {"selection": "ratio", "score_source": "true"}},
    "true_scores_autocast": {"context": autocast, "lemo": {"selection": "ratio", "score_source": "true"}},
    "dense_layer": {"lemo": {"dense_layers": [0]}},
}


def train_once(form, variant, checkpoint, stock_checkpointing=None):
    settings = VARIANTS[variant]
    stock = stock_model().to(settings.get("dtype", torch.float32))
    lemo = {"attention_forward": form, "checkpoint": checkpoint, "keep_ratio": 0.4, **settings.get("lemo", {})}
    model = lemo_model(stock, settings.get("lora", {}), **lemo)
    if stock_checkpointing is not None:
        checkpoint_stock_layers(model, stock_checkpointing)
    if settings.get("inputs") or stock_checkpointing:
        model.enable_input_require_grads()
    batch = place([random_tokens(length, length) for length in (37, 50, 9)], "right").batch
    torch.manual_seed(13)
    with settings.get("context", contextlib.nullcontext)():
        loss = model(**batch, **settings.get("extra", {})).loss
    loss.backward()
    return loss.detach(), trainable_gradients(model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMS)
def test_no_way_of_checkpointing_changes_a_gradient(form, variant):
    loss, wanted = train_once(form, variant, "none")
    full = VARIANTS[variant].get("lora", {}) is None
    assert len(wanted) == (2 * 9 + 3 if full else 2 * 7 * 2)
    for checkpoint, stock_checkpointing in (
        ("kept_rows", None),
        ("none", False),
        ("none", True),
        ("kept_rows", False),
        ("kept_rows", True),
    ):
        got_loss, got = train_once(form, variant, checkpoint, stock_checkpointing)
        assert torch.equal(got_loss, loss), (checkpoint, stock_checkpointing)
        # Dropout drawn anew, or a selection made anew, would be off by far more than rounding.
        largest = max(grad.abs().max().item() for grad in wanted.values())
        assert_same_gradients(got, wanted, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_two_backward_passes_add_up(form, checkpoint):
    model = lemo_model(stock_model(), {}, attention_forward=form, checkpoint=checkpoint)
    tokens = random_tokens(50, 1)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward(retain_graph=True)
    once = trainable_gradients(model)
    loss.backward()
    assert_same_gradients(trainable_gradients(model), {name: 2 * grad for name, grad in once.items()}, rtol=1e-6)


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_two_forwards_before_their_backwards(form, checkpoint):
    """Nothing of a forward lives in the model: another one in between does not disturb its backward."""
    model = lemo_model(stock_model(), {}, attention_forward=form, checkpoint=checkpoint, selection="ratio")
    first, second = random_tokens(50, 1)[None], random_tokens(33, 2)[None]
    _, wanted = loss_and_gradients(model, {"input_ids": first, "labels": first})
    model.zero_grad()
    loss = model(input_ids=first, labels=first).loss
    model(input_ids=second, labels=second)
    loss.backward()
    assert_same_gradients(trainable_gradients(model), wanted)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_recorded_hidden_states_are_what_each_layer_gave(form, checkpoint, inputs):
    model = lemo_model(stock_model(), {}, attention_forward=form, checkpoint=checkpoint)
    if inputs:
        model.enable_input_require_grads()
    backbone = sparse_backbone(model)
    seen = []
    for module in (backbone.embed_tokens, *backbone.layers[:-1], backbone.norm):
        module.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    tokens = random_tokens(40, 1)[None]
    output = model(input_ids=tokens, labels=tokens, output_hidden_states=True)
    output.loss.backward()
    assert len(output.hidden_states) == 3
    for recorded, copied in zip(output.hidden_states, seen, strict=True):
        assert torch.equal(recorded, copied)


def test_the_stored_selection_is_what_the_layers_used():
    model = lemo_model(stock_model(), keep_ratio=0.3)
    tokens = random_tokens(80, 1)[None]
    backbone = sparse_backbone(model)
    for number in range(3):
        assert backbone.lemo_draw == number
        model(input_ids=tokens, labels=tokens)
    assert backbone.lemo_kept_shares == (0.3, 0.3)


def tensors_of(holder):
    """Tensors among an object's attributes, and in containers and dataclasses there; modules and weights aside."""
    found, waiting, seen = [], list(vars(holder).values()), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module | nn.Parameter):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting += [each for each in value.values() if not isinstance(each, nn.Module)]
        elif isinstance(value, list | tuple):
            waiting += value
        elif dataclasses.is_dataclass(value):
            waiting += vars(value).values()
    return found


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_step_stays_when_its_backward_is_done(form, checkpoint, monkeypatch):
    """Not in the model; and while the loss is still held, no attention output beside the saved tensors."""
    splits = []

    class Watched(sparse_decoder.KeptAndRestRows):
        def __init__(self, *args):
            super().__init__(*args)
            splits.append(self)

    monkeypatch.setattr(sparse_decoder, "KeptAndRestRows", Watched)
    model = lemo_model(stock_model(), attention_forward=form, checkpoint=checkpoint, keep_ratio=0.3)
    backbone = sparse_backbone(model)
    before = len(tensors_of(backbone))
    tokens = random_tokens(80, 1)[None]
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert len(tensors_of(backbone)) == before
    assert len(splits) == 2
    if checkpoint == "kept_rows":
        assert all(split.finished is None for split in splits)


def test_sparse_evaluation_is_the_sparse_forward_and_ends():
    model = lemo_model(stock_model(), selection="ratio", keep_ratio=0.3, attention_forward="sparse")
    tokens = random_tokens(80, 1)[None]
    trained = model(input_ids=tokens, labels=tokens).loss
    model.eval()
    backbone = sparse_backbone(model)
    dense = model(input_ids=tokens, labels=tokens).loss
    with torch.no_grad(), sparse_evaluation(backbone):
        torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, trained)
    assert torch.equal(model(input_ids=tokens, labels=tokens).loss, dense)
    assert not torch.allclose(dense, trained)


def test_the_backbone_is_found_through_wrappers():
    model = lemo_model(stock_model())
    assert sparse_backbone(add_lora(model)) is model.model
    assert sparse_backbone(nn.ModuleDict({"module": model})["module"]) is model.model
    with pytest.raises(LemoConfigError, match="carries no LeMo; got LlamaForCausalLM"):
        sparse_backbone(stock_model())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"attention_dropout": 0.1}, "attention_dropout=0.1; set it to 0.0"), ({"output_attentions": True}, "after model.eval")],
)
def test_what_sparse_training_cannot_do_is_refused(change, message):
    stock = stock_model(**change, attn_implementation="eager")
    model = lemo_model(stock)
    tokens = random_tokens(10, 1)[None]
    with pytest.raises(LemoConfigError, match=message):
        model(input_ids=tokens, labels=tokens)
    model.config.lemo.update(enabled=False)
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_a_cache_in_training_is_refused_and_no_silent_dense_step():
    """Prefix tuning passes its prefix as a cache; with one, the layers would run densely."""
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(lemo_model(stock_model(), keep_ratio=0.3), prefix).train()
    tokens = random_tokens(50, 1)[None]
    with pytest.raises(LemoConfigError, match=r"got past_key_values.*use LoRA, or train with enabled=False"):
        model(input_ids=tokens, labels=tokens)
    with torch.no_grad():
        assert model(input_ids=tokens).logits.isfinite().all()
    sparse_backbone(model).config.lemo.update(enabled=False)
    model(input_ids=tokens, labels=tokens).loss.backward()
