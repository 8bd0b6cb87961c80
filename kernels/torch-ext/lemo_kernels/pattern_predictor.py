"""Block features of the pattern predictor, straight from raw residual rows (LeMo paper, section 4.2).

    F_n = pool over tokens t of block n of relu(relu(norm(x_t) W1) W2) W3,   half of F by mean, half by maximum

for the query and the key network at once. The norm's row scale comes last: norm(x) W1 = (x * w) W1 / rms(x), so one pass over
a row gathers both its sum of squares and its products; LayerNorm's mean and bias enter by the columns' sums of w * W1 and
b * W1, and rows are shifted by their first entry, so that a mean large against the deviation cancels nothing.

Bytes that must move: read the N rows once (the two networks of a block run side by side), write blocks * 2 p float32. The separate steps (norm, float32 copy, two products)
move 9 times that for 16-bit rows. Multiply-adds: N * (2 hidden * h1 + ...), by tensor cores in three tf32 terms, which keep
float32's precision; below the memory time for h1 up to 32. No gradient: predictors are frozen in fine-tuning, and their own training
runs on stored inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .host import launch_on, operator, optional, require, require_device, require_index, require_rows, require_vector, unit_stride

# Wider networks do not fit a program's registers and shared memory.
MAX_WIDTH = 64


@triton.jit
def _matrix(pointer, height, width, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.arange(0, HEIGHT)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + row * width + column, mask=(row < height) & (column < width), other=0.0)


@triton.jit
def _relu(x):
    return tl.where(x < 0.0, 0.0, x)  # unlike tl.maximum it passes NaN on


@triton.jit
def _block_features_kernel(
    stream, first_rows, lengths, weight, bias, q1, q2, q3, k1, k2, k3, query_out, key_out,
    num_rows, hidden, stream_stride, epsilon, qh1, qh2, kh1, kh2, features, block_size,
    CENTRED: tl.constexpr, HAS_BIAS: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, FEATURES: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs are one block's two networks: the second one to read a row finds it in the cache.
    is_key = tl.program_id(0) % 2 == 1
    block = (tl.program_id(0) // 2).to(tl.int64)
    matrix1, matrix2, matrix3, out, h1, h2 = q1, q2, q3, query_out, qh1, qh2
    if is_key:
        matrix1, matrix2, matrix3, out, h1, h2 = k1, k2, k3, key_out, kh1, kh2
    first = tl.load(first_rows + block)
    length = tl.load(lengths + block)
    total = tl.zeros((FEATURES,), tl.float32)
    largest = tl.full((FEATURES,), float("-inf"), tl.float32)
    missing = tl.zeros((TOKENS,), tl.int32)
    unit = tl.arange(0, H1)[None, :]
    for start in range(0, block_size, TOKENS):
        token = start + tl.arange(0, TOKENS)
        alive = token < length
        row = first + token
        readable = alive & (row >= 0) & (row < num_rows)
        missing += (alive & ~readable).to(tl.int32)
        here = stream + row * stream_stride
        shift = tl.zeros((TOKENS,), tl.float32)
        if CENTRED:
            shift = tl.load(here, mask=readable, other=0.0).to(tl.float32)
        products = tl.zeros((TOKENS, H1), tl.float32)
        sums = tl.zeros((TOKENS,), tl.float32)
        squares = tl.zeros((TOKENS,), tl.float32)
        weight_sums = tl.zeros((H1,), tl.float32)
        bias_sums = tl.zeros((H1,), tl.float32)
        for at in range(0, hidden, COLUMNS):
            column = at + tl.arange(0, COLUMNS)
            in_row = column < hidden
            mask = readable[:, None] & in_row[None, :]
            x = tl.load(here[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                x = tl.where(mask, x - shift[:, None], 0.0)
                sums += tl.sum(x, 1)
            squares += tl.sum(x * x, 1)
            first_matrix = tl.load(matrix1 + column[:, None] * h1 + unit, mask=in_row[:, None] & (unit < h1), other=0.0)
            if HAS_BIAS:
                b = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
                bias_sums += tl.sum(b[:, None] * first_matrix, 0)
            first_matrix *= tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)[:, None]
            if CENTRED:
                weight_sums += tl.sum(first_matrix, 0)
            products = tl.dot(x, first_matrix, products, input_precision="tf32x3")
        variance = squares / hidden
        if CENTRED:
            centre = sums / hidden
            variance = tl.maximum(variance - centre * centre, 0.0)
            products -= centre[:, None] * weight_sums[None, :]
        inner = _relu(products * (1.0 / tl.sqrt(variance + epsilon))[:, None] + bias_sums[None, :])
        outer = _relu(tl.dot(inner, _matrix(matrix2, h1, h2, H1, H2), input_precision="tf32x3"))
        values = tl.dot(outer, _matrix(matrix3, h2, features, H2, FEATURES), input_precision="tf32x3")
        total += tl.sum(tl.where(alive[:, None], values, 0.0), 0)
        largest = tl.maximum(largest, tl.max(tl.where(alive[:, None], values, float("-inf")), 0))
    feature = tl.arange(0, FEATURES)
    pooled = tl.where(feature < features // 2, total / tl.maximum(length, 1), largest)
    # A row that is not there makes its block NaN, and so does a block without rows.
    pooled = tl.where((tl.sum(missing, 0) > 0) | (length < 1), float("nan"), pooled)
    tl.store(out + block * features + feature, pooled, mask=feature < features)


@operator("block_features")
def block_features_operator(
    stream: Tensor,
    first_rows: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    centred: bool,
    query_matrices: list[Tensor],
    key_matrices: list[Tensor],
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Query and key features of all blocks, `(blocks, p)` float32 each; arguments as in `block_features`."""
    stream = unit_stride(stream)
    blocks, features = first_rows.shape[0], query_matrices[2].shape[1]
    query = torch.empty(blocks, features, dtype=torch.float32, device=stream.device)
    key = torch.empty(blocks, features, dtype=torch.float32, device=stream.device)
    if blocks:
        matrices = [matrix.contiguous() for matrix in (*query_matrices, *key_matrices)]
        widths = [matrix.shape[0] for matrix in (matrices[1], matrices[2], matrices[4], matrices[5])]
        h1, h2, p = (max(16, triton.next_power_of_2(max(each))) for each in (widths[0::2], widths[1::2], (features,)))
        tokens = min(64, max(16, triton.next_power_of_2(block_size)))
        with launch_on(stream):
            _block_features_kernel[(2 * blocks,)](
                stream, first_rows.contiguous(), lengths.contiguous(), weight.contiguous(), optional(bias, weight).contiguous(),
                *matrices, query, key, stream.shape[0], stream.shape[1], stream.stride(0), epsilon, *widths, features, block_size,
                CENTRED=centred, HAS_BIAS=bias is not None, H1=h1, H2=h2, FEATURES=p,
                TOKENS=tokens, COLUMNS=32, num_warps=4, num_stages=3,
            )  # fmt: skip
    return query, key


@block_features_operator.register_fake
def _(stream, first_rows, lengths, weight, bias, epsilon, centred, query_matrices, key_matrices, block_size):
    shape = first_rows.shape[0], query_matrices[2].shape[1]
    return stream.new_empty(shape, dtype=torch.float32), stream.new_empty(shape, dtype=torch.float32)


@torch.no_grad()
def block_features(
    stream: Tensor,
    first_rows: Tensor,
    lengths: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_matrices: list[Tensor],
    key_matrices: list[Tensor],
    *,
    block_size: int,
    epsilon: float,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """Query and key features of all blocks, from residual rows that nothing has normalised yet. Without autograd.

    Args:
        stream: Residual stream, `(num_rows, hidden)`, padding included.
        first_rows: First row of each block, `(blocks,)` int64.
        lengths: Tokens of each block, `(blocks,)` int32, 1 to `block_size`.
        weight, bias, epsilon, centred: The norm before the attention, as in `gather_norm`.
        query_matrices, key_matrices: `[W1, W2, W3]` of each network, float32: (hidden, h1), (h1, h2), (h2, p).
        block_size: Tokens of a full block.

    Returns:
        Q and K, `(blocks, p)` float32 each.

    Raises:
        KernelInputError: If shapes, dtypes, devices or (on the CPU) row numbers do not fit.
    """
    require_rows("stream", stream)
    require_vector("weight", weight, stream.shape[1], stream)
    if bias is not None:
        require_vector("bias", bias, stream.shape[1], stream)
    require(centred or bias is None, "a bias belongs to the centred norm", "centred=False with a bias", "set centred=True")
    require_index("first_rows", first_rows, stream.shape[0], stream)
    require_index("lengths", lengths, block_size + 1, stream, torch.int32, first=1, fix="leave empty blocks out")
    same = lengths.shape == first_rows.shape
    require(same, "first_rows and lengths must name the same blocks", f"{len(first_rows)} and {len(lengths)}", "pass one each")
    for name, matrices in (("query_matrices", query_matrices), ("key_matrices", key_matrices)):
        require(len(matrices) == 3, f"{name} must be three matrices", len(matrices), "pass W1, W2 and W3")
        width = stream.shape[1]
        for matrix in matrices:
            fits = matrix.dim() == 2 and matrix.shape[0] == width and matrix.dtype == torch.float32
            require(
                fits,
                f"{name} must be float32 and begin with {width} rows",
                f"{tuple(matrix.shape)} {matrix.dtype}",
                "pass them in order",
            )
            require_device(name, matrix, stream)
            width = matrix.shape[1]
            require(
                width <= MAX_WIDTH, f"a predictor's layers must be at most {MAX_WIDTH} wide", width, "use the PyTorch reference"
            )
    alike = query_matrices[2].shape[1] == key_matrices[2].shape[1]
    require(alike, "both networks must have the same number of features", "two numbers", "pass one layer's predictor")
    return block_features_operator(
        stream, first_rows, lengths, weight, bias, epsilon, centred, list(query_matrices), list(key_matrices), block_size
    )


def probe(device: torch.device, dtype: torch.dtype, hidden: int, block_size: int, kind: str, *widths: int) -> None:
    """Features of one block; `kind` is "centred" or "plain", `widths` the two of each network and that of the features."""
    stream, row = torch.ones(1, hidden, dtype=dtype, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    *layers, features = widths
    networks = [
        [torch.zeros(shape, device=device) for shape in ((hidden, first), (first, second), (second, features))]
        for first, second in (layers[:2], layers[2:])
    ]
    centred = kind == "centred"
    block_features(
        stream, row, row.int() + 1, weight, weight if centred else None, *networks,
        block_size=block_size, epsilon=1e-6, centred=centred,
    )  # fmt: skip
