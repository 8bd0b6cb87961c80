"""Attention to kept and nearby keys: the kernel against the reference in lemo_hf/models, and against windowed attention."""

import pytest
import torch
from lemo_kernels import kept_key_attention
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


def selection_in(lengths, size, dropped, seed=0, device=DEVICE):
    """Documents side by side and a selection that drops some of their blocks."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    documents = find_documents(1, sum(lengths), size, device, cu_seq_lens=ends.to(device))
    marks = torch.rand(sum(documents.block_counts), generator=torch.Generator().manual_seed(seed)) >= dropped
    return documents, selection_of_blocks(marks.to(device), documents)


def scopes(width, window, *blocks):
    """The same rows where the kernels run, and on the CPU, where the reference has its operators."""
    found = [selection_in(*blocks, device=device) for device in (DEVICE, torch.device("cpu"))]
    return [reference.KeptKeyScope(selection, documents, SCALE, width, window) for documents, selection in found]


def in_float32(parts):
    return [part.cpu().float() for part in parts]


def attended(inputs, scope, mode):
    kept = scope.selection.real_kept
    with kernel_mode(mode):
        return reference.attend_kept_keys(*inputs, inputs[1][kept], inputs[2][kept], scope)


def assert_attention_is_the_reference(inputs, ours, theirs):
    output, lse = attended(inputs, ours, "kernels")
    assert (output.shape, output.dtype) == (inputs[0].shape, inputs[0].dtype)
    assert (lse.shape, lse.dtype) == ((*output.shape[:2], 1), torch.float32)
    for got, wanted in zip((output, lse), attended(in_float32(inputs), theirs, "reference"), strict=True):
        assert_close(got.cpu().float(), wanted, inputs[0].dtype)


def assert_gradient_is_the_reference(inputs, grad, ours, theirs):
    """Of the kernel and of the reference, from one output and log-sum-exp."""
    output, lse = attended(in_float32(inputs), theirs, "reference")
    finished = [output.to(DEVICE, grad.dtype), lse.to(DEVICE)]
    found = []
    for scope, mode in ((ours, "kernels"), (theirs, "reference")):
        parts = [grad, *inputs, *finished]
        grads, query, key, value, *rest = parts if mode == "kernels" else in_float32(parts)
        kept, dropped = scope.selection.real_kept, scope.selection.real_rest
        of_kept = grads[kept], query[kept], *(part[kept] for part in rest)
        with kernel_mode(mode):
            found.append(reference.rest_query_gradient(*of_kept, key[dropped], value[dropped], scope))
    got, wanted = found
    assert (got.shape, got.dtype) == ((len(ours.selection.real_kept), *grad.shape[1:]), grad.dtype)
    assert_close(got.cpu().float(), wanted, grad.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "window"), [(1, None), (7, None), (65, None), (10**9, None), (7, 40), (30, 9)])
@pytest.mark.parametrize("lengths", [[1], [63], [200], [29, 3, 140]], ids=str)
def test_the_kernel_is_the_reference(lengths, width, window, dtype):
    """Blocks of 8, most of them dropped or all, ragged last ones among them; widths beyond a document, sliding windows."""
    inputs = heads(sum(lengths), dtype=dtype)
    for dropped in (1.0, 0.6, 0.0):
        assert_attention_is_the_reference(inputs, *scopes(width, window, lengths, 8, dropped))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "window"), [(1, None), (7, None), (65, None), (10**9, None), (7, 40), (30, 9)])
@pytest.mark.parametrize("lengths", [[1], [63], [200], [29, 3, 140]], ids=str)
def test_what_dropped_keys_add_to_the_queries_gradient_is_the_reference(lengths, width, window, dtype):
    inputs = heads(sum(lengths), dtype=dtype)
    grad = random(*inputs[0].shape, dtype=dtype, seed=7)
    for dropped in (1.0, 0.6, 0.0):
        assert_gradient_is_the_reference(inputs, grad, *scopes(width, window, lengths, 8, dropped))


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (6, 2, 24), (2, 1, 160), (2, 2, 256)])
def test_head_counts_and_head_sizes(queries, keys, dim):
    both = scopes(12, None, [70], 8, 0.5)
    for dtype in DTYPES:
        inputs = heads(70, queries, keys, dim, dtype)
        assert_attention_is_the_reference(inputs, *both)
        assert_gradient_is_the_reference(inputs, random(70, queries, dim, dtype=dtype, seed=7), *both)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 300])
def test_two_thousand_rows(width):
    inputs = heads(2000, 2, 1, 8)
    both = scopes(width, None, [1963, 37], 64, 0.6)
    assert_attention_is_the_reference(inputs, *both)
    assert_gradient_is_the_reference(inputs, random(2000, 2, 8, seed=7), *both)


@pytest.mark.parametrize("row", [0, 37, 65])
def test_one_kept_row_beside_empty_documents(row):
    """Every row against the definition: all keys within the width, and the kept one before them."""
    lengths = [0, 66, 0, 9]
    query, key, value = heads(75)
    places = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    kept = torch.tensor([row], device=DEVICE)
    rest = torch.cat((torch.arange(row), torch.arange(row + 1, 75))).to(DEVICE)
    got = attend_kept_keys(query, key, value, key[kept], value[kept], kept, places, lengths, SCALE, 7)
    rows, document = torch.arange(75), torch.tensor([0] * 66 + [1] * 9)
    distance = rows[:, None] - rows
    same = (document[:, None] == document) & (distance >= 0)
    seen = same & ((distance < 7) | (rows == row))
    leaf = query.cpu().double().requires_grad_()
    keys, values = (part.cpu().double().repeat_interleave(2, 1) for part in (key, value))
    scores = torch.einsum("ihd,jhd->hij", leaf, keys) * SCALE
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1)
    wanted = torch.einsum("hij,jhd->ihd", weights, values)
    assert_close(got[0].cpu(), wanted.detach().float())
    assert_close(got[1].cpu(), scores.logsumexp(-1).T[:, :, None].detach().float())
    grad = random(1, 4, 16, seed=7)
    of_kept = grad, query[kept], got[0][kept], got[1][kept]
    arguments = key[rest], value[rest], kept, rest, places[kept], lengths, SCALE, 7
    found = rest_query_gradient(*of_kept, *arguments)
    # The row's whole gradient less what its own key adds.
    (whole,) = torch.autograd.grad(wanted[row], leaf, grad[0].cpu().double())
    along = (grad[0].cpu().double() * (values[row] - wanted[row].detach())).sum(-1, keepdim=True)
    own = SCALE * weights[:, row, row, None].detach() * along * keys[row]
    if row:
        assert_close(found[0].cpu(), (whole[row] - own).float())
    else:
        assert torch.equal(found, torch.zeros_like(found)), "nothing before the first row"


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
    rest = (rows % 3).nonzero().squeeze(1)
    of_kept = random(24, 4, 16, seed=7), plain[0][kept], wanted[0][kept], wanted[1][kept]
    parts = (*of_kept, plain[1][rest], plain[2][rest])
    among = kept, rest, kept, [70], SCALE, 11
    wanted = rest_query_gradient(*parts, *among)
    for change in (strided, lambda part: part.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        assert torch.equal(rest_query_gradient(*(change(part) for part in parts), *among), wanted)


def test_offsets_beyond_32_bits():
    parts = [part.unflatten(1, (3, 16)) for part in far_rows(48, 3)]
    near = [part.contiguous() for part in parts]
    rows = torch.arange(5, device=DEVICE)
    got, wanted = (attend_kept_keys(*some, *some[1:], rows, rows, [5], SCALE, 2) for some in (parts, near))
    assert all(map(torch.equal, got, wanted))
    kept, rest = 2 * rows + 1, 2 * rows  # every other row, so that the last far one of each is read
    among = kept, rest, kept, [10], SCALE, 10
    finished = (near[0], *wanted)
    got, wanted = (
        rest_query_gradient(grad, query, output, lse, key, value, *among)
        for (query, key, value), (grad, output, lse) in (
            (parts, (parts[0], parts[2], finished[2])),
            (near, (near[0], near[2], finished[2])),
        )
    )
    assert torch.equal(got, wanted)
    assert wanted[4].abs().max() > 0


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(9, 4, 16, device=DEVICE)}, r"grad must be \(10, 4, 16\); got \(9, 4, 16\)"),
        ({"grad": torch.zeros(10, 4, 16, device=DEVICE).half()}, "grad must be torch.float32, .*; got torch.float16; cast it"),
        ({"grad": torch.zeros(10, 4, 16, device="meta")}, "grad must be on .*; got meta; move it there"),
        ({"output": torch.zeros(10, 4, 8, device=DEVICE)}, r"output must be \(10, 4, 16\); got \(10, 4, 8\)"),
        ({"output": torch.zeros(10, 4, 16, device=DEVICE).half()}, "output must be torch.float32, .*; got torch.float16"),
        ({"output": torch.zeros(10, 4, 16, device="meta")}, "output must be on .*; got meta"),
        ({"lse": torch.zeros(10, 2, 1, device=DEVICE)}, r"lse must be float32 \(10, 4, 1\), .*; got torch.float32 \(10, 2, 1\)"),
        ({"lse": torch.zeros(10, 4, 1, device=DEVICE).half()}, "got torch.float16"),
        ({"lse": torch.zeros(10, 4, 1, device="meta")}, "lse must be on .*; got meta"),
        ({"rest_value": torch.zeros(10, 2, 16, device="meta")}, "dropped values must be on .*; got meta"),
        (
            {"rest_key": torch.zeros(9, 2, 16, device=DEVICE)},
            r"dropped keys and dropped values must be \(10, key_value_heads, 16\)",
        ),
        ({"places": torch.arange(9, device=DEVICE)}, "kept_rows and places must be 10 each; got 10 and 9"),
        ({"rest_rows": torch.arange(11, 21, device=DEVICE)}, r"rest_rows must be in \[0, 20\); got 11 to 20"),
        ({"lengths": [20, 1]}, "documents must have 20 rows; got 21"),
        ({"width": 0}, "width=0"),
        ({"window": 0}, "window=0; pass at least 1, or None"),
        ({"window": -3}, "window=-3"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_gradient_is_refused_on_the_host(change, message):
    if DEVICE.type == "cuda" and "11 to 20" in message:
        pytest.skip("values are not read on a GPU, where that would wait for it")
    query, key, value = heads(20)
    rows = torch.arange(20, device=DEVICE)
    arguments = {"grad": query[:10], "query": query[:10], "output": query[:10], "lse": query[:10, :, :1]}
    arguments |= {"rest_key": key[10:], "rest_value": value[10:], "kept_rows": rows[:10], "rest_rows": rows[10:]}
    arguments |= {"places": rows[:10], "lengths": [15, 5], "scale": SCALE, "width": 4}
    with pytest.raises(KernelInputError, match=message):
        rest_query_gradient(**(arguments | change))


# Rows that are out of order may see nothing of what their tile walks: a softmax of nothing; and of other rows' sums an infinity.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(("width", "window"), [(6, None), (10**6, None), (10**6, 9)])
@pytest.mark.parametrize("shift", [5000, -5000, 2**31, -(2**40)])
@pytest.mark.parametrize("rows", [[3, 4000], [-9, 3], [3, 2**31 + 9000], [2**32 + 5, -(2**31) - 1]], ids=str)
def test_wrong_rows_on_a_device_read_nothing_that_is_not_there(rows, shift, width, window, monkeypatch):
    """Behind the checks, as on a GPU: values may be wrong then, addresses may not."""
    asked, forward, backward = [], kept_key_attention.interval_attention, kept_key_attention.interval_query_gradient

    def watched_forward(query, key, value, first_key, scale, far):
        asked.extend([(first_key, 20), (far.first, 3), (far.last, 2)])
        return forward(query, key, value, first_key, scale, far=far)

    def watched_backward(*arguments):
        first, _, last = arguments[6:]
        asked.extend([(first, 19), (last, 18)])
        return backward(*arguments)

    monkeypatch.setattr(kept_key_attention, "interval_attention", watched_forward)
    monkeypatch.setattr(kept_key_attention, "interval_query_gradient", watched_backward)
    query, key, value = heads(20)
    kept = torch.tensor(rows, device=DEVICE)
    places = torch.arange(20, device=DEVICE) + shift
    result = attend_kept_keys_operator(query, key, value, key[:2], value[:2], kept, places, [20], SCALE, width, window)
    assert result[0].shape == (20, 4, 16)
    rest = torch.arange(18, device=DEVICE) + shift
    of_kept = query[:2], query[:2], query[:2], query[:2, :, :1]
    found = rest_query_gradient_operator(*of_kept, key[:18], value[:18], kept, rest, places[:2], [20], SCALE, width)
    assert found.shape == (2, 4, 16)
    assert len(asked) == 5
    for numbers, bound in asked:
        assert numbers.dtype == torch.int32
        assert numbers.min() >= -1
        assert numbers.max() < bound
    assert all(asked[place][0].min() >= 0 for place in (0, 1, 3)), "a first key is one"
