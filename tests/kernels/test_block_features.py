import pytest
import torch
import torch.nn.functional as F
from lemo_kernels import block_features
from lemo_kernels.host import KernelInputError
from lemo_kernels.pattern_predictor import block_features_operator
from references.kernel_inputs import DEVICE, DTYPES, assert_close, error_ratio, far_rows, random, strided, transposed

from lemo_hf.models.documents import find_documents
from lemo_hf.models.pattern_predictor import PatternPredictor
from lemo_hf.models.row_operations import rms_norm

EPSILON = 1e-5


def predictor(hidden, sizes, features):
    network = PatternPredictor(hidden, sizes, features)
    network.reset_parameters(torch.Generator().manual_seed(4))
    return network.to(DEVICE)


def packed(lengths, block_size, padding=3):
    """Documents of these lengths in one row, after padding; first rows and lengths of their blocks beside them."""
    total = padding + sum(lengths)
    mask = (torch.arange(total) >= padding).long()[None]
    positions = torch.cat([torch.zeros(padding), *map(torch.arange, lengths)]).long()[None]
    documents = find_documents(1, total, block_size, DEVICE, attention_mask=mask.to(DEVICE), position_ids=positions.to(DEVICE))
    assert documents.lengths == list(lengths)
    firsts, sizes = [], []
    for start, length in zip(documents.starts, documents.lengths, strict=True):
        for first in range(0, length, block_size):
            firsts.append(start + first)
            sizes.append(min(block_size, length - first))
    return documents, torch.tensor(firsts, device=DEVICE), torch.tensor(sizes, dtype=torch.int32, device=DEVICE)


def both(stream, documents, first_rows, sizes, weight, bias, network, centred):
    rows = stream[documents.rows]
    normed = F.layer_norm(rows, rows.shape[1:], weight, bias, EPSILON) if centred else rms_norm(rows, weight, EPSILON)
    wanted = network(normed, documents)
    matrices = list(network.query.matrices), list(network.key.matrices)
    got = block_features(
        stream, first_rows, sizes, weight, bias, *matrices,
        block_size=documents.block_size, epsilon=EPSILON, centred=centred,
    )  # fmt: skip
    return got, wanted


def exact_features(stream, documents, weight, bias, network, centred):
    """The predictor on rows that were normalised in float64 and not rounded."""
    rows = stream[documents.rows].double()
    rows = rows - rows.mean(1, keepdim=True) if centred else rows
    normed = weight.double() * rows / (rows.square().mean(1, keepdim=True) + EPSILON).sqrt()
    return network(normed if bias is None else normed + bias.double(), documents)


def norm_weights(hidden, dtype, centred):
    weight = (1 + 0.3 * random(hidden, seed=6)).to(dtype)
    return weight, random(hidden, dtype=dtype, seed=7) if centred else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("lengths", "block_size", "hidden", "sizes", "features"),
    [
        ((1,), 64, 8, [3, 1, 1, 4], 2),
        ((63, 65, 1), 64, 40, [5, 17, 16, 9], 6),
        ((300,), 65, 130, [32, 32, 32, 32], 32),
        ((20, 7, 33), 5, 24, [24, 3, 2, 20], 7),
    ],
)
def test_features_equal_norm_and_predictor_on_every_block(lengths, block_size, hidden, sizes, features, centred, dtype):
    documents, first_rows, block_lengths = packed(lengths, block_size)
    stream = random(documents.num_rows, hidden, dtype=dtype, scale=3)
    weights, network = norm_weights(hidden, dtype, centred), predictor(hidden, sizes, features)
    got, reference = both(stream, documents, first_rows, block_lengths, *weights, network, centred)
    exact = exact_features(stream, documents, *weights, network, centred)
    for mine, rounded, truth in zip(got, reference, exact, strict=True):
        assert_close(mine, truth)  # as good as float32, whatever the stream's dtype
        assert error_ratio(mine, truth) <= error_ratio(rounded, truth) + 1e-5  # the reference rounds normalised rows


def test_a_long_document():
    documents, first_rows, block_lengths = packed((2000,), 64)
    weights = norm_weights(24, torch.float32, False)
    results = both(
        random(documents.num_rows, 24), documents, first_rows, block_lengths, *weights, predictor(24, [8] * 4, 8), False
    )
    for got, wanted in zip(*results, strict=True):
        assert_close(got, wanted)


def test_a_mean_large_against_the_deviation_cancels_nothing():
    documents, first_rows, sizes = packed((50,), 16)
    weight, bias = norm_weights(40, torch.float32, True)
    stream = 1000 + random(documents.num_rows, 40)
    network = predictor(40, [8] * 4, 8)
    got, _ = both(stream, documents, first_rows, sizes, weight, bias, network, True)
    for mine, truth in zip(got, exact_features(stream, documents, weight, bias, network, True), strict=True):
        assert_close(mine, truth)


def test_zero_norm_weights_and_large_biases():
    documents, first_rows, sizes = packed((50,), 16)
    weight, bias = norm_weights(40, torch.float32, True)
    weight[::2] = 0
    stream = random(documents.num_rows, 40)
    got, wanted = both(stream, documents, first_rows, sizes, weight, 100 * bias, predictor(40, [8] * 4, 8), True)
    for mine, reference in zip(got, wanted, strict=True):
        assert_close(mine, reference)


@pytest.mark.parametrize("lay_out", [strided, transposed])
def test_rows_that_are_not_contiguous_and_twice_the_same_bits(lay_out):
    documents, first_rows, sizes = packed((50,), 16)
    weights, network = norm_weights(40, torch.float32, False), predictor(40, [8] * 4, 8)
    stream = random(documents.num_rows, 40)
    results = [both(s, documents, first_rows, sizes, *weights, network, False)[0] for s in (stream, stream, lay_out(stream))]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def matrices(hidden=8, width=4, features=6):
    return [random(hidden, width), random(width, width), random(width, features)]


def test_no_block_and_a_row_out_of_range():
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    arguments = random(9, 8), none, none.int(), torch.ones(8, device=DEVICE), None, EPSILON, False, matrices(), matrices(), 4
    assert block_features_operator(*arguments)[0].shape == (0, 6)
    wrong = torch.tensor([0, 7, -2], device=DEVICE), torch.tensor([4, 4, 4], dtype=torch.int32, device=DEVICE)
    empty = torch.tensor([0, 4, 8], device=DEVICE), torch.tensor([4, 0, -1], dtype=torch.int32, device=DEVICE)
    for blocks in (wrong, empty):
        query, key = block_features_operator(arguments[0], *blocks, *arguments[3:])
        for features in (query, key):
            assert features[0].isfinite().all()
            assert features[1:].isnan().all()


def test_offsets_beyond_32_bits():
    (stream,) = far_rows(8)
    weight, first = torch.ones(8, device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    sizes = torch.tensor([3, 2], dtype=torch.int32, device=DEVICE)
    far, near = (
        block_features(rows, first, sizes, weight, None, matrices(), matrices(), block_size=3, epsilon=EPSILON)
        for rows in (stream, stream.clone())
    )
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_matrices": [torch.zeros(8, 4)]}, "query_matrices must be three matrices; got 1"),
        ({"key_matrices": [torch.zeros(8, 4), torch.zeros(5, 4), torch.zeros(4, 6)]}, r"begin with 4 rows; got \(5, 4\)"),
        ({"key_matrices": [torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(4, 5)]}, "the same number of features"),
        ({"query_matrices": [torch.zeros(8, 200), torch.zeros(200, 4), torch.zeros(4, 6)]}, "at most 64 wide; got 200"),
        ({"lengths": torch.ones(2)}, "lengths must be torch.int32; got torch.float32"),
        ({"lengths": torch.ones(1, dtype=torch.int32)}, "must name the same blocks; got 2 and 1"),
        (
            {"lengths": torch.tensor([4, 0], dtype=torch.int32)},
            r"lengths must be in \[1, 5\); got 0 to 4; leave empty blocks out",
        ),
        ({"bias": torch.ones(8)}, "a bias belongs to the centred norm"),
    ],
)
def test_what_does_not_fit_is_refused_by_fact_value_and_fix(changes, message):
    three = [torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(4, 6)]
    arguments = {
        "stream": torch.zeros(9, 8),
        "first_rows": torch.tensor([0, 4]),
        "lengths": torch.tensor([4, 4], dtype=torch.int32),
        "weight": torch.ones(8),
        "bias": None,
        "query_matrices": three,
        "key_matrices": three,
        **changes,
    }
    here = {
        name: part if part is None else [each.to(DEVICE) for each in part] if isinstance(part, list) else part.to(DEVICE)
        for name, part in arguments.items()
    }
    if DEVICE.type == "cuda" and "0 to 4" in message:
        pytest.skip("values are not read on a GPU, where that would wait for it")
    with pytest.raises(KernelInputError, match=message):
        block_features(**here, block_size=4, epsilon=EPSILON)


def test_the_registered_operator_passes_opcheck():
    first, sizes = torch.tensor([0, 4], device=DEVICE), torch.tensor([4, 2], dtype=torch.int32, device=DEVICE)
    weight = torch.ones(8, device=DEVICE)
    torch.library.opcheck(
        block_features_operator,
        (random(9, 8), first, sizes, weight, weight, EPSILON, True, matrices(), matrices(), 4),
    )
