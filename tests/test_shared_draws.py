"""What layers that draw the same blocks do to the gradient, against layers that draw each their own."""

import pytest
import torch
from references.tiny_models import (
    add_lora,
    assert_close_gradients,
    batches_of,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    trainable_gradients,
)

TOKENS = [random_tokens(90, 1), random_tokens(37, 2)]
LAYERS = 3


def without_mixing(model):
    """Attention adds nothing: a token's loss depends on its own rows alone, and its gradient can be told from the others'."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


MLP = {"targets": ["gate_proj", "up_proj", "down_proj"]}


def gradients_of_kept_tokens(draws: str, checkpoint: str) -> tuple[dict, dict]:
    """The exact form's gradient of the summed loss of one step, and stock's gradient of the loss of the kept tokens only."""
    stock = without_mixing(stock_model(num_hidden_layers=LAYERS))
    model = lemo_model(stock, MLP, draws=draws, keep_ratio=0.5, checkpoint=checkpoint)
    batch = place(TOKENS, "right").batch
    with batches_of(model) as batches:
        _, got = loss_and_gradients(model, batch, num_items_in_batch=1)
    kept = torch.zeros(batch["labels"].numel(), dtype=torch.bool)
    kept[batches[0].selections[0].kept_rows] = True
    # The label at a place is predicted by the row before it.
    labels = batch["labels"].clone()
    labels[:, 1:][~kept.view(labels.shape)[:, :-1]] = -100
    dense = add_lora(stock, **MLP)
    _, wanted = loss_and_gradients(dense, {**batch, "labels": labels}, num_items_in_batch=1)
    return got, wanted


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_without_attention_a_kept_token_has_its_whole_gradient(checkpoint):
    """Then the mean over draws is the dense gradient, times the chance to be kept: a constant among the drawn blocks."""
    got, wanted = gradients_of_kept_tokens("shared", checkpoint)
    assert_close_gradients(got, wanted)


def test_draws_by_layer_cut_a_kept_token_off_from_some_layers():
    got, wanted = gradients_of_kept_tokens("by_layer", "none")
    (name,) = (name for name in wanted if "layers.0.mlp.down_proj.lora_B" in name)
    assert torch.cosine_similarity(got[name].flatten(), wanted[name].flatten(), 0) < 0.95


def test_layers_of_one_share_hold_one_selection():
    model = lemo_model(
        stock_model(num_hidden_layers=5), {}, keep_ratio=[0.5, 0.5, 0.25, 1.0, 0.5], dense_layers=[1], block_size=4
    )
    with batches_of(model) as batches:
        model(**place(TOKENS, "left").batch).loss.backward()
    chosen = batches[0].selections
    assert chosen[0] is chosen[4]
    assert chosen[1].kept_share == chosen[3].kept_share == 1
    assert chosen[2].kept_share < chosen[0].kept_share < 1
    assert trainable_gradients(model)


def test_informed_draws_share_their_random_numbers_but_not_the_scores():
    """With a temperature each layer weighs blocks by its own scores: the random numbers are the same, the blocks need not be."""
    stock = stock_model(num_hidden_layers=LAYERS)
    shared, own = (
        lemo_model(stock, {}, keep_ratio=0.5, block_size=4, sampling_temperature=2.0, score_source="true", draws=draws)
        for draws in ("shared", "by_layer")
    )
    agreement = []
    for model in (shared, own):
        same = []
        with batches_of(model) as batches:
            for _ in range(20):
                model(**place(TOKENS, "right").batch)
        for batch in batches:
            marks = [batch.selections[layer].kept_blocks for layer in range(LAYERS)]
            same.append((marks[0] == marks[1]).float().mean())
        agreement.append(torch.stack(same).mean().item())
    assert agreement[0] > agreement[1] + 0.1
    assert agreement[0] < 1
