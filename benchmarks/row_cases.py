"""Kernels that move, normalise and activate rows, and what they replace, for benchmarks/kernel_times.py."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_setting import Case, Setting
from torch import Tensor


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

    saved = plain_rows.detach()

    def formula() -> Any:
        rows = saved.float()
        inverse = torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
        straight, scaled = rows * inverse, grad_normed.float() * weight.float()
        grad = inverse * (scaled - straight * (scaled * straight).mean(-1, keepdim=True)) + grad_rows.float()
        return [torch.zeros_like(grad_stream).index_copy(0, kept, grad.to(grad_stream.dtype)) + grad_stream]

    # Read: rows, both gradients of kept rows, the stream's gradient of the others. Write: the stream's gradient.
    moved = (3 * kept.numel() + rest.numel() + setting.rows) * setting.hidden * setting.itemsize
    return Case(ours, naive, bytes=moved, allowed=2, formula=formula)


def add_norm(setting: Setting) -> Case:
    """Attention's output added to the kept rows, and the sum's RMSNorm, forward."""
    import lemo_kernels

    kept, _ = setting.kept_rows()
    rows, update = (setting.random(kept.numel(), setting.hidden) for _ in range(2))
    weight = setting.random(setting.hidden)

    def naive() -> tuple[Tensor, Tensor]:
        sums = rows + update
        wide = sums.float()
        return sums, weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(sums.dtype)

    moved = 4 * kept.numel() * setting.hidden * setting.itemsize
    return Case(partial(lemo_kernels.add_norm, rows, update, weight, epsilon=1e-6), naive, bytes=moved)


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


def gated_activation(setting: Setting) -> Case:
    """`silu(gate) * up` of the kept rows' MLP, forward and both gradients."""
    import lemo_kernels

    kept, _ = setting.kept_rows()
    gate, up, grad = (setting.random(kept.numel(), setting.intermediate) for _ in range(3))
    leaves = gate.requires_grad_(), up.requires_grad_()

    def both_ways(product: Tensor) -> list[Tensor]:
        return [product.detach(), *torch.autograd.grad(product, leaves, grad)]

    def formula() -> list[Tensor]:
        wide = gate.detach().float()
        share = wide.sigmoid()
        active, given = (wide * share).to(gate.dtype), grad.float()
        of_gate = given * up.detach().float() * share * (1 + wide * (1 - share))
        return [active * up.detach(), of_gate.to(gate.dtype), (given * active).to(up.dtype)]

    # Forward: read two, write one. Backward: read three, write two.
    moved = 8 * kept.numel() * setting.intermediate * setting.itemsize
    ours = lambda: both_ways(lemo_kernels.gated_activation(*leaves, "silu"))  # noqa: E731
    return Case(ours, lambda: both_ways(F.silu(gate) * up), bytes=moved, allowed=2, formula=formula)


def block_features(setting: Setting) -> Case:
    """The predictor's query and key features of all blocks from residual rows, against norm, float32 copy, products and pools."""
    import lemo_kernels

    stream, weight = setting.random(setting.rows, setting.hidden), setting.random(setting.hidden)
    width, size = setting.predictor, setting.block_size
    shapes = (setting.hidden, width), (width, width), (width, width)
    query, key = ([torch.randn(shape, device=setting.device) / shape[0] ** 0.5 for shape in shapes] for _ in range(2))
    firsts = torch.arange(0, setting.rows, size, device=setting.device)
    lengths = torch.full_like(firsts, size, dtype=torch.int32)

    def pooled(rows: Tensor, matrices: list[Tensor]) -> Tensor:
        features = torch.relu(torch.relu(rows @ matrices[0]) @ matrices[1]) @ matrices[2]
        blocks = features.unflatten(0, (-1, size))
        return torch.cat((blocks[..., : width // 2].mean(1), blocks[..., width // 2 :].amax(1)), 1)

    def naive() -> list[Tensor]:
        wide = stream.float()
        normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(stream.dtype)
        return [pooled(normed.float(), matrices) for matrices in (query, key)]

    moved = setting.rows * setting.hidden * setting.itemsize
    ours = partial(lemo_kernels.block_features, stream, firsts, lengths, weight, None, query, key, block_size=size, epsilon=1e-6)
    return Case(ours, naive, bytes=moved)
