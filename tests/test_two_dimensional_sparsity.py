"""Attention patterns among kept tokens: against masks written out, and as parts of a model that trains."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from references.decoder_layer import hidden_pairs
from references.one_layer import saved_tensors
from references.tiny_models import (
    assert_close_gradients,
    assert_same_gradients,
    batches_of,
    checkpoint_stock_layers,
    lemo_model,
    loss_and_gradients,
    place,
    random_tokens,
    stock_model,
)
from torch.nn.attention.flex_attention import flex_attention
from training_runs import tiny_trainer
from transformers import AutoConfig

from lemo_hf.hub.card_tables import selection_rows
from lemo_hf.models.block_pair_attention import BlockPairs, flex_block_mask, with_flex_attention
from lemo_hf.models.document_attention import AttentionScope, attend, with_kept_row_gradient
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.pattern_predictor import predicted_block_scores
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.models.token_elimination import selection_of_blocks
from lemo_hf.models.two_dimensional_sparsity import (
    ShiftedGroups,
    _limits,
    attend_in_pattern,
    choose_pairs,
    pair_counts,
    require_groups_within,
)
from lemo_hf.profiling.bench_counts import saved_on_fake_tensors
from lemo_hf.profiling.bench_methods import choose_methods
from lemo_hf.profiling.bench_step import measure_step
from lemo_hf.profiling.flops import FlopCounter
from lemo_hf.profiling.memory_estimate import Estimator
from lemo_hf.profiling.step_model import StepSettings, build_model, layer_kinds, runs_flex_attention

SCALE = 0.37
BLOCK = 4
PATTERNS = [{"attention_pattern": "shifted_groups"}, {"attention_pattern": "shifted_groups", "group_size": 6},
            {"attention_pattern": "block_sparse"}]  # fmt: skip


def kept_documents(lengths, seed=0):
    """Documents of `lengths` in one row, blocks of them kept at random (first and last always), and S by block pair."""
    starts = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = find_documents(1, sum(lengths), BLOCK, torch.device("cpu"), position_ids=starts)
    generator = torch.Generator().manual_seed(seed)
    marks = torch.rand(sum(documents.block_counts), generator=generator) < 0.7
    for part in documents.split_blocks(marks):
        part[0] = part[-1] = True
    scores = [torch.rand(blocks, blocks, generator=generator).tril() for blocks in documents.block_counts]
    return documents, selection_of_blocks(marks, documents), scores


def heads_of(rows, heads=4, keys=2, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, count, dim) for count in (heads, keys, keys)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def slowly(query, key, value, seen):
    """Attention with every matrix written out; `seen` is `(heads, rows, rows)` or `(rows, rows)`."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, 1).transpose(0, 1) for part in (key, value))
    scores = (query.transpose(0, 1) @ key.mT * SCALE).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


def compare(got, wanted, inputs, **tolerance):
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    torch.testing.assert_close(got, wanted, **tolerance)
    pairs = zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True)
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference, **tolerance)


def same_document(lengths):
    number = torch.cat([torch.full((length,), place) for place, length in enumerate(lengths)])
    return number[:, None] == number


def groups_by_hand(lengths, size, heads, shifted_heads):
    """`(heads, rows, rows)`: group numbers of every row by their definition, one row at a time."""
    numbers = torch.zeros(heads, sum(lengths), dtype=torch.long)
    for head in range(heads):
        row = 0
        for length in lengths:
            group = size if size is not None else max(2, -(-length // 4))
            for within in range(length):
                numbers[head, row] = (within + (group - group // 2 if head in shifted_heads else 0)) // group
                row += 1
    later = torch.ones(sum(lengths), sum(lengths), dtype=torch.bool).triu(1)
    return (numbers[:, :, None] == numbers[:, None]) & same_document(lengths) & ~later


LENGTHS = [[32], [30], [17, 1, 31, 8], [5, 5, 5], [3]]


@pytest.mark.parametrize("size", [None, 2, 5, 8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_shifted_groups_equal_their_definition(lengths, size):
    inputs = heads_of(sum(lengths))
    seen = groups_by_hand(lengths, size, 4, {2, 3})
    got = attend_in_pattern(*inputs, AttentionScope(lengths, SCALE), ShiftedGroups(size))
    compare(got, slowly(*inputs, seen), inputs)


@pytest.mark.parametrize(("heads", "keys", "shifted"), [(4, 4, {2, 3}), (2, 1, {1}), (6, 3, {1, 3, 5}), (8, 2, {4, 5, 6, 7})])
def test_half_of_the_heads_are_shifted_however_they_share_keys(heads, keys, shifted):
    inputs = heads_of(23, heads, keys)
    got = attend_in_pattern(*inputs, AttentionScope([23], SCALE), ShiftedGroups(6))
    compare(got, slowly(*inputs, groups_by_hand([23], 6, heads, shifted)), inputs)


def test_groups_are_refused_where_heads_cannot_be_halved():
    with pytest.raises(LemoConfigError, match="shifts half of the heads; the model has 3 query heads; set attention_pattern"):
        attend_in_pattern(*heads_of(9, 3, 3), AttentionScope([9], SCALE), ShiftedGroups(4))


@pytest.mark.parametrize("window", [1, 5, 11])
def test_a_window_counts_original_distance_within_a_pattern(window):
    documents, selection, scores = kept_documents([45, 30])
    inputs = heads_of(sum(selection.kept_lengths))
    places = documents.place_of_row[selection.real_kept]
    scope = AttentionScope(selection.kept_lengths, SCALE, window, places)
    near = ~hidden_pairs(places, window)
    got = attend_in_pattern(*inputs, scope, ShiftedGroups(6))
    compare(got, slowly(*inputs, groups_by_hand(selection.kept_lengths, 6, 4, {2, 3}) & near), inputs)
    pairs = choose_pairs(scores, selection, documents, 0.5, window)
    compare(attend_in_pattern(*inputs, scope, pairs), slowly(*inputs, rows_by_hand(selection, pairs) & near), inputs)


def pairs_by_hand(documents, selection, scores, share):
    """Which kept blocks see which, `(blocks, blocks)`, by sorting Python lists."""
    size = sum(-(-length // BLOCK) for length in selection.kept_lengths)
    marks, first = torch.zeros(size, size, dtype=torch.bool), 0
    for of_document, kept in zip(scores, documents.split_blocks(selection.kept_blocks), strict=True):
        numbers = [number for number, is_kept in enumerate(kept.tolist()) if is_kept]
        for row, number in enumerate(numbers):
            count = max(-(-round(share * (row + 1) * 2**20) // 2**20), min(2, row + 1))
            best = sorted(range(1, row), key=lambda other: -of_document[number, numbers[other]].item())
            for other in [row, 0, *best][:count] if row else [0]:
                marks[first + row, first + other] = True
        first += len(numbers)
    return marks


def rows_by_hand(selection, pairs):
    """The pairs by rows, `(kept, kept)`, causal."""
    block, first = [], 0
    for length in selection.kept_lengths:
        block += [first + place // BLOCK for place in range(length)]
        first += -(-length // BLOCK)
    block = torch.tensor(block)
    return pairs.marks[block][:, block] & ~torch.ones(len(block), len(block), dtype=torch.bool).triu(1)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("lengths", [[64], [61], [40, 3, 50, 17], [4, 4]], ids=str)
def test_block_pairs_are_the_best_ones_and_attention_sees_just_these(lengths, share):
    documents, selection, scores = kept_documents(lengths)
    pairs = choose_pairs(scores, selection, documents, share)
    assert torch.equal(pairs.marks, pairs_by_hand(documents, selection, scores, share))
    assert pairs.marks.sum(1).tolist() == [count for of_document in pairs.counts for count in of_document]
    inputs = heads_of(sum(selection.kept_lengths))
    got = attend_in_pattern(*inputs, AttentionScope(selection.kept_lengths, SCALE), pairs)
    compare(got, slowly(*inputs, rows_by_hand(selection, pairs)), inputs)


def test_tied_scores_go_to_the_earlier_block():
    documents, selection, _ = kept_documents([80])
    pairs = choose_pairs([torch.ones(20, 20)], selection, documents, 0.3)
    for row, count in enumerate(pairs.counts[0]):
        assert pairs.marks[0 if row == 0 else row].nonzero().squeeze(1).tolist() == [*range(count - 1), row]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 1 / 3, 0.7, 1.0])
def test_the_device_counts_pairs_as_the_host_does(share):
    assert _limits(torch.arange(700), share).tolist() == pair_counts(700, share)


@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_full_share_is_plain_attention(dtype, keys):
    documents, selection, scores = kept_documents([700, 90, 33])
    pairs = choose_pairs(scores, selection, documents, 1.0)
    inputs = heads_of(sum(selection.kept_lengths), keys=keys, dtype=dtype)
    scope = AttentionScope(selection.kept_lengths, SCALE)
    plain = with_kept_row_gradient(*inputs, *attend(*(part.detach() for part in inputs), scope), scope)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {}
    compare(attend_in_pattern(*inputs, scope, pairs), plain, inputs, **tolerance)


@pytest.mark.parametrize("pattern", [ShiftedGroups(3), "pairs"])
def test_patterns_pass_gradcheck_and_two_backward_passes_agree(pattern):
    documents, selection, scores = kept_documents([17, 6])
    if pattern == "pairs":
        pattern = choose_pairs(scores, selection, documents, 0.5)
    inputs, scope = heads_of(sum(selection.kept_lengths), 2, 1, 3), AttentionScope(selection.kept_lengths, SCALE)
    assert torch.autograd.gradcheck(lambda *parts: attend_in_pattern(*parts, scope, pattern), inputs)
    output = attend_in_pattern(*inputs, scope, pattern)
    twice = [torch.autograd.grad(output.square().sum(), inputs, retain_graph=True) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*twice, strict=True))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [[128], [150], [96, 70], [70, 5, 96, 33]], ids=str)
def test_flex_attention_reads_the_same_pairs(lengths, window, monkeypatch):
    """The block mask of GPUs, as a dense matrix and in flex attention's own forward pass, which it has on the CPU too."""
    monkeypatch.setattr(f"{__name__}.BLOCK", 16)
    documents, selection, scores = kept_documents(lengths)
    pairs = choose_pairs(scores, selection, documents, 0.5, window)
    inputs = [part.detach() for part in heads_of(sum(selection.kept_lengths), dim=16, dtype=torch.float32)]
    places = None if window is None else documents.place_of_row[selection.real_kept]
    scope = AttentionScope(selection.kept_lengths, SCALE, window, places)
    mask = flex_block_mask(pairs, scope, torch.arange(16 * len(pairs.marks)))
    assert torch.equal(mask.to_dense()[0, 0].bool(), pairs.marks)
    if window is None:
        assert torch.equal(mask.kv_num_blocks[0, 0], torch.ones(len(pairs.marks), dtype=torch.int32)), (
            "the diagonal is masked by row"
        )
    calls = []

    def on_cpu(*tensors, **settings):
        options = settings.pop("kernel_options")
        calls.append(options)
        return flex_attention(*tensors, **settings)

    with pytest.warns(UserWarning, match="without torch.compile") if not _WARNED else contextlib.nullcontext():
        got = with_flex_attention(*inputs, scope, pairs, flex=on_cpu)
    _WARNED.append(True)
    assert calls == [
        {"BACKEND": "TRITON"} | dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), 16)
    ]
    torch.testing.assert_close(got, attend_in_pattern(*inputs, scope, pairs))


_WARNED: list[bool] = []  # torch warns once a process


def test_flex_attention_needs_blocks_of_whole_tiles():
    documents, selection, scores = kept_documents([20])
    pairs = choose_pairs(scores, selection, documents, 0.5)
    with pytest.raises(LemoConfigError, match="a multiple of 16 tokens; got block_size=4; set block_size to 64"):
        with_flex_attention(*heads_of(sum(selection.kept_lengths)), AttentionScope(selection.kept_lengths, SCALE), pairs)


def flops_of(compute):
    model = torch.nn.Module()
    with FlopCounter(model) as counter:
        compute().sum().backward()
    return counter.flops.total


def test_flops_are_those_of_the_pairs():
    """Heads of 8: 4 x 2 x 8 FLOPs a pair forward, 4 x 5 x 8 x 2 / 2 backward; no pair outside the pattern is computed."""
    documents, selection, scores = kept_documents([400])
    rows = sum(selection.kept_lengths)
    inputs, scope = heads_of(rows, dtype=torch.float32), AttentionScope([rows], SCALE)
    per_pair = 2 * 8 * (2 + 5)
    pairs = choose_pairs(scores, selection, documents, 0.25)
    counts, tail = pairs.counts[0], rows % BLOCK or BLOCK
    computed = BLOCK * BLOCK * sum(counts[:-1]) + tail * ((counts[-1] - 1) * BLOCK + tail)
    assert flops_of(lambda: attend_in_pattern(*inputs, scope, pairs)) == 4 * per_pair * computed
    groups = ShiftedGroups(16)
    by_half = [sum(size * (size + 1) // 2 for size in groups.lengths([rows], shifted)) for shifted in (False, True)]
    assert flops_of(lambda: attend_in_pattern(*inputs, scope, groups)) == 2 * per_pair * sum(by_half)
    plain = 4 * per_pair * rows * (rows + 1) // 2
    assert 4 * per_pair * computed < 0.32 * plain
    assert 2 * per_pair * sum(by_half) < 17 / rows * plain


@pytest.mark.parametrize("pattern", ["groups", "pairs"])
def test_nothing_is_saved_beyond_plain_attention_but_the_marks(pattern):
    documents, selection, scores = kept_documents([700])
    inputs, scope = heads_of(sum(selection.kept_lengths), dtype=torch.float32), AttentionScope(selection.kept_lengths, SCALE)
    chosen = ShiftedGroups(64) if pattern == "groups" else choose_pairs(scores, selection, documents, 0.25)

    def plain():
        return with_kept_row_gradient(*inputs, *attend(*(part.detach() for part in inputs), scope), scope)

    def saved(compute):
        result, tensors = saved_tensors(compute, [])
        storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}
        assert result.untyped_storage().data_ptr() in storages, "the output is saved once, and the projection saves it too"
        return sum(storages.values())

    marks = 0 if pattern == "groups" else len(chosen.marks) ** 2
    assert saved(lambda: attend_in_pattern(*inputs, scope, chosen)) == saved(plain) + marks
    assert marks < sum(selection.kept_lengths) ** 2 / BLOCK**2 + 1


def pattern_model(lora=None, stock=None, **lemo):
    return lemo_model(stock or stock_model(), {} if lora is None else lora, attention_forward="sparse", **lemo)


TEXTS = [random_tokens(length, length) for length in (61, 100, 37)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scores", ["predicted", "true"])
def test_documents_train_alike_padded_packed_and_checkpointed(pattern, scores):
    wanted_loss, wanted = loss_and_gradients(pattern_model(score_source=scores, **pattern), place(TEXTS, "left", 3).batch)
    for layout in ("right", "packed_positions", "packed_cu"):
        loss, got = loss_and_gradients(pattern_model(score_source=scores, **pattern), place(TEXTS, layout).batch)
        torch.testing.assert_close(loss, wanted_loss)
        assert_close_gradients(got, wanted)
    for checkpoint, stock_checkpointing in (("kept_rows", None), ("none", False), ("none", True)):
        model = pattern_model(score_source=scores, checkpoint=checkpoint, **pattern)
        if stock_checkpointing is not None:
            checkpoint_stock_layers(model, stock_checkpointing)
            model.enable_input_require_grads()
        loss, got = loss_and_gradients(model, place(TEXTS, "left", 3).batch)
        torch.testing.assert_close(loss, wanted_loss, rtol=0, atol=0)
        assert_close_gradients(got, wanted, rtol=1e-5, share=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "opt", "qwen2", "qwen3"])
def test_every_architecture_trains_in_a_pattern_and_evaluates_as_the_stock_model(architecture):
    stock = stock_model(architecture=architecture)
    batch = {"input_ids": TEXTS[0][None], "labels": TEXTS[0][None]}
    losses = set()
    for pattern in ({}, *PATTERNS):
        model = pattern_model(stock=stock, **pattern)
        loss, grads = loss_and_gradients(model, batch)
        losses.add(loss.item())
        assert all(grad.isfinite().all() for grad in grads.values())
        assert len(grads) > 20
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(model.eval()(**batch).logits, stock.eval()(**batch).logits)
    # Mistral's narrow window lets a kept block see two others at most, which are those that its pairs name.
    assert len(losses) == (3 if architecture == "mistral" else 4), "each pattern is another forward pass"


def test_one_value_spares_dense_layers_and_a_list_says_it_by_layer():
    config = LemoConfig(attention_forward="sparse", attention_pattern="block_sparse", dense_layers=[0, -1], keep_ratio=1.0)
    assert [config.pattern_of(layer, 4) for layer in range(4)] == ["full", "block_sparse", "block_sparse", "full"]
    batch = place(TEXTS, "left").batch
    model = pattern_model(attention_pattern=["full", "shifted_groups"])
    with batches_of(model) as seen:
        loss_and_gradients(model, batch)
    assert list(seen[0].patterns) == [1]
    assert isinstance(seen[0].patterns[1], ShiftedGroups)
    model = pattern_model(attention_pattern="block_sparse", dense_layers=[0])
    with batches_of(model) as seen:
        loss_and_gradients(model, batch)
    assert list(seen[0].patterns) == [1]
    assert isinstance(seen[0].patterns[1], BlockPairs)
    # Layers that keep every token because of their share follow the pattern.
    everything = {"keep_ratio": 1.0, "group_size": 6}
    plain, _ = loss_and_gradients(pattern_model(**everything), batch)
    grouped, _ = loss_and_gradients(pattern_model(attention_pattern="shifted_groups", **everything), batch)
    assert not torch.equal(plain, grouped)


def test_full_is_what_there_was_bit_for_bit():
    batch = place(TEXTS, "packed_positions").batch
    loss, grads = loss_and_gradients(pattern_model(), batch)
    same_loss, same = loss_and_gradients(
        pattern_model(attention_pattern=["full", "full"], group_size=7, pattern_share=0.1), batch
    )
    assert torch.equal(loss, same_loss)
    assert_same_gradients(same, grads)


def test_the_model_at_full_share_is_the_model_without_a_pattern():
    batch = place(TEXTS, "left").batch
    wanted_loss, wanted = loss_and_gradients(pattern_model(), batch)
    loss, got = loss_and_gradients(pattern_model(attention_pattern="block_sparse", pattern_share=1.0), batch)
    torch.testing.assert_close(loss, wanted_loss)
    assert_close_gradients(got, wanted)


def test_pairs_follow_the_predictor():
    """The default draw reads no scores, so predictors are needed for the pattern alone; theirs are the pairs that are chosen."""
    config = LemoConfig(attention_forward="sparse", attention_pattern="block_sparse")
    assert config.needs_predictors
    assert not config.needs_scores
    assert not LemoConfig(attention_forward="sparse", attention_pattern="block_sparse", score_source="true").needs_predictors
    assert not LemoConfig(attention_forward="sparse", attention_pattern="shifted_groups").needs_predictors
    model = pattern_model(attention_pattern="block_sparse", pattern_share=0.4)
    layer = sparse_backbone(model).layers[1]
    inputs = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args[0], kwargs["sparse_batch"])), with_kwargs=True
    )
    loss_and_gradients(model, place(TEXTS, "left").batch)
    hook.remove()
    (hidden, batch), documents = inputs[0], inputs[0][1].documents
    normed = layer.attention_norm(hidden.detach().flatten(0, 1)[documents.rows])
    features = [documents.split_blocks(part) for part in layer.lemo_predictor(normed, documents)]
    scores = [
        predicted_block_scores(q, k, layer.lemo_predictor.distance.by_distance(len(q))) for q, k in zip(*features, strict=True)
    ]
    wanted = choose_pairs(scores, batch.selections[1], documents, 0.4)
    assert torch.equal(batch.patterns[1].marks, wanted.marks)
    assert not torch.equal(batch.patterns[0].marks, wanted.marks), "layers choose by their own scores"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_pattern": "block_sparse"}, "exact form's forward pass is dense; got attention_pattern='block_sparse' with"),
        ({"attention_pattern": ["full", "shifted_groups"]}, "set attention_forward='sparse', or attention_pattern='full'"),
        ({"attention_pattern": "sparse"}, "attention_pattern must be one of full, shifted_groups, block_sparse"),
        ({"attention_pattern": []}, "or one per layer"),
        ({"attention_pattern": None}, "got None"),
        ({"group_size": 1}, "group_size must be a whole number from 2"),
        ({"group_size": True}, "got True; leave it out"),
        ({"pattern_share": 0}, r"must be in \(0, 1\]; got 0; 0.25 sees"),
        ({"pattern_share": "a"}, "got 'a'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(LemoConfigError, match=message):
        LemoConfig(**fields)


def test_a_list_must_name_every_layer():
    config = LemoConfig(attention_forward="sparse", attention_pattern=["full", "shifted_groups"])
    with pytest.raises(LemoConfigError, match="attention_pattern lists 2 layers, the model has 3"):
        config.validate_for(3)


def test_a_group_larger_than_the_document_is_refused():
    def model():
        return pattern_model(attention_pattern="shifted_groups", group_size=60)

    short, long = random_tokens(90, 1)[None], random_tokens(130, 2)[None]
    with pytest.raises(
        LemoConfigError, match="the longest has 90 tokens, of which a layer keeps 42; got group_size=60; set it to 11"
    ):
        model()(input_ids=short)
    trained = model()
    trained(input_ids=long)
    trained(input_ids=short)  # one short batch among longer ones is one group, and no mistake
    config = LemoConfig(attention_forward="sparse", attention_pattern="shifted_groups", group_size=60, selection="threshold")
    require_groups_within(config, 90, 2)
    with pytest.raises(LemoConfigError, match="of which a layer keeps 50"):
        require_groups_within(config, 50, 2)


PROFILED = AutoConfig.for_model(
    "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("name", ["lemo-sparse-groups-rows", "lemo-sparse-blocks"])
def test_a_benched_step_agrees_with_its_estimate_and_its_counts_on_fake_tensors(name):
    (chosen,) = choose_methods(name)
    settings = chosen.settings(512, "float32")
    assert runs_flex_attention(settings, 3) == ("blocks" in name)
    row = measure_step(PROFILED, chosen, settings, torch.device("cpu"), steps=1, counts=True)
    estimate = Estimator(PROFILED, on_gpu=False).estimate(settings)
    assert row["flops"] == sum(estimate.flops.values())
    assert row["live_peak_bytes"] == pytest.approx(estimate.live_bytes, rel=0.02)
    fake = saved_on_fake_tensors(PROFILED, settings)
    assert {part: row[part] for part in fake} == fake
    # On a GPU the counter sees nothing of compiled attention: the estimate's number is the row's then.
    plain = Estimator(PROFILED, on_gpu=False).estimate(choose_methods("lemo-sparse")[0].settings(512, "float32"))
    assert sum(estimate.flops.values()) != sum(plain.flops.values())


def test_an_estimate_of_few_layers_keeps_each_ones_pattern():
    lemo = LemoConfig(
        attention_forward="sparse",
        selection="ratio",
        keep_ratio=[0.5, 1.0, 0.5],
        dense_layers=[0],
        attention_pattern="block_sparse",
    )
    settings = StepSettings(512, lemo=lemo)
    assert settings.name == "LeMo sparse 0.666667, block sparse"
    assert len(set(layer_kinds(PROFILED, settings))) == 3
    built = build_on_meta(settings, [1, 2]).config.lemo
    assert [built.pattern_of(layer, 2) for layer in range(2)] == ["block_sparse", "block_sparse"]
    assert [built.is_dense(layer, 2) for layer in range(2)] == [True, False]
    assert build_on_meta(settings, [0]).config.lemo.pattern_of(0, 1) == "full"


def build_on_meta(settings, layers):
    with torch.device("meta"):
        return build_model(PROFILED, settings, layers)


def test_runs_say_which_pattern_they_trained_in():
    def rows(**fields):
        return dict(selection_rows(LemoConfig(attention_forward="sparse", **fields)))

    assert "Attention pattern" not in rows()
    assert (
        rows(attention_pattern="shifted_groups")["Attention pattern"] == "shifted groups of a quarter of a document's kept tokens"
    )
    blocks = rows(attention_pattern="block_sparse", pattern_share=0.3, dense_layers=[0])["Attention pattern"]
    assert blocks == "the 0.3 of the pairs of kept blocks that score highest in every layer but the dense ones"
    both = rows(attention_pattern=["full", "block_sparse", "shifted_groups"], group_size=512)["Attention pattern"]
    assert both == "shifted groups of 512 kept tokens and the 0.25 of the pairs of kept blocks that score highest, by layer"


def test_a_run_fits_predictors_for_its_pattern_alone_and_its_tail_attends_to_all(tmp_path):
    """The uniform draw reads no predictors, the pattern does."""
    trainer = tiny_trainer(
        tmp_path,
        {"selection": "sampled", "attention_forward": "sparse", "attention_pattern": "block_sparse"},
        dense_tail_share=0.5,
    )
    seen = []
    first = sparse_backbone(trainer.model).layers[0]
    first.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs.get("sparse_batch")), with_kwargs=True)
    trainer.train()
    assert any("recall" in entry for entry in trainer.state.log_history), "the predictor phase ran"
    steps = [batch for batch in seen if batch is not None]  # the phase's own forwards are the stock model's
    found = {(batch.selections[0].kept_share == 1, sorted(batch.patterns) == [0, 1], bool(batch.patterns)) for batch in steps}
    assert found == {(False, True, True), (True, False, False)}


def test_a_run_is_refused_at_its_start_where_no_document_fills_a_group(tmp_path):
    lemo = {"selection": "sampled", "attention_forward": "sparse", "attention_pattern": "shifted_groups", "group_size": 90}
    with pytest.raises(
        LemoConfigError, match="the longest has 96 tokens, of which a layer keeps 48; got group_size=90; set it to 12"
    ):
        tiny_trainer(tmp_path, lemo).train()


def test_committed_counts_are_the_ones_that_the_formulas_give():
    """Llama-3-8B at 64K: P and A of a layer in multiply-adds a token, the first layer dense, every layer run again in backward."""
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "pattern_counts_llama3_8b--any.json"
    found = {row["method"].partition("@")[0]: row["flops"] for row in json.loads(path.read_text())["rows"]}
    hidden, tokens, kept = 4096, 65536, 0.5
    attention, mlp, scores = 2.5 * hidden**2, 10.5 * hidden**2, hidden * (tokens + 1)
    head = 2 * hidden * 128256

    def step(per_layer):
        return 2 * tokens * (per_layer + head)

    def lemo(share):
        among = share * kept**2 * scores
        sparse = mlp + kept * attention + among + 2 * kept * (attention + mlp) + 3.5 * among
        return step(31 * sparse + 3 * (attention + mlp) + 4.5 * scores)

    # Stock checkpointing does not run the last matrix of a layer again: nothing saves its result.
    stock = step(32 * (3 * (attention + mlp) - mlp / 3 + 4.5 * scores))
    pairs = sum(pair_counts(512, 0.25)) * 64**2 / (32768 * 32769 / 2)
    groups = (4 * (1 / 4) ** 2 + 3 * (1 / 4) ** 2 + 2 * (1 / 8) ** 2) / 2
    for name, wanted in {
        "checkpointing": stock,
        "lemo-sparse-rows": lemo(1.0),
        "lemo-sparse-groups-rows": lemo(groups),
        "lemo-sparse-blocks-rows": lemo(pairs),
    }.items():
        assert found[name] == pytest.approx(wanted, rel=2e-3), name  # adapters, and predictors where there are any
