import functools
import inspect

import pytest
import torch
from references.tiny_models import (
    VOCABULARY,
    add_lora,
    assert_same_gradients,
    batches_of,
    chosen_blocks,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
)
from transformers import LlamaForCausalLM

from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.registry import lemo_config_from

FORMS = ["sparse", "exact"]
LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]


def text(rows=2, length=50, seed=0):
    return torch.stack([random_tokens(length, seed + row) for row in range(rows)])


# --- The stock model, wherever LeMo is not training ---


def test_the_forward_signature_is_the_stock_one():
    """Trainer drops columns that it does not name, generate leaves out options that it does not name."""
    stock = inspect.signature(LlamaForCausalLM.forward).parameters
    mine = inspect.signature(LemoLlamaForCausalLM.forward).parameters
    assert list(mine) == list(stock)
    assert [p.default for p in mine.values()] == [p.default for p in stock.values()]


@pytest.mark.parametrize("case", ["eval", "disabled"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_training_logits_are_the_stock_ones_bit_for_bit(case, layout):
    stock = stock_model()
    model = lemo_model(stock, enabled=case == "eval")
    model.train(case == "disabled")
    batch = place([random_tokens(length, length) for length in (40, 7, 23)], layout).batch
    got, wanted = model(**batch), stock(**batch)
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.8}], ids=str)
def test_generation_with_a_cache_is_the_stock_one(training, options):
    """Left padding too; and in training mode, since a cache means inference."""
    stock = stock_model()
    model = lemo_model(stock, keep_ratio=0.1, attention_forward="sparse").train(training)
    batch = place([random_tokens(30, 1), random_tokens(11, 2)], "left").batch
    results = []
    for each in (model, stock):
        torch.manual_seed(0)
        results.append(
            each.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=12,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))
    if training:
        assert sparse_backbone(model).lemo_draw == 0


def test_eval_after_training_steps_is_stock_again():
    stock = stock_model()
    model = lemo_model(stock)
    loss_and_gradients(model, {"input_ids": text(), "labels": text()})
    model.eval()
    assert torch.equal(model(text()).logits, stock(text()).logits)


def test_arguments_by_place():
    stock = stock_model()
    batch = place([random_tokens(30, 1), random_tokens(11, 2)], "left").batch
    arguments = batch["input_ids"], batch["attention_mask"]
    model = lemo_model(stock)
    assert torch.equal(model.eval()(*arguments).logits, stock(*arguments).logits)
    wanted = model.train()(**batch).loss
    sparse_backbone(model).lemo_draw = 0
    assert torch.equal(model(*arguments, None, None, None, batch["labels"]).loss, wanted)


@pytest.mark.parametrize("training", [False, True])
def test_return_dict_false_gives_a_tuple(training):
    model = lemo_model(stock_model()).train(training)
    output = model(text(), labels=text(), return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].shape == ()


def test_keeping_everything_needs_no_labels_and_gives_logits():
    stock = stock_model()
    model = lemo_model(stock, keep_ratio=1.0)
    torch.testing.assert_close(model(text()).logits, stock(text()).logits, rtol=1e-4, atol=1e-5)


# --- Training that keeps everything, and the exact form ---


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("lora", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("layout", ["right", "left", "packed_positions"])
@pytest.mark.parametrize("form", FORMS)
def test_keeping_every_block_equals_stock_training(form, layout, lora, checkpoint):
    stock = stock_model(tie_word_embeddings=lora is None)
    model = lemo_model(stock, lora, keep_ratio=1.0, attention_forward=form, segment_size=7, checkpoint=checkpoint)
    stock = stock if lora is None else add_lora(stock)
    batch = place([random_tokens(length, length) for length in (40, 7, 23)], layout).batch
    loss, got = loss_and_gradients(model, batch)
    # With the default cache the stock model overlooks packed documents.
    wanted_loss, wanted = loss_and_gradients(stock.train(), batch, use_cache=False)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert_same_gradients(got, wanted, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("selection", ["sampled", "ratio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_forward_is_the_dense_one_bit_for_bit(dtype, selection, checkpoint):
    stock = stock_model().to(dtype)
    model = lemo_model(stock, attention_forward="exact", keep_ratio=0.4, selection=selection, checkpoint=checkpoint)
    output = model(text(), labels=text(), output_hidden_states=True)
    wanted = stock(text(), labels=text(), output_hidden_states=True)
    assert all(share < 0.6 for share in sparse_backbone(model).lemo_kept_shares)
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, wanted.hidden_states, strict=True))
    assert torch.equal(model(text()).logits, wanted.logits)
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    wanted.loss.backward()
    mine, dense = model.model.layers[0].self_attn.q_proj.weight.grad, stock.model.layers[0].self_attn.q_proj.weight.grad
    assert not torch.allclose(mine, dense, rtol=1e-2), "the gradient must be a restricted one"


def test_under_autocast_the_exact_forward_is_still_the_dense_one():
    stock = stock_model()
    model = lemo_model(stock, attention_forward="exact", keep_ratio=0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(text()).logits, stock(text()).logits)


# --- A document, wherever it lies ---

SELECTIONS = {
    "ratio": {"selection": "ratio", "keep_ratio": 0.4},
    "ratio_true": {"selection": "ratio", "keep_ratio": 0.4, "score_source": "true"},
    "threshold": {"selection": "threshold", "thresholds": [8.0, 9.4]},
    "threshold_true": {"selection": "threshold", "thresholds": [1.44, 1.63], "score_source": "true"},
    "uniform": {"keep_ratio": 0.4},
    "informed": {"keep_ratio": 0.4, "sampling_temperature": 1.0},
    "informed_true": {"keep_ratio": 0.4, "sampling_temperature": 0.5, "score_source": "true"},
}
# Longer and shorter than a block of 4, one token, equal lengths, ragged ends.
DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((21, 3, 40, 8, 1, 17, 8))]


def model_for(selection, form, **changes):
    model = lemo_model(stock_model(), {}, attention_forward=form, **{"block_size": 4, **SELECTIONS[selection], **changes})
    sparse_backbone(model).lemo_draw = 5
    return model


def run(model, batch):
    sparse_backbone(model).lemo_draw = 5
    model.zero_grad()
    with batches_of(model) as batches:
        output = model(**batch, num_items_in_batch=1, output_hidden_states=True)
    output.loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return output.loss.detach(), output.hidden_states[-1].detach(), grads, chosen_blocks(batches[0])


@functools.cache
def each_alone(selection, form):
    return [run(model_for(selection, form), place([tokens], "packed_positions").batch) for tokens in DOCUMENTS]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_a_document_is_trained_the_same_wherever_it_lies(form, selection, layout):
    alone = each_alone(selection, form)
    placed = place(DOCUMENTS, layout, extra=3)
    loss, hidden, grads, chosen = run(model_for(selection, form), placed.batch)
    shares = [block for layer in chosen for document in layer for block in document[1:-1]]
    assert 0 < sum(shares) < len(shares), "a selection of all or nothing proves nothing"
    for index, (row, start, length) in enumerate(placed.places):
        _, hidden_alone, _, chosen_alone = alone[index]
        assert [layer[index] for layer in chosen] == [layer[0] for layer in chosen_alone]
        torch.testing.assert_close(hidden[row, start : start + length], hidden_alone[0], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(loss, sum(result[0] for result in alone), rtol=1e-4, atol=1e-4)
    wanted = {name: sum(result[2].get(name, torch.zeros(())) for result in alone) for name in grads}
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert_same_gradients(grads, wanted, rtol=1e-3, atol=1e-4 * largest)


LONG_DOCUMENTS = [random_tokens(length, seed) for seed, length in enumerate((63, 64, 65, 2001, 700, 128))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("selection", ["ratio", "ratio_true", "uniform", "informed"])
@pytest.mark.parametrize("form", FORMS)
def test_long_documents_of_real_blocks_too(form, selection, checkpoint, layout):
    changes = {"block_size": 64, "checkpoint": checkpoint}
    model = model_for(selection, form, **changes)
    loss, _, grads, chosen = run(model, place(LONG_DOCUMENTS, layout).batch)
    alone = [run(model_for(selection, form, **changes), place([tokens], "right").batch) for tokens in LONG_DOCUMENTS]
    for layer in range(2):
        assert chosen[layer] == [result[3][layer][0] for result in alone]
    torch.testing.assert_close(loss, sum(result[0] for result in alone), rtol=1e-4, atol=1e-4)
    wanted = {name: sum(result[2][name] for result in alone) for name in grads}
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert_same_gradients(grads, wanted, rtol=1e-3, atol=1e-4 * largest)


def test_sampled_documents_draw_for_themselves():
    """The same document twice in a batch draws the same; layers and steps differ."""
    model = lemo_model(stock_model(), block_size=4, keep_ratio=0.4)
    tokens = random_tokens(100, 1)
    batch = place([tokens, random_tokens(100, 2), tokens], "right").batch
    with batches_of(model) as batches:
        model(**batch)
        model(**batch)
        sparse_backbone(model).lemo_draw = 0
        model(**batch)
    first, second, again = map(chosen_blocks, batches)
    assert first[0][0] == first[0][2] != first[0][1]
    assert first[0] != first[1]
    assert second != first
    assert again == first


# --- Ends ---


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_padding_changes_nothing(form, checkpoint):
    model = lemo_model(stock_model(), {}, attention_forward=form, checkpoint=checkpoint, selection="ratio")
    batch = place([random_tokens(30, 1), random_tokens(11, 2)], "right").batch
    wanted_loss, wanted = loss_and_gradients(model, batch)
    fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    wider = {name: torch.cat((part[:1], torch.full_like(part[:1], fillers[name]), part[1:])) for name, part in batch.items()}
    loss, got = loss_and_gradients(model, wider)
    assert torch.equal(loss, wanted_loss)
    assert_same_gradients(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("items", [None, 4])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_ignored_labels_or_padding_gives_zero_gradients(form, checkpoint, items, padding):
    model = lemo_model(stock_model(), {}, attention_forward=form, checkpoint=checkpoint)
    mask = torch.full((2, 30), 0 if padding else 1)
    batch = {"input_ids": text(length=30), "attention_mask": mask, "labels": torch.full((2, 30), -100)}
    loss, grads = loss_and_gradients(model, batch, num_items_in_batch=items)
    assert loss.isnan() if items is None else loss == 0
    assert len(grads) == 2 * 7 * 2
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_one_token(form, checkpoint, selection):
    stock = stock_model()
    model = lemo_model(stock, block_size=4, attention_forward=form, checkpoint=checkpoint, **SELECTIONS[selection])
    token = torch.tensor([[5]])
    torch.testing.assert_close(model(token).logits, stock(token).logits, rtol=1e-4, atol=1e-5)
    loss, grads = loss_and_gradients(model, {"input_ids": token, "shift_labels": token})
    wanted_loss, wanted = loss_and_gradients(stock.train(), {"input_ids": token, "labels": token, "shift_labels": token})
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(grads, wanted, rtol=1e-4, atol=1e-5)


def test_samples_shorter_than_a_block_are_stock_training():
    stock = stock_model()
    model = lemo_model(stock, block_size=64, attention_forward="sparse", keep_ratio=0.1)
    batch = place([random_tokens(length, length) for length in (40, 7, 63)], "left").batch
    loss, got = loss_and_gradients(model, batch)
    wanted_loss, wanted = loss_and_gradients(stock.train(), batch)
    torch.testing.assert_close(loss, wanted_loss)
    assert_same_gradients(got, wanted, rtol=1e-3, atol=1e-5)


def test_embeddings_instead_of_tokens():
    model = lemo_model(stock_model(), selection="ratio")
    wanted = model(text(), labels=text()).loss
    embedded = model.get_input_embeddings()(text())
    torch.testing.assert_close(model(inputs_embeds=embedded, labels=text()).loss, wanted)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(labels=text())


def test_four_accumulated_micro_batches_equal_one_batch_of_four():
    model = lemo_model(stock_model(), {}, segment_size=16)
    batch = place([random_tokens(length, length) for length in (40, 7, 23, 31)], "right").batch
    items = (batch["labels"][:, 1:] != -100).sum()
    _, wanted = loss_and_gradients(model, batch, num_items_in_batch=items)
    model.zero_grad()
    total = 0.0
    for row in range(4):
        sparse_backbone(model).lemo_draw = 0
        loss = model(**{name: part[row : row + 1] for name, part in batch.items()}, num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    sparse_backbone(model).lemo_draw = 0
    assert total == pytest.approx(model(**batch, num_items_in_batch=items).loss.item(), rel=1e-5)
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_same_gradients(grads, wanted, rtol=1e-4, atol=1e-6)


# --- Weights and settings ---


@pytest.mark.parametrize("tied", [False, True])
def test_trained_and_tied_heads_get_the_stock_gradient(tied):
    stock = stock_model(tie_word_embeddings=tied)
    model = lemo_model(stock, keep_ratio=1.0, segment_size=9)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    _, got = loss_and_gradients(model, {"input_ids": text(), "labels": text()})
    _, wanted = loss_and_gradients(stock.train(), {"input_ids": text(), "labels": text()})
    assert ("lm_head.weight" in got) != tied
    assert_same_gradients(got, wanted, rtol=1e-3, atol=1e-5)


def test_changed_settings_take_effect_at_the_next_step():
    model = lemo_model(stock_model(), block_size=8, keep_ratio=0.9)
    model(text(), labels=text())
    before = sparse_backbone(model).lemo_kept_shares[0]
    model.config.lemo.update(keep_ratio=0.3)
    model(text(), labels=text())
    assert sparse_backbone(model).lemo_kept_shares[0] < before


def test_a_model_built_from_its_config_has_initialised_predictors():
    torch.manual_seed(0)
    model = LemoLlamaForCausalLM(lemo_config_from(stock_model().config, LemoConfig(predictor_rank=16)))
    for name, weight in model.named_parameters():
        if "lemo_predictor.distance" in name:
            assert not weight.any(), name
        elif "lemo_predictor" in name:
            assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.3), name


def test_other_head_sizes_biases_and_rope_scaling():
    changes = {
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    }
    stock = stock_model(**changes)
    model = lemo_model(stock, keep_ratio=1.0)
    assert torch.equal(model(text()).logits, stock(text()).logits)
    _, got = loss_and_gradients(model, {"input_ids": text(), "labels": text()})
    _, wanted = loss_and_gradients(stock.train(), {"input_ids": text(), "labels": text()})
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert_same_gradients(got, wanted, rtol=1e-3, atol=1e-5 * largest)


def test_a_few_steps_learn():
    model = lemo_model(stock_model(), {}, keep_ratio=0.5, checkpoint="kept_rows")
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(text(), labels=text()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert losses[0] > 0.8 * torch.tensor(VOCABULARY).log().item()
