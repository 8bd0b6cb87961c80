"""Attention, block scores, and what they replace, for benchmarks/kernel_times.py."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from kernel_setting import Case, Setting, one_document
from torch import Tensor

from lemo_hf.models import kept_key_attention as kept_key_reference
from lemo_hf.models import nearby_attention as nearby_reference
from lemo_hf.models import token_informativeness
from lemo_hf.models.kernel_switch import kernel_mode


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
    return Case(partial(both_ways, "triton"), sdpa, flops=flops, others=others, allowed=2, compiles=False)


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

    def ours() -> list[Tensor]:
        with kernel_mode("kernels"):
            return [kept_key_reference.rest_query_gradient(grad, *of_kept, *of_rest, scope)]

    def naive() -> list[Tensor]:
        # The formula itself: the reference in lemo_hf/models is for the CPU. No key is repeated, and no (kept, rest) matrix whole.
        keys, values = (part.float().transpose(0, 1)[:, None] for part in of_rest)
        parts = []
        for queries in torch.arange(kept.numel(), device=setting.device).split(512):
            given, asked, finished, sums = (
                part[queries].float().unflatten(1, (setting.key_heads, -1)).permute(1, 2, 0, 3) for part in (grad, *of_kept)
            )
            hidden = kept[queries][:, None] < rest
            weights = (asked @ keys.mT * scale - sums).exp_().masked_fill_(hidden, 0)
            weights *= given @ values.mT - (given * finished).sum(-1, keepdim=True)
            parts.append((weights @ keys * scale).permute(2, 0, 1, 3).flatten(1, 2).to(grad.dtype))
        return [torch.cat(parts)]

    pairs = kept.numel() * rest.numel() * (setting.rows + 1) / (2 * setting.rows)
    flops = 6 * round(pairs) * setting.heads * setting.head_dim
    own = of_kept[0], key[kept], value[kept], *of_kept[1:]
    others = {"gradient among kept rows": partial(lemo_kernels.attend_backward, grad, *own, [kept.numel()], scale)}
    return Case(ours, naive, flops=flops, others=others, allowed=2, compiles=False)
