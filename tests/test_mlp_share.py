"""A share of the MLP's own, `mlp_keep_ratio`: the dense forward, and the gradient of the MLP's rows alone."""

import pytest
import torch
from references.tiny_models import (
    add_lora,
    assert_close_gradients,
    assert_same_gradients,
    batches_of,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
    with_varied_vectors,
)

from lemo_hf import LemoConfig
from lemo_hf.models import kept_and_rest_rows
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_elimination import choose_blocks, kept_block_count
from lemo_hf.profiling.activation_memory import ActivationMemory

DOCUMENTS = [random_tokens(93, 1), random_tokens(61, 2)]
ATTENTION = {"targets": "attention"}


def run(model, batch, draw=0):
    sparse_backbone(model).lemo_draw = draw
    with batches_of(model) as batches:
        loss, gradients = loss_and_gradients(model, batch, num_items_in_batch=1)
    return loss, gradients, batches[0]


def mlp_blocks(batch, layer):
    """Marks of the blocks whose rows the layer's MLP keeps, `(blocks,)`, which must be whole ones."""
    chosen, documents = batch.selections[layer], batch.documents
    rows = torch.zeros(sum(documents.lengths), dtype=torch.bool)
    rows[chosen.real_kept if chosen.mlp_kept is None else chosen.real_kept[chosen.mlp_kept]] = True
    blocks = torch.zeros(sum(documents.block_counts), dtype=torch.bool)
    blocks[documents.block_of_row[rows]] = True
    assert torch.equal(blocks[documents.block_of_row], rows)
    return blocks


@pytest.mark.parametrize("form", ["exact", "kept_keys", "sparse"])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_a_share_no_smaller_than_the_layer_s_changes_no_bit(form, checkpoint):
    settings = {"keep_ratio": 0.5, "attention_forward": form, "checkpoint": checkpoint}
    plain, same = (lemo_model(stock_model(), {}, mlp_keep_ratio=share, **settings) for share in (None, 0.8))
    batch = place(DOCUMENTS, "left").batch
    one, other = run(plain, batch), run(same, batch)
    assert torch.equal(one[0], other[0])
    assert_same_gradients(other[1], one[1])


@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("form", ["exact", "kept_keys", "sparse"])
def test_the_mlp_of_rest_rows_in_parts_is_that_of_all_at_once(form, share, monkeypatch):
    model = lemo_model(stock_model(), {}, keep_ratio=0.5, mlp_keep_ratio=share, attention_forward=form)
    batch = place(DOCUMENTS, "left").batch
    whole = run(model, batch)
    sizes = []
    for layer in sparse_backbone(model).layers:
        forward = layer.feed_forward
        monkeypatch.setattr(
            layer, "feed_forward", lambda rows, f=forward: (sizes.append((len(rows), torch.is_grad_enabled())), f(rows))[1]
        )
    monkeypatch.setattr(kept_and_rest_rows, "_ROWS_AT_ONCE", 7)
    parts = run(model, batch)
    assert max(size for size, saves in sizes if not saves) == 7
    assert max(size for size, saves in sizes if saves) > 7
    torch.testing.assert_close(parts[0], whole[0])
    assert_close_gradients(parts[1], whole[1])


@pytest.mark.parametrize(
    "choosing", [{}, {"draws": "by_layer"}, {"selection": "ratio", "score_source": "true"}], ids=["shared", "by_layer", "ratio"]
)
def test_its_blocks_are_the_first_of_those_that_the_layer_keeps(choosing):
    """As many as the share says of every document, all kept ones, those that the layer alone would keep at that share."""
    stock = stock_model()
    batch = place(DOCUMENTS, "packed_positions").batch
    found = run(lemo_model(stock, {}, keep_ratio=0.6, mlp_keep_ratio=0.3, **choosing), batch)[2]
    alone = run(lemo_model(stock, {}, keep_ratio=0.3, **choosing), batch)[2]
    for layer, chosen in found.selections.items():
        marks = mlp_blocks(found, layer)
        assert (chosen.kept_blocks | ~marks).all()
        for part, kept in zip(*map(found.documents.split_blocks, (marks, chosen.kept_blocks)), strict=True):
            assert (int(part.sum()), int(kept.sum())) == (kept_block_count(len(part), 0.3), kept_block_count(len(part), 0.6))
        if layer == 0:  # above it the two models' inputs differ where scores decide
            assert torch.equal(marks, alone.selections[0].kept_blocks)


def test_beside_a_threshold_it_keeps_the_most_informative_blocks():
    """A document of which the threshold keeps fewer blocks keeps these."""
    scores = [torch.tensor([0.1, 0.9, 0.5, 0.8, 0.7, 0.2, 0.6, 0.0]), torch.tensor([0.0, 0.5, 0.1, 0.2, 0.0])]
    documents = find_documents(1, 8 * 4 + 5 * 4, 4, torch.device("cpu"), cu_seq_lens=torch.tensor([0, 32, 52]))
    config = LemoConfig(block_size=4, selection="threshold", thresholds=[0.55], mlp_keep_ratio=0.5)
    chosen = choose_blocks(scores, documents, config, 0, 0)
    assert chosen.kept_blocks.tolist() == [True, True, False, True, True, False, True, True, True, False, False, False, True]
    rows = chosen.kept_rows[chosen.mlp_kept]
    assert rows[::4].div(4, rounding_mode="floor").tolist() == [0, 1, 3, 7, 8, 12]
    assert sorted(torch.cat((chosen.mlp_kept, chosen.mlp_rest)).tolist()) == list(range(len(chosen.kept_rows)))


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 2.0])
def test_beside_a_threshold_every_document_has_its_own_count(threshold):
    """Ragged last blocks, documents of one block and of less."""
    lengths = [1, 4, 5, 30, 33, 64]
    documents = find_documents(1, sum(lengths), 4, torch.device("cpu"), cu_seq_lens=torch.tensor([0, *lengths]).cumsum(0))
    scores = list(
        torch.rand(sum(documents.block_counts), generator=torch.Generator().manual_seed(2)).split(documents.block_counts)
    )
    config = LemoConfig(block_size=4, selection="threshold", thresholds=[threshold], mlp_keep_ratio=0.4)
    chosen = choose_blocks(scores, documents, config, 0, 0)
    kept = [int(marks.sum()) for marks in documents.split_blocks(chosen.kept_blocks)]
    blocks = documents.block_of_row[chosen.real_kept if chosen.mlp_kept is None else chosen.real_kept[chosen.mlp_kept]]
    marks = torch.zeros_like(chosen.kept_blocks).index_fill_(0, blocks, True)
    wanted = [min(count, kept_block_count(len(part), 0.4)) for count, part in zip(kept, scores, strict=True)]
    assert [int(part.sum()) for part in documents.split_blocks(marks)] == wanted
    assert len(blocks) == int(marks[documents.block_of_row].sum()), "whole blocks"


def test_lists_of_shares_and_dense_layers():
    model = lemo_model(
        stock_model(num_hidden_layers=4), {}, keep_ratio=[1.0, 0.5, 0.25, 0.5], mlp_keep_ratio=0.25, dense_layers=[3]
    )
    batch = run(model, place(DOCUMENTS[:1], "right").batch)[2]
    blocks = [int(batch.selections[layer].kept_blocks.sum()) for layer in range(4)]
    assert blocks == [12, 6, 3, 12]
    assert [int(mlp_blocks(batch, layer).sum()) for layer in range(4)] == [3, 3, 3, 12]


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen3", "mistral"])
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("checkpoint", ["none", "kept_rows"])
def test_with_all_of_attention_it_is_the_stock_gradient_but_for_dropped_mlp_rows(architecture, targets, checkpoint):
    stock = with_varied_vectors(stock_model(architecture=architecture))
    batch = place(DOCUMENTS, "right").batch
    lora = {"targets": targets}
    model = lemo_model(stock, lora, keep_ratio=1.0, mlp_keep_ratio=0.5, checkpoint=checkpoint)
    loss, got, found = run(model, batch)
    dense = add_lora(stock, **lora)
    # OPT's MLP is two layers of the decoder layer itself; the last of them gives its output.
    parts = [getattr(layer, "mlp", None) or layer.fc2 for layer in _layers(dense)]
    for layer, part in enumerate(parts):
        chosen = found.selections[layer]
        rows = torch.zeros(batch["input_ids"].numel(), 1, dtype=torch.bool)
        rows[chosen.kept_rows[chosen.mlp_kept]] = True
        assert 0.3 < rows.float().mean() < 0.6
        rows = rows.view(*batch["input_ids"].shape, 1)
        if architecture == "opt":
            part.register_full_backward_pre_hook(lambda m, grads, rows=rows: (grads[0] * rows.view(*grads[0].shape[:-1], 1),))
        else:
            part.register_forward_hook(lambda m, a, output, rows=rows: torch.where(rows, output, output.detach()))
    wanted = loss_and_gradients(dense, batch, num_items_in_batch=1)
    torch.testing.assert_close(loss, wanted[0])
    assert_close_gradients(got, wanted[1])


def _layers(model):
    return next(module.layers for module in model.modules() if hasattr(module, "layers"))


@pytest.mark.parametrize("form", ["exact", "kept_keys", "sparse"])
def test_checkpointed_with_dropout_it_is_the_same_step(form):
    """What is run again draws the first run's numbers, though rows that the MLP drops are not run again."""
    found = []
    for checkpoint in ("none", "kept_rows"):
        settings = {"keep_ratio": 0.75, "mlp_keep_ratio": 0.25, "attention_forward": form, "checkpoint": checkpoint}
        model = lemo_model(stock_model(), {"lora_dropout": 0.2}, **settings)
        torch.manual_seed(3)
        found.append(run(model, place(DOCUMENTS, "left").batch))
    assert torch.equal(found[0][0], found[1][0])
    assert_close_gradients(found[1][1], found[0][1])


def test_dropped_rows_run_the_mlp_once():
    rows = []
    model = lemo_model(stock_model(num_hidden_layers=1), ATTENTION, keep_ratio=0.75, mlp_keep_ratio=0.25, checkpoint="kept_rows")
    sparse_backbone(model).layers[0].mlp.down_proj.register_forward_hook(lambda m, args, output: rows.append(len(args[0])))
    batch = run(model, place([random_tokens(96, 3)], "right").batch)[2]
    assert batch.selections[0].kept_share == 0.75
    assert rows == [24, 48, 24, 24]  # kept, kept by attention alone, rest; and again for backward


@pytest.mark.parametrize("layout", ["left", "right", "packed_positions"])
def test_documents_choose_alike_wherever_they_lie(layout):
    model = lemo_model(stock_model(), {}, keep_ratio=0.75, mlp_keep_ratio=0.25)
    loss, gradients, _ = run(model, place(DOCUMENTS, layout).batch)
    losses, total = 0, {}
    for document in DOCUMENTS:
        alone = run(model, place([document], "right").batch)
        losses = losses + alone[0]
        total = {name: grad + total.get(name, 0) for name, grad in alone[1].items()}
    torch.testing.assert_close(loss, losses)
    assert_close_gradients(gradients, total)


def test_saved_bytes_fall_by_the_rows_that_the_mlp_drops():
    """Per row its norm and two activations of the gated MLP: float32, hidden 32, MLP 80 wide; plus the numbers of the rows."""
    saved = []
    for share in (None, 0.25):
        model = lemo_model(stock_model(num_hidden_layers=1), ATTENTION, keep_ratio=0.75, mlp_keep_ratio=share)
        with ActivationMemory(model) as memory:
            loss = model(**place([random_tokens(96, 3)], "right").batch).loss
            saved.append(memory.saved.total)
        del loss
    dropped = 48 * 4 * (32 + 2 * 80)
    assert dropped * 0.95 < saved[0] - saved[1] < dropped * 1.1


def test_bad_shares():
    for share in (0, 1.5, "half", True, [0.5]):
        with pytest.raises(LemoConfigError, match=r"mlp_keep_ratio is a share of blocks and must be in \(0, 1\], or null; got"):
            LemoConfig(mlp_keep_ratio=share)
    assert LemoConfig.from_dict(LemoConfig(mlp_keep_ratio=0.25).to_dict()).mlp_keep_ratio == 0.25
    assert not LemoConfig(keep_ratio=1.0, mlp_keep_ratio=0.5).is_dense(0, 2)
    assert LemoConfig(keep_ratio=1.0, mlp_keep_ratio=1.0).is_dense(0, 2)
