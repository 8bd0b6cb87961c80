"""Attention at real sizes for benchmarks/gpu_suite.py: flash operators, Triton kernels and patterns against formulas written out."""

from typing import Any

import torch
from agreement import ALLOWED, error_ratio, require
from gpu_checks import Scale
from torch import Tensor

from lemo_hf.models.document_attention import AttentionScope
from lemo_hf.models.documents import Documents, find_documents
from lemo_hf.models.kept_key_attention import KeptKeyScope, attend_kept_keys, rest_query_gradient
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.token_elimination import Selection, selection_of_blocks
from lemo_hf.models.two_dimensional_sparsity import ShiftedGroups, attend_in_pattern, choose_pairs


def dense_attention(inputs: list[Tensor], scale: float, window: int | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one document by its definition, in float32, one strip of queries at a time."""
    query, key, value = (part.detach().float().transpose(0, 1) for part in inputs)
    group, outputs, sums = query.shape[0] // key.shape[0], [], []
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    for start in range(0, query.shape[1], 512):
        rows = slice(start, start + 512)
        distance = positions[rows, None] - positions[None]
        hidden = (distance < 0) | (distance >= (window or 1 << 40))
        scores = (query[:, rows] @ key.mT * scale).masked_fill_(hidden, -torch.inf)
        sums.append(scores.logsumexp(-1))
        outputs.append(scores.softmax(-1) @ value)
    return torch.cat(outputs, 1).transpose(0, 1), torch.cat(sums, 1).T[..., None]


def attention_run(
    inputs: list[Tensor], kept: Tensor, upstream: Tensor, scale: float, window: int | None, backend: str, deterministic: bool
) -> list[Tensor]:
    """Output and log-sum-exp of all rows, and the gradients of kept rows' queries, keys and values.

    Args:
        inputs: Queries, keys and values of one document, `(rows, heads, d)`.
        kept: Kept rows, `(kept,)`.
        upstream: The gradient of their output, `(kept, heads, d)`.
        scale, window, backend: As `lemo_kernels.attend` takes them.
        deterministic: Whether to run under `torch.use_deterministic_algorithms`.
    """
    import lemo_kernels

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        output, lse = lemo_kernels.attend(*inputs, [len(inputs[0])], scale, window, backend=backend)
        leaves = [part[kept].requires_grad_() for part in inputs]
        attached = lemo_kernels.with_kept_row_gradient(
            *leaves, output[kept], lse[kept], [len(kept)], scale, window, kept, backend=backend
        )
        return [output, lse, *torch.autograd.grad(attached, leaves, upstream)]
    finally:
        torch.use_deterministic_algorithms(before)


def attention_case(scale: Scale, dtype: torch.dtype, head_dim: int, window: int | None, rows: int) -> list[dict[str, Any]]:
    """The exact form: forward over all rows, backward on half of them; both backends where they serve, each twice."""
    generator = torch.Generator(scale.device).manual_seed(0)
    shapes = [(rows, heads, head_dim) for heads in ((4, 2, 2) if scale.tiny else (32, 8, 8))]
    inputs = [torch.randn(shape, generator=generator, device=scale.device).to(dtype) for shape in shapes]
    kept = torch.randperm(rows, generator=generator, device=scale.device)[: rows // 2].sort().values
    positions, factor = torch.arange(rows, device=scale.device), head_dim**-0.5
    wanted = dense_attention(inputs, factor, window, positions)
    upstream = torch.randn((len(kept), *shapes[0][1:]), generator=generator, device=scale.device).to(dtype)
    flash = scale.device.type == "cuda" and dtype != torch.float32 and window is None
    results: list[dict[str, Any]] = []
    gradients = {}
    for backend in ["triton"] + (["flash"] if flash else []):
        runs, strict = (
            [attention_run(inputs, kept, upstream, factor, window, backend, deterministic) for _ in range(2)]
            for deterministic in (False, True)
        )
        gradients[backend] = runs[0][2:]
        errors = [error_ratio(got, right) for got, right in zip(runs[0], wanted, strict=False)]
        same, same_strict = ([torch.equal(first, second) for first, second in zip(*pair, strict=True)] for pair in (runs, strict))
        strict_errors = [error_ratio(got, right) for got, right in zip(strict[0], runs[0], strict=True)]
        results.append(
            {
                "backend": backend,
                "forward_errors": errors,
                "same_bits": same,
                "same_bits_deterministic": same_strict,
                "deterministic_errors": strict_errors,
            }
        )
        what = f"{backend} {dtype} d={head_dim} window={window}"
        require(max(errors) <= ALLOWED[dtype], f"{what}: forward errors {errors}")
        # ATen adds the keys' and values' gradients up atomically unless it is told not to.
        require(backend == "flash" or all(same), f"{what}: other bits the second time, {same}")
        require(all(same_strict), f"{what}: other bits the second time under use_deterministic_algorithms, {same_strict}")
        require(
            max(strict_errors) <= ALLOWED[dtype], f"{what}: other results under use_deterministic_algorithms, {strict_errors}"
        )
    # The gradient by definition, in float32: what autograd makes of the formula with the finished output and log-sum-exp.
    right = dense_gradients([part[kept] for part in inputs], wanted[0][kept], wanted[1][kept], upstream, factor, window, kept)
    for row in results:
        row["backward_errors"] = [error_ratio(got, want) for got, want in zip(gradients[row["backend"]], right, strict=True)]
        require(max(row["backward_errors"]) <= 2 * ALLOWED[dtype], f"{row} {dtype} d={head_dim} window={window}")
    return [{"dtype": str(dtype), "head_dim": head_dim, "window": window, "rows": rows, **row} for row in results]


def dense_gradients(
    inputs: list[Tensor], output: Tensor, lse: Tensor, grad: Tensor, scale: float, window: int | None, positions: Tensor
) -> list[Tensor]:
    """dq, dk and dv by their formulas, in float32, one head at a time."""
    query, key, value, output, grad = (part.float() for part in (*inputs, output, grad))
    group = query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(part) for part in (query, key, value)]
    distance = positions[:, None] - positions[None]
    seen = (distance >= 0) & (distance < (window or 1 << 40))
    for head in range(query.shape[1]):
        shared = head // group
        weights = (query[:, head] @ key[:, shared].T * scale - lse[:, head]).exp_().masked_fill_(~seen, 0)
        along = (grad[:, head] * output[:, head]).sum(-1, keepdim=True)
        grads[2][:, shared] += weights.T @ grad[:, head]
        grad_scores = weights * (grad[:, head] @ value[:, shared].T - along)
        grads[0][:, head] = grad_scores @ key[:, shared] * scale
        grads[1][:, shared] += grad_scores.T @ query[:, head] * scale
    return grads


def attention_offsets(scale: Scale) -> dict[str, Any]:
    """Rows whose offsets exceed 2^31 elements: the last document of many must be what it is alone."""
    import lemo_kernels

    documents, length, heads, head_dim = (3, 40, 2, 16) if scale.tiny else (600, 1000, 32, 128)
    dtype = torch.float32 if scale.tiny else torch.bfloat16
    shape = (documents * length, heads, head_dim)
    generator = torch.Generator(scale.device).manual_seed(1)
    query = torch.randn(shape, generator=generator, device=scale.device, dtype=dtype)
    errors = {}
    for backend in ("triton",) if scale.tiny else ("triton", "flash"):
        output, lse = lemo_kernels.attend(query, query, query, [length] * documents, 0.1, backend=backend)
        last = [query[-length:]] * 3
        right = dense_attention(last, 0.1, None, torch.arange(length, device=scale.device))
        errors[backend] = [error_ratio(output[-length:], right[0]), error_ratio(lse[-length:], right[1])]
        require(max(errors[backend]) <= ALLOWED[dtype], f"{backend}: {errors[backend]}")
    return {"elements": query.numel(), "errors": errors}


def run_attention(scale: Scale, head_dim: int) -> dict[str, Any]:
    """All dtypes and windows of one head size."""
    rows = 70 if scale.tiny else 4096
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = [(dtype, window) for dtype in scale.dtypes for window in (None, rows // 3)]
    return {"rows": [row for dtype, window in cases for row in attention_case(scale, dtype, head_dim, window, rows)]}


def by_heads(inputs: list[Tensor], grad: Tensor, scale: float, seen: list[Tensor]) -> list[Tensor]:
    """Output, dq, dk and dv of attention with a mask, in float32, one head at a time.

    Args:
        inputs: Queries, keys and values, `(rows, heads, d)`.
        grad: The output's gradient.
        scale: Factor on the dot products.
        seen: For each half of the heads what a row sees, `(rows, rows)`.
    """
    leaves = [part.detach().float().requires_grad_() for part in inputs]
    heads, group = inputs[0].shape[1], inputs[0].shape[1] // inputs[1].shape[1]
    outputs = []
    for head in range(heads):
        query, key, value = leaves[0][:, head], leaves[1][:, head // group], leaves[2][:, head // group]
        weights = (query @ key.T * scale).masked_fill(~seen[2 * head // heads], -torch.inf).softmax(-1)
        outputs.append((weights @ value).detach())
        (weights @ value).backward(grad[:, head].float())
    return [torch.stack(outputs, 1), *(part.grad for part in leaves if part.grad is not None)]


def packed(scale: Scale, size: int, generator: torch.Generator) -> tuple[Documents, Selection]:
    """Three documents side by side, or two small ones, and a selection of three in five of their blocks."""
    lengths = (70, 33) if scale.tiny else (4096, 1000, 2100)
    places = torch.cat([torch.arange(length) for length in lengths])[None].to(scale.device)
    documents = find_documents(1, sum(lengths), size, scale.device, position_ids=places)
    marks = torch.rand(sum(documents.block_counts), generator=generator) < 0.6
    for part in documents.split_blocks(marks):
        part[0] = part[-1] = True
    return documents, selection_of_blocks(marks.to(scale.device), documents)


def run_kept_keys(scale: Scale) -> dict[str, Any]:
    """Attention to kept and nearby keys, and what dropped keys add to the queries' gradient, packed: kernels against masks written out."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device, generator = scale.device, torch.Generator().manual_seed(0)
    documents, selection = packed(scale, 16 if scale.tiny else 64, generator)
    kept, rest, place = selection.real_kept, selection.real_rest, documents.place_of_row
    document, count = (place == 0).cumsum(0), len(place)
    distance = torch.arange(count, device=device)[:, None] - torch.arange(count, device=device)
    earlier = (document[:, None] == document) & (distance >= 0)
    is_kept = torch.zeros(count, dtype=torch.bool, device=device).index_fill_(0, kept, True)
    size, heads, groups = (32, 4, 2) if scale.tiny else (128, 32, 8)
    rows: list[dict[str, Any]] = []
    # Nearby keys, all keys as in the exact form, and a sliding window with either.
    widths = [(width, window) for width in (count // 30, count) for window in (None, count // 6)]
    for dtype, (width, window) in [(dtype, each) for dtype in scale.dtypes for each in widths]:
        query, grad = (torch.randn(count, heads, size, generator=generator).to(device, dtype) for _ in range(2))
        key, value = (torch.randn(count, groups, size, generator=generator).to(device, dtype) for _ in range(2))
        scope = KeptKeyScope(selection, documents, size**-0.5, width, window)
        with kernel_mode("kernels"):
            output, lse = attend_kept_keys(query, key, value, key[kept], value[kept], scope)
            of_kept = grad[kept], query[kept], output[kept], lse[kept]
            added = rest_query_gradient(*of_kept, key[rest], value[rest], scope)
        seen = earlier & (is_kept | (distance < width)) & (distance < (window or count))
        wanted: list[list[Tensor]] = [[], []]
        for head in range(heads):
            q, g, k, v = (part[:, head * part.shape[1] // heads].float() for part in (query, grad, key, value))
            weights = (q @ k.T * scope.scale).masked_fill_(~seen, -torch.inf).softmax(-1)
            mixed = weights @ v
            weights = weights[kept][:, rest] * (g[kept] @ v[rest].T - (g * mixed).sum(-1)[kept, None])
            wanted[0].append(mixed)
            wanted[1].append(weights @ k[rest] * scope.scale)
        errors = [error_ratio(got, torch.stack(want, 1)) for got, want in zip((output, added), wanted, strict=True)]
        rows.append({"dtype": str(dtype), "width": width, "window": window, "rows": count, "errors": errors})
        require(errors[0] <= ALLOWED[dtype] and errors[1] <= 2 * ALLOWED[dtype], f"{rows[-1]}")
    return {"rows": rows}


def run_patterns(scale: Scale) -> dict[str, Any]:
    """Attention patterns among kept rows, packed documents: their operators on this device against masks written out."""
    size = 16 if scale.tiny else 64
    torch.backends.cuda.matmul.allow_tf32 = False
    device, generator = scale.device, torch.Generator().manual_seed(0)
    documents, selection = packed(scale, size, generator)
    lengths = documents.lengths
    kept = documents.place_of_row[selection.real_kept]
    document = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(selection.kept_lengths, device=device))
    within = torch.cat([torch.arange(length) for length in selection.kept_lengths]).to(device)
    causal = (document[:, None] == document) & (within[:, None] >= within)
    scores = [torch.rand(blocks, blocks, generator=generator).to(device) for blocks in documents.block_counts]
    group = max(selection.kept_lengths) // 5
    rows: list[dict[str, Any]] = []
    for dtype in scale.dtypes:
        for window in (None, sum(lengths) // 6):
            near = causal if window is None else causal & (kept[:, None] - kept < window)
            pairs = choose_pairs(scores, selection, documents, 0.25, window)
            block = within // size + (document * (sum(lengths) // size + 1))
            compact = torch.unique(block, return_inverse=True)[1]
            halves = [
                near & ((within + shift)[:, None] // group == (within + shift) // group) for shift in (0, group - group // 2)
            ]
            cases = {
                "shifted_groups": (ShiftedGroups(group), halves),
                "block_sparse": (pairs, [near & pairs.marks[compact][:, compact]] * 2),
            }
            for name, (pattern, seen) in cases.items():
                shapes = [(len(kept), heads, 32 if scale.tiny else 128) for heads in ((4, 2, 2) if scale.tiny else (32, 8, 8))]
                inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
                grad = torch.randn(shapes[0], generator=generator).to(device, dtype)
                scope = AttentionScope(selection.kept_lengths, shapes[0][2] ** -0.5, window, kept if window else None)
                with kernel_mode("kernels" if name == "shifted_groups" else "auto"):
                    output = attend_in_pattern(*inputs, scope, pattern)
                    got = [output.detach(), *torch.autograd.grad(output, inputs, grad)]
                errors = [
                    error_ratio(one, other) for one, other in zip(got, by_heads(inputs, grad, scope.scale, seen), strict=True)
                ]
                rows.append({"pattern": name, "dtype": str(dtype), "window": window, "rows": len(kept), "errors": errors})
                # Blocks' operator is torch's own, whose float32 sums are not ours to bound tightly.
                allowed = 2 * ALLOWED[dtype] if name == "shifted_groups" else max(2 * ALLOWED[dtype], 1e-4)
                require(max(errors) <= allowed, f"{rows[-1]}")
    return {"rows": rows}
