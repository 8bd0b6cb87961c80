"""Attention of every token to kept tokens and to those just before it: the forward of the form `"kept_keys"` (ours).

With `width` the number of nearby tokens, a token at place i of its document, kept or not, attends to

    V(i) = { j <= i : j is kept } u { j : i - width < j <= i }

at original positions. So a dropped token is no key to tokens far behind it, and that is all that its layer's forward leaves out:
the paper's sparse form also takes the dropped token's own attention away, and from kept tokens the dropped ones next to them.
Gradients are those of kept queries, keys and values with the probabilities of this forward (document_attention.py), and

    dq_i = scale * sum of p_ij (dO_i . v_j - D_i) k_j over all j in V(i), kept or dropped

so dropped keys, which get no gradient, belong to the sum (`with_rest_keys`). The exact form has that part too: it is a width beyond
the document, and dq_i the dense one.

Pairs of a document of N tokens, a share r kept: about r N^2 / 2 + (1 - r) width N, where the dense forward has N^2 / 2 and
attention among kept tokens r^2 N^2 / 2; pairs of kept queries and dropped keys r (1 - r) width N, and r (1 - r) N^2 / 2 in the
exact form, 1.5 times a forward's work each in backward. It saves as much as the exact form: kept rows' queries, keys, values and
output, and dropped rows' keys and values.

On a GPU a kernel walks both sets of keys where they stand. Elsewhere a strip of queries is two calls of ATen's flash operator:
the kept rows before the strip's nearby keys, all visible, and the stretch of nearby keys, visible by a mask. Their log-sum-exps make
one softmax of them. Where a sliding window or an unknown selection (a compiler's) hides kept rows too, it is one call with a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from .document_attention import require_cpu
from .documents import Documents
from .kernel_switch import kernel
from .token_elimination import Selection

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Queries of one call, rounded up to whole blocks.
_STRIP = 256
# Keys whose scores exist at one time, with those of a strip.
_KEYS_AT_ONCE = 256


@dataclass(frozen=True)
class KeptKeyScope:
    """Which keys the rows of a batch see, and the factor on their dot products.

    Args:
        selection: Which rows are kept.
        documents: The batch's documents.
        scale: Factor on the dot products.
        width: Nearby tokens that a row sees whether they are kept or not, itself included.
        window: Positions that a row sees at all, as a sliding window has it; `None` for all earlier ones.
    """

    selection: Selection
    documents: Documents
    scale: float
    width: int
    window: int | None = None


@torch.no_grad()
def attend_kept_keys(
    query: Tensor, key: Tensor, value: Tensor, kept_key: Tensor, kept_value: Tensor, scope: KeptKeyScope
) -> tuple[Tensor, Tensor]:
    """Attention of all real rows to kept and nearby ones of their document, without autograd.

    Args:
        query: `(real_rows, heads, head_dim)`, positions applied.
        key, value: `(real_rows, key_value_heads, head_dim)`.
        kept_key, kept_value: Those of kept rows alone, `(kept, key_value_heads, head_dim)`.
        scope: Rows, scale and widths.

    Returns:
        The attention output `(real_rows, heads, head_dim)` and the log-sum-exp of the scores `(real_rows, heads, 1)`.

    Raises:
        LemoConfigError: On other devices than the CPU where no kernel runs.
    """
    documents, selection = scope.documents, scope.selection
    if (fast := kernel("attend_kept_keys", query, query.shape[2])) is not None:
        return fast(
            query,
            key,
            value,
            kept_key,
            kept_value,
            selection.real_kept,
            documents.place_of_row,
            documents.lengths,
            scope.scale,
            scope.width,
            scope.window,
        )
    require_cpu(query)
    outputs, sums = zip(
        *(_attend_strip(query, key, value, kept_key, kept_value, strip, scope) for strip in _strips(scope)), strict=True
    )
    return torch.cat(outputs), torch.cat(sums).unsqueeze(-1)


@dataclass(frozen=True)
class _Strip:
    """Queries of one document and the keys they may see: a stretch of the kept rows, then a stretch of all rows.

    Which of the first a query sees is `None` where it is all of them.
    """

    queries: slice
    far: slice
    near: slice
    sees_far: Tensor | None  # (queries, far keys)
    sees_near: Tensor  # (queries, near keys)


def _attend_strip(
    query: Tensor, key: Tensor, value: Tensor, kept_key: Tensor, kept_value: Tensor, strip: _Strip, scope: KeptKeyScope
) -> tuple[Tensor, Tensor]:
    """A strip's output `(queries, heads, head_dim)` and log-sum-exp `(queries, heads)`."""
    asked = query[strip.queries]
    near, far = (key[strip.near], value[strip.near]), (kept_key[strip.far], kept_value[strip.far])
    if strip.sees_far is not None:
        keys, values = (torch.cat(parts) for parts in zip(far, near, strict=True))
        return _attend_some(asked, keys, values, torch.cat((strip.sees_far, strip.sees_near), 1), scope.scale)
    output, lse = _attend_some(asked, *near, strip.sees_near, scope.scale)
    if not len(far[0]):
        return output, lse
    # Without a mask the operator takes a third less time; the two parts are one softmax by their sums.
    far_output, far_lse = _attend_some(asked, *far, None, scope.scale)
    both = torch.logaddexp(lse, far_lse)
    weight, far_weight = ((part - both).exp().unsqueeze(-1) for part in (lse, far_lse))
    return (output * weight + far_output * far_weight).to(query.dtype), both


def _attend_some(query: Tensor, key: Tensor, value: Tensor, sees: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = None
    if sees is not None:
        mask = torch.zeros(sees.shape, dtype=query.dtype, device=sees.device).masked_fill_(~sees, -torch.inf)[None, None]
    rows = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    output, lse = _flash(*rows, 0.0, False, attn_mask=mask, scale=scale)
    return output[0].transpose(0, 1), lse[0].transpose(0, 1)


def _strips(scope: KeptKeyScope) -> Iterator[_Strip]:
    documents, selection = scope.documents, scope.selection
    size = documents.block_size
    step = -(-_STRIP // size) * size
    place = documents.place_of_row
    kept_place = place[selection.real_kept]
    is_kept = torch.zeros_like(place, dtype=torch.bool).index_fill_(0, selection.real_kept, True)
    is_bound = torch.compiler.is_compiling()
    first = first_kept = 0
    for length, kept, before in zip(documents.lengths, selection.kept_lengths, _kept_before(scope), strict=True):
        for start in range(0, length, step):
            stop = min(start + step, length)
            # Whole blocks, so that all keys before the stretch that are kept stand in a row of their own.
            block = max(0, start - scope.width + 1) // size
            oldest = 0 if scope.window is None or is_bound else max(0, start - scope.window + 1) // size
            far = slice(first_kept + before[min(oldest, block)], first_kept + before[block])
            queries, near = slice(first + start, first + stop), slice(first + block * size, first + stop)
            at = place[queries][:, None]
            distance = at - place[near]
            sees_near = (distance >= 0) & ((distance < scope.width) | is_kept[near])
            sees_far = None
            if is_bound or scope.window is not None:
                window = length if scope.window is None else scope.window
                sees_near &= distance < window
                # Where `before` is a bound, some of these rows come later; they stand in the stretch.
                sees_far = (kept_place[far] < block * size) & (at - kept_place[far] < window)
            yield _Strip(queries, far, near, sees_far, sees_near)
        first, first_kept = first + length, first_kept + kept


def _kept_before(scope: KeptKeyScope) -> list[list[int]]:
    """For each document and each of its blocks, how many kept rows come before it; a bound while a compiler traces.

    On shapes alone (fake tensors), where which blocks are kept is not known, they are taken to lie evenly.
    """
    documents, selection = scope.documents, scope.selection
    size = documents.block_size
    found = []
    spans = zip(documents.split_blocks(selection.kept_blocks), documents.block_counts, selection.kept_lengths, strict=True)
    for marks, blocks, kept in spans:
        if torch.compiler.is_compiling():
            found.append([min(kept, block * size) for block in range(blocks)])
        elif isinstance(marks, FakeTensor):
            found.append([kept * block // blocks for block in range(blocks)])
        else:
            found.append([count * size for count in accumulate(marks[:-1].tolist(), initial=0)])
    return found


def rest_query_gradient(
    grad: Tensor, query: Tensor, output: Tensor, lse: Tensor, rest_key: Tensor, rest_value: Tensor, scope: KeptKeyScope
) -> Tensor:
    """What the dropped keys that kept queries see add to these queries' gradient.

    Args:
        grad, query, output: `(kept, heads, head_dim)`; the first is the gradient of `output`.
        lse: `(kept, heads, 1)`.
        rest_key, rest_value: Those of dropped rows, `(rest, key_value_heads, head_dim)`.
        scope: Rows, scale and widths.

    Returns:
        `(kept, heads, head_dim)`.

    Raises:
        LemoConfigError: On other devices than the CPU where no kernel runs.
    """
    documents, selection = scope.documents, scope.selection
    place = documents.place_of_row
    if (fast := kernel("rest_query_gradient", query, query.shape[2])) is not None:
        rows = selection.real_kept, selection.real_rest, place[selection.real_kept], documents.lengths
        return fast(grad, query, output, lse, rest_key, rest_value, *rows, scope.scale, scope.width, scope.window)
    require_cpu(query)
    wide = torch.promote_types(query.dtype, torch.float32)
    found = query.new_zeros(query.shape)
    kept_place, rest_place = place[selection.real_kept], place[selection.real_rest]
    width = scope.width if scope.window is None else min(scope.width, scope.window)
    # Backward may run within autocast, which would multiply in 16 bits.
    with torch.autocast(query.device.type, enabled=False):
        for queries, stretches in _rest_strips(scope, width):
            # (key heads, query heads of each * rows, head_dim): no key is repeated.
            groups = rest_key.shape[1]
            asked, given, finished, sums = (_by_key_head(part[queries], groups, wide) for part in (query, grad, output, lse))
            of_query = torch.zeros_like(asked)
            # What is taken from every score of a row is one more column of the products, not a pass over the scores.
            asked = torch.cat((asked * scope.scale, -sums), 2)
            given = torch.cat((given, -(given * finished).sum(-1, keepdim=True)), 2)
            for keys, all_visible in stretches:
                key, value = (F.pad(part[keys].transpose(0, 1).to(wide), (0, 1), value=1.0) for part in (rest_key, rest_value))
                weights = (asked @ key.mT).exp_()
                if not all_visible:
                    distance = kept_place[queries][:, None] - rest_place[keys]
                    hidden = (distance < 0) | (distance >= width)
                    weights.masked_fill_(hidden.repeat(asked.shape[1] // len(distance), 1), 0)
                of_query += weights.mul_(given @ value.mT) @ key[:, :, :-1]
            rows = queries.stop - queries.start
            found[queries] = of_query.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2) * scope.scale
    return found


def _by_key_head(rows: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`(rows, heads, d)` as `(groups, heads / groups * rows, d)`."""
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2).to(dtype)


def _rest_strips(scope: KeptKeyScope, width: int) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Strips of a document's kept rows, and stretches of the dropped rows that any of them may see, with whether all of them see all."""
    documents, selection = scope.documents, scope.selection
    size = documents.block_size
    step = max(1, _STRIP // size)
    first_kept = first_rest = 0
    spans = zip(documents.lengths, selection.kept_lengths, _kept_before(scope), strict=True)
    for length, kept, before in spans:
        rest = length - kept
        # Dropped rows before each block; a compiler knows none.
        behind = [block * size - count for block, count in enumerate(before)]
        for block in range(0, len(before), step):
            after = block + step
            if torch.compiler.is_compiling():
                queries, places = slice(min(kept, block * size), min(kept, after * size)), [0, 0, 0, rest]
            else:
                is_last = after >= len(before)
                queries = slice(before[block], kept if is_last else before[after])
                oldest, whole = max(0, block * size - width + 1) // size, -(-max(0, after * size - width) // size)
                places = [*(behind[at] for at in (oldest, min(whole, block), block)), rest if is_last else behind[after]]
            parts = [slice(first_rest + start, first_rest + stop) for start, stop in pairwise(places)]
            stretches = [(keys, part == 1) for part, whole in enumerate(parts) for keys in _in_steps(whole)]
            if queries.start < queries.stop and stretches:
                yield slice(first_kept + queries.start, first_kept + queries.stop), stretches
        first_kept, first_rest = first_kept + kept, first_rest + rest


def _in_steps(keys: slice) -> list[slice]:
    return [slice(start, min(start + _KEYS_AT_ONCE, keys.stop)) for start in range(keys.start, keys.stop, _KEYS_AT_ONCE)]


class _RestKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attended: Tensor, query: Tensor, lse: Tensor, rest_key: Tensor, rest_value: Tensor, scope: KeptKeyScope
    ) -> Tensor:
        ctx.save_for_backward(attended, query, lse, rest_key, rest_value)
        ctx.scope = scope
        return attended.view_as(attended)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, query, lse, rest_key, rest_value = ctx.saved_tensors
        of_query = rest_query_gradient(grad.contiguous(), query, output, lse, rest_key, rest_value, ctx.scope)
        return grad, of_query, None, None, None, None


def with_rest_keys(
    attended: Tensor, query: Tensor, lse: Tensor, rest_key: Tensor, rest_value: Tensor, scope: KeptKeyScope
) -> Tensor:
    """Adds to the gradient of kept queries what the dropped keys that they see contribute; these get no gradient.

    Args:
        attended: Kept rows' output with the gradient of kept pairs attached, `(kept, heads, head_dim)`.
        query, lse: Kept rows', as in `with_kept_row_gradient`.
        rest_key, rest_value: Those of dropped rows, `(rest, key_value_heads, head_dim)`.
        scope: Rows, scale and widths.
    """
    if not query.requires_grad:
        return attended
    return _RestKeys.apply(attended, query, lse, rest_key, rest_value, scope)
