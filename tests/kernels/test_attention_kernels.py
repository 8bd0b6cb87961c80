"""The attention kernels against the reference in lemo_hf/models, which has operators for the CPU."""

import lemo_kernels
import pytest
import torch
from lemo_kernels import document_attention
from lemo_kernels.document_attention import (
    attend,
    attend_backward,
    attend_backward_operator,
    attend_operator,
    with_kept_row_gradient,
)
from lemo_kernels.host import KernelInputError
from references.kernel_inputs import ALLOWED, DEVICE, DTYPES, error_ratio, far_rows, random, strided
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lemo_hf.models import document_attention as reference
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.profiling.flops import FlopCounter

SCALE = 0.31


def heads(rows, queries=4, keys=2, dim=16, dtype=torch.float32, seed=0):
    return tuple(
        random(rows, count, dim, dtype=dtype, seed=seed + 100 * place) for place, count in enumerate((queries, keys, keys))
    )


def backends(dtype, window):
    """ATen's CUDA operators serve 16-bit rows without a window."""
    return ["triton"] + (["flash"] if DEVICE.type == "cuda" and dtype != torch.float32 and window is None else [])


def kept_of(lengths, share, seed):
    """Some rows of each document, its first always: their numbers, and how many of each."""
    kept = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < share
    for part in kept.split(lengths):
        part[:1] = True
    return kept.nonzero().squeeze(1), [int(part.sum()) for part in kept.split(lengths)]


def places_of(lengths):
    return torch.cat([torch.arange(length) for length in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)


def scope(lengths, window=None, places=None):
    return reference.AttentionScope(lengths, SCALE, window, None if window is None else places)


def reference_attend(inputs, scope):
    """The reference in float32 on the CPU."""
    return reference.attend(*(part.detach().cpu().float() for part in inputs), scope)


def reference_gradients(inputs, output, lse, upstream, scope):
    leaves = [part.detach().cpu().float().requires_grad_() for part in inputs]
    attached = reference.with_kept_row_gradient(*leaves, output.cpu().float(), lse.cpu(), scope)
    return torch.autograd.grad(attached, leaves, upstream.cpu().float())


def assert_near(got, wanted, dtype):
    for mine, theirs in zip(got, wanted, strict=True):
        # A row that sees itself alone has a softmax of one: its dq and dk are 0 but for rounding.
        nothing = theirs.abs().max() < 1e-3
        assert mine.abs().max() < 0.01 if nothing else error_ratio(mine.cpu(), theirs) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [63], [65], [0, 4, 0, 70], [1, 1, 33], [130], []], ids=str)
def test_forward_and_gradients_equal_the_reference(lengths, dtype):
    inputs = [part.requires_grad_() for part in heads(sum(lengths), dtype=dtype)]
    upstream = heads(sum(lengths), seed=1, dtype=dtype)[0]
    for backend in backends(dtype, None):
        output, lse = attend(*inputs, lengths, SCALE, backend=backend)
        assert (output.shape, output.dtype) == (inputs[0].shape, dtype)
        assert (lse.shape, lse.dtype) == ((sum(lengths), 4, 1), torch.float32)
        attached = with_kept_row_gradient(*inputs, output, lse, lengths, SCALE, backend=backend)
        assert torch.equal(attached, output)
        got = torch.autograd.grad(attached, inputs, upstream)
        if not sum(lengths):
            assert [grad.shape for grad in got] == [part.shape for part in inputs]
            continue
        assert_near((output, lse), reference_attend(inputs, scope(lengths)), dtype)
        assert_near(got, reference_gradients(inputs, output, lse, upstream, scope(lengths)), dtype)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (6, 2, 24), (4, 4, 64), (2, 1, 160), (2, 2, 256)])
def test_head_counts_and_head_sizes(queries, keys, dim):
    for dtype in DTYPES:
        inputs = [part.requires_grad_() for part in heads(70, queries, keys, dim, dtype)]
        upstream = random(70, queries, dim, dtype=dtype, seed=3)
        for backend in backends(dtype, None):
            output, lse = attend(*inputs, [30, 40], SCALE, backend=backend)
            assert_near((output, lse), reference_attend(inputs, scope([30, 40])), dtype)
            attached = with_kept_row_gradient(*inputs, output, lse, [30, 40], SCALE, backend=backend)
            got = torch.autograd.grad(attached, inputs, upstream)
            assert_near(got, reference_gradients(inputs, output, lse, upstream, scope([30, 40])), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100], ids=str)
def test_the_exact_form_with_windows_by_original_distance(window, dtype):
    """Forward over all rows, backward on kept rows with the full output and log-sum-exp."""
    lengths = [150, 0, 5, 70]
    inputs = heads(225, dtype=dtype, seed=4)
    kept, kept_lengths = kept_of(lengths, 0.5, seed=5)
    places = places_of(lengths)
    upstream = heads(len(kept), seed=6, dtype=dtype)[0]
    for backend in backends(dtype, window):
        output, lse = attend(*inputs, lengths, SCALE, window, backend=backend)
        assert_near((output, lse), reference_attend(inputs, scope(lengths, window, places)), dtype)
        leaves = [part[kept.to(DEVICE)].requires_grad_() for part in inputs]
        finished = output[kept.to(DEVICE)], lse[kept.to(DEVICE)]
        arguments = (kept_lengths, SCALE, window, places[kept].to(DEVICE), backend)
        got = torch.autograd.grad(with_kept_row_gradient(*leaves, *finished, *arguments), leaves, upstream)
        wanted = reference_gradients(leaves, *finished, upstream, scope(kept_lengths, window, places[kept]))
        assert_near(got, wanted, dtype)


@pytest.mark.parametrize("window", [None, 9])
def test_the_sparse_form_counts_original_distance(window):
    lengths = [40, 90]
    kept, kept_lengths = kept_of(lengths, 0.4, seed=7)
    places = places_of(lengths)[kept]
    inputs = heads(len(kept), seed=8)
    got = attend(*inputs, kept_lengths, SCALE, window, places.to(DEVICE))
    assert_near(got, reference_attend(inputs, scope(kept_lengths, window, places)), torch.float32)


def attended(inputs, lengths, window, kept, kept_lengths, places, upstream):
    """Both forms: the forward over all rows, the gradients of kept rows by it, and the forward among kept rows."""
    kept_places = places[kept].to(DEVICE)
    output, lse = attend(*inputs, lengths, SCALE, window)
    leaves = [part[kept.to(DEVICE)].requires_grad_() for part in inputs]
    finished = output[kept.to(DEVICE)], lse[kept.to(DEVICE)]
    attached = with_kept_row_gradient(*leaves, *finished, kept_lengths, SCALE, window, kept_places)
    gradients = torch.autograd.grad(attached, leaves, upstream)
    among = attend(*(leaf.detach() for leaf in leaves), kept_lengths, SCALE, window, kept_places)
    return (output, lse), leaves, finished, gradients, among


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 100], ids=str)
def test_long_documents_beside_each_other_do_not_see_each_other(window):
    """Of several tiles each, three query heads on a key head; what one document holds changes no bit of the others.

    Finite numbers, that is: a tile may hold rows of two documents, and 0 * nan is nan.
    """
    lengths = [300, 0, 1, 130, 64, 200]
    inputs = heads(sum(lengths), 3, 1)
    kept, kept_lengths = kept_of(lengths, 0.5, seed=5)
    places = places_of(lengths)
    upstream = heads(len(kept), 3, 1, seed=6)[0]
    everything, leaves, finished, gradients, among = attended(inputs, lengths, window, kept, kept_lengths, places, upstream)
    assert_near(everything, reference_attend(inputs, scope(lengths, window, places)), torch.float32)
    kept_scope = scope(kept_lengths, window, places[kept])
    assert_near(gradients, reference_gradients(leaves, *finished, upstream, kept_scope), torch.float32)
    assert_near(among, reference_attend(leaves, kept_scope), torch.float32)
    row = torch.arange(sum(lengths))
    changed = (row >= 301) & (row < 431)
    other = [part.masked_fill(changed.to(DEVICE)[:, None, None], 30.0) for part in inputs]
    again, _, _, other_gradients, other_among = attended(other, lengths, window, kept, kept_lengths, places, upstream)
    for before, after, rows in (
        *((mine, theirs, row) for mine, theirs in zip(everything, again, strict=True)),
        *((mine, theirs, kept) for mine, theirs in zip((*gradients, *among), (*other_gradients, *other_among), strict=True)),
    ):
        same = ~changed[rows].to(DEVICE)
        assert torch.equal(before[same], after[same])
        assert not torch.equal(before[~same], after[~same])


@pytest.mark.parametrize("window", [None, 150], ids=str)
def test_two_thousand_rows(window):
    """The forward over all of them, the gradient of a sixth of them."""
    lengths = [1963, 0, 37]
    inputs = heads(2000, 2, 1, 8, torch.float16)
    kept, kept_lengths = kept_of(lengths, 0.16, seed=5)
    places = places_of(lengths)
    for backend in backends(torch.float16, window):
        output, lse = attend(*inputs, lengths, SCALE, window, backend=backend)
        assert_near((output, lse), reference_attend(inputs, scope(lengths, window, places)), torch.float16)
        leaves = [part[kept.to(DEVICE)].requires_grad_() for part in inputs]
        finished = output[kept.to(DEVICE)], lse[kept.to(DEVICE)]
        upstream = random(*finished[0].shape, dtype=torch.float16, seed=6)
        arguments = (kept_lengths, SCALE, window, places[kept].to(DEVICE), backend)
        got = torch.autograd.grad(with_kept_row_gradient(*leaves, *finished, *arguments), leaves, upstream)
        wanted = reference_gradients(leaves, *finished, upstream, scope(kept_lengths, window, places[kept]))
        assert_near(got, wanted, torch.float16)


@pytest.mark.slow
def test_the_gradient_of_two_thousand_rows():
    inputs = [part.requires_grad_() for part in heads(2000, 2, 1, 8, torch.float16)]
    upstream = random(2000, 2, 8, dtype=torch.float16, seed=6)
    output, lse = attend(*inputs, [1963, 37], SCALE, backend="triton")
    attached = with_kept_row_gradient(*inputs, output, lse, [1963, 37], SCALE, backend="triton")
    got = torch.autograd.grad(attached, inputs, upstream)
    assert_near(got, reference_gradients(inputs, output, lse, upstream, scope([1963, 37])), torch.float16)


def test_one_kept_row_of_many():
    inputs = heads(66, seed=9)
    output, lse = (part[37:38] for part in attend(*inputs, [66], SCALE))
    leaves = [part[37:38].clone().requires_grad_() for part in inputs]
    upstream = heads(1, seed=10)[0]
    got = torch.autograd.grad(with_kept_row_gradient(*leaves, output, lse, [1], SCALE), leaves, upstream)
    wanted = reference_gradients(leaves, output, lse, upstream, scope([1]))
    assert wanted[0].abs().max() > 1e-3, "in the exact form one row alone still has a gradient"
    assert_near(got, wanted, torch.float32)


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    plain = heads(70)
    strides = [strided(part) for part in plain]
    dims_first = [part.permute(2, 1, 0).contiguous().permute(2, 1, 0) for part in plain]
    wanted = attend(*plain, [70], SCALE)
    upstream = heads(70, seed=1)[0]
    grads = attend_backward_operator(upstream, *plain, *wanted, [70], SCALE, 11, None, "triton")
    for inputs in (strides, dims_first):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(attend(*inputs, [70], SCALE), wanted, strict=True))
        upstream_too = upstream.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        again = attend_backward_operator(upstream_too, *inputs, *wanted, [70], SCALE, 11, None, "triton")
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, grads, strict=True))


@pytest.mark.parametrize("far", ["rows", "heads"])
def test_offsets_beyond_32_bits(far):
    """Rows, or heads, whose offsets do not fit 32 bits although their numbers and strides do."""
    parts = far_rows(48, 3)
    inputs = [part.unflatten(1, (3, 16)) if far == "rows" else part.unflatten(1, (3, 16)).transpose(0, 1) for part in parts]
    near = [part.contiguous() for part in inputs]
    count = inputs[0].shape[0]
    output, lse = attend(*near, [count], SCALE, backend="triton")
    again = attend(*inputs, [count], SCALE, backend="triton")
    grads = [
        attend_backward_operator(output, *which, output, lse, [count], SCALE, None, None, "triton") for which in (near, inputs)
    ]
    pairs = [*zip((output, lse), again, strict=True), *zip(*grads, strict=True)]
    assert all(torch.equal(wanted, got) for wanted, got in pairs)


def test_the_same_bits_twice():
    inputs = [part.requires_grad_() for part in heads(140, dtype=torch.float16)]
    upstream = heads(140, seed=1, dtype=torch.float16)[0]
    runs = []  # of the kernels; ATen's dq has the same bits under deterministic algorithms only
    for _ in range(2):
        output, lse = attend(*inputs, [40, 100], SCALE, 50)
        attached = with_kept_row_gradient(*inputs, output, lse, [40, 100], SCALE, 50)
        runs.append([output, lse, *torch.autograd.grad(attached, inputs, upstream)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_operators_are_registered_as_torch_expects():
    inputs = heads(20)
    arguments = ([12, 8], SCALE, 5, torch.arange(20, device=DEVICE), "triton")
    torch.library.opcheck(attend_operator, (*inputs, *arguments))
    output, lse = attend(*inputs, *arguments[:-1])
    torch.library.opcheck(attend_backward_operator, (torch.ones_like(output), *inputs, output, lse, *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [10, 11]}, "20 rows; got \\[10, 11\\]"),
        ({"lengths": [21, -1]}, "add up"),
        ({"window": 0}, "window=0"),
        ({"positions": torch.zeros(19, dtype=torch.long, device=DEVICE)}, r"shape \(19,\)"),
        ({"positions": torch.zeros(20, device=DEVICE)}, "float32"),
        ({"key": torch.zeros(20, 3, 16, device=DEVICE)}, r"\(20, 3, 16\)"),
        ({"value": torch.zeros(20, 2, 8, device=DEVICE)}, r"\(20, 2, 8\)"),
        ({"key": torch.zeros(20, 2, 16, dtype=torch.float16, device=DEVICE)}, "float16"),
        ({"value": torch.zeros(20, 2, 16, device="meta")}, "meta"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_on_the_host(change, message):
    query, key, value = heads(20)
    arguments = {"query": query, "key": key, "value": value, "lengths": [20], "scale": SCALE, **change}
    with pytest.raises(KernelInputError, match=message):
        attend(**arguments)
    with pytest.raises(KernelInputError, match=message):
        with_kept_row_gradient(output=query, lse=query[..., :1], **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"grad": torch.zeros(19, 4, 16, device=DEVICE)},
            r"grad must be \(20, 4, 16\); got \(19, 4, 16\); pass one row per query",
        ),
        ({"grad": torch.zeros(20, 4, 16, device=DEVICE).half()}, "grad must be torch.float32, .*; got torch.float16; cast it"),
        ({"grad": torch.zeros(20, 4, 16, device="meta")}, "grad must be on .*; got meta; move it there"),
        ({"output": torch.zeros(20, 2, 16, device=DEVICE)}, r"output must be \(20, 4, 16\); got \(20, 2, 16\)"),
        ({"output": torch.zeros(20, 4, 16, device=DEVICE).half()}, "output must be torch.float32, .*; got torch.float16"),
        ({"output": torch.zeros(20, 4, 16, device="meta")}, "output must be on .*; got meta"),
        ({"lse": torch.zeros(19, 4, 1, device=DEVICE)}, r"lse must be float32 \(20, 4, 1\), .*; got torch.float32 \(19, 4, 1\)"),
        ({"lse": torch.zeros(20, 4, device=DEVICE)}, r"got torch.float32 \(20, 4\); pass what the forward gave"),
        ({"lse": torch.zeros(20, 4, 1, device=DEVICE).half()}, r"got torch.float16 \(20, 4, 1\)"),
        ({"lse": torch.zeros(20, 4, 1, device="meta")}, "lse must be on .*; got meta"),
    ],
    ids=str,
)
def test_what_does_not_belong_to_the_queries_is_refused_on_the_host(change, message):
    """The kernels of the backward read as many rows of it as there are queries."""
    query, key, value = heads(20)
    arguments = {"query": query, "key": key, "value": value, "output": query, "lse": query[..., :1], "lengths": [20]}
    with pytest.raises(KernelInputError, match=message):
        attend_backward(**{"grad": query, **arguments, **change}, scale=SCALE)
    if "grad" not in change:
        with pytest.raises(KernelInputError, match=message):
            with_kept_row_gradient(**{**arguments, **change}, scale=SCALE)


def test_head_sizes_beyond_256_and_float64_are_refused():
    with pytest.raises(KernelInputError, match="got 264"):
        attend(*heads(4, 1, 1, 264), [4], SCALE)
    with pytest.raises(KernelInputError, match="float64"):
        attend(*heads(4, dtype=torch.float64), [4], SCALE)


def test_flash_operators_accept_the_call_and_return_its_shapes(monkeypatch):
    """No GPU here: fake CUDA tensors run the schemas and shape functions of ATen's CUDA operators; gpu_suite.py the operators."""
    monkeypatch.setattr(
        document_attention, "on_device", lambda values, device: torch.empty(len(values), dtype=torch.int64, device=device)
    )
    with FakeTensorMode():
        query, key, value = (torch.empty(20, count, 128, dtype=torch.bfloat16, device="cuda") for count in (4, 2, 2))
        output, lse = document_attention._flash_forward(query, key, value, [12, 0, 8], SCALE)
        assert output.shape == query.shape
        assert lse.shape == (20, 4, 1)
        assert lse.dtype == torch.float32
        grads = document_attention._flash_backward(output, query, key, value, output, lse, [12, 0, 8], SCALE)
        assert [(grad.shape, grad.dtype, grad.device.type) for grad in grads] == [
            (part.shape, torch.bfloat16, "cuda") for part in (query, key, value)
        ]


def test_flash_serves_16_bit_rows_without_a_window_and_triton_the_rest(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        query = torch.empty(20, 4, 128, dtype=torch.bfloat16, device="cuda")
        places = torch.empty(20, dtype=torch.int64, device="cuda")
        chosen = document_attention.fastest_backend
        assert chosen(query, [20], None, None) == "flash"
        assert chosen(query, [20], 20, None) == "flash", "a window as long as the longest document hides nothing"
        assert chosen(query, [20], 19, None) == "triton"
        assert chosen(query, [20], 20, places) == "triton", "rows with gaps may lie further apart than their number"
        assert chosen(query.float(), [20], None, None) == "triton"
        assert chosen(torch.empty(20, 4, 100, dtype=torch.bfloat16, device="cuda"), [20], None, None) == "triton"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert chosen(query, [20], None, None) == "triton"
    assert chosen(torch.zeros(20, 4, 128, dtype=torch.float16), [20], None, None) == "triton"


@pytest.mark.parametrize("window", [None, 9])
def test_the_models_call_the_kernels_where_these_are_switched_on(window):
    inputs = heads(45)
    places = places_of([15, 30]).to(DEVICE)
    arguments = [15, 30], SCALE, window, None if window is None else places
    with kernel_mode("kernels"):
        got = reference.attend(*inputs, reference.AttentionScope(*arguments))
    wanted = attend(*inputs, *arguments)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))
    gradients = []
    for attach in ("kernels", "direct"):
        leaves = [part.clone().requires_grad_() for part in inputs]
        if attach == "kernels":
            with kernel_mode("kernels"):
                attached = reference.with_kept_row_gradient(*leaves, *got, reference.AttentionScope(*arguments))
        else:
            attached = with_kept_row_gradient(*leaves, *got, *arguments)
        gradients.append(torch.autograd.grad(attached.square().sum(), leaves))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_the_flop_counter_counts_kernels_as_the_reference_is_counted():
    """An operator that the counter does not know costs nothing: training on a GPU would look as if it had no attention."""
    inputs = [part.requires_grad_() for part in heads(64)]
    counted = {}
    for mode in ("kernels", "reference"):
        if mode == "reference" and DEVICE.type == "cuda":
            pytest.skip("the reference has operators for the CPU")
        with FlopCounter(nn.Identity()) as counter, kernel_mode(mode):
            output, lse = reference.attend(*inputs, scope([40, 24]))
            reference.with_kept_row_gradient(*inputs, output, lse, scope([40, 24])).sum().backward()
        counted[mode] = counter.flops.by("part", "phase")
    assert counted["kernels"] == counted["reference"]
    assert counted["kernels"]["attention", "backward"] == 2 * (40 * 41 + 24 * 25) // 2 * 4 * 16 * 5


def test_the_flop_counter_knows_windows_scores_and_features():
    inputs, places = heads(64), places_of([64]).to(DEVICE)
    with FlopCounter(nn.Identity()) as counter:
        attend(*inputs, [64], SCALE, 10, places)
        lemo_kernels.block_scores(*inputs[:2], 8, SCALE)
        matrices = [random(48, 4), random(4, 4), random(4, 2)]
        rows = torch.arange(0, 64, 8, device=DEVICE)
        lengths = torch.full((8,), 8, dtype=torch.int32, device=DEVICE)
        lemo_kernels.block_features(
            random(64, 48), rows, lengths, random(48), None, matrices, matrices, block_size=8, epsilon=1e-6
        )
    assert counter.flops.by("operator") == {
        "attend": 2 * (55 + 54 * 10) * 4 * 16 * 2,
        "block_scores": 2 * (64 * 65 // 2) * 4 * 16,
        "block_features": 2 * 64 * 2 * (48 * 4 + 16 + 8),
    }
