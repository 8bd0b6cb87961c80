"""The attention kernels against the reference in lemo_hf/models and, for windows, against dense matrices."""

import pytest
import torch
from lemo_kernels import document_attention
from lemo_kernels.document_attention import _attend, _attend_backward, attend, with_kept_row_gradient
from lemo_kernels.host import KernelInputError
from torch._subclasses.fake_tensor import FakeTensorMode

from lemo_hf.models import document_attention as reference

SCALE = 0.31
# Ratio of root-mean-square error to root-mean-square value.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3}


def error_ratio(got, wanted):
    got, wanted = got.double(), wanted.double()
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all(), "an output was not written, or overflowed"
    return ((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp_min(1e-30)).item()


def heads(rows, queries=4, keys=2, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, count, dim, generator=generator).to(dtype) for count in (queries, keys, keys))


def kept_of(lengths, share, seed):
    """Some rows of each document, its first always; their numbers and how many of each."""
    kept = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < share
    for part in kept.split(lengths):
        part[:1] = True
    return kept.nonzero().squeeze(1), [int(part.sum()) for part in kept.split(lengths)]


def by_formula(query, key, value, lengths, window, positions, output=None, lse=None, grad=None):
    """Dense matrices in float64: output and log-sum-exp, or the gradients for those given."""
    query, key, value = (part.double() for part in (query, key, value))
    group = query.shape[1] // key.shape[1]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    distance = positions[:, None] - positions[None]
    seen = (document[:, None] == document[None]) & (distance >= 0) & (distance < (window or 1 << 40))
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * SCALE
    scores = scores.masked_fill(~seen, -torch.inf)
    if grad is None:
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.repeat_interleave(group, 1))
        return mixed, scores.logsumexp(-1).T[..., None]
    grad, output, lse = grad.double(), output.double(), lse.double()
    weights = (scores - lse.squeeze(-1).T[..., None]).exp()
    normaliser = (grad * output).sum(-1).T[..., None]
    grad_scores = weights * (torch.einsum("qhd,khd->hqk", grad, value.repeat_interleave(group, 1)) - normaliser)
    grad_query = torch.einsum("hqk,khd->qhd", grad_scores, key.repeat_interleave(group, 1)) * SCALE
    grad_key = torch.einsum("hqk,qhd->khd", grad_scores, query) * SCALE
    grad_value = torch.einsum("hqk,qhd->khd", weights, grad)
    return grad_query, *(part.unflatten(1, (-1, group)).sum(2) for part in (grad_key, grad_value))


LENGTHS = [[1], [63], [65], [0, 4, 0, 70], [1, 1, 33], [130], []]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_forward_and_gradients_equal_the_reference(lengths, dtype):
    inputs = [part.requires_grad_() for part in heads(sum(lengths), dtype=dtype)]
    upstream = heads(sum(lengths), seed=1, dtype=dtype)[0]
    output, lse = attend(*inputs, lengths, SCALE)
    if not sum(lengths):
        assert output.shape == (0, 4, 16)
        assert lse.shape == (0, 4, 1)
        return
    wide = [part.detach().float().requires_grad_() for part in inputs]
    wanted, wanted_lse = reference.attend(*wide, reference.AttentionScope(lengths, SCALE))
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    assert error_ratio(output, wanted) < LIMITS[dtype]
    assert error_ratio(lse, wanted_lse) < LIMITS[dtype]
    attached = with_kept_row_gradient(*inputs, output, lse, lengths, SCALE)
    assert torch.equal(attached, output)
    attached = with_kept_row_gradient(*inputs, wanted.to(dtype), wanted_lse, lengths, SCALE)
    got = torch.autograd.grad(attached, inputs, upstream)
    attached = reference.with_kept_row_gradient(*wide, wanted, wanted_lse, reference.AttentionScope(lengths, SCALE))
    for mine, theirs in zip(got, torch.autograd.grad(attached, wide, upstream.float()), strict=True):
        # One row alone has a softmax of one: dq and dk are 0 but for rounding.
        assert error_ratio(mine, theirs) < LIMITS[dtype] or (len(inputs[0]) == 1 and mine.abs().max() < 0.01)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 1, 8), (6, 2, 24), (4, 4, 64), (2, 1, 160), (2, 2, 256)])
def test_head_counts_and_head_sizes(queries, keys, dim):
    inputs = heads(70, queries, keys, dim)
    output, lse = attend(*inputs, [30, 40], SCALE)
    wanted, wanted_lse = reference.attend(*inputs, reference.AttentionScope([30, 40], SCALE))
    assert error_ratio(output, wanted) < 2e-6
    assert error_ratio(lse, wanted_lse) < 2e-6
    upstream = heads(70, queries, keys, dim, seed=3)[0]
    got = _attend_backward(upstream, *inputs, output, lse, [30, 40], SCALE, None, None, "triton")
    exact = by_formula(*inputs, [30, 40], None, torch.arange(70), output, lse, upstream)
    for mine, theirs in zip(got, exact, strict=True):
        assert error_ratio(mine, theirs) < 5e-6


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100], ids=str)
def test_the_exact_form_with_windows_by_original_distance(window, dtype):
    """Forward over all rows, backward on kept rows with the full output and log-sum-exp."""
    lengths = [150, 0, 5, 70]
    query, key, value = heads(225, dtype=dtype, seed=4)
    kept, kept_lengths = kept_of(lengths, 0.5, seed=5)
    places = torch.cat([torch.arange(length) for length in lengths])
    output, lse = attend(query, key, value, lengths, SCALE, window)
    wanted, wanted_lse = by_formula(query, key, value, lengths, window, places)
    assert error_ratio(output, wanted) < LIMITS[dtype]
    assert error_ratio(lse, wanted_lse) < LIMITS[dtype]
    scope = reference.AttentionScope(lengths, SCALE, window, places)
    wanted, wanted_lse = reference.attend(query.float(), key.float(), value.float(), scope)
    assert error_ratio(output, wanted) < LIMITS[dtype]
    assert error_ratio(lse, wanted_lse) < LIMITS[dtype]

    leaves = [part[kept].clone().requires_grad_() for part in (query, key, value)]
    upstream = heads(len(kept), seed=6, dtype=dtype)[0]
    finished = output[kept], lse[kept]
    attached = with_kept_row_gradient(*leaves, *finished, kept_lengths, SCALE, window, places[kept])
    got = torch.autograd.grad(attached, leaves, upstream)
    exact = by_formula(*(leaf.detach() for leaf in leaves), kept_lengths, window, places[kept], *finished, upstream)
    for mine, theirs in zip(got, exact, strict=True):
        assert error_ratio(mine, theirs) < 2 * LIMITS[dtype] or theirs.abs().max() < 1e-3
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    scope = reference.AttentionScope(kept_lengths, SCALE, window, places[kept])
    attached = reference.with_kept_row_gradient(*wide, finished[0].float(), finished[1], scope)
    for mine, theirs in zip(got, torch.autograd.grad(attached, wide, upstream.float()), strict=True):
        assert error_ratio(mine, theirs) < 2 * LIMITS[dtype] or theirs.abs().max() < 1e-3


@pytest.mark.parametrize("window", [None, 9])
def test_the_sparse_form_counts_original_distance(window):
    lengths = [40, 90]
    kept, kept_lengths = kept_of(lengths, 0.4, seed=7)
    places = torch.cat([torch.arange(length) for length in lengths])[kept]
    query, key, value = heads(len(kept), seed=8)
    output, lse = attend(query, key, value, kept_lengths, SCALE, window, places)
    wanted, wanted_lse = by_formula(query, key, value, kept_lengths, window, places)
    assert error_ratio(output, wanted) < 2e-6
    assert error_ratio(lse, wanted_lse) < 2e-6


def test_one_kept_row_of_many():
    query, key, value = heads(66, seed=9)
    output, lse = attend(query, key, value, [66], SCALE)
    leaves = [part[37:38].clone().requires_grad_() for part in (query, key, value)]
    upstream = heads(1, seed=10)[0]
    attached = with_kept_row_gradient(*leaves, output[37:38], lse[37:38], [1], SCALE)
    got = torch.autograd.grad(attached, leaves, upstream)
    one = [leaf.detach() for leaf in leaves]
    exact = by_formula(*one, [1], None, torch.zeros(1, dtype=torch.long), output[37:38], lse[37:38], upstream)
    assert exact[0].abs().max() > 1e-3, "in the exact form one row alone still has a gradient"
    for mine, theirs in zip(got, exact, strict=True):
        assert error_ratio(mine, theirs) < 5e-6


def test_inputs_that_are_not_contiguous_are_read_as_they_are():
    plain = heads(70)
    strided = []
    for part in plain:
        wide = torch.full((70, part.shape[1] + 1, 2 * part.shape[2]), torch.nan)
        wide[:, :-1, : part.shape[2]] = part
        strided.append(wide[:, :-1, : part.shape[2]])
    dims_first = [part.permute(2, 1, 0).contiguous().permute(2, 1, 0) for part in plain]
    wanted = attend(*plain, [70], SCALE)
    upstream = heads(70, seed=1)[0]
    grads = _attend_backward(upstream, *plain, *wanted, [70], SCALE, 11, None, "triton")
    for inputs in (strided, dims_first):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(attend(*inputs, [70], SCALE), wanted, strict=True))
        upstream_too = upstream.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        again = _attend_backward(upstream_too, *inputs, *wanted, [70], SCALE, 11, None, "triton")
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, grads, strict=True))


def test_the_same_bits_twice():
    inputs = [part.requires_grad_() for part in heads(140, dtype=torch.float16)]
    upstream = heads(140, seed=1, dtype=torch.float16)[0]
    runs = []
    for _ in range(2):
        output, lse = attend(*inputs, [40, 100], SCALE, 50)
        attached = with_kept_row_gradient(*inputs, output, lse, [40, 100], SCALE, 50)
        runs.append([output, lse, *torch.autograd.grad(attached, inputs, upstream)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_operators_are_registered_as_torch_expects():
    inputs = heads(20)
    arguments = ([12, 8], SCALE, 5, torch.arange(20), "triton")
    torch.library.opcheck(_attend, (*inputs, *arguments))
    output, lse = attend(*inputs, *arguments[:-1])
    torch.library.opcheck(_attend_backward, (torch.ones_like(output), *inputs, output, lse, *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [10, 11]}, "20 rows; got \\[10, 11\\]"),
        ({"lengths": [21, -1]}, "add up"),
        ({"window": 0}, "window=0"),
        ({"positions": torch.zeros(19, dtype=torch.long)}, r"shape \(19,\)"),
        ({"positions": torch.zeros(20)}, "float32"),
        ({"key": torch.zeros(20, 3, 16)}, r"\(20, 3, 16\)"),
        ({"value": torch.zeros(20, 2, 8)}, r"\(20, 2, 8\)"),
        ({"key": torch.zeros(20, 2, 16, dtype=torch.float16)}, "float16"),
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
        chosen = document_attention._backend
        assert chosen(query, [20], None, None) == "flash"
        assert chosen(query, [20], 20, None) == "flash", "a window as long as the longest document hides nothing"
        assert chosen(query, [20], 19, None) == "triton"
        assert chosen(query, [20], 20, places) == "triton", "rows with gaps may lie further apart than their number"
        assert chosen(query.float(), [20], None, None) == "triton"
        assert chosen(torch.empty(20, 4, 100, dtype=torch.bfloat16, device="cuda"), [20], None, None) == "triton"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert chosen(query, [20], None, None) == "triton"
    assert chosen(torch.zeros(20, 4, 128, dtype=torch.float16), [20], None, None) == "triton"
