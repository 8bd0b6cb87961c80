import functools

import pytest
import torch
from references.tiny_models import (
    VOCABULARY,
    assert_close_gradients,
    assert_same_gradients,
    batches_of,
    chosen_blocks,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    text,
    with_varied_vectors,
)

from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.registry import lemo_config_from

FORMS = ["sparse", "exact", "kept_keys"]
LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]


# --- The stock model, wherever LeMo is not training ---


def test_eval_after_training_steps_is_stock_again():
    stock = stock_model()
    model = lemo_model(stock)
    loss_and_gradients(model, {"input_ids": text(), "labels": text()})
    model.eval()
    assert torch.equal(model(text()).logits, stock(text()).logits)


def test_keeping_everything_needs_no_labels_and_gives_logits():
    stock = stock_model()
    model = lemo_model(stock, keep_ratio=1.0)
    torch.testing.assert_close(model(text()).logits, stock(text()).logits, rtol=1e-4, atol=1e-5)


# --- Positions and shapes that checkpoints of Llama 1 to 3 have ---

ROPE = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0}
    | {"original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("rope_type", ROPE)
def test_scaled_positions_are_the_stock_ones_in_every_forward(rope_type):
    """Samples beyond the original context and then within it: some scalings change with the length that they see."""
    rope = {"rope_type": rope_type, "rope_theta": 1e4, **ROPE[rope_type]}
    stock = stock_model(rope_parameters=rope, max_position_embeddings=32)
    plain = stock_model()
    exact = lemo_model(stock, keep_ratio=0.4)
    dense = lemo_model(stock, keep_ratio=1.0, attention_forward="sparse")
    for tokens in (text(length=50), text(length=20)):
        batch = {"input_ids": tokens, "labels": tokens}
        wanted = stock.eval()(tokens).logits
        assert torch.equal(exact(tokens).logits, wanted)
        assert torch.equal(exact.eval()(tokens).logits, wanted)
        exact.train()
        with batches_of(dense) as batches:
            _, got = loss_and_gradients(dense, batch)
        cos, sin = stock.model.rotary_emb(torch.zeros(()), torch.arange(tokens.shape[1])[None])
        assert torch.equal(batches[0].rotary[0], cos[0].repeat(2, 1))
        assert torch.equal(batches[0].rotary[1], sin[0].repeat(2, 1))
        _, gradients = loss_and_gradients(stock.train(), batch)
        assert_close_gradients(got, gradients, rtol=1e-3, share=1e-5)
    assert not torch.allclose(stock(text()).logits, plain(text()).logits, atol=1e-2)


def test_other_head_sizes_and_biases():
    stock = with_varied_vectors(stock_model(head_dim=16, attention_bias=True, mlp_bias=True))
    model = lemo_model(stock, keep_ratio=1.0)
    assert torch.equal(model.eval()(text()).logits, stock(text()).logits)
    _, got = loss_and_gradients(model.train(), {"input_ids": text(), "labels": text()})
    _, wanted = loss_and_gradients(stock.train(), {"input_ids": text(), "labels": text()})
    assert_close_gradients(got, wanted, rtol=1e-3, share=1e-5)


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
    assert_close_gradients(grads, wanted, rtol=1e-3, share=1e-4)


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
    assert_close_gradients(grads, wanted, rtol=1e-3, share=1e-4)


def test_sampled_documents_draw_for_themselves():
    """The same document twice in a batch draws the same; steps differ, and layers where each draws its own."""
    model = lemo_model(stock_model(), block_size=4, keep_ratio=0.4, draws="by_layer")
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
