"""Every choice of the quality bench chooses what its definition says, and restricts what it says."""

from contextlib import contextmanager

import pytest
import torch
from references.tiny_models import (
    add_lora,
    assert_close_gradients,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
)

from benchmarks.quality import block_rankings, choices, gradient_oracle
from benchmarks.quality.choices import CHOICES, chosen_by
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_elimination import kept_block_count

SIZE = 8
DOCUMENTS = [random_tokens(93, 1), random_tokens(61, 2)]
ATTENTION = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
RANKED = [
    name for name, choice in CHOICES.items() if choice.ranking is not None and choice.ranking is not block_rankings.gradient_norm
]
EMULATED = [name for name, choice in CHOICES.items() if choice.is_emulated and not choice.nearby]


@pytest.fixture(scope="module")
def model():
    return lemo_model(stock_model(), ATTENTION, keep_ratio=0.5, block_size=SIZE)


@contextmanager
def batches_of(model):
    """What the layers of each sparse forward within share; dense ones, which an oracle runs, have nothing."""
    batches = []
    first = sparse_backbone(model).layers[0]
    note = lambda _, args, kwargs: batches.extend([kwargs["sparse_batch"]] if "sparse_batch" in kwargs else [])  # noqa: E731
    hook = first.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield batches
    finally:
        hook.remove()


def chosen(model, name, batch, draw=0):
    """What each layer keeps, `(layers, blocks)`, and the batch's documents."""
    sparse_backbone(model).lemo_draw = draw
    with chosen_by(model, name), batches_of(model) as batches:
        model(**batch).loss.backward()
    selections = batches[0].selections
    return torch.stack([selections[layer].kept_blocks for layer in sorted(selections)]), batches[0].documents


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "sparse_nearby"])
def test_counts_and_documents(model, name):
    """As many blocks as the package keeps, and a document of a batch, wherever it lies, keeps what it keeps alone."""
    layout = "packed_positions" if CHOICES[name].is_emulated or CHOICES[name].needs_oracle else "left"
    marks, documents = chosen(model, name, place(DOCUMENTS, layout).batch, draw=3)
    for index, part in enumerate(marks.split(documents.block_counts, 1)):
        assert (part.sum(1) == kept_block_count(part.shape[1], 0.5)).all()
        assert part[:, 0].all()
        assert part[:, -1].all()
        if CHOICES[name].needs_oracle:
            continue  # the loss, and with it its gradient, is that of the whole batch
        alone, _ = chosen(model, name, place(DOCUMENTS[index : index + 1], "right").batch, draw=3)
        assert torch.equal(part, alone)


def heads_of(model, layer, tokens):
    """Queries, keys, values `(tokens, heads, d)` of the dense model, keys and values repeated, and what attention adds."""
    found = {}

    def look(module, args, kwargs):
        residual = (args[0] if args else kwargs["hidden_states"])[0]
        rotary = tuple(part[0] for part in kwargs["position_embeddings"])
        found["heads"] = module.project_heads(module.attention_norm(residual), rotary)

    module = sparse_backbone(model).layers[layer]
    handles = [
        module.register_forward_pre_hook(look, with_kwargs=True),
        module.self_attn.register_forward_hook(lambda m, a, output: found.update(added=output[0][0])),
    ]
    model.eval()
    with torch.no_grad():
        model(input_ids=tokens[None])
    model.train()
    for handle in handles:
        handle.remove()
    query, key, value = found["heads"]
    groups = query.shape[1] // key.shape[1]
    return query, key, value.repeat_interleave(groups, 1), key.repeat_interleave(groups, 1), found["added"]


def slow_scores(name, model, layer, tokens):
    """The definitions, with one loop for each sum."""
    query, key, _, keys, added = heads_of(model, layer, tokens)
    count = len(tokens)
    spans = [range(start, min(start + SIZE, count)) for start in range(0, count, SIZE)]
    dots = torch.einsum("ihd,jhd->hij", query, keys) / query.shape[2] ** 0.5
    causal = torch.ones(count, count).tril().bool()
    positive = (dots.clamp_min(0) * causal).mean(0)
    reduce = torch.mean if name == "mean_over_block" else torch.max
    pair = torch.tensor([[reduce(positive[m.start : m.stop, n.start : n.stop]) for n in spans] for m in spans])
    means = lambda of_row: torch.stack([of_row[span.start : span.stop].mean() for span in spans])  # noqa: E731
    later = torch.stack([sum((pair[m, n] for m in range(n + 1, len(spans))), torch.zeros(())) for n in range(len(spans))])
    earlier = torch.stack([sum((pair[m, n] for n in range(m)), torch.zeros(())) for m in range(len(spans))])
    if name in ("true", "mean_over_block"):
        return later + earlier
    if name == "column_sum":
        return later
    if name == "key_norm":
        return means(key.norm(dim=-1).mean(1))
    if name == "output_norm":
        return means(added.norm(dim=-1))
    if name == "local_and_sink":
        return torch.arange(len(spans)).float()
    assert name == "attention_mass"
    probabilities = dots.masked_fill(~causal, -torch.inf).softmax(-1).mean(0)
    return means(torch.stack([probabilities[j:, j].mean() for j in range(count)]))


@pytest.mark.parametrize(
    "name", ["true", "mean_over_block", "column_sum", "key_norm", "output_norm", "attention_mass", "local_and_sink"]
)
def test_scores_are_their_definition(model, name, monkeypatch):
    choice, found = CHOICES[name], []
    if choice.ranking is not None:
        noting = choices.replace(choice, ranking=lambda at: found.append(choice.ranking(at)[0]) or [found[-1]])
        monkeypatch.setitem(CHOICES, name, noting)
    marks, _ = chosen(model, name, place(DOCUMENTS[:1], "right").batch)
    for layer, kept in enumerate(marks):
        scores = slow_scores(name, model, layer, DOCUMENTS[0])
        if found:  # up to a factor
            got, wanted = (part.float() / part.float().norm() for part in (found[layer], scores))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        best = scores[1:-1].topk(int(kept.sum()) - 2).indices + 1
        assert sorted(best.tolist()) == kept[1:-1].nonzero()[:, 0].add(1).tolist()


BATCH = place([random_tokens(96, 4)], "right").batch


def gradients(model, name, batch=BATCH, draw=0):
    sparse_backbone(model).lemo_draw = draw
    with chosen_by(model, name), batches_of(model) as batches:
        loss, found = loss_and_gradients(model, batch, num_items_in_batch=1)
    return loss, found, batches[0]


@pytest.mark.parametrize("layout", ["right", "packed_positions"])
def test_a_restricted_layer_is_the_exact_form(model, layout, monkeypatch):
    """With the package's rows for both parts, emulated layers have the package's loss and gradient."""
    batch = place(DOCUMENTS if layout == "packed_positions" else DOCUMENTS[:1], layout).batch
    monkeypatch.setitem(CHOICES, "emulated", choices.Choice("", attention_factor=1 + 1e-12))
    for name in ("emulated", "random_shared"):
        got = gradients(model, name, batch)
        if name == "emulated":
            wanted = got
    torch.testing.assert_close(got[0], wanted[0])
    assert_close_gradients(got[1], wanted[1])


@pytest.mark.parametrize(("name", "attention", "mlp"), [("attention_more", 0.7, 0.3875), ("attention_all", 1.0, 0.5)])
def test_emulated_shares_of_the_mlp_are_those_of_the_package(model, name, attention, mlp):
    """`mlp_keep_ratio` has the gradient that dense autograd has with the same rows detached."""
    native = lemo_model(stock_model(), ATTENTION, keep_ratio=attention, mlp_keep_ratio=mlp, block_size=SIZE)
    sparse_backbone(native).lemo_draw = 0
    wanted = loss_and_gradients(native, BATCH, num_items_in_batch=1)
    got = gradients(model, name)
    torch.testing.assert_close(got[0], wanted[0])
    assert_close_gradients(got[1], wanted[1])


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_choices_have_the_dense_loss(model, name):
    model.eval()
    dense = loss_and_gradients(model, BATCH, num_items_in_batch=1)[0]
    model.train()
    torch.testing.assert_close(gradients(model, name)[0], dense)


def one_layer(lora=ATTENTION, **lemo):
    stock = stock_model(num_hidden_layers=1)
    return stock, lemo_model(stock, lora, keep_ratio=0.5, block_size=SIZE, **lemo)


def kept_labels(batch, kept):
    """Labels that kept rows predict."""
    labels = batch["labels"].clone()
    labels[:, 1:][~kept.view(labels.shape)[:, :-1]] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("kept_keys_alone", {"o_proj"}),
        ("kept_keys_centred", {"o_proj"}),
        ("random_shared", {"o_proj", "q_proj"}),
        ("all_key_weights", {"o_proj", "q_proj", "k_proj", "v_proj"}),
    ],
)
def test_which_gradients_of_the_kept_tokens_are_the_dense_ones(name, exact):
    """One layer: queries and outputs are kept tokens' own; seeing all keys makes queries exact, and their weights keys and values."""
    stock, model = one_layer()
    _, got, batch = gradients(model, name)
    kept = batch.selections[0].kept_blocks.repeat_interleave(SIZE)
    wanted = loss_and_gradients(add_lora(stock, **ATTENTION), kept_labels(BATCH, kept), num_items_in_batch=1)[1]
    alike = {weight.split(".")[-4] for weight in got if torch.allclose(got[weight], wanted[weight], rtol=1e-4, atol=1e-4)}
    assert alike == exact


def test_gradients_of_dropped_keys_end_at_the_layer():
    """What goes on to the layers below is kept rows' alone; the dropped ones' labels left out, they have nothing."""
    _, model = one_layer()
    inputs = []
    embed = sparse_backbone(model).embed_tokens
    embed.register_forward_hook(lambda m, a, output: inputs.append(output.requires_grad_()) or output.retain_grad())
    for name in ("random_shared", "kept_keys_alone", "kept_keys_centred", "all_key_weights"):
        kept = gradients(model, name)[2].selections[0].kept_blocks.repeat_interleave(SIZE)
        gradients(model, name, kept_labels(BATCH, kept))
        rows = inputs[-1].grad[0].norm(dim=-1)
        assert not rows[~kept].any()
        assert rows[kept][:-1].all()  # the last row predicts nothing


def test_shares_of_attention_and_mlp(model, monkeypatch):
    given = []
    inner = choices.restricted_forward

    def note(layer, residual, rotary, documents, restriction):
        given.append(restriction)
        return inner(layer, residual, rotary, documents, restriction)

    monkeypatch.setattr(choices, "restricted_forward", note)
    for name, attention, mlp in (("attention_more", 9, 5), ("attention_all", 12, 6), ("mlp_all", 6, 12), ("mlp_more", 5, 8)):
        given.clear()
        gradients(model, name)
        blocks = given[0].attention.kept_blocks, given[0].mlp.view(12, SIZE)
        assert (int(blocks[0].sum()), int(blocks[1].all(1).sum())) == (attention, mlp)
        assert torch.equal(blocks[1].all(1), blocks[1].any(1))
        smaller, larger = sorted((blocks[0], blocks[1].any(1)), key=lambda marks: int(marks.sum()))
        assert (larger | ~smaller).all(), "nested"


def test_rows_that_attention_drops_gain_nothing_from_their_mlp():
    """Shared draws, adapters on attention: what is kept for the MLP beyond attention's rows is kept for nothing."""
    model = lemo_model(stock_model(num_hidden_layers=3), ATTENTION, keep_ratio=0.5, block_size=SIZE)
    assert_close_gradients(gradients(model, "mlp_all")[1], gradients(model, "random_shared")[1])


def test_labels_of_dropped_rows_change_nothing():
    """Shared draws, adapters on attention: the loss of dropped rows has no gradient, so it need not be computed."""
    model = lemo_model(stock_model(num_hidden_layers=3), ATTENTION, keep_ratio=0.5, block_size=SIZE)
    _, whole, batch = gradients(model, "random_shared")
    kept = batch.selections[0].kept_blocks.repeat_interleave(SIZE)
    assert_close_gradients(gradients(model, "random_shared", kept_labels(BATCH, kept))[1], whole)


@pytest.mark.parametrize("name", ["mlp_activation", "mlp_gradient"])
def test_mlp_rows_are_those_of_the_largest_norm(name, monkeypatch):
    _, model = one_layer()
    rows = []
    inner = choices._best_rows
    monkeypatch.setattr(choices, "_best_rows", lambda at, norms: rows.append((norms, inner(at, norms))) or rows[-1][1])
    gradients(model, name)
    ((norms, marks),) = rows
    assert marks.sum() == 6 * SIZE
    assert norms[marks].min() >= norms[~marks].max()
    seen = {}
    mlp = sparse_backbone(model).layers[0].mlp
    delta = torch.zeros(96, 32, requires_grad=True)
    handles = [
        mlp.register_forward_hook(lambda m, a, output: output + delta),
        mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
    ]
    model.eval()
    model(**BATCH, num_items_in_batch=1).loss.backward()
    for handle in handles:
        handle.remove()
    wanted = delta.grad if name == "mlp_gradient" else seen["x"].detach()[0]
    torch.testing.assert_close(norms, wanted.norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_gradient_norm_keeps_the_blocks_of_the_largest_gradients():
    _, model = one_layer()
    found = {}
    gradient_oracle.row_gradient_norms(found, model, (), BATCH)
    _, _, batch = gradients(model, "gradient_norm")
    kept = batch.selections[0].kept_blocks
    means = found["mlp"][0].view(12, SIZE).mean(1)[1:-1]
    assert kept.sum() == 6
    assert set(means.topk(4).indices.tolist()) == set(kept[1:-1].nonzero()[:, 0].tolist())
    assert len(found["attention"]) == 1
    assert sparse_backbone(model).config.lemo.enabled


def test_reweighted_draws_divide_by_the_chance_to_be_kept():
    """Without attention the gradient is a sum over rows: kept blocks' dense parts, each over its chance."""
    mlp = {"targets": ["down_proj"]}
    stock, model = one_layer(mlp)
    for layer in (stock.model.layers[0], sparse_backbone(model).layers[0]):
        layer.self_attn.o_proj.weight.data.zero_()
    chances = []
    inner = block_rankings.informative_draw

    def note(at):
        found = inner(at)
        chances.append(found[1][0])
        return found

    block_rankings.informative_draw = note
    try:
        _, got, batch = gradients(model, "informative_draw_reweighted")
    finally:
        block_rankings.informative_draw = inner
    dense = add_lora(stock, **mlp)
    wanted = None
    for block in batch.selections[0].kept_blocks.nonzero()[:, 0].tolist():
        only = torch.zeros(96, dtype=torch.bool).index_fill_(0, torch.arange(block * SIZE, (block + 1) * SIZE), True)
        part = loss_and_gradients(dense, kept_labels(BATCH, only), num_items_in_batch=1)[1]
        scaled = {name: grad / chances[0][block].float() for name, grad in part.items()}
        wanted = scaled if wanted is None else {name: wanted[name] + scaled[name] for name in wanted}
    assert_close_gradients(got, wanted)


def test_dropped_tokens_see_their_neighbours_in_the_sparse_form(monkeypatch):
    """Kept rows as in the package's sparse form; a dropped row attends to itself and the tokens before it, without gradient."""
    monkeypatch.setattr(choices, "NEARBY", 5)
    _, model = one_layer(attention_forward="sparse")
    outputs = []
    layer = sparse_backbone(model).layers[0]
    handle = layer.register_forward_hook(lambda m, a, output: outputs.append(output[0].detach()))
    _, got, batch = gradients(model, "sparse_nearby")
    sparse_backbone(model).lemo_draw = 0
    _, plain = loss_and_gradients(model, BATCH, num_items_in_batch=1)
    handle.remove()
    kept = batch.selections[0].kept_blocks.repeat_interleave(SIZE)
    torch.testing.assert_close(outputs[0][kept], outputs[1][kept])
    assert_close_gradients(got, plain)  # labels of dropped rows reach no weight
    tokens = BATCH["input_ids"][0]
    query, _, values, keys, _ = heads_of(model, 0, tokens)
    distance = torch.arange(96)[:, None] - torch.arange(96)
    dots = torch.einsum("ihd,jhd->hij", query, keys) / query.shape[2] ** 0.5
    seen = dots.masked_fill((distance < 0) | (distance >= 5), -torch.inf).softmax(-1)
    with torch.no_grad():
        embedded = sparse_backbone(model).embed_tokens(tokens)
        middle = embedded + layer.project_output(torch.einsum("hij,jhd->ihd", seen, values))
        wanted = middle + layer.feed_forward(layer.mlp_norm(middle))
    torch.testing.assert_close(outputs[0][~kept], wanted[~kept], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_behind(model):
    backbone = sparse_backbone(model)
    before = backbone.config.lemo.to_dict()
    for name in ("key_norm", "gradient_norm", "kept_keys_alone", "true"):
        with pytest.raises(KeyboardInterrupt), chosen_by(model, name):
            raise KeyboardInterrupt
    assert backbone.config.lemo.to_dict() == before
    assert not model._forward_pre_hooks
    assert not any({"choose", "sparse_forward"} & set(vars(layer)) for layer in backbone.layers)


def test_bad_names_and_forms(model):
    with (
        pytest.raises(ValueError, match="no choice is called so; got 'best'; take one of random_shared"),
        chosen_by(model, "best"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="other attention form; got attention_forward='exact'"),
        chosen_by(model, "sparse_nearby"),
    ):
        pass
