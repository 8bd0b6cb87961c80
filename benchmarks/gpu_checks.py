"""Parts of benchmarks/gpu_suite.py that compare with what something must be: attention at real sizes, training in bfloat16."""

import time
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from lemo_hf import LemoConfig
from lemo_hf.models.document_attention import AttentionScope
from lemo_hf.models.documents import Documents, find_documents
from lemo_hf.models.kept_key_attention import KeptKeyScope, attend_kept_keys, rest_query_gradient
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.lemo_config import AttentionForward
from lemo_hf.models.token_elimination import Selection, selection_of_blocks
from lemo_hf.models.two_dimensional_sparsity import ShiftedGroups, attend_in_pattern, choose_pairs
from lemo_hf.profiling.estimate.step_model import StepSettings, build_model

ALLOWED = {torch.float32: 1e-5, torch.float16: 0.002, torch.bfloat16: 0.005}  # root-mean-square error over root mean square


@dataclass(frozen=True)
class Scale:
    """Real sizes on a GPU, or tiny ones on the CPU."""

    tiny: bool

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes to check; bfloat16 products are wrong in the interpreter."""
        return [torch.float32, torch.float16] + ([] if self.tiny else [torch.bfloat16])


def error_ratio(got: Tensor, wanted: Tensor) -> float:
    """Root-mean-square error over root mean square; infinite if an entry is not a number."""
    scale = wanted.double().square().mean().sqrt().clamp_min(1e-12)
    ratio = ((got.double() - wanted.double()).square().mean().sqrt() / scale).item()
    return ratio if ratio == ratio else float("inf")


def require(right: bool, what: str) -> None:
    """Ends a part whose result is not what it must be."""
    if not right:
        raise AssertionError(what)


# As the `probe` of each function's module takes them: Llama-3-8B's sizes.
KERNELS: tuple[tuple[str, tuple[int | str, ...]], ...] = (
    ("take_rows", (4096,)),
    ("gather_norm", (4096, "plain")),
    ("apply_rotary", (32, 8, 128)),
    ("gated_activation", (14336, "silu")),
    ("attend", (128, "all")),
    ("attend", (128, "window")),
    ("attend_nearby", (128,)),
    ("attend_kept_keys", (128,)),
    ("informativeness_by_document", (128, 64)),
    ("cross_entropy_in_place", (128256,)),
    ("block_features", (4096, 64, "plain", 32, 32, 32, 32, 32)),
)


def run_kernels(scale: Scale) -> dict[str, Any]:
    """Every kernel once, in bfloat16: seconds until it has compiled and run, or why it cannot."""
    import lemo_kernels

    rows: list[dict[str, Any]] = []
    for name, sizes in KERNELS:
        began = time.perf_counter()
        row: dict[str, Any] = {"kernel": name, "sizes": sizes}
        try:
            # In the interpreter products of bfloat16 are wrong, but they run.
            lemo_kernels.probe(name, scale.device, torch.float32 if scale.tiny else torch.bfloat16, *sizes)
        except torch.AcceleratorError:
            raise  # nothing runs in this process any more
        except Exception as failure:  # whatever the compiler raises: the others still have something to say
            row["failure"] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:1000]}"
        rows.append(row | {"seconds": time.perf_counter() - began})
    require(not any("failure" in row for row in rows), str([row for row in rows if "failure" in row]))
    return {"rows": rows}


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


def attention_case(scale: Scale, dtype: torch.dtype, head_dim: int, window: int | None, rows: int) -> list[dict[str, Any]]:
    """The exact form: forward over all rows, backward on half of them; both backends where they serve."""
    import lemo_kernels

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
        runs = []
        for _ in range(2):
            output, lse = lemo_kernels.attend(*inputs, [rows], factor, window, backend=backend)
            leaves = [part[kept].requires_grad_() for part in inputs]
            attached = lemo_kernels.with_kept_row_gradient(
                *leaves, output[kept], lse[kept], [len(kept)], factor, window, kept, backend=backend
            )
            runs.append([output, lse, *torch.autograd.grad(attached, leaves, upstream)])
        gradients[backend] = runs[0][2:]
        errors = [error_ratio(got, right) for got, right in zip(runs[0], wanted, strict=False)]
        same = [torch.equal(first, second) for first, second in zip(*runs, strict=True)]
        results.append({"backend": backend, "forward_errors": errors, "same_bits": same})
        require(max(errors) <= ALLOWED[dtype], f"{backend} {dtype} d={head_dim} window={window}: forward errors {errors}")
        require(backend == "flash" or all(same), f"triton {dtype}: other bits the second time, {same}")
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


def small_config(model_type: str, tiny: bool) -> PreTrainedConfig:
    """A model that kernels and flash operators serve."""
    width, layers = (32, 1) if tiny else (128, 2)
    values: dict[str, Any] = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": 160, "max_position_embeddings": 512,
    }  # fmt: skip
    if model_type == "opt":
        values |= {"ffn_dim": 2 * width, "word_embed_proj_dim": width, "dropout": 0.0, "attention_dropout": 0.0}
    else:
        values |= {"intermediate_size": 2 * width, "num_key_value_heads": 2, "head_dim": width // 4}
    if model_type == "mistral":
        values["sliding_window"] = 12 if tiny else 48  # shorter than the documents: the Triton kernels serve it
    return AutoConfig.for_model(model_type, **values)


def small_model(model_type: str, lemo: LemoConfig, tiny: bool) -> nn.Module:
    """The architecture with adapters whose every weight has a gradient; the same weights every time."""
    torch.manual_seed(0)
    config = small_config(model_type, tiny)
    model = build_model(config, StepSettings(64, "lemo", lemo, dtype="float32"), list(range(config.num_hidden_layers)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def moved(model: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """The model on a device with its base in `dtype`; adapters and predictors stay float32."""
    model = model.to(device)
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "lemo_predictor" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def train(model: nn.Module, batch: dict[str, Tensor], steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses of some AdamW steps on one batch, and the first step's gradients, float32 on the CPU."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    batch = {name: part.to(weights[0].device) for name, part in batch.items()}
    losses: list[float] = []
    gradients: list[Tensor] = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        gradients = gradients or [weight.grad.float().cpu() for weight in weights if weight.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients


def largest_error(gradients: list[Tensor], wanted: list[Tensor]) -> float:
    """Of all weights' gradients."""
    return max(error_ratio(got, want) for got, want in zip(gradients, wanted, strict=True) if want.abs().max() > 0)


def run_training(scale: Scale, model_type: str) -> dict[str, Any]:
    """One architecture in every form: the first step against float32 on the CPU, then some more. What rounding to 16 bits
    alone does to the gradients is measured on the CPU, too; kernels on a GPU may double it.
    """
    documents, dtype = ((20, 3, 17), torch.float32) if scale.tiny else ((90, 7, 53), torch.bfloat16)
    tokens = torch.randint(0, 160, (2, sum(documents)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in documents]).expand(2, -1)
    forms = [(form, checkpoint, "full") for form in get_args(AttentionForward) for checkpoint in ("none", "kept_rows")]
    # Pairs of blocks at the full share: scores that differ in the last bits would choose others.
    forms += [("sparse", "none", "shifted_groups"), ("sparse", "none", "block_sparse"), ("sparse", "kept_rows", "block_sparse")]
    rows = []
    few = [("exact", "kept_rows", "full"), ("kept_keys", "none", "full"), ("sparse", "kept_rows", "block_sparse")]
    for form, checkpoint, pattern in few if scale.tiny else forms:
        for packed in (True,) if scale.tiny else (False, True):
            batch = {"input_ids": tokens, "labels": tokens} | ({"position_ids": positions} if packed else {})
            # The default, a uniform draw, needs no scores: theirs would differ in the last bits and choose other blocks.
            size = 16 if pattern == "block_sparse" else 8
            lemo = LemoConfig(
                attention_forward=form,
                # Documents are short: of most of their tokens these are not all.
                nearby_tokens=7 if form == "kept_keys" else None,
                checkpoint=checkpoint,
                block_size=size,
                segment_size=64,
                attention_pattern=pattern,
                pattern_share=1.0,
            )  # type: ignore[arg-type]
            with kernel_mode("reference"):
                (loss, *_), wanted = train(small_model(model_type, lemo, scale.tiny), batch, steps=1)
                _, rounded = train(moved(small_model(model_type, lemo, scale.tiny), "cpu", dtype), batch, steps=1)
            with kernel_mode("kernels"):
                model = moved(small_model(model_type, lemo, scale.tiny), scale.device, dtype)
                losses, gradients = train(model, batch, steps=2 if scale.tiny else 4)
            error, usual = largest_error(gradients, wanted), largest_error(rounded, wanted)
            row = {
                "form": form,
                "checkpoint": checkpoint,
                "pattern": pattern,
                "packed": packed,
                "losses": losses,
                "float32_loss": loss,
            }
            rows.append(row | {"gradient_error": error, "rounding_error": usual})
            require(abs(losses[0] / loss - 1) < (1e-5 if scale.tiny else 0.01), f"another loss than on the CPU: {rows[-1]}")
            require(error < 2 * usual + 1e-4, f"other gradients than on the CPU: {rows[-1]}")
            require(losses[-1] < losses[0], f"it must learn: {rows[-1]}")
    return {"rows": rows}
