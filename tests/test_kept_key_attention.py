"""The form `"kept_keys"`: every token sees kept tokens and nearby ones. Values, gradients, documents, bytes, compilation."""

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
from lemo_hf.models import kept_key_attention
from lemo_hf.models.document_attention import AttentionScope, attend, with_kept_row_gradient
from lemo_hf.models.documents import find_documents
from lemo_hf.models.kept_key_attention import KeptKeyScope, attend_kept_keys, rest_query_gradient, with_rest_keys
from lemo_hf.models.lemo_config import LemoConfigError
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
    layer, hidden, rotary, batch = layer_under_test({}, "kept_keys", checkpoint, architecture, nearby_tokens=nearby)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=hidden.dtype)
    inputs = [hidden, *(weight for weight in layer.parameters() if weight.requires_grad)]
    results = [
        layer.sparse_forward(hidden, rotary, batch),
        slowly(layer, hidden, rotary, batch, "kept_keys", window_of(architecture, layer.layer_idx), nearby),
    ]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(*(torch.autograd.grad(result, inputs, upstream) for result in results), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
def test_a_model_equals_the_slow_reference_wherever_documents_lie(architecture, layout):
    stock = with_varied_vectors(stock_model(architecture=architecture))
    model = lemo_model(stock, {}, attention_forward="kept_keys", nearby_tokens=13, keep_ratio=0.4).double()
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
    return slowly(layer, hidden, rotary, batch, "kept_keys", window, 13)


def some_rows(lengths, size, marks, seed=1):
    """Random heads of documents side by side, 4 query heads on 2, and a selection of their blocks."""
    documents = find_documents(1, sum(lengths), size, torch.device("cpu"), cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0))
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    return documents, selection_of_blocks(torch.tensor(marks), documents), query, key, value


def attended(documents, selection, query, key, value, width, window=None):
    kept = selection.real_kept
    return attend_kept_keys(query, key, value, key[kept], value[kept], KeptKeyScope(selection, documents, 0.3, width, window))


def densely(documents, selection, query, key, value, width, window):
    """By the matrix of all scores: output and log-sum-exp."""
    place, rows = documents.place_of_row, torch.arange(len(query))
    document = (place == 0).cumsum(0)
    distance = rows[:, None] - rows
    kept = torch.zeros(len(rows), dtype=torch.bool).index_fill_(0, selection.real_kept, True)
    seen = (document[:, None] == document) & (distance >= 0) & (kept | (distance < width))
    if window is not None:
        seen &= distance < window
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * 0.3
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(2, 1)), scores.logsumexp(-1).T.unsqueeze(-1)


@pytest.mark.parametrize("window", [None, 2, 11, 26])
@pytest.mark.parametrize("width", [1, 3, 4, 9, 29, 10**9])
def test_blocks_of_every_kind_are_the_formula(width, window, monkeypatch):
    """Short last blocks among the dropped ones, documents that drop nothing or everything, strips of one block and of several."""
    marks = [True, False, False, True, False, False, False, False, False, False, True, True, False]
    rows = some_rows([29, 3, 14], 4, marks)
    wanted = densely(*rows, width, window)
    for strip in (256, 8, 1):
        monkeypatch.setattr(kept_key_attention, "_STRIP", strip)
        for got, part in zip(attended(*rows, width, window), wanted, strict=True):
            torch.testing.assert_close(got, part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("marks", [[True] * 8, [True, False, True, False, False, False, True, True]])
def test_a_width_beyond_the_document_is_dense_attention(marks):
    documents, selection, *heads = some_rows([29], 4, marks)
    wanted = attend(*heads, AttentionScope([29], 0.3))
    for got, part in zip(attended(documents, selection, *heads, 10**9), wanted, strict=True):
        torch.testing.assert_close(got, part, rtol=1e-12, atol=1e-12)


def test_a_quarter_of_the_blocks_is_a_quarter_of_the_pairs():
    """Beyond the nearby tokens: twice the document, four times the pairs, and of those as many as are kept."""
    flops = {}
    for blocks, every in ((64, 2), (128, 2), (128, 4)):
        rows = some_rows([blocks * 8], 8, [block % every == 0 for block in range(blocks)])
        with FlopCounter(torch.nn.Identity()) as counter:
            attended(*rows, 8)
        flops[blocks, every] = counter.flops.total / (2 * 4 * 2 * 8)
    # A strip of 256 queries looks at its own 256 and 8 keys before them besides.
    nearby = {blocks: sum(256 * min(start + 256, 264) for start in range(0, blocks * 8, 256)) for blocks in (64, 128)}
    far = {case: pairs - nearby[case[0]] for case, pairs in flops.items()}
    assert far[128, 4] * 2 == far[128, 2]
    # Of the 31, 63 and 95 blocks before that stretch every other one is kept, the first among them.
    assert far[128, 2] == 256 * 8 * (16 + 32 + 48)


def test_on_shapes_alone_kept_blocks_are_taken_to_lie_evenly():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = some_rows([512], 8, [block % 2 == 0 for block in range(64)])
    counts = []
    with FlopCounter(torch.nn.Identity()) as counter:
        attended(*real, 8)
    counts.append(counter.flops.total)
    with FakeTensorMode(), FlopCounter(torch.nn.Identity()) as counter:
        documents = find_documents(1, 512, 8, torch.device("cpu"))
        selection = selection_of_blocks(torch.empty(64, dtype=torch.bool), documents, [256])
        attended(documents, selection, *(torch.empty(512, heads, 8) for heads in (4, 2, 2)), 8)
    counts.append(counter.flops.total)
    assert counts[1] == pytest.approx(counts[0], rel=0.01)  # evenly to the row, not to the block


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_it_saves_what_the_exact_form_saves(architecture, checkpoint):
    forms = (("exact", None), ("kept_keys", 16))
    saved = [sum(run_layer(form, checkpoint, 0.5, architecture, nearby=nearby)[2].values()) for form, nearby in forms]
    assert saved[0] == saved[1] > 0


@pytest.mark.parametrize(
    ("checkpoint", "stock_checkpointing"), [("kept_rows", None), ("none", False), ("none", True), ("kept_rows", False)]
)
def test_no_way_of_checkpointing_changes_a_gradient(checkpoint, stock_checkpointing):
    """Adapters' dropout included, whose numbers the dropped rows' projections draw too."""
    found = []
    for kind, stock_kind in (("none", None), (checkpoint, stock_checkpointing)):
        settings = {"attention_forward": "kept_keys", "nearby_tokens": 11, "keep_ratio": 0.4, "checkpoint": kind}
        model = lemo_model(stock_model(), {"lora_dropout": 0.4}, **settings)
        if stock_kind is not None:
            checkpoint_stock_layers(model, stock_kind)
            model.enable_input_require_grads()
        torch.manual_seed(13)
        found.append(loss_and_gradients(model, place(DOCUMENTS, "right").batch))
    assert torch.equal(found[0][0], found[1][0])
    assert_same_gradients(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)


def test_kept_row_checkpointing_runs_dropped_rows_once():
    settings = {"attention_forward": "kept_keys", "keep_ratio": 0.25, "checkpoint": "kept_rows"}
    model = lemo_model(stock_model(num_hidden_layers=1), {}, **settings)
    attention, rows = sparse_backbone(model).layers[0].self_attn, []
    for name in ("q_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(lambda m, args, output, name=name: rows.append((name, len(args[0]))))
    loss_and_gradients(model, place([random_tokens(96, 3)], "right").batch)
    forward = [("q_proj", 72), ("q_proj", 24), ("o_proj", 24), ("o_proj", 72)]
    assert rows == [*forward, ("q_proj", 24), ("o_proj", 24)]


@pytest.mark.parametrize(("width", "window"), [(4, None), (4, 11)])
def test_where_blocks_are_not_known_as_it_is_traced_the_result_is_the_same(width, window, monkeypatch):
    """The strips then look at as many kept rows as there may be, and mask those that come later."""
    rows = some_rows(
        [61], 4, [True, False, False, True, True, True, True, False, True, False, False, True, True, False, True, True]
    )
    wanted = attended(*rows, width, window)
    monkeypatch.setattr(kept_key_attention, "_STRIP", 8)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for got, part in zip(attended(*rows, width, window), wanted, strict=True):
        torch.testing.assert_close(got, part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [[20], [10, 10], [3, 9, 1]], ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("width", [1, 5, 20])
def test_the_gradient_of_kept_queries_is_that_of_all_keys_they_see(width, window, lengths):
    """Kept and dropped keys together: with a width beyond the documents the dense gradient, as in the exact form."""
    blocks = sum(-(-length // 2) for length in lengths)
    marks = (torch.rand(blocks, generator=torch.Generator().manual_seed(5)) < 0.5).tolist()
    documents, selection, query, key, value = some_rows(lengths, 2, marks)
    kept, rest = selection.real_kept, selection.real_rest
    scope = KeptKeyScope(selection, documents, 0.3, width, window)
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(6), dtype=query.dtype)
    leaf = query.clone().requires_grad_()
    seen, _ = densely(documents, selection, leaf, key, value, width, window)
    wanted = torch.autograd.grad(seen[kept], leaf, upstream[kept])[0][kept]
    output, lse = attend_kept_keys(query, key, value, key[kept], value[kept], scope)
    leaf = query[kept].requires_grad_()
    places = None if window is None else documents.place_of_row[kept]
    among = AttentionScope(selection.kept_lengths, 0.3, window, places)
    attached = with_kept_row_gradient(leaf, key[kept], value[kept], output[kept], lse[kept], among)
    attached = with_rest_keys(attached, leaf, lse[kept], key[rest], value[rest], scope)
    torch.testing.assert_close(torch.autograd.grad(attached, leaf, upstream[kept])[0], wanted)


def test_a_backward_within_autocast_loses_no_bits():
    documents, selection, query, key, value = some_rows([61], 4, [True, False] * 8)
    kept, rest = selection.real_kept, selection.real_rest
    query, key, value = (part.float() for part in (query, key, value))
    output, lse = attended(documents, selection, query, key, value, 9)
    arguments = (output[kept].cos(), query[kept], output[kept], lse[kept], key[rest], value[rest])
    scope = KeptKeyScope(selection, documents, 0.3, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = rest_query_gradient(*arguments, scope)
    assert torch.equal(within, rest_query_gradient(*arguments, scope))


def test_queries_without_gradient_ask_nothing(monkeypatch):
    """As in a first layer with adapters on its values alone."""
    monkeypatch.setattr(kept_key_attention, "rest_query_gradient", None)
    model = lemo_model(stock_model(num_hidden_layers=1), {"targets": ["v_proj"]}, keep_ratio=0.4)
    assert loss_and_gradients(model, place(DOCUMENTS, "right").batch)[1]


def test_autocast_runs():
    model = lemo_model(stock_model(), {}, attention_forward="kept_keys", nearby_tokens=16)
    batch = place(DOCUMENTS, "right").batch
    plain = loss_and_gradients(model, batch)[0]
    sparse_backbone(model).lemo_draw = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
    assert gradients
    torch.testing.assert_close(loss, plain, rtol=0.03, atol=0.0)


def test_what_is_not_set_is_what_the_form_takes():
    assert LemoConfig(attention_forward="kept_keys").nearby == 256
    assert LemoConfig(attention_forward="kept_keys", nearby_tokens=7).nearby == 7
    assert LemoConfig(attention_forward="sparse").nearby == 0
    assert LemoConfig().nearby is None


@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
@pytest.mark.parametrize("nearby", [0, 6])
def test_the_exact_form_s_gradient_sees_as_many_dropped_keys_as_are_asked_for(nearby, checkpoint):
    """The forward pass stays the dense one; where none are seen their keys and values are not saved."""
    outputs, grads = [], []
    for width in (None, nearby):
        layer, hidden, rotary, batch = layer_under_test({}, "exact", checkpoint, nearby_tokens=width)
        outputs.append(layer.sparse_forward(hidden, rotary, batch))
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4), dtype=hidden.dtype)
        named = {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}
        grads.append(dict(zip(named, torch.autograd.grad(outputs[-1], named.values(), upstream), strict=True)))
    torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    differs = {name.split(".")[1] for name in grads[0] if not torch.allclose(grads[0][name], grads[1][name])}
    assert differs == {"q_proj"}
    whole, part = (sum(run_layer("exact", checkpoint, 0.5, nearby=width)[2].values()) for width in (None, nearby))
    assert (part < whole) == (nearby == 0)


def test_a_token_that_sees_not_even_itself_is_refused():
    with pytest.raises(
        LemoConfigError, match="a token sees itself at least; got nearby_tokens=0 with attention_forward='kept_keys'"
    ):
        LemoConfig(attention_forward="kept_keys", nearby_tokens=0)


def test_patterns_are_refused():
    with pytest.raises(LemoConfigError, match="got attention_pattern='shifted_groups' with attention_forward='kept_keys'"):
        LemoConfig(attention_forward="kept_keys", attention_pattern="shifted_groups")
