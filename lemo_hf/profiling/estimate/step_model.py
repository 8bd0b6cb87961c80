"""What a training step is made of, and a model of few layers to trace it with: stock, with Liger's functions, or LeMo."""

import re
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import getsource
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.opt.modeling_opt import OPTDecoder

from ...errors import LemoError
from ...loading import without_peft_deprecation
from ...models.lemo_config import LemoConfig
from ...registry import ARCHITECTURES, lemo_config_from
from ..baselines.baseline import Baseline
from .liger_functions import use_liger_functions
from .model_shapes import stock_type

# What a user would pick; "lemo" is configured by its LemoConfig.
METHODS = ("stock", "checkpointing", "liger", "liger+checkpointing", "lemo")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")


@dataclass(frozen=True)
class StepSettings:
    """One configuration of a training step.

    Args:
        seq_len: Tokens of a sample, one document each.
        method: `"stock"` LoRA; `"checkpointing"`: every layer is run again in the backward (`torch.utils.checkpoint`, not
            reentrant); `"liger"`: norms, SwiGLU and the loss as Liger's functions allocate them; both; or `"lemo"`.
        lemo: LeMo's config for `method="lemo"`, the defaults if `None`.
        batch_size: Samples of a step.
        lora_r: Rank of the adapters.
        targets: Names of the adapted linear layers, or "all-linear"; attention's projections if empty.
        dtype: Float type of the base model: "bfloat16", "float16" or "float32".
        adapter_dtype: Float type of the adapters: "float32" is PEFT's default.
        autocast: Whether the forward runs under bfloat16 autocast.
        baseline: What takes LeMo's place in the stock model, for `method="stock"`.
    """

    seq_len: int
    method: str = "lemo"
    lemo: LemoConfig | None = None
    batch_size: int = 1
    lora_r: int = 8
    targets: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    autocast: bool = False
    baseline: Baseline | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise LemoError(f"no such method; {self.method!r}; choose one of {', '.join(METHODS)}")
        for name in ("dtype", "adapter_dtype"):
            if getattr(self, name) not in DTYPES:
                raise LemoError(f"no such {name}; {getattr(self, name)!r}; choose one of {', '.join(DTYPES)}")
        for name in ("seq_len", "batch_size", "lora_r"):
            if getattr(self, name) < 1:
                raise LemoError(f"{name} must be at least 1; got {getattr(self, name)}; set it to 1 or more")
        if self.baseline is not None and self.method != "stock":
            raise LemoError(
                f"a baseline changes the stock model; {self.baseline.name!r} with method {self.method!r}; use method stock"
            )

    @property
    def lemo_config(self) -> LemoConfig | None:
        """LeMo's config, or `None` for a method without LeMo."""
        return (self.lemo or LemoConfig()) if self.method == "lemo" else None

    @property
    def name(self) -> str:
        """The method in words, kept share included."""
        lemo = self.lemo_config
        if self.baseline is not None:
            return self.baseline.words
        if lemo is None:
            return {"stock": "stock LoRA", "checkpointing": "stock + checkpointing"}.get(self.method, self.method.capitalize())
        kept = lemo.keep_ratio if isinstance(lemo.keep_ratio, float | int) else sum(lemo.keep_ratio) / len(lemo.keep_ratio)
        nearby = f", {lemo.nearby} nearby tokens" if lemo.nearby or lemo.nearby_tokens == 0 else ""
        rows = ", kept-row checkpointing" if lemo.checkpoint == "kept_rows" else ""
        rows += f", {lemo.offload} offload" if lemo.offload != "none" else ""
        names = lemo.attention_pattern if isinstance(lemo.attention_pattern, list) else [lemo.attention_pattern]
        patterns = ", ".join(sorted({name.replace("_", " ") for name in names} - {"full"}))
        return f"LeMo {lemo.attention_forward.replace('_', ' ')} {kept:g}{f', {patterns}' if patterns else ''}{nearby}{rows}"

    def running(self, device_type: str = "cpu") -> AbstractContextManager[Any]:
        """The context of the forward pass on a type of device."""
        return torch.autocast(device_type, dtype=torch.bfloat16) if self.autocast else nullcontext()


def runs_flex_attention(settings: StepSettings, num_layers: int) -> bool:
    """Whether a layer's attention is `flex_attention`, compiled, where there is a GPU."""
    lemo = settings.lemo_config
    return lemo is not None and any(lemo.pattern_of(layer, num_layers) == "block_sparse" for layer in range(num_layers))


def layer_kinds(config: PreTrainedConfig, settings: StepSettings) -> list[Hashable]:
    """By layer what makes it differ from others: equal kinds allocate and compute alike. The first layer is one of its own."""
    layers, lemo = config.num_hidden_layers, settings.lemo_config
    types = getattr(config, "layer_types", None) or [None] * layers
    kinds: list[Hashable] = []
    for layer in range(layers):
        of_lemo: Hashable = None
        if lemo is not None:
            dense = lemo.is_dense(layer, layers)
            sizes = tuple(lemo.predictor_sizes[layer]) if lemo.predictor_sizes else None
            of_lemo = (dense, None if dense else lemo.ratio_of(layer), sizes, lemo.pattern_of(layer, layers))
        elif settings.baseline is not None:
            of_lemo = settings.baseline.kind_of_layer(layer, layers)
        kinds.append((layer == 0, types[layer], of_lemo))
    return kinds


def build_model(config: PreTrainedConfig, settings: StepSettings, layers: list[int]) -> nn.Module:
    """The model with some of its layers only, adapters on, in training mode; to be built on the meta device.

    Args:
        config: The whole model's config, checked.
        settings: The step.
        layers: Which of its layers to build, in order.

    Raises:
        LemoError: If an adapter's target is not there, the method does not exist for the architecture, or an older release of
            transformers runs it in a way that no trace shows.
    """
    from peft import LoraConfig, get_peft_model

    small = _config_of(config, settings, layers)
    if settings.method == "lemo":
        model = ARCHITECTURES[stock_type(config)][1](small)
    else:
        model = AutoModelForCausalLM.from_config(small, attn_implementation="sdpa")
    model.tie_weights()
    if settings.baseline is not None:
        settings.baseline.apply(model, layers, config.num_hidden_layers)
    if settings.method.startswith("liger"):
        use_liger_functions(model)
    _refuse_older_transformers(config, settings)
    if settings.method.endswith("checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module._can_checkpoint_with_cache = True  # type: ignore[assignment]  # the one of `forward_loss` keeps nothing
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if settings.targets == ("all-linear",):
        targets = sorted(names - {"lm_head"})
    else:
        targets = list(settings.targets) or sorted(names & set(_ATTENTION_PROJECTIONS))
    if missing := sorted(set(targets) - names):
        raise LemoError(f"no linear layer of this name; {missing[0]!r}; choose targets among {', '.join(sorted(names))}")
    with without_peft_deprecation():
        adapted = get_peft_model(model, LoraConfig(r=settings.lora_r, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if resident_part(name) != "predictors":
            wanted = settings.adapter_dtype if resident_part(name) == "adapter" else settings.dtype
            parameter.data = parameter.data.to(DTYPES[wanted])
    return adapted.train()


def _refuse_older_transformers(config: PreTrainedConfig, settings: StepSettings) -> None:
    # Within the supported range: they checkpoint around a layer's call, so what is saved belongs to no layer, and their OPT
    # compares a drawn number with layerdrop=0 in training, which has no value on the meta device.
    if settings.method.endswith("checkpointing") and "__call__" in vars(GradientCheckpointingLayer):
        what = "stock checkpointing"
    elif stock_type(config) == "opt" and "self.layerdrop > 0" not in getsource(OPTDecoder.forward):
        what = "OPT"
    else:
        return
    raise LemoError(
        f"{what} cannot be estimated with this release of transformers; {transformers.__version__}; upgrade transformers"
    )


def resident_part(parameter_name: str) -> str:
    """What a parameter counts as: adapter, predictors or weights."""
    if "lora_" in parameter_name:
        return "adapter"
    return "predictors" if "lemo_predictor" in parameter_name else "weights"


def forward_loss(model: Any, input_ids: Tensor, settings: StepSettings) -> Tensor:
    """The training loss of one batch; nothing else of the forward's results stays alive, as in `Trainer`."""
    inputs: dict[str, Any] = {}
    if settings.method != "lemo":
        inputs["past_key_values"] = _PassingCache(config=model.config)
    with settings.running(input_ids.device.type):
        return model(input_ids=input_ids, labels=input_ids, use_cache=False, **inputs).loss


class _PassingCache(DynamicCache):
    """A cache that keeps nothing. Without one `transformers` looks into `position_ids` for packed documents, cannot in fake
    tensors, and would make a mask of all pairs; with it attention runs as it does for rows that are one document each.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def _config_of(config: PreTrainedConfig, settings: StepSettings, layers: list[int]) -> PreTrainedConfig:
    """The config of a model of these layers: of the LeMo class for `method="lemo"`, of the stock class otherwise."""
    values = config.to_dict()
    for name in ("model_type", "lemo", "quantization_config"):
        values.pop(name, None)
    values["num_hidden_layers"] = len(layers)
    if values.get("layer_types"):
        values["layer_types"] = [values["layer_types"][layer] for layer in layers]
    # Rotary kinds that look at positions cannot run on fake tensors; bytes and FLOPs are the same for all kinds.
    if isinstance(values.get("rope_parameters"), dict):
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values["rope_parameters"].get("rope_theta", 1e4)}
    # A table of learned positions must hold the sample; rotary ones have no table.
    values["max_position_embeddings"] = max(values.get("max_position_embeddings") or 0, settings.seq_len)
    small = AutoConfig.for_model(stock_type(config), **values)
    small._attn_implementation = "sdpa"
    lemo = settings.lemo_config
    if lemo is None:
        return small
    total = config.num_hidden_layers
    lemo = replace(
        lemo,
        keep_ratio=[lemo.ratio_of(layer) for layer in layers],
        dense_layers=[place for place, layer in enumerate(layers) if lemo.is_named_dense(layer, total)],
        predictor_sizes=[lemo.predictor_sizes[layer] for layer in layers] if lemo.predictor_sizes else None,
        attention_pattern=[lemo.pattern_of(layer, total) for layer in layers],
        # Thresholds choose by values, which fake tensors lack; as many blocks are taken to be kept as keep_ratio says.
        selection="ratio" if lemo.selection == "threshold" else lemo.selection,
        thresholds=None,
    )
    return lemo_config_from(small, lemo)
