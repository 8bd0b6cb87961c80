"""What only OPT has: learned positions, hidden dropout, an MLP with ReLU, projected embeddings, and sizes that are refused."""

import pytest
import torch
from references.one_layer import run_layer
from references.tiny_models import (
    assert_close_gradients,
    batches_of,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    with_varied_vectors,
)
from transformers import OPTConfig

from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.registry import lemo_config_from

TOKENS = random_tokens(60, 1)[None]


def opt(**changes):
    return with_varied_vectors(stock_model(architecture="opt", **changes))


def positions_seen(model, batch):
    seen = []
    hook = sparse_backbone(model).embed_positions.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with batches_of(model) as batches:
        model(**batch)
    hook.remove()
    return seen[0].expand(batch["input_ids"].shape[0], -1), batches[0].documents


@pytest.mark.parametrize("layout", ["left", "right", "packed_positions", "packed_seq_idx", "packed_cu"])
def test_positions_count_from_each_document_s_first_token(layout):
    model = lemo_model(opt())
    positions, documents = positions_seen(model, place([random_tokens(length, length) for length in (21, 5, 34)], layout).batch)
    for start, length in zip(documents.starts, documents.lengths, strict=True):
        assert positions.flatten()[start : start + length].tolist() == list(range(length))


def test_given_positions_are_kept():
    model = lemo_model(opt())
    given = torch.arange(7, 67)[None]
    positions, _ = positions_seen(model, {"input_ids": TOKENS, "position_ids": given})
    assert torch.equal(positions, given)


def test_a_document_beyond_the_learned_positions_is_refused_in_one_line():
    model = lemo_model(opt(max_position_embeddings=32))
    with pytest.raises(LemoConfigError, match=r"the model's 32 learned positions; it has 60 tokens; use shorter") as error:
        model(TOKENS, labels=TOKENS)
    assert "\n" not in str(error.value)
    short = place([random_tokens(30, 1), random_tokens(30, 2)], "packed_seq_idx").batch
    assert model(**short).loss.isfinite()


@pytest.mark.parametrize(
    "changes", [{"word_embed_proj_dim": 16}, {"_remove_final_layer_norm": True}, {"enable_bias": False}], ids=str
)
def test_variants_equal_stock_training(changes):
    stock = opt(**changes)
    model = lemo_model(stock, keep_ratio=1.0)
    assert torch.equal(model.eval()(TOKENS).logits, stock(TOKENS).logits)
    loss, got = loss_and_gradients(model.train(), {"input_ids": TOKENS, "labels": TOKENS})
    wanted_loss, wanted = loss_and_gradients(stock.train(), {"input_ids": TOKENS, "labels": TOKENS})
    torch.testing.assert_close(loss, wanted_loss)
    assert_close_gradients(got, wanted, rtol=1e-3, share=1e-5)


def test_layers_that_normalise_after_are_refused_in_one_line():
    """OPT-350m."""
    with pytest.raises(LemoConfigError, match=r"got do_layer_norm_before=False, as OPT-350m has it; choose another") as error:
        lemo_config_from(OPTConfig(do_layer_norm_before=False, word_embed_proj_dim=512, hidden_size=1024))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["layerdrop", "attention_dropout"])
def test_dropping_layers_or_attention_is_refused(name):
    model = lemo_model(opt(**{name: 0.1}))
    with pytest.raises(LemoConfigError, match=rf"the config has {name}=0.1; set it to 0.0"):
        model(TOKENS, labels=TOKENS)


def test_hidden_dropout_falls_on_kept_and_rest_rows_with_its_probability():
    """Zero weights behind a bias of one: what reaches the residual stream is 1 / (1 - p) or nothing, twice per row."""
    stock = stock_model(architecture="opt", dropout=0.25, num_hidden_layers=1)
    for name, weight in stock.named_parameters():
        weight.data.fill_(1.0 if name.endswith(("out_proj.bias", "fc2.bias")) else 0.0)
    for form, kept_share in (("exact", 1.0), ("kept_keys", 1.0), ("sparse", 0.0)):
        model = lemo_model(stock, keep_ratio=0.5, attention_forward=form)
        streams, backbone = [], sparse_backbone(model)
        backbone.layers[0].register_forward_hook(lambda module, args, output, into=streams: into.append(output[0]))
        with batches_of(model) as batches:
            model(random_tokens(400, 1)[None])
        selection = batches[0].selections[0]
        kept, rest = (streams[0][rows] * 0.75 for rows in (selection.kept_rows, selection.rest_rows))
        assert set(kept.unique().tolist()) == {0.0, 1.0, 2.0}
        # In the sparse form a rest row passes attention by, so its MLP's dropout alone falls on it.
        assert set(rest.unique().tolist()) == ({0.0, 1.0} if form == "sparse" else {0.0, 1.0, 2.0})
        assert kept.mean().item() == pytest.approx(1.5, abs=0.05)
        assert rest.mean().item() == pytest.approx(0.75 * (1 + kept_share), abs=0.05)


def test_the_mlp_saves_its_relu_output_only():
    """Rows of H with adapters everywhere: norms 2, their outputs 2, q, k, v and output 4, MLP 80 / 32, once; of dropped rows k, v."""
    _, saved, storages, kept = run_layer("exact", "none", 0.5, "opt")
    assert len({t.untyped_storage().data_ptr() for t in saved if t.shape[1:].numel() == 80}) == 1
    adapters, statistics, index = 6 * 4, 2 * 2 + 4, 2  # products of r = 4; two norms' and each head's; a row number of 8 bytes
    dropped = (2 * 61 - kept) * 4 * 2 * 32
    assert sum(storages.values()) == kept * 4 * ((2 + 2 + 4) * 32 + 80 + adapters + statistics + index) + dropped
