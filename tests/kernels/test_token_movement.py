import pytest
import torch
from lemo_kernels import merge_rows, replace_rows, row_slots, scatter_add_rows, take_rows
from lemo_kernels.host import KernelInputError
from lemo_kernels.token_movement import merge_rows_operator, scatter_add_rows_operator, take_rows_operator
from references.kernel_inputs import DEVICE, DTYPES, far_rows, random, split_rows, strided, transposed

from lemo_hf.models import token_elimination

# rows, kept, padding, hidden: odd sizes, everything kept, one row kept, all but one kept, none.
SHAPES = [(1, 1, 0, 8), (63, 63, 0, 40), (65, 1, 7, 33), (65, 64, 0, 1), (2000, 901, 90, 24), (130, 50, 80, 1030), (5, 0, 2, 16)]


def reference_merge(stream, kept_rows, rest_rows, kept, rest):
    selection = token_elimination.Selection(kept_rows, rest_rows, [], kept_rows, kept_rows, rest_rows)
    return token_elimination.merge_rows(stream, kept, rest, selection)


def through_a_layer(stream, kept_rows, rest_rows, factor, update, rest, rest_update, kernels):
    """Takes kept rows, computes something on them, merges: as a decoder layer does."""
    if kernels:
        slots = row_slots(kept_rows, rest_rows, stream.shape[0])
        kept, stream = take_rows(stream, kept_rows, slots)
        return merge_rows(stream, kept_rows, slots, kept * factor, update, rest, rest_update)
    kept = token_elimination.gather_rows(stream, kept_rows) * factor
    kept = kept if update is None else kept + update
    old = stream.detach().index_select(0, rest_rows) if rest is None else rest
    rest = rest if rest_update is None else old + rest_update
    return reference_merge(stream, kept_rows, rest_rows, kept, rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "kept", "padding", "hidden"), SHAPES)
def test_a_layer_moves_its_rows_bit_for_bit_and_so_do_their_gradients(rows, kept, padding, hidden, dtype):
    kept_rows, rest_rows = split_rows(rows, kept, padding)
    rest = rest_rows.numel()
    parts = {
        "update": random(kept, hidden, dtype=dtype, seed=1),
        "rest": random(rest, hidden, dtype=dtype, seed=2),
        "rest_update": random(rest, hidden, dtype=dtype, seed=3),
    }
    upstream = random(rows, hidden, dtype=dtype, seed=4)
    combinations = [(), ("update",), ("rest",), ("update", "rest_update"), ("rest", "rest_update")]
    for given in combinations[-2:] if rows > 100 else combinations:
        chosen = {name: part.clone() if name in given else None for name, part in parts.items()}
        results = []
        for kernels in (False, True):
            stream, factor = random(rows, hidden, dtype=dtype).requires_grad_(), random(hidden, dtype=dtype, seed=5)
            leaves = [stream]
            if chosen["update"] is not None:
                chosen["update"] = chosen["update"].detach().requires_grad_()
                leaves.append(chosen["update"])
            merged = through_a_layer(stream, kept_rows, rest_rows, factor, **chosen, kernels=kernels)
            results.append((merged, *torch.autograd.grad(merged, leaves, upstream)))
        for got, wanted in zip(results[1], results[0], strict=True):
            assert torch.equal(got, wanted), given


@pytest.mark.parametrize("lay_out", [strided, transposed])
def test_rows_that_are_not_contiguous(lay_out):
    kept_rows, rest_rows = split_rows(65, 30, 3)
    args = random(30, 40, seed=1), random(32, 40, seed=2), random(32, 40, seed=3)
    stream, factor = random(65, 40), random(40, seed=5)
    got = through_a_layer(lay_out(stream), kept_rows, rest_rows, factor, *(lay_out(part) for part in args), kernels=True)
    assert torch.equal(got, through_a_layer(stream, kept_rows, rest_rows, factor, *args, kernels=False))
    assert torch.equal(take_rows_operator(lay_out(stream), kept_rows), stream[kept_rows])
    gradient = torch.ones(1, 1, device=DEVICE).expand(65, 40)  # what a sum sends back
    leaf = stream.clone().requires_grad_()
    slots = row_slots(kept_rows, rest_rows, 65)
    kept, passed_on = take_rows(leaf, kept_rows, slots)
    merge_rows(passed_on, kept_rows, slots, kept * 2).backward(gradient)
    assert torch.equal(leaf.grad[kept_rows], torch.full((30, 40), 2.0, device=DEVICE))
    assert torch.equal(leaf.grad[rest_rows], torch.ones(32, 40, device=DEVICE))


def test_a_gradient_that_reaches_one_of_the_two_results_only():
    kept_rows, rest_rows = split_rows(9, 4)
    slots = row_slots(kept_rows, rest_rows, 9)
    leaf = random(9, 8).requires_grad_()
    take_rows(leaf, kept_rows, slots)[0].sum().backward()
    assert torch.equal(leaf.grad.sum(1), torch.zeros(9, device=DEVICE).index_fill(0, kept_rows, 8.0))
    leaf.grad = None
    _, stream = take_rows(leaf, kept_rows, slots)
    merge_rows(stream, kept_rows, slots, random(4, 8)).sum().backward()
    assert torch.equal(leaf.grad.sum(1), torch.zeros(9, device=DEVICE).index_fill(0, rest_rows, 8.0))


def test_the_merged_stream_is_a_new_one_and_mixes_dtypes_as_a_sum_does():
    kept_rows, rest_rows = split_rows(20, 8, 2)
    slots = row_slots(kept_rows, rest_rows, 20)
    stream, kept, update = random(20, 16), random(8, 16, seed=1), random(8, 16, dtype=torch.float16, seed=2).requires_grad_()
    before = stream.clone()
    merged = merge_rows(stream, kept_rows, slots, kept, update)
    assert torch.equal(merged, before.index_copy(0, kept_rows, kept + update))
    assert torch.equal(stream, before)
    merged.sum().backward()
    assert update.grad.dtype == torch.float16
    assert (update.grad == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
def test_scatter_add(in_place, dtype):
    rows, _ = split_rows(65, 20)
    stream, update = random(65, 40, dtype=dtype), random(20, 40, dtype=dtype, seed=1)
    wanted = stream.index_add(0, rows, update)
    before = stream.clone()
    result = scatter_add_rows(stream, rows, strided(update), in_place=in_place)
    assert torch.equal(result, wanted)
    assert (result is stream) == in_place
    assert in_place or torch.equal(stream, before)


def test_autograd_knows_that_the_stream_changed():
    weight, rows = random(8, 40).requires_grad_(), torch.tensor([1, 4], device=DEVICE)
    plain = random(5, 8) @ weight
    scatter_add_rows(plain.detach(), rows, random(2, 40), in_place=True)
    plain.sum().backward()  # a product does not read its own result
    saved = (random(5, 8) @ weight).tanh()
    scatter_add_rows(saved.detach(), rows, random(2, 40))  # a new one
    saved.sum().backward(retain_graph=True)
    scatter_add_rows(saved.detach(), rows, random(2, 40), in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_adding_no_row_changes_nothing():
    stream = random(5, 8)
    nothing = scatter_add_rows(stream.clone(), torch.zeros(0, dtype=torch.int64, device=DEVICE), stream[:0], in_place=True)
    assert torch.equal(nothing, stream)


def test_a_wrong_row_number_is_added_nowhere():
    stream, rows = random(9, 8), torch.tensor([2, 9, -1, 2**40], device=DEVICE)
    changed = stream.clone()
    scatter_add_rows_operator(changed, rows, random(4, 8, seed=1))
    assert torch.equal(changed, stream.index_add(0, rows[:1], random(4, 8, seed=1)[:1]))


def test_replacing_rows():
    kept_rows, rest_rows = split_rows(33, 11, 4)
    stream, kept = random(33, 24), random(11, 24, seed=1)
    replaced = replace_rows(stream, row_slots(kept_rows, rest_rows, 33), kept)
    assert torch.equal(replaced, stream.index_copy(0, kept_rows, kept))


def test_slots_invert_a_selection():
    slots = row_slots(torch.tensor([1, 4], device=DEVICE), torch.tensor([0, 2], device=DEVICE), 6)
    assert slots.tolist() == [-2, 0, -3, -1, 1, -1]


def test_offsets_beyond_32_bits():
    stream, far = far_rows(8, 2)
    rows = torch.tensor([0, 4], device=DEVICE)
    assert torch.equal(take_rows_operator(stream, rows), stream[rows])
    rest_rows = torch.tensor([1, 2, 3], device=DEVICE)
    merged = merge_rows_operator(stream, row_slots(rest_rows, rows[:1], 5), far, None, None, None)
    assert torch.equal(merged, torch.stack((stream[0], *far[:3], stream[4])))
    order = torch.tensor([4, 3, 2, 1, 0], device=DEVICE)
    for arguments in ((far, far, None, None), (far[:0], None, far, far)):
        slots = row_slots(order, rows[:0], 5) if arguments[0] is far and arguments[2] is None else row_slots(rows[:0], order, 5)
        assert torch.equal(merge_rows_operator(stream, slots, *arguments), 2 * far.flip(0))
    wanted = stream + far
    scatter_add_rows(stream, torch.arange(5, device=DEVICE), far, in_place=True)
    assert torch.equal(stream, wanted)


def test_a_wrong_row_number_is_refused_on_the_host_or_reads_nan_and_never_other_memory():
    stream, slots = random(9, 8), torch.full((9,), -1, dtype=torch.int32, device=DEVICE)
    for wrong in (9, -1):
        rows = torch.tensor([2, wrong], device=DEVICE)
        taken = take_rows_operator(stream, rows)
        assert torch.equal(taken[0], stream[2])
        assert taken[1].isnan().all()
        slots[4] = 7  # of two kept rows
        assert merge_rows_operator(stream, slots, taken, None, None, None)[4].isnan().all()
        if DEVICE.type == "cpu":
            with pytest.raises(KernelInputError, match=r"rows must be in \[0, 9\); got .*; select rows of this batch"):
                take_rows(stream, rows, slots)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": torch.zeros(2, 9, 8)}, r"stream must be \(rows, width\); got shape \(2, 9, 8\); flatten the batch first"),
        ({"stream": torch.zeros(9, 8, dtype=torch.float64)}, "float32, float16 or bfloat16; got torch.float64; use the PyTorch"),
        ({"rows": torch.zeros(1, 2, dtype=torch.int64)}, r"rows must be a vector; got shape \(1, 2\); flatten it"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, "rows must be torch.int64; got torch.int32"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "rows must be on .*; got meta; move it there"),
        ({"slots": torch.zeros(8, dtype=torch.int32)}, r"slots must be \(9,\) int32 .*; got \(8,\) .*; make them with row_slots"),
        ({"kept": torch.zeros(2, 7)}, "kept must have rows of width 8; got 7"),
        ({"kept": torch.zeros(3, 8)}, "kept must have 2 rows; got 3; pass one row per index"),
        ({"kept_update": torch.zeros(2, 8, device="meta")}, "kept_update must be on .*; got meta"),
        ({"rest_update": torch.zeros(1, 8, requires_grad=True)}, "rest_update carries no gradient; .*; detach it"),
        ({"rest": torch.zeros(1, 8), "rest_update": torch.zeros(2, 8)}, "rest_update must have 1 rows; got 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_fact_value_and_fix(changes, message):
    def here(tensor):
        return tensor if tensor.device.type == "meta" else tensor.to(DEVICE).detach().requires_grad_(tensor.requires_grad)

    arguments = {
        "stream": torch.zeros(9, 8),
        "rows": torch.tensor([2, 5]),
        "slots": torch.zeros(9, dtype=torch.int32),
        "kept": torch.zeros(2, 8),
        **changes,
    }
    with pytest.raises(KernelInputError, match=message):
        merge_rows(**{name: here(part) for name, part in arguments.items()})


def test_registered_operators_pass_opcheck():
    kept_rows, rest_rows = split_rows(9, 4, 1)
    slots = row_slots(kept_rows, rest_rows, 9)
    stream, kept, rest = random(9, 8), random(4, 8), random(4, 8)
    torch.library.opcheck(take_rows_operator, (stream, kept_rows))
    torch.library.opcheck(merge_rows_operator, (stream, slots, kept, kept, rest, rest))
    torch.library.opcheck(merge_rows_operator, (None, slots, kept, None, None, None))
    torch.library.opcheck(scatter_add_rows_operator, (stream, kept_rows, kept))
