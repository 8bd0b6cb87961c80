"""LeMo as the paper's public artifact has it in its memory experiments (Wang et al., "JENGA: Enhancing Long-Context Fine-tuning of
LLMs with Contextual Token Sparsity", USENIX ATC 2025, arXiv 2501.09767, sections 4 and 5), written anew from how it behaves.

    n = N1(x) of every row;  x = x + scatter(Attn(n[K]) -> zeros);  x = x + PrunedMLP(N2(x))

- Attention: each layer keeps the most informative blocks of 64 by a predictor's scores, as many as a profile over layers says
  (found offline; `KEPT_BLOCKS`), and kept tokens attend among themselves. Rows move by index, zeros, scatter.
- MLP: the forward is exact; of gate, activation and up only the fifth of the *channels* with the largest norms over all tokens
  is cached, and the backward works with zeros for the others, in products of full width. No token leaves it.
- Norms are the stock ones over all rows. The loss is taken in chunks of 2048 tokens, each run again in the backward.
- The predictors have the size that pruning left in the paper, 8.1 M a layer of 4096; here float32, as all of this package's.

The artifact's time experiments run another configuration, with the stock MLP: this one has its memory, and its own time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...errors import LemoError
from ...models.documents import find_documents
from ...models.lemo_config import LemoConfig
from ...models.pattern_predictor import PatternPredictor
from ...models.token_elimination import choose_blocks
from .stock_layers import decoder_layers, norms, positions_of, refuse_unsupported

# Share of blocks that attention keeps, by layer of 32, to two decimals; the profiles of Llama and OPT are alike.
KEPT_BLOCKS = (
    0.99, 0.97, 0.95, 0.92, 0.92, 0.88, 0.86, 0.79, 0.78, 0.73, 0.71, 0.69, 0.64, 0.62, 0.61, 0.57,
    0.53, 0.52, 0.50, 0.43, 0.44, 0.43, 0.42, 0.41, 0.45, 0.42, 0.40, 0.40, 0.44, 0.43, 0.44, 0.49,
)  # fmt: skip
KEPT_CHANNELS = 0.2
LOSS_CHUNK = 2048


def kept_blocks(layer: int, num_layers: int) -> float:
    """Share of blocks that a layer's attention keeps: the profile, stretched over `num_layers`."""
    return KEPT_BLOCKS[int((layer + 0.5) * len(KEPT_BLOCKS) / num_layers)]


def use_artifact_lemo(model: Any, layers: list[int], num_layers: int, block_size: int) -> None:
    """Lets a stock causal language model eliminate tokens and channels as the artifact does.

    Args:
        model: The model, before adapters are added.
        layers: By layer of `model` its number in the whole model, where only some are built.
        num_layers: Layers of the whole model.
        block_size: Tokens of a block, 64 in the paper.

    Raises:
        LemoError: If its layers do what these leave out.
    """
    refuse_unsupported(model.config, "LeMo (artifact)")
    hidden = model.config.hidden_size
    for layer, number in zip(decoder_layers(model), layers, strict=True):
        layer.lemo_predictor = PatternPredictor(hidden, [max(1, round(0.171 * hidden))] * 4, max(2, hidden // 4))
        layer.lemo_predictor.reset_parameters()
        chosen = LemoConfig(block_size=block_size, selection="ratio", keep_ratio=kept_blocks(number, num_layers))
        layer.forward = _eliminating(layer, chosen)
    model.forward = _with_chunked_loss(model)


def _with_chunked_loss(model: Any) -> Callable[..., CausalLMOutputWithPast]:
    def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(rows), targets, reduction="sum")

    def forward(input_ids: Tensor, labels: Tensor, **inputs: Any) -> CausalLMOutputWithPast:
        hidden = model.model(input_ids=input_ids, **inputs).last_hidden_state.flatten(0, 1)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        parts = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses = [checkpoint(chunk_loss, rows, wanted, use_reentrant=False) for rows, wanted in parts]
        return CausalLMOutputWithPast(loss=torch.stack(losses).sum() / (targets != -100).sum())

    return forward


def _eliminating(layer: Any, chosen: LemoConfig) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
        (batch, tokens, _), (first, second) = hidden_states.shape, norms(layer)
        normed = first(hidden_states).flatten(0, 1)
        documents = find_documents(batch, tokens, chosen.block_size, normed.device)
        with torch.no_grad():
            scores = layer.lemo_predictor.informativeness(normed, documents)
        selection = choose_blocks(scores, documents, chosen, 0, 0)
        kept = selection.kept_rows
        # Every sample is as long and keeps as many blocks, the last one included: its kept rows make a rectangle.
        positions = tuple(
            part.expand(batch, -1, -1).flatten(0, 1).index_select(0, kept).unflatten(0, (batch, -1))
            for part in positions_of(arguments)
        )
        rows = normed.index_select(0, kept).unflatten(0, (batch, -1))
        with_positions = {"position_embeddings": positions} if positions else {}
        attended, _ = layer.self_attn(hidden_states=rows, attention_mask=None, **with_positions)
        update = torch.zeros_like(normed).index_copy(0, kept, attended.flatten(0, 1))
        hidden_states = hidden_states + update.view_as(hidden_states)
        return hidden_states + pruned_feed_forward(layer, second(hidden_states), KEPT_CHANNELS)

    return forward


def pruned_feed_forward(layer: Any, rows: Tensor, share: float) -> Tensor:
    """The MLP whose backward sees `share` of its channels.

    Args:
        layer: A stock layer whose MLP has frozen, plain matrices.
        rows: `(..., hidden)`.
        share: Share of channels, in (0, 1].

    Raises:
        LemoError: If the MLP has adapters or other than linear layers.
    """
    if hasattr(layer, "mlp"):
        modules, activation = (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj), layer.mlp.act_fn
    else:
        modules, activation = (layer.fc1, None, layer.fc2), layer.activation_fn
    if any(type(module) is not nn.Linear or module.weight.requires_grad for module in modules if module is not None):
        raise LemoError("channels are pruned of frozen, plain MLP matrices; the MLP has adapters; adapt attention only")
    return _PrunedMLP.apply(rows, modules, activation, share)


class _PrunedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, modules: tuple[Any, ...], activation: Callable[[Tensor], Tensor], share: float) -> Tensor:
        gate_proj, up_proj, down_proj = modules
        gate = gate_proj(rows)
        up = None if up_proj is None else up_proj(rows)
        activated = activation(gate)
        size = activated.flatten(0, -2).norm(dim=0)
        if up is not None:
            size = size + up.flatten(0, -2).norm(dim=0)
        channels = size.topk(max(1, int(share * len(size)))).indices
        saved = [part.index_select(-1, channels) for part in (gate, activated, up) if part is not None]
        ctx.save_for_backward(channels, *saved)
        ctx.modules, ctx.activation = modules, activation
        return down_proj(activated if up is None else activated * up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        channels, gate, activated, *rest = ctx.saved_tensors
        gate_proj, up_proj, down_proj = ctx.modules
        grad = (grad @ down_proj.weight).index_select(-1, channels)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            again = ctx.activation(leaf)
        (grad_gate,) = torch.autograd.grad(again, leaf, grad * rest[0] if rest else grad)
        grad_rows = _spread(grad_gate, channels, gate_proj) @ gate_proj.weight
        if rest:
            grad_rows = grad_rows + _spread(grad * activated, channels, up_proj) @ up_proj.weight
        return grad_rows, None, None, None


def _spread(part: Tensor, channels: Tensor, projection: nn.Linear) -> Tensor:
    """Zeros of full width with the kept channels in their places."""
    return part.new_zeros(*part.shape[:-1], projection.out_features).index_copy(-1, channels, part)
