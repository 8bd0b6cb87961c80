"""What `lemo bench --counts-only` says of a method: bytes and FLOPs of the real code on fake tensors of the real length, all layers.

The same on every machine, and no weights are needed: 8B shapes at 128K tokens take seconds.
"""

from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..activation_memory import ActivationMemory
from ..estimate.estimator import Estimator
from ..estimate.fake_model import fake_model
from ..estimate.kernel_shapes import kernels_on_shapes
from ..estimate.step_model import StepSettings, build_model, forward_loss
from ..estimate.step_trace import EveryTokenHasALabel


def counted_step(estimator: Estimator, settings: StepSettings) -> dict[str, Any]:
    """Peak, saved bytes and FLOPs of a step.

    Args:
        estimator: Of the model.
        settings: The step.

    Returns:
        `estimated_bytes` of tensors alive at the highest moment, its parts and moment; `saved_bytes` for backward, by part and by
        layer; `flops`; with a card its `estimated_seconds`, and those `estimated_seconds_at_least`.
    """
    estimate = estimator.estimate(settings)
    times = {"estimated_seconds": estimate.seconds, "estimated_seconds_at_least": estimate.seconds_at_least}
    return (times if estimate.card is not None else {}) | {
        "settings": asdict(settings),
        "estimated_bytes": estimate.live_bytes,
        "estimated_parts": estimate.parts,
        "estimated_moment": estimate.moment,
        "flops": sum(estimate.flops.values()),
        **saved_on_fake_tensors(estimator.config, settings),
    }


def saved_on_fake_tensors(config: PreTrainedConfig, settings: StepSettings) -> dict[str, Any]:
    """Bytes that the forward of the whole model saves for backward: in all, by part, and by layer (those outside layers apart)."""
    mode = EveryTokenHasALabel(settings.batch_size)
    layers = config.num_hidden_layers
    model = fake_model(lambda: build_model(config, settings, list(range(layers))), mode)
    with mode, kernels_on_shapes(on_gpu=True):
        ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long)
        with ActivationMemory(model) as memory:
            loss = forward_loss(model, ids, settings)
        del loss
    by_layer = memory.saved.by("layer")
    return {
        "saved_bytes": memory.saved.total,
        "saved_by_part": memory.saved.by("part"),
        "saved_by_layer": [by_layer.get(layer, 0) for layer in range(layers)],
    }
