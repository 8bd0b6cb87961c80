"""What benchmarks/kernel_times.py measures: each kernel, the formula it replaces, and what must move or be computed at least."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo_hf.models import kept_key_attention as kept_key_reference
from lemo_hf.models import nearby_attention as nearby_reference
from lemo_hf.models import token_informativeness
from lemo_hf.models.documents import Documents, find_documents
from lemo_hf.models.kernel_switch import kernel_mode
from lemo_hf.models.token_elimination import Selection, selection_of_blocks


@dataclass(frozen=True)
class Setting:
    """Sizes of one measurement: Llama-3-8B's unless tiny."""

    rows: int
    keep: float
    device: torch.device
    dtype: torch.dtype
    hidden: int = 4096
    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    block_size: int = 64
    segment: int = 1024

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers; the generator's state moves on."""
        return (torch.randn(*shape, device=self.device, dtype=torch.float32) * scale).to(self.dtype)

    def kept_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of blocks chosen at random, and the others; both sorted."""
        blocks = self.rows // self.block_size
        chosen = torch.randperm(blocks, device=self.device)[: max(1, round(self.keep * blocks))]
        marks = torch.zeros(blocks, dtype=torch.bool, device=self.device).index_fill_(0, chosen, True)
        marks = marks.repeat_interleave(self.block_size)
        return marks.nonzero().squeeze(1), (~marks).nonzero().squeeze(1)

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return torch.empty(0, dtype=self.dtype).element_size()


@dataclass
class Case:
    """One kernel at one setting.

    Args:
        ours, naive: Both return tensors that must agree.
        bytes: What must move at least; 0 where traffic is not the bound.
        flops: What must be computed, multiply-adds as two; 0 where arithmetic is not the bound.
        others: Further things to time, by name.
        exact: Whether results must agree bit for bit.
        compiles: Whether `torch.compile` of the formula is timed.
    """

    ours: Callable[[], Any]
    naive: Callable[[], Any]
    bytes: int = 0
    flops: int = 0
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)
    exact: bool = False
    compiles: bool = True


def gather_norm(setting: Setting) -> Case:
    """Kept rows out of the stream, and their RMSNorm, forward."""
    import lemo_kernels

    stream, weight = setting.random(setting.rows, setting.hidden), setting.random(setting.hidden)
    kept, rest = setting.kept_rows()
    slots = lemo_kernels.row_slots(kept, rest, setting.rows)

    def naive() -> tuple[Tensor, Tensor]:
        rows = stream[kept]
        wide = rows.float()
        return rows, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(rows.dtype)

    ours = partial(lemo_kernels.gather_norm, stream, kept, slots, weight, epsilon=1e-6)
    return Case(lambda: ours()[:2], naive, bytes=3 * kept.numel() * setting.hidden * setting.itemsize)


def gather_norm_backward(setting: Setting) -> Case:
    """The gradient of the stream through gather and norm."""
    import lemo_kernels

    stream = setting.random(setting.rows, setting.hidden).requires_grad_()
    weight = setting.random(setting.hidden).abs() + 0.5
    kept, rest = setting.kept_rows()
    slots = lemo_kernels.row_slots(kept, rest, setting.rows)
    grad_rows, grad_normed = (setting.random(kept.numel(), setting.hidden) for _ in range(2))
    rows, normed, passed = lemo_kernels.gather_norm(stream, kept, slots, weight, epsilon=1e-6)
    # merge_rows hands the stream's gradient on and gather_norm replaces the kept rows in it, so its own is zero there.
    grad_stream = setting.random(setting.rows, setting.hidden).index_fill_(0, kept, 0)
    plain = stream.detach().clone().requires_grad_()
    plain_rows = plain[kept]
    wide = plain_rows.float()
    plain_normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(plain_rows.dtype)

    def ours() -> Any:
        return torch.autograd.grad((rows, normed, passed), stream, (grad_rows, grad_normed, grad_stream), retain_graph=True)

    def naive() -> Any:
        grads = torch.autograd.grad((plain_rows, plain_normed), plain, (grad_rows, grad_normed), retain_graph=True)
        return [grads[0] + grad_stream]

    # Read: rows, both gradients of kept rows, the stream's gradient of the others. Write: the stream's gradient.
    moved = (3 * kept.numel() + rest.numel() + setting.rows) * setting.hidden * setting.itemsize
    return Case(ours, naive, bytes=moved, compiles=False)


def rotary(setting: Setting) -> Case:
    """Rotary of kept rows' queries and keys at their original positions."""
    import lemo_kernels

    kept, _ = setting.kept_rows()
    query, key = (setting.random(kept.numel(), count, setting.head_dim) for count in (setting.heads, setting.key_heads))
    angles = torch.rand(setting.rows, setting.head_dim // 2, device=setting.device).repeat(1, 2)
    cos, sin = angles.cos().to(setting.dtype), angles.sin().to(setting.dtype)

    def turned(rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, -1)
        return torch.cat((-second, first), -1)

    def naive() -> tuple[Tensor, Tensor]:
        c, s = cos[kept][:, None], sin[kept][:, None]
        return query * c + turned(query) * s, key * c + turned(key) * s

    numbers = 2 * kept.numel() * setting.head_dim * (setting.heads + setting.key_heads + 1)
    return Case(partial(lemo_kernels.apply_rotary, query, key, cos, sin, kept), naive, bytes=numbers * setting.itemsize)


def scatter_add(setting: Setting) -> Case:
    """Kept rows' results added to the residual stream: in place against zeros, scatter and add."""
    import lemo_kernels

    kept, _ = setting.kept_rows()
    stream, update = setting.random(setting.rows, setting.hidden), setting.random(kept.numel(), setting.hidden)
    running = stream.clone()

    def naive() -> list[Tensor]:
        return [stream + torch.zeros_like(stream).index_copy(0, kept, update)]

    def once() -> list[Tensor]:
        running.copy_(stream)
        return [lemo_kernels.scatter_add_rows(running, kept, update, in_place=True)]

    moved = 3 * kept.numel() * setting.hidden * setting.itemsize
    timed = partial(lemo_kernels.scatter_add_rows, running, kept, update, in_place=True)
    return Case(once, naive, bytes=moved, others={"ours": timed}, exact=True)


def take_and_merge(setting: Setting) -> Case:
    """A layer's movement, forward and backward: kept rows out, kept and rest rows back into a new stream."""
    import lemo_kernels

    kept, rest = setting.kept_rows()
    stream = setting.random(setting.rows, setting.hidden).requires_grad_()
    rest_rows = setting.random(rest.numel(), setting.hidden)
    slots = lemo_kernels.row_slots(kept, rest, setting.rows)
    upstream = setting.random(setting.rows, setting.hidden)

    def ours() -> tuple[Tensor, Tensor]:
        rows, passed = lemo_kernels.take_rows(stream, kept, slots)
        merged = lemo_kernels.merge_rows(passed, kept, slots, rows, rest=rest_rows)
        return merged, torch.autograd.grad(merged, stream, upstream)[0]

    def naive() -> tuple[Tensor, Tensor]:
        rows = stream[kept]
        merged = stream.index_copy(0, kept, rows).index_copy(0, rest, rest_rows)
        # A rest row's new value is a constant, its gradient that of the residual stream.
        merged = merged + (stream - stream.detach()).index_fill(0, kept, 0)
        return merged, torch.autograd.grad(merged, stream, upstream)[0]

    # Forward: take 2 K, merge reads K + R and writes N; backward: take 2 K, put back reads N and writes N.
    moved = (4 * kept.numel() + 4 * setting.rows) * setting.hidden * setting.itemsize
    return Case(ours, naive, bytes=moved, exact=True)


def block_scores(setting: Setting) -> Case:
    """True block scores against the QK half of the causal flash forward, which takes half of its time."""
    import lemo_kernels

    query, key = (setting.random(setting.rows, count, setting.head_dim) for count in (setting.heads, setting.key_heads))
    scale = setting.head_dim**-0.5

    def naive() -> list[Tensor]:
        with kernel_mode("reference"):
            return [token_informativeness.block_scores(query, key, setting.block_size, scale)]

    value = torch.randn_like(key)
    flops = setting.heads * setting.head_dim * setting.rows * (setting.rows + 1)
    others = {"whole flash forward": partial(lemo_kernels.attend, query, key, value, [setting.rows], scale)}
    ours = partial(lemo_kernels.block_scores, query, key, setting.block_size, scale)
    return Case(lambda: [ours()], naive, flops=flops, others=others, compiles=False)


def loss(setting: Setting) -> Case:
    """Head, loss and gradient of all rows by segments, frozen head: kernels against the PyTorch path and Liger if it is there."""
    from lemo_hf.models.segmented_loss import segmented_causal_lm_loss

    hidden = setting.random(1, setting.rows, setting.hidden).requires_grad_()
    head = torch.nn.Linear(setting.hidden, setting.vocabulary, bias=False, device=setting.device, dtype=setting.dtype)
    head.requires_grad_(False)
    labels = torch.randint(0, setting.vocabulary, (1, setting.rows), device=setting.device)

    def segmented(mode: Any) -> tuple[Tensor, Tensor]:
        with kernel_mode(mode):
            value = segmented_causal_lm_loss(hidden, labels, head, setting.segment)
        return value, torch.autograd.grad(value, hidden)[0]

    others: dict[str, Callable[[], Any]] = {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        pass
    else:
        fused = LigerFusedLinearCrossEntropyLoss()

        def liger() -> Any:
            return torch.autograd.grad(fused(head.weight, hidden[0, :-1], labels[0, 1:]), hidden)

        others["liger"] = liger
    flops = 4 * setting.rows * setting.hidden * setting.vocabulary
    return Case(partial(segmented, "kernels"), partial(segmented, "reference"), flops=flops, others=others, compiles=False)


def attention(setting: Setting) -> Case:
    """Attention and its gradients among kept rows in our Triton kernels, against ATen's flash operators or the CPU reference."""
    import lemo_kernels

    rows = round(setting.rows * setting.keep)
    query, key, value = (
        setting.random(rows, count, setting.head_dim).requires_grad_()
        for count in (setting.heads, setting.key_heads, setting.key_heads)
    )
    upstream, scale = torch.randn_like(query), setting.head_dim**-0.5

    def both_ways(backend: str) -> list[Tensor]:
        output, lse = lemo_kernels.attend(query, key, value, [rows], scale, backend=backend)
        attached = lemo_kernels.with_kept_row_gradient(query, key, value, output, lse, [rows], scale, backend=backend)
        return [output, *torch.autograd.grad(attached, (query, key, value), upstream)]

    def sdpa() -> list[Tensor]:
        heads = [part.transpose(0, 1)[None] for part in (query, key, value)]
        output = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        return [output, *torch.autograd.grad(output, (query, key, value), upstream)]

    flash = setting.device.type == "cuda" and setting.dtype != torch.float32
    others = {"ATen flash operators": partial(both_ways, "flash")} if flash else {}
    flops = 7 * setting.heads * setting.head_dim * rows * (rows + 1)
    return Case(partial(both_ways, "triton"), sdpa, flops=flops, others=others, compiles=False)


def one_document(setting: Setting) -> tuple[Documents, Selection]:
    """All rows as one document, and a choice of its blocks."""
    documents = find_documents(1, setting.rows, setting.block_size, setting.device)
    marks = torch.zeros(sum(documents.block_counts), dtype=torch.bool, device=setting.device)
    return documents, selection_of_blocks(marks.index_fill_(0, setting.kept_rows()[0] // setting.block_size, True), documents)


def nearby_attention(setting: Setting) -> Case:
    """Attention of dropped rows to the 128 tokens before them, against the formula's gathered keys."""
    documents, selection = one_document(setting)
    rest = selection.real_rest.numel()
    query = setting.random(rest, setting.heads, setting.head_dim)
    key, value = (setting.random(setting.rows, setting.key_heads, setting.head_dim) for _ in range(2))
    scope = nearby_reference.NearbyScope(selection, documents, setting.head_dim**-0.5, 128)

    def attended(mode: Any) -> list[Tensor]:
        with kernel_mode(mode):
            return [nearby_reference.attend_nearby(query, key, value, scope)]

    flops = 4 * rest * min(128, setting.rows) * setting.heads * setting.head_dim
    return Case(partial(attended, "kernels"), partial(attended, "reference"), flops=flops, compiles=False)


def kept_key_attention(setting: Setting) -> Case:
    """Attention of all rows to kept ones and the 256 nearest, against SDPA with masks by strips of queries, and beside dense attention."""
    import lemo_kernels

    documents, selection = one_document(setting)
    kept, width, scale = selection.real_kept, min(256, setting.rows // 4), setting.head_dim**-0.5
    query = setting.random(setting.rows, setting.heads, setting.head_dim)
    key, value = (setting.random(setting.rows, setting.key_heads, setting.head_dim) for _ in range(2))
    of_kept = key[kept], value[kept]
    scope = kept_key_reference.KeptKeyScope(selection, documents, scale, width)
    rows, group = torch.arange(setting.rows, device=setting.device), setting.heads // setting.key_heads
    is_kept = torch.zeros_like(rows, dtype=torch.bool).index_fill_(0, kept, True)

    def ours() -> list[Tensor]:
        with kernel_mode("kernels"):
            return [kept_key_reference.attend_kept_keys(query, key, value, *of_kept, scope)[0]]

    def naive() -> list[Tensor]:
        parts, heads = [], [part.repeat_interleave(group, 1).transpose(0, 1)[None] for part in (key, value)]
        for start in range(0, setting.rows, 1024):
            end = min(start + 1024, setting.rows)
            distance = rows[start:end, None] - rows[:end]
            mask = (distance >= 0) & (is_kept[:end] | (distance < width))
            strip, seen = query[start:end].transpose(0, 1)[None], (part[:, :, :end] for part in heads)
            parts.append(F.scaled_dot_product_attention(strip, *seen, attn_mask=mask, scale=scale))
        return [torch.cat(parts, 2)[0].transpose(0, 1)]

    # As if kept rows lay evenly: their share of all pairs, and what is missing of the nearby ones.
    share, pairs = kept.numel() / setting.rows, setting.rows * (setting.rows + 1) / 2
    near = width * setting.rows - width * (width - 1) / 2
    flops = 4 * round(share * pairs + (1 - share) * near) * setting.heads * setting.head_dim
    others = {"dense attention": partial(lemo_kernels.attend, query, key, value, [setting.rows], scale)}
    return Case(ours, naive, flops=flops, others=others, compiles=False)


def rest_query_gradient(setting: Setting) -> Case:
    """What all dropped keys add to kept queries' gradient, as in the exact form, beside the gradient among kept rows."""
    import lemo_kernels

    documents, selection = one_document(setting)
    kept, rest, scale = selection.real_kept, selection.real_rest, setting.head_dim**-0.5
    query = setting.random(setting.rows, setting.heads, setting.head_dim)
    key, value = (setting.random(setting.rows, setting.key_heads, setting.head_dim) for _ in range(2))
    output, lse = lemo_kernels.attend(query, key, value, [setting.rows], scale, backend="triton")
    grad, of_kept = setting.random(kept.numel(), *query.shape[1:]), (query[kept], output[kept], lse[kept])
    of_rest, scope = (key[rest], value[rest]), kept_key_reference.KeptKeyScope(selection, documents, scale, setting.rows)

    def gradient(mode: Any) -> list[Tensor]:
        with kernel_mode(mode):
            return [kept_key_reference.rest_query_gradient(grad, *of_kept, *of_rest, scope)]

    pairs = kept.numel() * rest.numel() * (setting.rows + 1) / (2 * setting.rows)
    flops = 6 * round(pairs) * setting.heads * setting.head_dim
    own = of_kept[0], key[kept], value[kept], *of_kept[1:]
    others = {"gradient among kept rows": partial(lemo_kernels.attend_backward, grad, *own, [kept.numel()], scale)}
    return Case(partial(gradient, "kernels"), partial(gradient, "reference"), flops=flops, others=others, compiles=False)


CASES: dict[str, Callable[[Setting], Case]] = {
    builder.__name__: builder
    for builder in (
        gather_norm, gather_norm_backward, rotary, scatter_add, take_and_merge, block_scores, loss, attention,
        nearby_attention, kept_key_attention, rest_query_gradient,
    )
}  # fmt: skip


def settings_of(name: str, tiny: bool) -> Iterator[Setting]:
    """The sizes at which a kernel is measured."""
    if tiny:
        sizes = {"hidden": 32, "heads": 4, "key_heads": 2, "head_dim": 16, "vocabulary": 70, "block_size": 8, "segment": 16}
        yield Setting(48, 0.5, torch.device("cpu"), torch.float32, **sizes)  # type: ignore[arg-type]
        return
    quadratic = name in ("block_scores", "attention", "kept_key_attention", "rest_query_gradient")
    all_rows = (8192, 32768, 65536) if quadratic else (16384,) if name == "loss" else (16384, 32768, 65536, 131072)
    for rows in all_rows:
        for keep in (1.0,) if name in ("loss", "block_scores") else (0.5,) if quadratic else (0.3, 0.5, 0.7):
            yield Setting(rows, keep, torch.device("cuda"), torch.bfloat16)
