"""LongLoRA's shifted sparse attention, S2-Attn (Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language
Models", ICLR 2024, arXiv 2309.12307, section 3.2), written from the paper.

The sequence is cut into groups of a quarter of its length and attention is causal within a group. Half of the heads see groups
that begin half a group later, so that information passes from group to group:

    heads of the first half     [0, G) [G, 2G) [2G, 3G) [3G, 4G)
    heads of the second half    [0, G/2) [G/2, 3G/2) [3G/2, 5G/2) [5G/2, 7G/2) [7G/2, 4G)

The paper shifts by rolling the sequence, which puts its two ends into one group, and says that the mask has to keep them apart:
here they are two groups of their own. Projections, MLP, norms and loss are the stock model's; in the paper norms and embeddings
train too, here adapters alone do, as for all methods that it is compared with. Group attention is stock SDPA.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...errors import LemoError

GROUPS = 4
_NAME = "lemo_bench_longlora"


def use_longlora(model: Any) -> None:
    """Lets a stock causal language model attend in shifted groups.

    Args:
        model: The model, before adapters are added.

    Raises:
        LemoError: If its heads cannot be halved, or attention has a window already.
    """
    config = model.config
    if window := getattr(config, "sliding_window", None):
        raise LemoError(f"LongLoRA's groups take the place of a sliding window; the config has {window}; set it to null")
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if keys % 2:
        raise LemoError(f"LongLoRA shifts half of the heads; the model has {keys} key heads; use one with an even number")
    # transformers' own registry of attention functions; one without a mask function gets no mask, and rows without padding need none.
    AttentionInterface.register(_NAME, shifted_sparse_attention)
    model.set_attn_implementation(_NAME)


def shifted_sparse_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' `AttentionInterface` takes it.

    Args:
        module: The attention module.
        query: `(batch, heads, seq_len, head_dim)`.
        key, value: `(batch, key_value_heads, seq_len, head_dim)`.
        attention_mask: None; every row is one document without padding.
        scaling: Factor on the dot products.
        dropout: Of the probabilities.

    Returns:
        The output, `(batch, seq_len, heads, head_dim)`, and no weights.

    Raises:
        LemoError: If there is a mask.
    """
    if attention_mask is not None:
        raise LemoError("LongLoRA's groups take rows without padding; got an attention mask; leave it out")
    group = max(2, -(-query.shape[2] // GROUPS))

    def attend(parts: list[Tensor], shift: int) -> Tensor:
        return _in_groups(lambda q, k, v: sdpa_attention_forward(module, q, k, v, None, dropout, scaling)[0], parts, group, shift)

    halves = [part.chunk(2, dim=1) for part in (query, key, value)]
    return torch.cat([attend([part[half] for part in halves], shift) for half, shift in ((0, 0), (1, group // 2))], dim=2), None


def _in_groups(attend: Any, parts: list[Tensor], group: int, first: int) -> Tensor:
    """Attention within `[0, first)`, whole groups after it, and what is left; from and to the shapes above."""
    batch, _, tokens, _ = parts[0].shape
    first = min(first, tokens)
    whole = (tokens - first) // group
    stops = [0, first, first + whole * group, tokens]
    outputs = []
    for start, stop, count in zip(stops, stops[1:], (1, whole, 1), strict=False):
        if stop > start:
            # Whole groups lie in the batch dimension, as rows of their own.
            folded = [part[:, :, start:stop].unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1) for part in parts]
            outputs.append(attend(*folded).unflatten(0, (batch, count)).flatten(1, 2))
    return torch.cat(outputs, dim=1)
