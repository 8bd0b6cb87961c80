"""Attention to kept and nearby keys: the kernel against the reference in lemo_hf/models, and against windowed attention."""

import pytest
import torch
from lemo_kernels.document_attention import attend
from lemo_kernels.host import KernelInputError
from lemo_kernels.kept_key_attention import (
    attend_kept_keys,
    attend_kept_keys_operator,
    rest_query_gradient,
    rest_query_gradient_operator,
)
from references.kernel_inputs import DEVICE, DTYPES, assert_close, far_rows, random, strided
from torch import nn

from lemo_hf.models import kept_key_attention as reference
from lemo_hf.models.documents import find_documents
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.token_elimination import selection_of_blocks
from lemo_hf.profiling.flops import FlopCounter

SCALE = 0.31


def heads(rows, queries=4, keys=2, dim=16, dtype=torch.float32, seed=0):
    return tuple(
        random(rows, count, dim, dtype=dtype, seed=seed + 100 * place) for place, count in enumerate((queries, keys, keys))
    )


def selection_in(lengths, size, dropped, seed=0):
    """Documents side by side and a selection that drops some of their blocks."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    documents = find_documents(1, sum(lengths), size, DEVICE, cu_seq_lens=ends.to(DEVICE))
    marks = torch.rand(sum(documents.block_counts), generator=torch.Generator().manual_seed(seed)) >= dropped
    return documents, selection_of_blocks(marks.to(DEVICE), documents)


def both(inputs, documents, selection, width, window=None):
    query, key, value = inputs
    kept = key[selection.real_kept], value[selection.real_kept]
    found = []
    for mode in ("kernels", "reference"):
        scope = reference.KeptKeyScope(selection, documents, SCALE, width, window)
        with kernel_mode(mode):
            found.append(reference.attend_kept_keys(query, key, value, *kept, scope))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "window"), [(1, None), (7, None), (65, None), (10**9, None), (7, 40), (30, 9)])
@pytest.mark.parametrize("lengths", [[1], [63], [200], [29, 3, 140]], ids=str)
def test_the_kernel_is_the_reference(lengths, width, window, dtype):
    """Blocks of 8, most of them dropped or all, ragged last ones among them; widths beyond a document, sliding windows."""
    inputs = heads(sum(lengths), dtype=dtype)
    for dropped in (1.0, 0.6, 0.0):
        documents, selection = selection_in(lengths, 8, dropped)
        for got, wanted in zip(*both(inputs, documents, selection, width, window), strict=True):
            assert got.shape[:2] == (sum(lengths), 4)
            assert_close(got, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "window"), [(1, None), (7, None), (65, None), (10**9, None), (7, 40), (30, 9)])
@pytest.mark.parametrize("lengths", [[1], [63], [200], [29, 3, 140]], ids=str)
def test_what_dropped_keys_add_to_the_queries_gradient_is_the_reference(lengths, width, window, dtype):
    query, key, value = heads(sum(lengths), dtype=dtype)
    grad = random(*query.shape, dtype=dtype, seed=7)
    for dropped in (1.0, 0.6, 0.0):
        documents, selection = selection_in(lengths, 8, dropped)
        kept, rest = selection.real_kept, selection.real_rest
        scope = reference.KeptKeyScope(selection, documents, SCALE, width, window)
        with kernel_mode("reference"):
            output, lse = reference.attend_kept_keys(query, key, value, key[kept], value[kept], scope)
        of_kept = grad[kept], query[kept], output[kept], lse[kept]
        found = []
        for mode in ("kernels", "reference"):
            with kernel_mode(mode):
                found.append(reference.rest_query_gradient(*of_kept, key[rest], value[rest], scope))
        assert found[0].shape == (len(kept), 4, 16)
        assert_close(*found, dtype)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (6, 2, 24), (2, 1, 160), (2, 2, 256)])
def test_head_counts_and_head_sizes(queries, keys, dim):
    documents, selection = selection_in([70], 8, 0.5)
    for dtype in DTYPES:
        for got, wanted in zip(*both(heads(70, queries, keys, dim, dtype), documents, selection, 12), strict=True):
            assert_close(got, wanted, dtype)


def test_with_all_rows_kept_it_is_dense_attention():
    lengths = [400, 37]
    inputs = heads(sum(lengths), 2, 1)
    rows = torch.arange(sum(lengths), device=DEVICE)
    places = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    got = attend_kept_keys(*inputs, *inputs[1:], rows, places, lengths, SCALE, 20)
    for part, wanted in zip(got, attend(*inputs, lengths, SCALE, backend="triton"), strict=True):
        assert_close(part, wanted)


def test_without_kept_rows_it_is_windowed_attention():
    lengths = [100, 37]
    inputs = heads(sum(lengths), 2, 1)
    places = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    got = attend_kept_keys(*inputs, *(part[:0] for part in inputs[1:]), nothing, places, lengths, SCALE, 20)
    for part, wanted in zip(got, attend(*inputs, lengths, SCALE, 20, backend="triton"), strict=True):
        assert_close(part, wanted)


def test_dropped_rows_far_behind_and_other_documents_change_no_bit():
    lengths = [50, 40]
    inputs = heads(90)
    documents, selection = selection_in(lengths, 8, 0.6)
    kept = selection.real_kept
    assert 25 > 16 not in kept.tolist()
    query, key, value = inputs
    among = kept, documents.place_of_row, lengths
    wanted = attend_kept_keys(query, key, value, key[kept], value[kept], *among, SCALE, 6)[0]
    other = value.clone()
    other[16] += 1  # dropped: seen by rows 16 to 21 alone
    got = attend_kept_keys(query, key, other, key[kept], value[kept], *among, SCALE, 6)[0]
    changed = (got != wanted).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == list(range(16, 22))
    of_kept = value[kept].clone()
    of_kept[0] += 1  # kept, row 0 or later: seen by all that come six rows later in its document, and by no other
    row = int(kept[0])
    got = attend_kept_keys(query, key, value, key[kept], of_kept, *among, SCALE, 6)[0]
    assert (got != wanted).flatten(1).any(1).nonzero().flatten().tolist() == list(range(row + 6, 50))


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    plain = heads(70)
    rows = torch.arange(70, device=DEVICE)
    kept = rows[::3].contiguous()
    parts = (*plain, plain[1][kept], plain[2][kept])
    wanted = attend_kept_keys(*parts, kept, rows, [70], SCALE, 11)
    for change in (strided, lambda part: part.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        got = attend_kept_keys(*(change(part) for part in parts), kept, rows, [70], SCALE, 11)
        assert all(map(torch.equal, got, wanted))


def test_offsets_beyond_32_bits():
    parts = [part.unflatten(1, (3, 16)) for part in far_rows(48, 3)]
    near = [part.contiguous() for part in parts]
    rows = torch.arange(5, device=DEVICE)
    got, wanted = (attend_kept_keys(*some, *some[1:], rows, rows, [5], SCALE, 2) for some in (parts, near))
    assert all(map(torch.equal, got, wanted))


def test_the_same_bits_twice_and_as_torch_expects():
    query, key, value = heads(70, dtype=torch.float16)
    rows = torch.arange(70, device=DEVICE)
    arguments = (query, key, value, key[8:40], value[8:40], rows[8:40], rows, [70], SCALE, 9, None)
    assert all(map(torch.equal, attend_kept_keys(*arguments), attend_kept_keys(*arguments)))
    torch.library.opcheck(attend_kept_keys_operator, arguments)
    output, lse = attend_kept_keys(*arguments)
    rest = torch.cat((rows[:8], rows[40:]))
    of_kept = (query[8:40], query[8:40], output[8:40], lse[8:40])
    arguments = (*of_kept, key[rest], value[rest], rows[8:40], rest, rows[8:40], [70], SCALE, 9)
    assert torch.equal(rest_query_gradient(*arguments), rest_query_gradient(*arguments))
    torch.library.opcheck(rest_query_gradient_operator, arguments)


@pytest.mark.parametrize("lengths", [[80], [40, 40], [60, 20]], ids=str)
@pytest.mark.parametrize("width", [8, 1000])
def test_the_flop_counter_counts_the_keys_that_are_seen(lengths, width):
    """With half of the rows kept, evenly: half of all pairs of a document, and as many of its nearby ones."""
    query, key, value = heads(80)
    rows = torch.arange(80, device=DEVICE)
    kept, rest, places = rows[::2].contiguous(), rows[1::2].contiguous(), torch.cat([rows[:length] for length in lengths])
    pairs, near = (sum(min(place + 1, most) for place in places.tolist()) for most in (80, width))
    with FlopCounter(nn.Identity()) as counter:
        output, lse = attend_kept_keys(query, key, value, key[kept], value[kept], kept, places, lengths, SCALE, width)
        of_kept = query[kept], query[kept], output[kept], lse[kept]
        rest_query_gradient(*of_kept, key[rest], value[rest], kept, rest, places[kept], lengths, SCALE, width)
    wanted = {"attend_kept_keys": 2 * (pairs + near) // 2 * 4 * 16 * 2, "rest_query_gradient": 2 * near // 4 * 4 * 16 * 3}
    assert counter.flops.by("operator") == wanted
    assert counter.flops.by("part") == {"attention": sum(wanted.values())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept_rows": torch.arange(9, device=DEVICE)}, r"kept keys and kept values must be \(9, key_value_heads, 16\)"),
        ({"kept_rows": torch.arange(11, 21, device=DEVICE)}, r"kept_rows must be in \[0, 20\); got 11 to 20"),
        ({"kept_rows": torch.arange(10, dtype=torch.int32, device=DEVICE)}, "int32"),
        ({"places": torch.arange(10, device=DEVICE)}, "places must be 20; got 10"),
        ({"lengths": [20, 1]}, "documents must have 20 rows; got 21"),
        ({"width": 0}, "width=0"),
        ({"window": 0}, "window=0"),
        ({"key": torch.zeros(20, 3, 16, device=DEVICE)}, r"\(20, 3, 16\)"),
        (
            {"kept_key": torch.zeros(10, 4, 16, device=DEVICE), "kept_value": torch.zeros(10, 4, 16, device=DEVICE)},
            "keys' heads; got 4",
        ),
        ({"value": torch.zeros(20, 2, 16, dtype=torch.float16, device=DEVICE)}, "float16"),
        ({"value": torch.zeros(20, 2, 16, device="meta")}, "meta"),
        ({"query": torch.zeros(20, 64, device=DEVICE)}, r"\(20, 64\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_on_the_host(change, message):
    if DEVICE.type == "cuda" and "11 to 20" in message:
        pytest.skip("values are not read on a GPU, where that would wait for it")
    query, key, value = heads(20)
    rows = torch.arange(20, device=DEVICE)
    arguments = {"query": query, "key": key, "value": value, "kept_key": key[:10], "kept_value": value[:10]}
    arguments |= {"kept_rows": rows[:10], "places": rows, "lengths": [15, 5], "scale": SCALE, "width": 4}
    with pytest.raises(KernelInputError, match=message):
        attend_kept_keys(**(arguments | change))


def test_wrong_rows_on_a_device_read_nothing_that_is_not_there():
    """Behind the checks, as on a GPU: values may be wrong then, addresses may not."""
    query, key, value = heads(20)
    rows = torch.tensor([3, 4000], device=DEVICE)
    places = torch.arange(20, device=DEVICE) + 5000
    result = attend_kept_keys_operator(query, key, value, key[:2], value[:2], rows, places, [20], SCALE, 10**6, None)
    assert result[0].shape == (20, 4, 16)
