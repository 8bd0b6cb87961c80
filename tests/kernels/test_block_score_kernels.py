"""The block-score kernel against the definition in lemo_hf/models."""

import lemo_kernels
import pytest
import torch
from lemo_kernels import token_informativeness
from lemo_kernels.host import KernelInputError
from lemo_kernels.token_informativeness import (
    block_informativeness_operator,
    block_scores,
    block_scores_operator,
    informativeness_by_document,
)
from references.kernel_inputs import DEVICE, DTYPES, error_ratio, far_rows, random, strided

from lemo_hf.models import token_informativeness as reference
from lemo_hf.models.kernel_switch import kernel_mode

SCALE = 0.29


def heads(tokens, queries=4, keys=2, dim=16, dtype=torch.float32, seed=0):
    return tuple(random(tokens, count, dim, dtype=dtype, seed=seed + 100 * place) for place, count in enumerate((queries, keys)))


def assert_same_scores(got, wanted):
    assert got.shape == wanted.shape
    assert got.dtype == torch.float32
    assert torch.equal(got.triu(1), torch.zeros_like(got)), "nothing above the diagonal"
    assert wanted.abs().max() > 0.01
    # The same 16-bit numbers in, float32 sums in both.
    assert error_ratio(got, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "block_size"), [(1, 8), (63, 8), (65, 8), (200, 8), (300, 64), (257, 48), (150, 1), (290, 140), (40, 64)]
)
def test_scores_equal_the_definition(tokens, block_size, dtype):
    query, key = heads(tokens, dtype=dtype)
    got = block_scores(query, key, block_size, SCALE)
    assert_same_scores(got, reference.block_scores(query, key, block_size, SCALE))


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (6, 2, 24), (3, 3, 160), (2, 1, 256)])
def test_head_counts_and_head_sizes(queries, keys, dim):
    query, key = heads(150, queries, keys, dim)
    got = block_scores(query, key, 16, SCALE)
    assert_same_scores(got, reference.block_scores(query, key, 16, SCALE))


@pytest.mark.parametrize("window", [1, 5, 64, 130, 1000])
def test_only_pairs_within_the_window_count(window):
    query, key = heads(400)
    got = block_scores(query, key, 16, SCALE, window)
    assert_same_scores(got, reference.block_scores(query, key, 16, SCALE, window))


def test_two_thousand_tokens():
    query, key = heads(2000, 2, 1)
    assert_same_scores(block_scores(query, key, 64, SCALE), reference.block_scores(query, key, 64, SCALE))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("block_size", [8, 130])
def test_informativeness_by_document(block_size, window):
    lengths = [70, 0, 1, 33, 8, 200]
    query, key = heads(sum(lengths))
    got = informativeness_by_document(query, key, lengths, block_size, SCALE, window)
    parts = zip(query.split(lengths), key.split(lengths), strict=True)
    wanted = [
        reference.block_informativeness(reference.block_scores(q, k, block_size, SCALE, window))
        if len(q)
        else torch.zeros(0, device=DEVICE)
        for q, k in parts
    ]
    assert [part.shape for part in got] == [part.shape for part in wanted]
    torch.testing.assert_close(torch.cat(got), torch.cat(wanted))
    assert got[2].item() == 0.0, "a document of one block"


def test_more_blocks_than_a_grid_s_second_dimension_holds(monkeypatch):
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            launched.append(grid)
            return lambda *args, **constants: None

    monkeypatch.setattr(token_informativeness, "_informativeness_kernel", Recorder())
    assert block_informativeness_operator(random(1), [70_000, 3]).shape == (70_003,)
    ((programs,),) = launched
    assert programs == 2 * 70_000


def test_a_document_has_the_same_bits_alone_and_packed():
    lengths = [70, 33, 200]
    query, key = heads(sum(lengths), dtype=torch.float16)
    packed = informativeness_by_document(query, key, lengths, 8, SCALE)
    for q, k, wanted in zip(query.split(lengths), key.split(lengths), packed, strict=True):
        (alone,) = informativeness_by_document(q, k, [len(q)], 8, SCALE)
        assert torch.equal(alone, wanted)
    again = informativeness_by_document(query, key, lengths, 8, SCALE)
    assert all(torch.equal(first, second) for first, second in zip(packed, again, strict=True))


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    query, key = heads(90)
    wanted = block_scores(query, key, 16, SCALE)
    apart = [strided(part) for part in (query, key)]
    dims_first = [part.permute(2, 1, 0).contiguous().permute(2, 1, 0) for part in (query, key)]
    assert torch.equal(block_scores(*apart, 16, SCALE), wanted)
    assert torch.equal(block_scores(*dims_first, 16, SCALE), wanted)


@pytest.mark.parametrize("far", ["rows", "heads"])
def test_offsets_beyond_32_bits(far):
    inputs = [part.unflatten(1, (3, 16)) for part in far_rows(48, 2)]
    query, key = inputs if far == "rows" else (part.transpose(0, 1) for part in inputs)
    assert torch.equal(block_scores(query, key, 2, SCALE), block_scores(query.contiguous(), key.contiguous(), 2, SCALE))


def test_operators_are_registered_as_torch_expects():
    query, key = heads(40)
    torch.library.opcheck(block_scores_operator, (query, key, [24, 16], 8, SCALE, 5))
    torch.library.opcheck(block_informativeness_operator, (block_scores_operator(query, key, [24, 16], 8, SCALE, None), [3, 2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [10, 11]}, "the 20 tokens"),
        ({"block_size": 0}, "block_size=0"),
        ({"window": 0}, "window=0"),
        ({"key": torch.zeros(20, 3, 16, device=DEVICE)}, "multiple of the key heads; got 3"),
        ({"key": torch.zeros(19, 2, 16, device=DEVICE)}, r"\(19, 2, 16\)"),
        ({"key": torch.zeros(20, 2, 16, dtype=torch.float16, device=DEVICE)}, "float16"),
        ({"key": torch.zeros(20, 2, 16, device="meta")}, "meta"),
        ({"query": torch.zeros(20, 4, 264, device=DEVICE), "key": torch.zeros(20, 2, 264, device=DEVICE)}, "256; got 264"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_on_the_host(change, message):
    query, key = heads(20)
    arguments = {"query": query, "key": key, "lengths": [20], "block_size": 8, "scale": SCALE, **change}
    with pytest.raises(KernelInputError, match=message):
        informativeness_by_document(**arguments)


def test_the_models_call_the_kernel_where_it_is_switched_on(monkeypatch):
    query, key = heads(90)
    calls = []
    monkeypatch.setattr(lemo_kernels, "block_scores", lambda *args: calls.append(args) or block_scores(*args))
    with kernel_mode("kernels"):
        got = reference.block_scores(query, key, 16, SCALE, 40)
    assert len(calls) == 1
    assert torch.equal(got, block_scores(query, key, 16, SCALE, 40))
    assert_same_scores(got, reference.block_scores(query, key, 16, SCALE, 40))
    assert len(calls) == 1, "the reference is not the kernel"
