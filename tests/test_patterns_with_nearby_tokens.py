"""Attention patterns among kept tokens while dropped ones see the tokens before them: slow references, and offload to the bit."""

import math
from functools import partial

import pytest
import torch
from offload_models import LINK, assert_same_bits, steps
from references.attention_patterns import groups_by_hand, rows_by_hand
from references.one_layer import layer_under_test, slowly
from references.tiny_models import (
    assert_same_gradients,
    batches_of,
    checkpoint_stock_layers,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    with_varied_vectors,
)

from lemo_hf.models.block_pair_attention import BlockPairs
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

NEARBY = {"nearby_tokens": 128, "block_reduction": "mean"}
PATTERNS = {
    "groups": {"attention_pattern": "shifted_groups"},
    "set groups": {"attention_pattern": "shifted_groups", "group_size": 22},
    "blocks": {"attention_pattern": "block_sparse", "pattern_share": 0.3},
    "by layer": {"attention_pattern": ["block_sparse", "shifted_groups"], "pattern_share": 0.3},
}
# Longer than what a dropped token sees, as long as a block, and short.
LENGTHS = (230, 8, 151, 37)
DOCUMENTS = [random_tokens(length, length) for length in LENGTHS]


def seen_in(batch, layer, group_size):
    """Which kept rows see which in a layer's pattern, `(heads or 1, kept, kept)`."""
    pattern = batch.patterns[layer]
    if isinstance(pattern, BlockPairs):
        return rows_by_hand(pattern)[None]
    return groups_by_hand(batch.selections[layer].kept_lengths, group_size, 4, {2, 3})


@pytest.mark.parametrize("pattern", ["groups", "set groups", "blocks"])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_a_layer_in_a_pattern_equals_the_slow_reference(architecture, checkpoint, pattern):
    """Output and every gradient, in float64, left-padded; Mistral's window of 11 is narrower than all of them."""
    fields = {**NEARBY, **PATTERNS[pattern]}
    layer, hidden, rotary, batch = layer_under_test({}, "sparse", checkpoint, architecture, LENGTHS, 8, **fields)
    got = layer.sparse_forward(hidden, rotary, batch)
    sees = seen_in(batch, layer.layer_idx, fields.get("group_size"))
    assert not sees.all(0).equal(torch.ones_like(sees[0]).tril())
    wanted = slowly(layer, hidden, rotary, batch, "sparse", 11 if architecture == "mistral" else None, 128, sees)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=hidden.dtype)
    inputs = [hidden, *(weight for weight in layer.parameters() if weight.requires_grad)]
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    for mine, reference in zip(*(torch.autograd.grad(result, inputs, upstream) for result in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layout", ["left", "right", "packed_positions", "packed_cu"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_model_in_a_pattern_equals_the_slow_reference_wherever_documents_lie(pattern, layout):
    fields = {"attention_forward": "sparse", "selection": "ratio", "keep_ratio": 0.4, **NEARBY, **PATTERNS[pattern]}
    model = lemo_model(with_varied_vectors(stock_model()), {}, **fields).double()
    batch = place(DOCUMENTS, layout).batch
    got = loss_and_gradients(model, batch)
    for layer in sparse_backbone(model).layers:
        layer.sparse_forward = partial(chosen_slowly, layer, fields.get("group_size"))
    wanted = loss_and_gradients(model, batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-11, atol=0.0)
    assert_same_gradients(got[1], wanted[1], rtol=1e-8, atol=1e-11)


def chosen_slowly(layer, group_size, hidden, rotary, batch):
    rows, flat = hidden.flatten(0, 1), batch.flat_rotary(rotary)
    layer.choose_pattern(rows, flat, batch, layer.choose(rows, flat, batch))
    return slowly(layer, hidden, rotary, batch, "sparse", None, 128, seen_in(batch, layer.layer_idx, group_size))


def test_beside_a_pattern_kept_rows_are_what_they_were():
    batch, outputs, kept = place([random_tokens(96, 3)], "right").batch, [], []
    for nearby in (0, 16):
        settings = {"attention_forward": "sparse", "attention_pattern": "shifted_groups", "nearby_tokens": nearby}
        model = lemo_model(stock_model(num_hidden_layers=1), **settings)
        sparse_backbone(model).layers[0].register_forward_hook(lambda m, args, output: outputs.append(output.detach()[0]))
        with batches_of(model) as batches:
            model(**batch)
        kept.append(batches[0].selections[0])
    assert torch.equal(outputs[0][kept[0].kept_rows], outputs[1][kept[1].kept_rows])
    assert not torch.isclose(outputs[0][kept[0].rest_rows], outputs[1][kept[1].rest_rows]).all(1).any()


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows", "activation"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_offload_changes_no_bit_beside_a_pattern(pattern, checkpoint):
    """Several rows, left-padded and packed, queries in groups, adapters with dropout: with all, a part, and what hides moved."""
    fields = {"attention_forward": "sparse", "selection": "ratio", "keep_ratio": [0.5, 0.75], **NEARBY, **PATTERNS[pattern]}

    def stepped(batch, settings=None):
        stored = "kept_rows" if checkpoint == "kept_rows" else "none"
        model = lemo_model(stock_model(), {"lora_dropout": 0.2}, checkpoint=stored, **fields)
        if checkpoint == "activation":
            checkpoint_stock_layers(model)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        if settings is None:
            return steps(model, count=2, batch=batch)[0]
        with SensitiveOffload(sparse_backbone(model), settings) as offload:
            found, reports = steps(model, offload, 2, batch)
        assert all(sum(report.moved_bytes) > 0 for report in reports)
        return found

    for layout in ("left", "packed_positions"):
        batch = place(DOCUMENTS, layout).batch
        wanted = stepped(batch)
        for budget in (math.inf, 70_001.0, None):
            times = [(1e-4, 1e-4)] * 2
            settings = OffloadSettings(budget=budget, smallest=1, link=LINK, seconds=times)
            for got, reference in zip(stepped(batch, settings), wanted, strict=True):
                assert_same_bits(got, reference)
