"""Sliding windows beyond what test_architectures.py says of them: where they end, and what they must not cost."""

import pytest
import torch
from references.one_layer import layer_under_test
from references.tiny_models import (
    assert_close_gradients,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
)

from lemo_hf.models import document_attention
from lemo_hf.models.sparse_decoder import sparse_backbone

TOKENS = random_tokens(60, 1)[None]


def model_with(window, **lemo):
    stock = stock_model(architecture="mistral", sliding_window=window)
    return stock, lemo_model(stock, **lemo)


@pytest.mark.parametrize("window", [1, 2, 59, 60, 61, None])
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_windows_of_every_width_equal_stock_training(form, window):
    stock, model = model_with(window, keep_ratio=1.0, attention_forward=form)
    loss, got = loss_and_gradients(model, {"input_ids": TOKENS, "labels": TOKENS})
    wanted_loss, wanted = loss_and_gradients(stock.train(), {"input_ids": TOKENS, "labels": TOKENS})
    torch.testing.assert_close(loss, wanted_loss)
    assert_close_gradients(got, wanted, rtol=1e-3, share=1e-5)


@pytest.mark.parametrize(("window", "masked"), [(59, True), (60, False), (4096, False), (None, False)])
def test_a_window_that_covers_every_document_forms_no_mask(window, masked, monkeypatch):
    strips = []
    whole = document_attention._strips
    monkeypatch.setattr(document_attention, "_strips", lambda *args: strips.append(args) or whole(*args))
    _, model = model_with(window, keep_ratio=0.5)
    loss_and_gradients(model, {"input_ids": TOKENS, "labels": TOKENS})
    # Forward and backward of two layers.
    assert len(strips) == (4 if masked else 0)


def test_true_scores_heed_the_window():
    """A needle that only tokens outside its window would attend to makes no block informative."""
    scores = {}
    for window in (8, None):
        _, model = model_with(window, block_size=4)
        layer = sparse_backbone(model).layers[0]
        query = key = torch.zeros(40, 4, 8)
        key[0], query[30:] = 1.0, 1.0
        scores[window] = layer.block_scores(query, key[:, :2], 4)
    assert not scores[8][:, 0][2:].any()
    assert scores[None][8, 0] > 0


def test_layers_of_one_model_may_differ():
    stock = stock_model(architecture="qwen2", layer_types=["sliding_attention", "full_attention"])
    layers = sparse_backbone(lemo_model(stock)).layers
    assert [layer.attention_window for layer in layers] == [11, None]
    unused = stock_model(architecture="qwen2", use_sliding_window=False)
    assert [layer.attention_window for layer in sparse_backbone(lemo_model(unused)).layers] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sparse", "exact", "kept_keys"])
def test_long_documents_of_several_strips_equal_stock_training(form):
    stock, model = model_with(300, keep_ratio=1.0, attention_forward=form, block_size=64)
    batch = place([random_tokens(length, length) for length in (1500, 700, 40)], "right").batch
    loss, got = loss_and_gradients(model, batch)
    wanted_loss, wanted = loss_and_gradients(stock.train(), batch, use_cache=False)
    torch.testing.assert_close(loss, wanted_loss)
    assert_close_gradients(got, wanted, rtol=1e-3, share=1e-4)


def test_distance_is_the_original_one_not_that_among_kept_rows():
    """With gaps, rows that are neighbours among kept ones may be out of each other's sight."""
    layer, hidden, rotary, batch = layer_under_test(None, "sparse", "none", "mistral", lengths=(40,))
    output = layer.sparse_forward(hidden, rotary, batch)
    kept = batch.selections[1].kept_rows
    gaps = kept[1:] - kept[:-1]
    assert gaps.max() > 1
    row = int(kept[1:][gaps == gaps.max()][0])
    seen = torch.autograd.grad(output.flatten(0, 1)[row].sum(), hidden)[0].flatten(0, 1).abs().sum(1).nonzero().flatten()
    assert seen.tolist() == [each for each in kept.tolist() if row - 11 < each <= row]
