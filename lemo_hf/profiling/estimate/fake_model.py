"""Models of any size without their memory: fake CPU tensors in place of parameters, for measures that need shapes only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_model(build: Callable[[], nn.Module], mode: FakeTensorMode) -> nn.Module:
    """Builds a model whose parameters and buffers are fake CPU tensors.

    It is built on the meta device (PEFT cannot move adapters of fake tensors) and converted afterwards; CPU and not meta,
    because attention on the meta device takes the math path, which costs and saves other amounts.

    ```python
    mode = FakeTensorMode()
    model = fake_model(lambda: LlamaForCausalLM(config), mode)
    with mode, ActivationMemory(model) as memory:
        ids = torch.zeros(1, 4096, dtype=torch.long)
        loss = model(input_ids=ids, labels=ids).loss
    ```

    Nothing may depend on the values of fake tensors. Without a cache (`use_cache=False`, or activation checkpointing) stock
    `transformers` looks into `position_ids` for packed documents, cannot, and passes an attention mask it would not need:
    attention then counts all pairs instead of the causal ones.

    Args:
        build: Returns the model, adapters included; runs under `torch.device("meta")`.
        mode: The mode in which the model will run; not entered yet.
    """
    with torch.device("meta"):
        model = build()
    fakes: dict[int, torch.Tensor] = {}  # by the original, so that tied weights stay tied
    for module in model.modules():
        holders: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in holders:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = _fake_like(tensor, mode)
                tensors[name] = fakes[id(tensor)]
    return model


def _fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake
