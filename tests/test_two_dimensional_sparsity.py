"""Attention patterns among kept tokens against masks written out."""

import contextlib

import pytest
import torch
from references.attention_patterns import groups_by_hand, rows_by_hand
from references.decoder_layer import hidden_pairs
from references.one_layer import saved_tensors
from torch.nn.attention.flex_attention import flex_attention

from lemo_hf.models.block_pair_attention import flex_block_mask, with_flex_attention
from lemo_hf.models.document_attention import AttentionScope, attend, with_kept_row_gradient
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.models.token_elimination import selection_of_blocks
from lemo_hf.models.two_dimensional_sparsity import (
    ShiftedGroups,
    _limits,
    attend_in_pattern,
    choose_pairs,
    pair_counts,
)
from lemo_hf.profiling.flops import FlopCounter

SCALE = 0.37
BLOCK = 4


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
    compare(attend_in_pattern(*inputs, scope, pairs), slowly(*inputs, rows_by_hand(pairs) & near), inputs)


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


@pytest.mark.parametrize("share", [0.01, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("lengths", [[64], [61], [40, 3, 50, 17], [4, 4]], ids=str)
def test_block_pairs_are_the_best_ones_and_attention_sees_just_these(lengths, share):
    documents, selection, scores = kept_documents(lengths)
    pairs = choose_pairs(scores, selection, documents, share)
    assert torch.equal(pairs.marks, pairs_by_hand(documents, selection, scores, share))
    assert pairs.marks.sum(1).tolist() == [count for of_document in pairs.counts for count in of_document]
    inputs = heads_of(sum(selection.kept_lengths))
    got = attend_in_pattern(*inputs, AttentionScope(selection.kept_lengths, SCALE), pairs)
    compare(got, slowly(*inputs, rows_by_hand(pairs)), inputs)


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
