"""Tiny seeded models, stock and LeMo with the same weights, and batches that hold documents in different places."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from lemo_hf import registry
from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.models.sparse_decoder import SparseBatch, sparse_backbone
from lemo_hf.registry import lemo_config_from

PAD = 0
VOCABULARY = 96
# With kept keys, unless a test says otherwise.
NEARBY = 7


_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}
_ROTARY = {
    "intermediate_size": 80,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
# Stock class and config of each architecture's tiny model: 2 layers, hidden 32, 4 heads of 8. Wide weights, so that scores
# differ clearly, and windows far smaller than the documents.
ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], dict]] = {
    "llama": (LlamaForCausalLM, _ROTARY),
    "mistral": (MistralForCausalLM, {**_ROTARY, "sliding_window": 11}),
    "opt": (OPTForCausalLM, {"ffn_dim": 80, "max_position_embeddings": 512, "init_std": 0.2, "dropout": 0.0}),
    "qwen2": (Qwen2ForCausalLM, {**_ROTARY, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": (Qwen3ForCausalLM, {**_ROTARY, "head_dim": 16}),
}


def stock_model(seed: int = 0, architecture: str = "llama", **changes) -> PreTrainedModel:
    """The tiny model of an architecture, the same weights for the same seed."""
    stock_class, values = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return stock_class(stock_class.config_class(**{**_SHAPE, **values, **changes})).eval()


def with_varied_vectors(model: PreTrainedModel, seed: int = 5) -> PreTrainedModel:
    """Norm weights other than 1 and biases other than 0, which models are not initialised with."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def add_lora(model, targets="all-linear", **changes):
    """LoRA with random A and B, so that every adapter weight has a gradient; the same weights for the same model."""
    if targets == "attention":
        targets = ["q_proj", "k_proj", "v_proj", "out_proj" if model.config.model_type.endswith("opt") else "o_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **changes))


def lemo_model(stock: PreTrainedModel, lora: dict | None = None, **lemo):
    """A LeMo model in training mode with the weights of `stock` and predictors that are the same every time.

    With kept keys a token sees 7 nearby ones unless `lemo` says otherwise: of a test's short documents 256 would be all.
    """
    lemo = {"block_size": 8, "predictor_rank": 8, "predictor_features": 8, **lemo}
    if lemo.get("attention_forward") == "kept_keys":
        lemo.setdefault("nearby_tokens", NEARBY)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = lemo_config_from(stock.config, LemoConfig(**lemo))
        model = registry.ARCHITECTURES[stock.config.model_type][1](config)
    model.to(next(stock.parameters()).dtype)
    missing, unexpected = model.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all("lemo_predictor" in name for name in missing)
    return (model if lora is None else add_lora(model, **lora)).train()


def checkpoint_stock_layers(model, use_reentrant: bool = False) -> None:
    """Stock activation checkpointing, by the name that this release of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def trainable_gradients(model) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 0.0, atol: float = 0.0) -> None:
    assert got.keys() == wanted.keys()
    assert got, "no gradients at all"
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_close_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-4, share: float = 1e-5) -> None:
    """Equal up to `share` of the largest entry of all, below which cancellation leaves rounding only."""
    largest = max(grad.abs().max().item() for grad in wanted.values())
    assert_same_gradients(got, wanted, rtol=rtol, atol=share * largest)


def loss_and_gradients(model, batch: dict, **extra) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, **extra).loss
    loss.backward()
    return loss.detach(), trainable_gradients(model)


def random_tokens(length: int, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def text(rows: int = 2, length: int = 50) -> Tensor:
    """Rows of different tokens, `(rows, length)`."""
    return torch.stack([random_tokens(length, row) for row in range(rows)])


@dataclass
class Placed:
    """A batch and where its documents went: `(row, start, length)` each."""

    batch: dict[str, Tensor]
    places: list[tuple[int, int, int]] = field(default_factory=list)


def place(documents: list[Tensor], layout: str, extra: int = 0) -> Placed:
    """A batch of the documents, with labels whose first one per document is ignored.

    Args:
        documents: Tokens of each document.
        layout: "left", "right" (padded, one document a row), "left_positions" (with position_ids from a collator), or
            "packed_positions", "packed_seq_idx", "packed_cu" (all documents in one row).
        extra: Padding beyond the longest document.
    """
    labels = [torch.cat((torch.tensor([-100]), tokens[1:])) for tokens in documents]
    lengths = [len(tokens) for tokens in documents]
    if layout.startswith("packed"):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        places = [(0, end - length, length) for end, length in zip(ends, lengths, strict=True)]
        batch = {"input_ids": torch.cat(documents)[None], "labels": torch.cat(labels)[None]}
        if layout == "packed_positions":
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        elif layout == "packed_seq_idx":
            numbers = [torch.full((length,), number) for number, length in enumerate(lengths)]
            batch["seq_idx"] = torch.cat(numbers)[None].int()
        else:
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, *ends], dtype=torch.int32)
            batch["max_length_q"] = batch["max_length_k"] = max(lengths)
        return Placed(batch, places)
    width = max(lengths) + extra
    batch = {
        "input_ids": torch.full((len(documents), width), PAD),
        "attention_mask": torch.zeros(len(documents), width, dtype=torch.long),
        "labels": torch.full((len(documents), width), -100),
    }
    places = []
    for row, (tokens, label, length) in enumerate(zip(documents, labels, lengths, strict=True)):
        start = width - length if layout.startswith("left") else 0
        span = slice(start, start + length)
        batch["input_ids"][row, span], batch["labels"][row, span], batch["attention_mask"][row, span] = tokens, label, 1
        places.append((row, start, length))
    if layout == "left_positions":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).masked_fill(batch["attention_mask"] == 0, 1)
    return Placed(batch, places)


@contextmanager
def batches_of(model) -> Iterator[list[SparseBatch]]:
    """What the layers of each sparse forward within share, in order."""
    batches: list[SparseBatch] = []
    first = sparse_backbone(model).layers[0]
    hook = first.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs["sparse_batch"]), with_kwargs=True)
    yield batches
    hook.remove()


def chosen_blocks(batch: SparseBatch) -> list[list[list[bool]]]:
    """What a forward kept: by layer, by document, by block."""
    documents = batch.documents
    return [
        [part.tolist() for part in documents.split_blocks(batch.selections[layer].kept_blocks)]
        for layer in sorted(batch.selections)
    ]


# Llama-3-8B's proportions at a sixteenth of its width, for counts that do not change with it.
SIXTEENTH_OF_8B = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
