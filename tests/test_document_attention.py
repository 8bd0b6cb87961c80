import pytest
import torch
from references.decoder_layer import probabilities

from lemo_hf.models.document_attention import attend, with_kept_row_gradient
from lemo_hf.models.lemo_config import LemoConfigError

SCALE = 0.41


def heads(rows, queries=4, keys=2, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, count, dim, generator=generator, dtype=dtype) for count in (queries, keys, keys))


def by_formula(query, key, value, lengths):
    """Output `(rows, heads, dim)` and log-sum-exp `(rows, heads, 1)` by dense matrices, one document after the other."""
    outputs, sums = [], []
    repeats = query.shape[1] // key.shape[1]
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        scores = q.transpose(0, 1) @ k.repeat_interleave(repeats, 1).permute(1, 2, 0) * SCALE
        outputs.append((probabilities(scores) @ v.repeat_interleave(repeats, 1).transpose(0, 1)).transpose(0, 1))
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        sums.append(scores.masked_fill(later, -torch.inf).logsumexp(-1).T[..., None])
    return torch.cat(outputs), torch.cat(sums)


LENGTHS = [[12], [1], [5, 5, 5], [1, 1], [3, 9, 1], [0, 4, 0, 7], [64, 33]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attend_equals_the_formula_by_document(lengths):
    query, key, value = heads(sum(lengths))
    output, lse = attend(query, key, value, lengths, SCALE)
    wanted, wanted_lse = by_formula(query, key, value, lengths)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(lse, wanted_lse)


@pytest.mark.parametrize("lengths", [[6], [3, 3], [4, 1, 2]], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_attention_among_kept_rows_passes_gradcheck(lengths, keys):
    inputs = [part.requires_grad_() for part in heads(sum(lengths), 4, keys, dim=4)]

    def attention(query, key, value):
        output, lse = attend(query, key, value, lengths, SCALE)
        return with_kept_row_gradient(query, key, value, output, lse, lengths, SCALE)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("lengths", [[20], [10, 10], [3, 9, 1]], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_the_exact_gradient_is_the_dense_one_on_kept_pairs(lengths, keys):
    """dq, dk and dv with every matrix written out: P of the full softmax, then only pairs of a kept query and a kept key."""
    rows = sum(lengths)
    query, key, value = heads(rows, 4, keys, seed=2)
    kept = torch.rand(rows, generator=torch.Generator().manual_seed(5)) < 0.6
    kept[0] = kept[-1] = True
    kept_lengths = [int(part.sum()) for part in kept.split(lengths)]
    output, lse = attend(query, key, value, lengths, SCALE)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    leaves = [part[kept].clone().requires_grad_() for part in (query, key, value)]
    attached = with_kept_row_gradient(*leaves, output[kept], lse[kept], kept_lengths, SCALE)
    assert torch.equal(attached, output[kept])
    got = torch.autograd.grad(attached, leaves, upstream[kept])

    wanted = [torch.zeros_like(part) for part in (query, key, value)]
    group = 4 // keys
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        keep = kept[span].double()
        for head in range(4):
            q, k, v = query[span, head], key[span, head // group], value[span, head // group]
            p = probabilities((q @ k.T * SCALE)[None])[0]
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


def test_keeping_every_row_is_the_dense_gradient():
    inputs = [part.requires_grad_() for part in heads(15)]
    output, lse = attend(*inputs, [15], SCALE)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(with_kept_row_gradient(*inputs, output, lse, [15], SCALE), inputs, upstream)
    wanted = torch.autograd.grad(by_formula(*inputs, [15])[0], inputs, upstream)
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference)


def test_two_backward_passes_give_the_same():
    inputs = [part.requires_grad_() for part in heads(9)]
    output = with_kept_row_gradient(*inputs, *attend(*inputs, [4, 5], SCALE), [4, 5], SCALE)
    first = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(output.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype, tolerance):
    query, key, value = heads(40, dtype=dtype)
    output, lse = attend(query, key, value, [17, 23], SCALE)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    wanted, _ = by_formula(query.double(), key.double(), value.double(), [17, 23])
    torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)


def test_a_document_alone_and_in_a_batch_gives_the_same_bits():
    query, key, value = heads(30, dtype=torch.float32)
    together, _ = attend(query, key, value, [11, 19], SCALE)
    alone, _ = attend(query[11:], key[11:], value[11:], [19], SCALE)
    assert torch.equal(together[11:], alone)


def test_other_devices_are_refused_in_one_line():
    query, key, value = (part.to("meta") for part in heads(4))
    with pytest.raises(LemoConfigError, match="for the CPU so far; got tensors on meta") as error:
        attend(query, key, value, [4], SCALE)
    assert "\n" not in str(error.value)
