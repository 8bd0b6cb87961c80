"""What the model classes of all architectures share: predictors among the weights, and the segmented loss of a training step."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .lemo_config import LemoConfigError
from .pattern_predictor import PredictorParameters
from .segmented_loss import segmented_causal_lm_loss
from .sparse_decoder import sparse_backbone


class SparsePreTrainedModel:
    """Mixin of a stock `PreTrainedModel` (before it in the bases): how predictors are initialised, loaded and kept in float32."""

    # A stock checkpoint has no predictors: they are initialised and trained by the first phase of a run.
    _keys_to_ignore_on_load_missing: list[str] | set[str] | None = [r"lemo_predictor"]
    _keep_in_fp32_modules_strict: list[str] | set[str] | None = ["lemo_predictor"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, PredictorParameters):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `PreTrainedModel`.

        Raises:
            LemoConfigError: If predictors among the weights hold values that no predictor of this model can have.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        backbone = sparse_backbone(model)
        for index, layer in enumerate(backbone.layers):
            for name, weight in layer.lemo_predictor.named_parameters():
                # Weights that wait on a disk, or for another process to send them, cannot be looked at.
                fault = None if weight.is_meta else predictor_fault(f"layers.{index}.{name}", weight, backbone)
                if fault:
                    raise LemoConfigError(
                        f"predictors do not fit the model: {fault}; {model.name_or_path!r}; use those of a run on this model, or train new ones"
                    )
        return loaded


def predictor_fault(name: str, tensor: Tensor, backbone: Any) -> str | None:
    """What is wrong with the values of a predictor's tensor; `None` if nothing is.

    Args:
        name: `layers.<layer>.<name in the predictor>`.
        tensor: The values.
        backbone: The model's backbone, which has the rotary frequencies.
    """
    # A comparison with NaN is false both ways: blocks would be kept by their place.
    if not tensor.isfinite().all():
        return f"{name} holds values that are not finite"
    rotary = getattr(backbone, "rotary_emb", None)
    frequencies = 0 if rotary is None else rotary.inv_freq.numel()
    # They index the model's position tensors; out of bounds a GPU ends the process.
    if ".rotary." in name and not ((tensor == tensor.round()) & (tensor >= -1) & (tensor < frequencies)).all():
        return f"{name} names rotary frequencies that the model's {frequencies} are not"
    return None


class SparseCausalLM:
    """Mixin of a stock causal language model (before it in the bases): its backbone is the LeMo one."""

    base_model_class: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.base_model_class(config)
        self.post_init()  # type: ignore[attr-defined]


def with_segmented_loss(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a causal language model whose training loss is segmented; everything else stays the stock one's.

    In training with labels the result carries the loss and no logits.

    Args:
        stock_forward: The stock class's function. The result has its signature, which generate and Trainer read to decide
            what they pass on and which columns of a data set they drop.
    """
    parameters = list(signature(stock_forward).parameters.values())[1:]
    by_place = [each.name for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD]

    @wraps(stock_forward)
    @can_return_tuple
    def forward(self: Any, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        kwargs.update(zip(by_place, args, strict=False))
        lemo, labels, next_labels = self.config.lemo, kwargs.get("labels"), kwargs.get("shift_labels")
        if not (self.training and lemo.enabled) or (labels is None and next_labels is None):
            return stock_forward(self, **kwargs)
        items = kwargs.get("num_items_in_batch")
        for name in ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep"):
            kwargs.pop(name, None)
        outputs = self.model(**kwargs, return_dict=True)
        loss = segmented_causal_lm_loss(outputs.last_hidden_state, labels, self.lm_head, lemo.segment_size, items, next_labels)
        return CausalLMOutputWithPast(loss=loss, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    return forward
