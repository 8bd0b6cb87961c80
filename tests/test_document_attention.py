import pytest
import torch
from references.decoder_layer import hidden_pairs

from lemo_hf.models.document_attention import AttentionScope, attend, with_kept_row_gradient
from lemo_hf.models.lemo_config import LemoConfigError

SCALE = 0.41


def heads(rows, queries=4, keys=2, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, count, dim, generator=generator, dtype=dtype) for count in (queries, keys, keys))


def scope_of(lengths, window=None, kept=None):
    """The scope of whole documents of `lengths`, or of their rows marked in `kept`."""
    places = torch.cat([torch.arange(length) for length in lengths])
    if kept is not None:
        places, lengths = places[kept], [int(part.sum()) for part in kept.split(lengths)]
    return AttentionScope(lengths, SCALE, window, None if window is None else places)


def by_formula(query, key, value, scope):
    """Output `(rows, heads, dim)` and log-sum-exp `(rows, heads, 1)` by dense matrices, one document after the other."""
    outputs, sums = [], []
    repeats = query.shape[1] // key.shape[1]
    places = torch.arange(len(query)) if scope.positions is None else scope.positions
    for q, k, v, place in zip(*(part.split(scope.lengths) for part in (query, key, value, places)), strict=True):
        scores = q.transpose(0, 1) @ k.repeat_interleave(repeats, 1).permute(1, 2, 0) * SCALE
        scores = scores.masked_fill(hidden_pairs(place, scope.window), -torch.inf)
        outputs.append((scores.softmax(-1) @ v.repeat_interleave(repeats, 1).transpose(0, 1)).transpose(0, 1))
        sums.append(scores.logsumexp(-1).T[..., None])
    return torch.cat(outputs), torch.cat(sums)


LENGTHS = [[12], [1], [5, 5, 5], [1, 1], [3, 9, 1], [0, 4, 0, 7], [64, 33]]


WINDOWS = [None, 1, 3, 40]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attend_equals_the_formula_by_document(lengths, window):
    query, key, value = heads(sum(lengths))
    scope = scope_of(lengths, window)
    output, lse = attend(query, key, value, scope)
    wanted, wanted_lse = by_formula(query, key, value, scope)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(lse, wanted_lse)


@pytest.mark.parametrize("lengths", [[6], [3, 3], [4, 1, 2]], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 2])
def test_attention_among_kept_rows_passes_gradcheck(lengths, keys, window):
    inputs = [part.requires_grad_() for part in heads(sum(lengths), 4, keys, dim=4)]
    scope = scope_of(lengths, window)

    def attention(query, key, value):
        return with_kept_row_gradient(query, key, value, *attend(query, key, value, scope), scope)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("lengths", [[20], [10, 10], [3, 9, 1]], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 4, 40])
def test_the_exact_gradient_is_the_dense_one_on_kept_pairs(lengths, keys, window):
    """dq, dk and dv with every matrix written out: P of the full softmax, then only pairs of a kept query and a kept key."""
    rows = sum(lengths)
    query, key, value = heads(rows, 4, keys, seed=2)
    kept = torch.rand(rows, generator=torch.Generator().manual_seed(5)) < 0.6
    kept[0] = kept[-1] = True
    output, lse = attend(query, key, value, scope_of(lengths, window))
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    leaves = [part[kept].clone().requires_grad_() for part in (query, key, value)]
    attached = with_kept_row_gradient(*leaves, output[kept], lse[kept], scope_of(lengths, window, kept))
    assert torch.equal(attached, output[kept])
    got = torch.autograd.grad(attached, leaves, upstream[kept])

    wanted = [torch.zeros_like(part) for part in (query, key, value)]
    group = 4 // keys
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        keep = kept[span].double()
        unseen = hidden_pairs(torch.arange(length), window)
        for head in range(4):
            q, k, v = query[span, head], key[span, head // group], value[span, head // group]
            p = (q @ k.T * SCALE).masked_fill(unseen, -torch.inf).softmax(-1)
            grad_out = upstream[span, head]
            full_output = p @ v
            normaliser = (grad_out * full_output).sum(1, keepdim=True)
            pairs = keep[:, None] * keep[None, :]
            grad_scores = pairs * p * (grad_out @ v.T - normaliser)
            wanted[0][span, head] += grad_scores @ k * SCALE
            wanted[1][span, head // group] += grad_scores.T @ q * SCALE
            wanted[2][span, head // group] += (pairs * p).T @ grad_out
        start += length
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference[kept], rtol=1e-9, atol=1e-11)


def test_strips_of_a_long_document_join_without_a_seam():
    """Documents of several strips, windows of less and more than one, gaps between kept rows: output and all gradients."""
    lengths = [1100, 700]
    kept = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(3)) < 0.7
    for window in (60, 600):
        scope = scope_of(lengths, window, kept)
        inputs = [part[kept].requires_grad_() for part in heads(sum(lengths), 2, 1, dim=4)]
        output, lse = attend(*inputs, scope)
        wanted, wanted_lse = by_formula(*inputs, scope)
        torch.testing.assert_close(output, wanted)
        torch.testing.assert_close(lse, wanted_lse)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = torch.autograd.grad(with_kept_row_gradient(*inputs, output, lse, scope), inputs, upstream)
        for mine, reference in zip(got, torch.autograd.grad(wanted, inputs, upstream), strict=True):
            torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [30, 513, 900])
def test_a_window_gives_the_bits_of_one_call_with_the_whole_mask(dtype, window):
    query, key, value = heads(1300, dtype=dtype)
    output, _ = attend(query, key, value, scope_of([1300], window))
    inputs = (part.transpose(0, 1)[None] for part in (query, key, value))
    seen = ~hidden_pairs(torch.arange(1300), window)
    whole = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=seen, scale=SCALE, enable_gqa=True)
    assert torch.equal(output, whole[0].transpose(0, 1))


def test_keeping_every_row_is_the_dense_gradient():
    inputs = [part.requires_grad_() for part in heads(15)]
    scope = scope_of([15])
    output, lse = attend(*inputs, scope)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(with_kept_row_gradient(*inputs, output, lse, scope), inputs, upstream)
    wanted = torch.autograd.grad(by_formula(*inputs, scope)[0], inputs, upstream)
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference)


def test_two_backward_passes_give_the_same():
    inputs = [part.requires_grad_() for part in heads(9)]
    output = with_kept_row_gradient(*inputs, *attend(*inputs, scope_of([4, 5])), scope_of([4, 5]))
    first = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(output.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype, tolerance):
    query, key, value = heads(40, dtype=dtype)
    output, lse = attend(query, key, value, scope_of([17, 23]))
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    wanted, _ = by_formula(query.double(), key.double(), value.double(), scope_of([17, 23]))
    torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_document_alone_and_in_a_batch_gives_the_same_bits():
    query, key, value = heads(30, dtype=torch.float32)
    together, _ = attend(query, key, value, scope_of([11, 19]))
    alone, _ = attend(query[11:], key[11:], value[11:], scope_of([19]))
    assert torch.equal(together[11:], alone)


def test_other_devices_are_refused_in_one_line():
    query, key, value = (part.to("meta") for part in heads(4))
    with pytest.raises(LemoConfigError, match=r"a reference for the CPU only; got torch\.float64 on meta") as error:
        attend(query, key, value, scope_of([4]))
    assert "\n" not in str(error.value)
