"""The features that change what a training step stores or computes, each on a tiny model, and steps with any of them combined."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from references.tiny_models import lemo_model, place, random_tokens, stock_model, trainable_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.models.sparse_decoder import sparse_backbone
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.training.sensitive_offload import OffloadSettings, SensitiveOffload

# Releases of transformers that can checkpoint some layers only.
EVERY_N = "every_n_layers" in signature(getattr(PreTrainedModel, "activation_checkpointing_enable", len)).parameters
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BLOCK = {"block_size": 8, "predictor_rank": 8, "predictor_features": 8, "segment_size": 32}


@dataclass(frozen=True)
class Feature:
    """One feature.

    Args:
        choice: Features of one choice exclude each other.
        neutral: It changes where or when things are computed, and no gradient.
        lemo: Fields of the lemo block.
        adapter: Fields of `LoraConfig`; lists are added up.
        checkpointing: Arguments of `activation_checkpointing_enable`.
        autocast: Type that the forward runs in.
        bits: Width of the base model's quantised weights.
        dtype: Type that the base model is loaded in.
        model: Fields of the model's config.
        prepare: What is done to the base model.
    """

    choice: str
    neutral: bool = False
    lemo: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    checkpointing: dict[str, Any] | None = None
    autocast: torch.dtype | None = None
    bits: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    prepare: Callable[[Any], Any] | None = None


def float32_norms(model: Any) -> Any:
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = weight.data.float()
    return model


def with_noise(model: Any) -> Any:
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    return model


def checkpointing(every_n_layers: int = 1, use_reentrant: bool = False) -> dict[str, Any]:
    return {"every_n_layers": every_n_layers, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}


def enable_checkpointing(model: Any, activation_checkpointing_kwargs: dict[str, Any], every_n_layers: int) -> None:
    if EVERY_N:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers=every_n_layers)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=activation_checkpointing_kwargs)


def selective_checkpointing() -> dict[str, Any]:
    """As trl's `selective`: attention's result is stored, the rest is run again."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return CheckpointPolicy.MUST_SAVE if operator is attention else CheckpointPolicy.PREFER_RECOMPUTE

    values = checkpointing()
    values["activation_checkpointing_kwargs"]["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return values


FEATURES = {
    "checkpointing": Feature("checkpointing", neutral=True, checkpointing=checkpointing()),
    "reentrant": Feature("checkpointing", neutral=True, checkpointing=checkpointing(use_reentrant=True)),
    "every_2_layers": Feature("checkpointing", neutral=True, checkpointing=checkpointing(2)),
    "selective": Feature("checkpointing", neutral=True, checkpointing=selective_checkpointing()),
    "kept_rows": Feature("checkpointing", neutral=True, lemo={"checkpoint": "kept_rows"}),
    "offload": Feature("offload", neutral=True),
    "compile": Feature("compile", neutral=True),
    "accumulation": Feature("accumulation", neutral=True),
    "4bit": Feature("base", bits=4),
    "8bit": Feature("base", bits=8),
    "bf16_base": Feature("dtype", dtype=torch.bfloat16),
    "float32_norms": Feature("dtype", dtype=torch.bfloat16, prepare=float32_norms, autocast=torch.bfloat16),
    "bf16": Feature("autocast", autocast=torch.bfloat16),
    "fp16": Feature("autocast", autocast=torch.float16),
    "dora": Feature("dora", adapter={"use_dora": True}),
    "rslora": Feature("rslora", adapter={"use_rslora": True}),
    "dropout": Feature("dropout", adapter={"lora_dropout": 0.3}),
    "mlp": Feature("mlp", adapter={"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "head": Feature("head", adapter={"target_modules": ["lm_head"]}),
    "embeddings": Feature("embeddings", adapter={"target_modules": ["embed_tokens"]}),
    "new_tokens": Feature("embeddings", adapter={"trainable_token_indices": {"embed_tokens": [5, 7, 11]}}),
    "trained_ends": Feature("embeddings", adapter={"modules_to_save": ["embed_tokens", "norm"]}),
    "tied": Feature("tied", model={"tie_word_embeddings": True}),
    "tied_adapters": Feature(
        "tied", model={"tie_word_embeddings": True}, adapter={"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "full": Feature("full"),
    "neftune": Feature("neftune", prepare=with_noise),
}
if not EVERY_N:
    del FEATURES["every_2_layers"]
# No pair, in the stock libraries already; the last is refused at start.
IMPOSSIBLE = {
    ("full", other): "there is no adapter"
    for other in ("dora", "rslora", "dropout", "mlp", "head", "embeddings", "new_tokens", "trained_ends", "tied_adapters")
} | {
    ("full", "4bit"): "Trainer refuses to train a quantised base whole",
    ("full", "8bit"): "the same",
    ("new_tokens", "tied_adapters"): "PEFT wraps embeddings once",
    ("8bit", "dora"): "PEFT loses the scales of 8-bit weights on a CPU",
}


def combine(*names: str) -> list[Feature]:
    return [FEATURES[name] for name in names]


@cache
def saved_base(folder: Path, layers: int, tied: bool) -> Path:
    path = folder / f"{layers}-{tied}"
    stock_model(num_hidden_layers=layers, tie_word_embeddings=tied).save_pretrained(path)
    return path


def base_model(names: tuple[str, ...], folder: Path, lemo: dict[str, Any] | None, layers: int) -> Any:
    features = combine(*names)
    config = {"num_hidden_layers": layers}
    for feature in features:
        config |= feature.model
    block = None if lemo is None else {**BLOCK, **lemo, **{k: v for each in features for k, v in each.lemo.items()}}
    bits = next((feature.bits for feature in features if feature.bits), None)
    dtype = next((feature.dtype for feature in features if feature.dtype), torch.float32)
    if bits is None:
        stock = stock_model(**config).to(dtype)
        return stock if block is None else lemo_model(stock, **block)
    path = saved_base(folder, layers, config.get("tie_word_embeddings", False))
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the predictors
        if block is None:
            model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=dtype)
        else:
            lemo_block = LemoConfig(**block)
            model = AutoLemoModelForCausalLM.from_pretrained(path, lemo=lemo_block, quantization_config=quantization, dtype=dtype)
    if dtype == torch.float32:
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model.requires_grad_(False)  # by hand, as scripts do that keep the embeddings in 16 bits


def make_model(names: tuple[str, ...], folder: Path, lemo: dict[str, Any] | None, layers: int = 2) -> Any:
    """A model with all of the features, the same weights each time; the stock one without `lemo`."""
    features = combine(*names)
    model = base_model(names, folder, lemo, layers)
    for feature in features:
        model = feature.prepare(model) if feature.prepare else model
    if "full" not in names:
        values: dict[str, Any] = {"r": 4, "target_modules": list(ATTENTION), "init_lora_weights": False}
        for feature in features:
            for name, value in feature.adapter.items():
                values[name] = [*values.get(name, []), *value] if isinstance(value, list) else value
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **values))
    for feature in features:
        if feature.checkpointing is not None:
            enable_checkpointing(model, **feature.checkpointing)
    return model.train()


EVERYTHING = OffloadSettings(budget=math.inf, smallest=1)


def with_layers(model: Any) -> nn.Module:
    return next(module for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))


def batch_for(names: tuple[str, ...]) -> dict[str, Tensor]:
    # The stock model draws dropout and noise for padding too, so what draws is compared without padding.
    lengths = (40, 40, 40) if {"dropout", "neftune"} & set(names) else (37, 50, 9)
    return place([random_tokens(length, row) for row, length in enumerate(lengths)], "right").batch


@dataclass
class Step:
    """One step's outcome.

    Args:
        loss: Its loss.
        gradients: Of all trainable weights.
        layer_bytes, bytes: Saved by the layers and in all; 0 where a compiler runs them.
        copied_bytes: Moved to the host by the offload.
        shares: Kept shares by layer.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    layer_bytes: int
    bytes: int
    copied_bytes: int
    shares: tuple[float, ...]


def step(names: tuple[str, ...], folder: Path, lemo: dict[str, Any] | None, beside: tuple[str, ...] = ()) -> Step:
    """Forward and backward of a fresh model with the features; under "accumulation" in parts.

    Args:
        names: The features.
        folder: Where base models are saved.
        lemo: Fields of the lemo block; the stock model without.
        beside: Features of the step that this one is compared with: its model has the same size, its batch the same shape.
    """
    model = make_model(names, folder, lemo, layers=1 if "compile" in (*names, *beside) else 2)
    batch = batch_for((*names, *beside))
    called = model
    if "compile" in names:
        torch._dynamo.reset()
        called = torch.compile(model, backend="eager")
    parts = [batch]
    if "accumulation" in names:
        parts = [{name: values[row : row + 1] for name, values in batch.items()} for row in range(len(batch["labels"]))]
    items = (batch["labels"][:, 1:] != -100).sum()
    result = Step(torch.zeros(()), {}, 0, 0, 0, ())
    torch.manual_seed(13)
    for part in parts:
        with ExitStack() as stack:
            memory = None if "compile" in names else stack.enter_context(ActivationMemory(model))
            offload = None
            if "offload" in names:
                offload = stack.enter_context(SensitiveOffload(with_layers(model), EVERYTHING))
            for dtype in {feature.autocast for feature in combine(*names)} - {None}:
                stack.enter_context(torch.autocast("cpu", dtype=dtype))
            loss = called(**part, num_items_in_batch=items).loss
        if memory is not None:
            result.bytes += memory.saved.total
            result.layer_bytes += sum(size for layer, size in memory.saved.by("layer").items() if layer is not None)
        result.copied_bytes += 0 if offload is None else sum(offload.report().moved_bytes)
        loss.backward()
        result.loss = result.loss + loss.detach()
        if lemo is not None and not result.shares:
            result.shares = sparse_backbone(model).lemo_kept_shares
    result.gradients = trainable_gradients(model)
    return result
