import pytest
import torch
from lemo_kernels import apply_rotary
from lemo_kernels.host import KernelInputError
from lemo_kernels.rotary import rotary_operator
from references.kernel_inputs import DEVICE, DTYPES, assert_close, far_rows, random, split_rows, strided
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

# kept rows, positions, query heads, key heads, head size
SHAPES = [(1, 1, 1, 1, 2), (63, 70, 4, 2, 8), (65, 300, 7, 1, 6), (2000, 2500, 2, 1, 4), (20, 33, 3, 3, 128), (0, 5, 2, 1, 8)]


def tables(positions, head_dim, dtype):
    angles = 100 * random(positions, head_dim, seed=20)  # halves that differ, as no caller has them: nothing may rest on that
    return angles.cos().to(dtype), angles.sin().to(dtype)


def both(query, key, cos, sin, rows, upstream):
    """Results and gradients of the kernel and of transformers' function on gathered tables."""
    results = []
    for kernels in (True, False):
        q, k = (heads.detach().clone().requires_grad_() for heads in (query, key))
        if kernels:
            rotated = apply_rotary(q, k, cos, sin, rows)
        else:
            at = torch.arange(len(q), device=q.device) if rows is None else rows % len(cos)
            rotated = apply_rotary_pos_emb(q, k, cos[at], sin[at], unsqueeze_dim=1)
        results.append((*rotated, *torch.autograd.grad(rotated, (q, k), [g.to(rotated[0].dtype) for g in upstream])))
    return results


def assert_equal(results, exactly):
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        # On a GPU float32 products and sums contract.
        assert torch.equal(got, wanted) if exactly else assert_close(got, wanted) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kept", "positions", "heads", "key_heads", "head_dim"), SHAPES)
def test_rotation_equals_transformers_bit_for_bit(kept, positions, heads, key_heads, head_dim, dtype):
    query, key = random(kept, heads, head_dim, dtype=dtype), random(kept, key_heads, head_dim, dtype=dtype, seed=1)
    upstream = random(kept, heads, head_dim, seed=2), random(kept, key_heads, head_dim, seed=3)
    rows, _ = split_rows(positions, kept)
    exactly = DEVICE.type == "cpu" or dtype != torch.float32
    assert_equal(both(query, key, *tables(positions, head_dim, dtype), rows, upstream), exactly)


def test_one_sequence_s_tables_serve_all_samples_and_none_are_needed_for_every_row():
    query, key = random(30, 4, 8), random(30, 2, 8, seed=1)
    cos, sin = tables(20, 8, torch.float32)
    rows, _ = split_rows(60, 30)
    upstream = random(30, 4, 8, seed=2), random(30, 2, 8, seed=3)
    one = both(query, key, cos, sin, rows, upstream)
    repeated = both(query, key, cos.repeat(3, 1), sin.repeat(3, 1), rows, upstream)
    assert_equal((one[0], repeated[0]), True)
    assert_equal(one, DEVICE.type == "cpu")
    assert_equal(both(query[:20], key[:20], cos, sin, None, [part[:20] for part in upstream]), DEVICE.type == "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_tables_beside_16_bit_heads_give_float32_as_under_autocast(dtype):
    upstream = random(9, 4, 8, seed=2), random(9, 2, 8, seed=3)
    heads = random(9, 4, 8, dtype=dtype), random(9, 2, 8, dtype=dtype, seed=1)
    results = both(*heads, *tables(40, 8, torch.float32), split_rows(40, 9)[0], upstream)
    assert results[0][0].dtype == torch.float32
    assert results[0][2].dtype == dtype
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted)


def test_heads_that_are_not_contiguous():
    query, key = random(9, 4, 8), random(9, 2, 8, seed=1)
    cos, sin = tables(40, 8, torch.float32)
    rows, _ = split_rows(40, 9)
    fused = torch.cat((query, key), 1)  # one projection of both
    by_head = query.transpose(0, 1).contiguous().transpose(0, 1)
    last = query.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = apply_rotary(query, key, cos, sin, rows)
    for q, k in ((fused[:, :4], fused[:, 4:]), (by_head, key), (last, strided(key))):
        got = apply_rotary(q, k, strided(cos), strided(sin), rows)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_nothing_is_saved_but_the_tables_and_the_row_numbers():
    cos, sin = tables(40, 8, torch.float32)
    rows, _ = split_rows(40, 9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_rotary(random(9, 4, 8).requires_grad_(), random(9, 2, 8).requires_grad_(), cos, sin, rows)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (cos, sin, rows)}


def test_offsets_beyond_32_bits():
    heads, cos, sin = far_rows(16, 3)
    query, cos, sin = heads.unflatten(1, (2, 8)), cos[:, :8], sin[:, :8]
    rows = torch.tensor([4, 3, 2, 1, 0], device=DEVICE)
    far, near = (
        rotary_operator(q, q, c, s, rows, False, torch.float16)
        for q, c, s in ((query, cos, sin), (query.clone(), cos.clone(), sin.clone()))
    )
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(far, near, strict=True))


def test_a_negative_row_reads_nan():
    rows = torch.tensor([3, -1], device=DEVICE)
    query, _ = rotary_operator(random(2, 1, 8), random(2, 1, 8), random(5, 8), random(5, 8), rows, False, torch.float32)
    assert query[0].isfinite().all()
    assert query[1].isnan().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 8)}, r"query must be \(rows, heads, head_dim\); got shape \(2, 8\)"),
        ({"key": torch.zeros(3, 1, 8)}, "must agree in rows, head_dim and dtype"),
        ({"key": torch.zeros(2, 1, 8).half()}, "must agree in rows, head_dim and dtype"),
        ({"cos": torch.zeros(5, 6)}, "cos must have rows of width 8; got 6"),
        ({"sin": torch.zeros(4, 8)}, "sin must have 5 rows; got 4"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows must be \(2,\); got \(3,\)"),
        ({"rows": None}, "without rows the tables need one entry per row; got 5; pass rows"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "rows must be on .*; got meta"),
    ],
)
def test_what_does_not_fit_is_refused_by_fact_value_and_fix(changes, message):
    arguments = {
        "query": torch.zeros(2, 3, 8),
        "key": torch.zeros(2, 1, 8),
        "cos": torch.zeros(5, 8),
        "sin": torch.zeros(5, 8),
        "rows": torch.tensor([1, 4]),
        **changes,
    }
    here = {n: t if t is None or t.device.type == "meta" else t.to(DEVICE) for n, t in arguments.items()}
    with pytest.raises(KernelInputError, match=message):
        apply_rotary(**here)


def test_the_registered_operator_passes_opcheck():
    args = random(2, 3, 8), random(2, 1, 8), random(5, 8), random(5, 8)
    torch.library.opcheck(rotary_operator, (*args, torch.tensor([1, 4], device=DEVICE), False, torch.float32))
    torch.library.opcheck(rotary_operator, (*args[:2], args[2][:2], args[3][:2], None, True, torch.float16))
