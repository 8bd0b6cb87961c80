"""What no training step can know when it chooses: how large the dense gradient of each row is."""

from typing import Any

import torch
from torch import Tensor, nn

from lemo_hf.models.sparse_decoder import sparse_backbone


def row_gradient_norms(into: dict[str, list[Tensor]], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Norms of the dense loss's gradient at every row of each layer's attention and MLP outputs; a forward pre-hook of the model.

    Args:
        into: Receives `"attention"` and `"mlp"`, each a list by layer of `(rows,)`.
        model: A LeMo model.
        args, kwargs: Of its forward; `labels` among them.
    """
    backbone = sparse_backbone(model)
    lemo = backbone.config.lemo
    if not lemo.enabled:
        return  # the dense pass below
    outputs: dict[str, list[Tensor]] = {"attention": [], "mlp": []}

    def remember(part: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[part].append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = []
    for layer in backbone.layers:
        handles += [
            layer.self_attn.register_forward_hook(remember("attention")),
            layer.mlp.register_forward_hook(remember("mlp")),
        ]
    lemo.update(enabled=False)
    try:
        loss = model(*args, **kwargs).loss
        for part, rows in outputs.items():
            grads = torch.autograd.grad(loss, rows, retain_graph=True)
            into[part] = [grad.flatten(0, -2).norm(dim=-1) for grad in grads]
    finally:
        lemo.update(enabled=True)
        for handle in handles:
            handle.remove()
