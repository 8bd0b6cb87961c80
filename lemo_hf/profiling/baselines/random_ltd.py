"""Random layerwise token dropping, random-LTD (Yao et al., "Random-LTD: Random and Layerwise Token Dropping Brings Efficient
Training for Large-scale Transformers", 2022, arXiv 2211.11586, section 3), written from the paper.

Every layer but the first and the last draws tokens of its own, anew at each step. They pass through the whole layer, attention
among themselves at their original positions and MLP; the others go around it unchanged:

    x[K] = Layer(x[K]),   x[R] = x[R]

The paper draws single tokens; `block_size` above 1 draws runs of tokens, as LeMo's blocks, so that only the way of choosing
differs. Its schedule, which keeps more and more tokens over the run, is left out: a step here has the share it is given.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...models.token_elimination import kept_block_count
from .stock_layers import decoder_layers, positions_of


def use_random_ltd(model: Any, layers: list[int], num_layers: int, keep_ratio: float, block_size: int) -> None:
    """Lets the middle layers of a stock causal language model drop tokens.

    Args:
        model: The model, before adapters are added.
        layers: By layer of `model` its number in the whole model, where only some are built.
        num_layers: Layers of the whole model.
        keep_ratio: Share of blocks that a layer computes on, in (0, 1].
        block_size: Tokens that are drawn together.
    """
    for layer, number in zip(decoder_layers(model), layers, strict=True):
        if not is_dense(number, num_layers):
            layer.forward = _dropping(layer.forward, keep_ratio, block_size)


def is_dense(layer: int, num_layers: int) -> bool:
    """Whether a layer computes on every token."""
    return layer in (0, num_layers - 1)


def _dropping(stock_forward: Callable[..., Tensor], keep_ratio: float, block_size: int) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
        kept = draw_rows(hidden_states.shape[1], keep_ratio, block_size, hidden_states.device)
        if positions := positions_of(arguments, kept):
            arguments["position_embeddings"] = positions
        # Positions with gaps would read as document boundaries; those of the rows are in their rotary tensors.
        arguments |= {"attention_mask": None, "position_ids": None}
        passed = stock_forward(hidden_states.index_select(1, kept), **arguments)
        return hidden_states.index_copy(1, kept, passed)

    return forward


def draw_rows(tokens: int, keep_ratio: float, block_size: int, device: torch.device) -> Tensor:
    """Places of the tokens drawn, `(kept,)`, sorted; the same for all rows of a batch.

    Args:
        tokens: Length of the sequence.
        keep_ratio: Share of blocks.
        block_size: Tokens of a block; a shorter last block is always among those drawn, so that their number does not depend
            on the draw.
    """
    whole, left = divmod(tokens, block_size)
    count = min(whole, max(1, kept_block_count(-(-tokens // block_size), keep_ratio) - bool(left)))
    blocks = torch.randperm(whole, device=device)[:count].sort().values
    rows = (blocks[:, None] * block_size + torch.arange(block_size, device=device)).flatten()
    return torch.cat((rows, torch.arange(whole * block_size, tokens, device=device))) if left else rows
