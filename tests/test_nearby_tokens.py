"""Local attention of dropped tokens in the sparse form, `nearby_tokens`: its values, its documents, and that nothing of it is saved."""

from functools import partial

import pytest
import torch
from references.one_layer import layer_under_test, run_layer, slowly
from references.tiny_models import (
    ARCHITECTURES,
    assert_same_gradients,
    checkpoint_stock_layers,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    with_varied_vectors,
)

from lemo_hf import LemoConfig
from lemo_hf.models import nearby_attention
from lemo_hf.models.document_attention import AttentionScope, attend
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.nearby_attention import NearbyScope, attend_nearby
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_elimination import selection_of_blocks
from lemo_hf.profiling.flops import FlopCounter

DOCUMENTS = [random_tokens(53, 1), random_tokens(37, 2), random_tokens(9, 3)]
LAYOUTS = ["left", "right", "left_positions", "packed_positions", "packed_seq_idx", "packed_cu"]


def window_of(architecture, layer):
    values = ARCHITECTURES[architecture][1]
    return values.get("sliding_window") if layer >= values.get("max_window_layers", 0) else None


@pytest.mark.parametrize("nearby", [1, 6, 20])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layer_equals_the_slow_reference(architecture, checkpoint, nearby):
    """Output and every gradient, in float64; Mistral's and Qwen2's windows of 11 lie between the widths."""
    layer, hidden, rotary, batch = layer_under_test({}, "sparse", checkpoint, architecture, nearby_tokens=nearby)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=hidden.dtype)
    inputs = [hidden, *(weight for weight in layer.parameters() if weight.requires_grad)]
    results = [
        layer.sparse_forward(hidden, rotary, batch),
        slowly(layer, hidden, rotary, batch, "sparse", window_of(architecture, layer.layer_idx), nearby),
    ]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(*(torch.autograd.grad(result, inputs, upstream) for result in results), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_a_model_equals_the_slow_reference_wherever_documents_lie(architecture, layout):
    model = lemo_model(with_varied_vectors(stock_model(architecture=architecture)), {}, attention_forward="sparse").double()
    sparse_backbone(model).config.lemo.update(nearby_tokens=13, keep_ratio=0.4)
    batch = place(DOCUMENTS, layout).batch
    got = loss_and_gradients(model, batch)
    sparse_backbone(model).lemo_draw = 0
    for layer in sparse_backbone(model).layers:
        layer.sparse_forward = partial(chosen_slowly, layer, window_of(architecture, layer.layer_idx))
    wanted = loss_and_gradients(model, batch)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-11, atol=0.0)
    assert_same_gradients(got[1], wanted[1], rtol=1e-8, atol=1e-11)


def chosen_slowly(layer, window, hidden, rotary, batch):
    layer.choose(hidden.flatten(0, 1), batch.flat_rotary(rotary), batch)
    return slowly(layer, hidden, rotary, batch, "sparse", window, 13)


def some_rows(lengths, size, marks):
    """Random heads of documents side by side, 4 query heads on 2, and a selection of their blocks."""
    documents = find_documents(1, sum(lengths), size, torch.device("cpu"), cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0))
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    return documents, selection_of_blocks(torch.tensor(marks), documents), query, key, value


@pytest.mark.parametrize("width", [1, 3, 4, 9, 29, 10**9])
def test_blocks_of_every_kind_are_windowed_attention(width, monkeypatch):
    """Short last blocks among the dropped ones, documents that drop nothing or everything, and keys gathered in parts."""
    marks = [True, False, False, True, False, False, False, False, False, False, True, True, False]
    documents, selection, query, key, value = some_rows([29, 3, 14], 4, marks)
    wanted, _ = attend(query, key, value, AttentionScope([29, 3, 14], 0.3, min(width, 46), documents.place_of_row))
    for at_once in (16384, 40, 1):
        monkeypatch.setattr(nearby_attention, "_KEYS_AT_ONCE", at_once)
        got = attend_nearby(query[selection.real_rest], key, value, NearbyScope(selection, documents, 0.3, width))
        torch.testing.assert_close(got, wanted[selection.real_rest], rtol=1e-12, atol=1e-12)


def test_a_width_beyond_the_document_is_dense_attention():
    documents, selection, query, key, value = some_rows([29], 4, [True, False, True, False, False, False, True, True])
    wanted, _ = attend(query, key, value, AttentionScope([29], 0.3))
    got = attend_nearby(query[selection.real_rest], key, value, NearbyScope(selection, documents, 0.3, 10**9))
    torch.testing.assert_close(got, wanted[selection.real_rest], rtol=1e-12, atol=1e-12)


def test_work_is_linear_in_tokens():
    """Twice the dropped tokens, twice the attention; none of it depends on what lies beyond the width."""
    counts = []
    for blocks in (8, 16, 32):
        documents, selection, query, key, value = some_rows([blocks * 8], 8, [True, False] * (blocks // 2))
        with FlopCounter(torch.nn.Identity()) as counter:
            attend_nearby(query[selection.real_rest], key, value, NearbyScope(selection, documents, 0.3, 17))
        counts.append(counter.flops.total)
    rows, stretch, heads, size = 4 * 8, 8 + 16, 4, 8
    assert counts == [times * rows * stretch * heads * 2 * 2 * size for times in (1, 2, 4)]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_not_a_byte_more_is_saved(architecture, checkpoint):
    saved = [sum(run_layer("sparse", checkpoint, 0.5, architecture, nearby=nearby)[2].values()) for nearby in (0, 16)]
    assert saved[0] == saved[1] > 0


@pytest.mark.parametrize(
    ("checkpoint", "stock_checkpointing"), [("kept_rows", None), ("none", False), ("none", True), ("kept_rows", False)]
)
def test_no_way_of_checkpointing_changes_a_gradient(checkpoint, stock_checkpointing):
    """Adapters' dropout included, whose numbers the dropped rows' projections draw too."""
    found = []
    for kind, stock_kind in (("none", None), (checkpoint, stock_checkpointing)):
        settings = {"attention_forward": "sparse", "nearby_tokens": 11, "keep_ratio": 0.4, "checkpoint": kind}
        model = lemo_model(stock_model(), {"lora_dropout": 0.4}, **settings)
        if stock_kind is not None:
            checkpoint_stock_layers(model, stock_kind)
            model.enable_input_require_grads()
        torch.manual_seed(13)
        found.append(loss_and_gradients(model, place(DOCUMENTS, "right").batch))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)


def test_kept_row_checkpointing_runs_dropped_rows_once():
    settings = {"attention_forward": "sparse", "nearby_tokens": 11, "keep_ratio": 0.25, "checkpoint": "kept_rows"}
    model = lemo_model(stock_model(num_hidden_layers=1), {}, **settings)
    attention, rows = sparse_backbone(model).layers[0].self_attn, []
    for name in ("q_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(lambda m, args, output, name=name: rows.append((name, len(args[0]))))
    loss_and_gradients(model, place([random_tokens(96, 3)], "right").batch)
    forward = [("q_proj", 72), ("q_proj", 24), ("o_proj", 24), ("o_proj", 72)]
    assert rows == [*forward, ("q_proj", 24), ("o_proj", 24)]


def test_autocast_runs():
    model = lemo_model(stock_model(), {}, attention_forward="sparse", nearby_tokens=16)
    batch = place(DOCUMENTS, "right").batch
    plain = loss_and_gradients(model, batch)[0]
    sparse_backbone(model).lemo_draw = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
    assert gradients
    torch.testing.assert_close(loss, plain, rtol=0.03, atol=0.0)


def test_zero_is_the_paper_s_form():
    """No attention module sees a dropped row, as before the field was there."""
    assert LemoConfig(attention_forward="sparse").nearby == 0
    layer, hidden, rotary, batch = layer_under_test({}, "sparse", "none")
    rows = []
    layer.self_attn.q_proj.register_forward_hook(lambda m, args, output: rows.append(len(args[0])))
    layer.sparse_forward(hidden, rotary, batch)
    assert rows == [batch.selections[1].kept_rows.numel()]


@pytest.mark.parametrize("value", [-1, 1.5, True, "128", 2**31])
def test_what_is_no_number_of_tokens_is_refused(value):
    with pytest.raises(LemoConfigError, match=r"nearby_tokens must be a whole number from 0 to .*; got .*; set it to 0 or more"):
        LemoConfig(attention_forward="sparse", nearby_tokens=value)
