"""Local attention of dropped rows: the kernel against the reference in lemo_hf/models, and against windowed attention."""

import pytest
import torch
from lemo_kernels import nearby_attention
from lemo_kernels.document_attention import attend
from lemo_kernels.host import KernelInputError
from lemo_kernels.nearby_attention import attend_nearby, attend_nearby_operator
from references.kernel_inputs import DEVICE, DTYPES, assert_close, far_rows, random, strided
from torch import nn

from lemo_hf.models import nearby_attention as reference
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


def both(inputs, documents, selection, width):
    query, key, value = inputs
    found = []
    for mode in ("kernels", "reference"):
        scope = reference.NearbyScope(selection, documents, SCALE, width)
        with kernel_mode(mode):
            found.append(reference.attend_nearby(query[selection.real_rest], key, value, scope))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 65, 10**9])
@pytest.mark.parametrize("lengths", [[1], [63], [200], [29, 3, 140]], ids=str)
def test_the_kernel_is_the_reference(lengths, width, dtype):
    """Blocks of 8, most of them dropped, ragged last ones among them; widths beyond a document."""
    inputs = heads(sum(lengths), dtype=dtype)
    for dropped in (1.0, 0.6):
        documents, selection = selection_in(lengths, 8, dropped)
        got, wanted = both(inputs, documents, selection, width)
        assert got.shape == (selection.real_rest.numel(), 4, 16)
        assert_close(got, wanted, dtype)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_rows_far_apart_are_windowed_attention_s_rows(share):
    """Tiles of queries whose first and last row lie hundreds of keys apart."""
    lengths = [1000, 37]
    inputs = heads(sum(lengths), 2, 1)
    _, selection = selection_in(lengths, 8, share)
    rows = selection.real_rest
    places = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)[rows]
    got = attend_nearby(inputs[0][rows], *inputs[1:], rows, places, SCALE, 20)
    assert_close(got, attend(*inputs, lengths, SCALE, 20, backend="triton")[0][rows])


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (6, 2, 24), (2, 1, 160), (2, 2, 256)])
def test_head_counts_and_head_sizes(queries, keys, dim):
    documents, selection = selection_in([70], 8, 0.5)
    for dtype in DTYPES:
        assert_close(*both(heads(70, queries, keys, dim, dtype), documents, selection, 12), dtype)


def test_two_thousand_rows():
    inputs = heads(2000, 2, 1, 8, torch.float16)
    documents, selection = selection_in([1963, 37], 64, 0.6)
    assert_close(*both(inputs, documents, selection, 150))


def test_documents_that_drop_nothing_or_everything():
    documents, _ = selection_in([20, 9, 30, 8], 8, 0.0)
    marks = torch.tensor([False, True, False, True]).repeat_interleave(torch.tensor(documents.block_counts))
    for kept_blocks in (marks, ~marks):
        selection = selection_of_blocks(kept_blocks.to(DEVICE), documents)
        assert selection.kept_lengths in ([0, 9, 0, 8], [20, 0, 30, 0])
        assert_close(*both(heads(67), documents, selection, 11))


def test_one_row_and_no_row():
    documents, _ = selection_in([66], 1, 0.0)
    selection = selection_of_blocks(torch.arange(66, device=DEVICE) != 37, documents)
    assert_close(*both(heads(66), documents, selection, 9))
    query, key, value = heads(66)
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert attend_nearby(query[:0], key, value, nothing, nothing, SCALE, 9).shape == (0, 4, 16)


def test_what_lies_beyond_the_width_or_in_another_document_changes_no_bit():
    lengths = [50, 40]
    query, key, value = heads(90)
    rows = torch.tensor([30, 31, 52, 53, 80], device=DEVICE)
    places = torch.tensor([30, 31, 2, 3, 30], device=DEVICE)
    wanted = attend_nearby(query[rows], key, value, rows, places, SCALE, 6)
    seen = torch.zeros(sum(lengths), dtype=torch.bool)
    for row, first in ((30, 25), (31, 26), (52, 50), (53, 50), (80, 75)):
        seen[first : row + 1] = True
    hidden = (~seen).to(DEVICE)[:, None, None]
    other = [part.masked_fill(hidden, 30.0) for part in (key, value)]
    assert torch.equal(attend_nearby(query[rows], *other, rows, places, SCALE, 6), wanted)
    for row in (25, 50, 75):
        changed = value.clone()
        changed[row] += 1
        assert not torch.equal(attend_nearby(query[rows], key, changed, rows, places, SCALE, 6), wanted), row


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    plain = heads(70)
    rows = torch.arange(0, 70, 3, device=DEVICE)
    query = plain[0][rows]
    wanted = attend_nearby(query, *plain[1:], rows, rows, SCALE, 11)
    for change in (strided, lambda part: part.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        got = attend_nearby(change(query), *(change(part) for part in plain[1:]), rows, rows, SCALE, 11)
        assert torch.equal(got, wanted)


def test_offsets_beyond_32_bits():
    parts = [part.unflatten(1, (3, 16)) for part in far_rows(48, 3)]
    near = [part.contiguous() for part in parts]
    rows = torch.arange(5, device=DEVICE)
    assert torch.equal(attend_nearby(*parts, rows, rows, SCALE, 2), attend_nearby(*near, rows, rows, SCALE, 2))


def test_the_same_bits_twice_and_as_torch_expects():
    query, key, value = heads(70, dtype=torch.float16)
    rows = torch.arange(20, 60, device=DEVICE)
    arguments = (query[rows], key, value, rows, rows, SCALE, 9)
    assert torch.equal(attend_nearby(*arguments), attend_nearby(*arguments))
    torch.library.opcheck(attend_nearby_operator, arguments)


def test_the_flop_counter_counts_the_keys_that_are_seen():
    query, key, value = heads(70)
    rows = torch.arange(20, 60, device=DEVICE)
    with FlopCounter(nn.Identity()) as counter:
        attend_nearby(query[rows], key, value, rows, rows, SCALE, 9)
    assert counter.flops.by("operator") == {"attend_nearby": 2 * 40 * 9 * 4 * 16 * 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.arange(9, device=DEVICE)}, "rows and places must be 10 each; got 9 and 10"),
        ({"rows": torch.arange(11, 21, device=DEVICE)}, r"rows must be in \[0, 20\); got 11 to 20"),
        ({"rows": torch.arange(10, dtype=torch.int32, device=DEVICE)}, "int32"),
        ({"width": 0}, "width=0"),
        ({"key": torch.zeros(20, 3, 16, device=DEVICE)}, r"\(20, 3, 16\)"),
        ({"value": torch.zeros(20, 2, 8, device=DEVICE)}, r"\(20, 2, 8\)"),
        ({"value": torch.zeros(20, 2, 16, dtype=torch.float16, device=DEVICE)}, "float16"),
        ({"value": torch.zeros(20, 2, 16, device="meta")}, "meta"),
        ({"query": torch.zeros(10, 64, device=DEVICE)}, r"\(10, 64\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_on_the_host(change, message):
    if DEVICE.type == "cuda" and "11 to 20" in message:
        pytest.skip("values are not read on a GPU, where that would wait for it")
    query, key, value = heads(20)
    rows = torch.arange(10, device=DEVICE)
    arguments = {"query": query[:10], "key": key, "value": value, "rows": rows, "places": rows, "scale": SCALE, "width": 4}
    with pytest.raises(KernelInputError, match=message):
        attend_nearby(**(arguments | change))


# Rows that are out of order may see nothing of what their tile walks: a softmax of nothing.
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")
@pytest.mark.parametrize("width", [6, 10**6])
@pytest.mark.parametrize("places", [[5003, 9000], [-7, 3], [-(2**40), 2**40], [2**31, 2**32 + 5]], ids=str)
@pytest.mark.parametrize("rows", [[3, 4000], [-9, 3], [3, 2**31], [3, 2**31 + 9000], [2**32 + 5, -(2**31) - 1]], ids=str)
def test_wrong_rows_on_a_device_read_nothing_that_is_not_there(rows, places, width, monkeypatch):
    """Behind the checks, as on a GPU: values may be wrong then, addresses may not."""
    asked, attention = [], nearby_attention.interval_attention

    def watched(query, key, value, first_key, scale, last_key):
        asked.append(torch.stack((first_key, last_key)))
        return attention(query, key, value, first_key, scale, last_key)

    monkeypatch.setattr(nearby_attention, "interval_attention", watched)
    query, key, value = heads(20)
    at = torch.tensor(rows, device=DEVICE)
    at_place = torch.tensor(places, device=DEVICE)
    assert attend_nearby_operator(query[:2], key, value, at, at_place, SCALE, width).shape == (2, 4, 16)
    (keys,) = asked
    assert keys.dtype == torch.int32
    assert keys.min() >= 0
    assert keys.max() < 20
    assert (keys[0] <= keys[1]).all(), "every row sees a key"
