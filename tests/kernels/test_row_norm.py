import pytest
import torch
import torch.nn.functional as F
from lemo_kernels import add_norm, gather_norm, merge_rows, output_determines_input, rest_norm, row_slots
from lemo_kernels.host import KernelInputError
from lemo_kernels.row_norm import norm_backward_operator, norm_operator
from references.kernel_inputs import (
    ALLOWED,
    DEVICE,
    DTYPES,
    assert_close,
    error_ratio,
    far_rows,
    random,
    split_rows,
    strided,
    transposed,
)

from lemo_hf.models.row_operations import rms_norm
from lemo_hf.models.token_elimination import gather_rows

EPSILON = 1e-5
SHAPES = [(1, 1, 0, 8), (63, 63, 0, 40), (65, 1, 7, 33), (40, 13, 3, 2500), (5, 0, 2, 16)]


def reference_norm(rows, weight, bias, centred):
    if centred:
        return F.layer_norm(rows, rows.shape[-1:], weight, bias, EPSILON)
    return rms_norm(rows, weight, EPSILON)


def parameters(hidden, centred, dtype=torch.float32, seed=10):
    weight = (1 + 0.3 * random(hidden, seed=seed)).to(dtype)
    return weight, 0.3 * random(hidden, seed=seed + 1).to(dtype) if centred else None


def both(stream, kept_rows, rest_rows, weight, bias, centred, upstream, from_output=False, trained=()):
    """Results and gradients of gather, norm and merge by the kernels and by the reference."""
    results = []
    for kernels in (True, False):
        leaf = stream.detach().clone().requires_grad_()
        leaves = [leaf, *(part.detach().requires_grad_() for part in trained)]
        w, b = leaves[1:] if len(trained) == 2 else (leaves[1] if trained else weight, bias)
        if kernels:
            slots = row_slots(kept_rows, rest_rows, leaf.shape[0])
            kept, normed, passed_on = gather_norm(
                leaf, kept_rows, slots, w, b, epsilon=EPSILON, centred=centred, from_output=from_output
            )
            merged = merge_rows(passed_on, kept_rows, slots, kept, normed * normed)
        else:
            kept = gather_rows(leaf, kept_rows)
            normed = reference_norm(kept, w, b, centred)
            merged = leaf.index_copy(0, kept_rows, kept + normed * normed)
        results.append((kept, normed, merged, *torch.autograd.grad(merged, leaves, upstream)))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("rows", "kept", "padding", "hidden"), SHAPES)
def test_gather_and_norm_equal_the_reference_with_all_gradients(rows, kept, padding, hidden, centred, dtype):
    kept_rows, rest_rows = split_rows(rows, kept, padding)
    weight, bias = parameters(hidden, centred, dtype)
    stream, upstream = random(rows, hidden, dtype=dtype, scale=3), random(rows, hidden, dtype=dtype, seed=1)
    for from_output, trained in ((False, [weight, *([bias] if centred else [])]), (True, [])):
        got, wanted = both(stream, kept_rows, rest_rows, weight, bias, centred, upstream, from_output, trained)
        assert torch.equal(got[0], wanted[0])
        for mine, reference in zip(got[1:], wanted[1:], strict=True):
            assert_close(mine, reference)


def test_many_rows():
    weight, _ = parameters(24, False)
    got, wanted = both(random(2000, 24), *split_rows(2000, 700, 90), weight, None, False, random(2000, 24, seed=1))
    for mine, reference in zip(got, wanted, strict=True):
        assert_close(mine, reference)


@pytest.mark.parametrize("lay_out", [strided, transposed])
def test_rows_that_are_not_contiguous(lay_out):
    kept_rows, rest_rows = split_rows(65, 30, 3)
    weight, bias = parameters(40, True)
    stream, upstream = random(65, 40), random(65, 40, seed=1)
    slots = row_slots(kept_rows, rest_rows, 65)
    results = []
    for arrange in (lay_out, torch.clone):
        leaf = arrange(stream).requires_grad_()
        _, normed, _ = gather_norm(leaf, kept_rows, slots, strided(weight[:, None])[:, 0], bias, epsilon=EPSILON, centred=True)
        summed, again = add_norm(arrange(stream[:30]), arrange(normed), weight, epsilon=EPSILON)
        results.append((normed, summed, again, *torch.autograd.grad(again, leaf, arrange(upstream[:30]))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("with_update", [False, True])
def test_add_and_norm_equal_the_reference_with_all_gradients(with_update, centred, dtype):
    weight, bias = parameters(72, centred, dtype)
    upstream = random(45, 72, dtype=dtype, seed=2), random(45, 72, dtype=dtype, seed=3)
    for from_output in (False, True):
        results = []
        for kernels in (True, False):
            leaves = [random(45, 72, dtype=dtype).requires_grad_()]
            if with_update:
                leaves.append(random(45, 72, dtype=dtype, seed=1).requires_grad_())
            if kernels:
                update = leaves[1] if with_update else None
                pair = add_norm(leaves[0], update, weight, bias, epsilon=EPSILON, centred=centred, from_output=from_output)
            else:
                summed = leaves[0] + leaves[1] if with_update else leaves[0]
                pair = summed, reference_norm(summed, weight, bias, centred)
            results.append((*pair, *torch.autograd.grad(pair, leaves, upstream)))
        assert torch.equal(results[0][0], results[1][0])
        for mine, reference in zip(results[0][1:], results[1][1:], strict=True):
            assert_close(mine, reference)


@pytest.mark.parametrize("with_update", [False, True])
def test_rest_rows_are_normalised_without_a_copy_and_without_autograd(with_update):
    _, rest_rows = split_rows(30, 11, 2)
    weight, _ = parameters(24, False)
    stream, update = random(30, 24).requires_grad_(), random(rest_rows.numel(), 24, seed=1) if with_update else None
    with torch.no_grad():
        sums, normed = rest_norm(stream, rest_rows, update, weight, None, EPSILON, False)
        wanted = stream[rest_rows] if update is None else stream[rest_rows] + update
    assert sums is None if update is None else torch.equal(sums, wanted)
    assert_close(normed, reference_norm(wanted, weight, None, False))
    assert not normed.requires_grad


def test_float32_rows_and_weights_of_another_dtype_promote_as_pytorch_does():
    rows, update = random(9, 16), random(9, 16, dtype=torch.float16, seed=1)
    summed, normed = add_norm(rows, update, parameters(16, False, torch.float16)[0], epsilon=EPSILON)
    assert torch.equal(summed, rows + update)
    assert normed.dtype == torch.float32
    wide = add_norm(update, None, parameters(16, False)[0], epsilon=EPSILON)[1]
    assert_close(wide, rms_norm(update, parameters(16, False)[0], EPSILON), torch.float16)


def gradients_from_output(weight, bias, dtype, centred=True):
    """Error of the input's gradient when backward works from the result, by the reference in float64."""
    stream, upstream = random(80, weight.numel(), dtype=dtype, scale=2), random(80, weight.numel(), dtype=dtype, seed=1)
    leaf = stream.double().requires_grad_()
    wanted = F.layer_norm(leaf, leaf.shape[1:], weight.double(), None if bias is None else bias.double(), EPSILON)
    (wanted,) = torch.autograd.grad(wanted, leaf, upstream.double())
    leaf = stream.requires_grad_()
    _, normed = add_norm(leaf, None, weight, bias, epsilon=EPSILON, centred=centred, from_output=True)
    return error_ratio(torch.autograd.grad(normed, leaf, upstream)[0], wanted)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the division by zero that the check avoids
def test_backward_from_the_output_is_exact_where_the_check_says_so_and_only_there():
    dtype = DTYPES[-1]
    weight, _ = parameters(256, False, dtype)
    weight = weight.abs().clamp_min(0.1)
    assert output_determines_input(weight, None, dtype)
    assert output_determines_input(weight, weight, dtype)
    assert gradients_from_output(weight, weight, dtype) <= ALLOWED[dtype]
    zeros, large = weight.clone().index_fill_(0, torch.arange(0, 256, 2, device=DEVICE), 0), 1000 * weight
    assert not output_determines_input(zeros, None, dtype)
    assert not output_determines_input(weight, large, dtype)
    assert not output_determines_input(torch.full_like(weight, torch.nan), None, dtype)
    assert gradients_from_output(zeros, None, dtype) > 5 * ALLOWED[dtype]
    assert gradients_from_output(weight, large, dtype) > 5 * ALLOWED[dtype]
    tiny = torch.full_like(weight, 1e-3)
    assert output_determines_input(tiny, None, dtype) == (dtype != torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_rows_serve_zero_weights_and_large_biases(dtype):
    weight, bias = parameters(48, True, dtype)
    weight = weight.index_fill(0, torch.arange(0, 48, 2, device=DEVICE), 0)
    kept_rows, rest_rows = split_rows(20, 9)
    stream, upstream = random(20, 48, dtype=dtype), random(20, 48, dtype=dtype, seed=1)
    for offset in (0, 100):
        got, wanted = both(stream, kept_rows, rest_rows, weight, (bias + offset) / 10, True, upstream)
        for mine, reference in zip(got[1:], wanted[1:], strict=True):
            assert_close(mine, reference)


def test_what_is_saved_is_one_number_a_row_and_either_the_rows_or_the_result():
    weight, _ = parameters(64, False, torch.float16)
    kept_rows, rest_rows = split_rows(100, 40)
    slots = row_slots(kept_rows, rest_rows, 100)
    for from_output, kept_by_output in ((True, 1), (False, 0)):
        saved = {}

        def note(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        stream = random(100, 64, dtype=torch.float16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            results = gather_norm(stream, kept_rows, slots, weight, epsilon=EPSILON, from_output=from_output)
        for tensor in (weight, slots):
            saved.pop(tensor.untyped_storage().data_ptr())
        assert sum(saved.values()) == 40 * 64 * 2 + 40 * 4
        assert results[kept_by_output].untyped_storage().data_ptr() in saved


def test_offsets_beyond_32_bits():
    stream, update = far_rows(8, 2)
    weight, rows = torch.ones(8, dtype=torch.float16, device=DEVICE), torch.tensor([4], device=DEVICE)
    common = weight, None, EPSILON, False, True
    far, near = (norm_operator(s, None, u, *common) for s, u in ((stream, update), (stream.clone(), update.clone())))
    taken = norm_operator(stream, rows, None, *common)
    assert torch.equal(taken[0], stream[4:])
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))
    saved = weight, None, far[2], far[3]
    slots = row_slots(torch.arange(5, device=DEVICE), rows[:0], 5)
    for with_slots in (None, slots):
        gradients = [
            norm_backward_operator(
                g, s, *saved, g, g if with_slots is not None else None, with_slots, False, False, torch.float16
            )
            for g, s in ((update, stream), (update.clone(), stream.clone()))
        ]
        assert torch.equal(*gradients)
    passed = norm_backward_operator(
        update, stream, *saved, None, stream, row_slots(rows[:0], rows, 5), False, False, torch.float16
    )  # fmt: skip
    assert torch.equal(passed, stream)


def test_a_wrong_row_number_gives_a_nan_row():
    weight, _ = parameters(8, False)
    for wrong in (9, -1):
        rows = torch.tensor([2, wrong], device=DEVICE)
        _, normed, _, _ = norm_operator(random(9, 8), rows, None, weight, None, EPSILON, False, True)
        assert normed[1].isnan().all()
        assert normed[0].isfinite().all()


def test_the_same_input_gives_the_same_bits():
    kept_rows, rest_rows = split_rows(65, 30)
    weight, bias = parameters(40, True)
    args = random(65, 40), kept_rows, rest_rows, weight, bias, True, random(65, 40, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(both(*args)[0], both(*args)[0], strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight must have shape \(8,\); got \(7,\)"),
        ({"weight": torch.ones(8).double()}, "weight must be float32, .*; got torch.float64"),
        ({"bias": torch.ones(8), "centred": False}, "a bias belongs to the centred norm"),
        (
            {"weight": torch.ones(8).requires_grad_(), "from_output": True},
            "needs a frozen weight and bias; .*; set from_output=False",
        ),
        ({"slots": None, "stream": torch.ones(9, 8).requires_grad_()}, "backward needs slots; .*; make them with row_slots"),
        ({"stream": torch.ones(9, 70_000), "weight": torch.ones(70_000)}, "up to 65536 columns; got 70000; use the PyTorch"),
    ],
)
def test_what_does_not_fit_is_refused_by_fact_value_and_fix(changes, message):
    arguments = {
        "stream": torch.ones(9, 8),
        "rows": torch.tensor([2, 5]),
        "slots": torch.full((9,), -1, dtype=torch.int32),
        "weight": torch.ones(8),
        "epsilon": EPSILON,
        "centred": True,
        **changes,
    }
    here = {
        name: part.to(DEVICE).detach().requires_grad_(part.requires_grad) if torch.is_tensor(part) else part
        for name, part in arguments.items()
    }
    with pytest.raises(KernelInputError, match=message):
        gather_norm(**here)


def test_registered_operators_pass_opcheck():
    weight, bias = parameters(8, True)
    stream, rows = random(9, 8), torch.tensor([1, 5], device=DEVICE)
    slots = row_slots(rows, rows[:0], 9)
    torch.library.opcheck(norm_operator, (stream, rows, None, weight, None, EPSILON, False, True))
    torch.library.opcheck(norm_operator, (stream, None, stream, weight, bias, EPSILON, True, True))
    kept, normed, inverse, mean = norm_operator(stream, rows, None, weight, bias, EPSILON, True, True)
    common = weight, bias, inverse, mean
    torch.library.opcheck(norm_backward_operator, (normed, kept, *common, kept, stream, slots, False, True, torch.float32))
    torch.library.opcheck(norm_backward_operator, (normed, normed, *common, None, None, None, True, True, torch.float32))
