"""Exports the embedded base model with the measurements that its card reports.

Everything in the card comes from `measurements.json`, which is measured on the exported bfloat16 weights, loaded with
the stock `AutoModelForCausalLM`. Besides held-out perplexity it asks whether attention is used at all:

- `loss_by_context`: loss of the same targets (the last 64 tokens of held-out windows) when shown less or more of the
  text before them. An n-gram copycat gains nothing beyond a few tokens.
- `repeated_text`, `repeated_noise`: loss in the first and second copy of a text (or of random tokens) laid twice in a
  row. Only attention to the earlier copy lowers the second.
- `attention_entropy`: mean entropy of each layer's heads over that of uniform attention, in [0, 1].
- baselines: unigram and interpolated 5-gram perplexity (Witten-Bell) from the same training tokens.
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from ..errors import LemoError

if TYPE_CHECKING:
    from .training import BaseModelTrainer

TARGETS = 64  # tokens whose loss is compared under different contexts


@torch.no_grad()
def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in float32 of every next token of `rows` `(rows, tokens)`: `(rows, tokens - 1)`; -100 gives 0."""
    out = []
    for row in rows.split(2):
        logits = model(input_ids=row[:, :-1].clamp(min=0)).logits.float()
        out.append(F.cross_entropy(logits.transpose(1, 2), row[:, 1:], reduction="none", ignore_index=-100))
    return torch.cat(out)


def ngram_perplexity(train: np.ndarray, held_out: list[np.ndarray], order: int, vocab_size: int) -> float:
    """Perplexity of an interpolated Witten-Bell n-gram model.

    `P(w|h) = (c(hw) + types(h) P(w|h')) / (c(h) + types(h))` with h' one token shorter, down to the uniform
    distribution. N-grams are packed in one integer, so `vocab_size ** order` must stay below 2^63.

    Args:
        train: training tokens in a row, `(tokens,)`.
        held_out: token arrays of the held-out documents; their first tokens are not predicted.
        order: n, 1 for unigrams.
    """

    def packed(tokens: np.ndarray, n: int) -> np.ndarray:
        """Integers of the n-grams that end at each position from n-1 on."""
        key = np.zeros(len(tokens) - n + 1, dtype=np.int64)
        for offset in range(n):
            key = key * vocab_size + tokens[offset : len(tokens) - n + 1 + offset]
        return key

    def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, values[place], 0)

    train = train.astype(np.int64)
    tables = []
    for n in range(1, order + 1):
        grams, counts = np.unique(packed(train, n), return_counts=True)
        contexts, first = np.unique(grams // vocab_size, return_index=True)
        tables.append((grams, counts, contexts, np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))))
    total, targets = 0.0, 0
    for document in held_out:
        document = document.astype(np.int64)
        probability = np.full(len(document), 1.0 / vocab_size)
        for n, (grams, counts, contexts, context_counts, types) in enumerate(tables, start=1):
            if len(document) < n:
                break
            keys = packed(document, n)
            seen, kinds = (lookup(contexts, values, keys // vocab_size) for values in (context_counts, types))
            lower = probability[n - 1 :]
            mixed = (lookup(grams, counts, keys) + kinds * lower) / np.maximum(seen + kinds, 1)
            probability[n - 1 :] = np.where(seen > 0, mixed, lower)
        total -= np.log(probability[1:]).sum()
        targets += len(document) - 1
    return math.exp(total / targets)


def attention_structure(model: Any, rows: torch.Tensor) -> dict[str, list[float]]:
    """Per layer: entropy of attention over uniform attention's, and its share on the first token and beyond 64 tokens.

    Args:
        model: a Llama loaded with `attn_implementation="eager"`.
        rows: `(rows, tokens)` of real text.
    """
    tokens = rows.shape[1]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    later = torch.arange(tokens) >= TARGETS  # early queries have little to choose from
    uniform = torch.log(torch.arange(1, tokens + 1).float())
    found: dict[str, list[float]] = {"attention_entropy": [], "first_token_share": [], "distant_share": []}
    with torch.no_grad():
        layers = [model(input_ids=row[None], output_attentions=True).attentions for row in rows]
    for layer in range(len(layers[0])):
        weights = torch.cat([attentions[layer] for attentions in layers])  # (rows, heads, queries, keys)
        entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1) / uniform.clamp(min=1e-6)
        found["attention_entropy"].append(entropy[..., later].mean().item())
        found["first_token_share"].append(weights[:, :, later, 0].mean().item())
        distant = (weights * (distance > TARGETS)).sum(-1) - weights[..., 0]
        found["distant_share"].append(distant[..., later].mean().item())
    return found


def measure(trainer: BaseModelTrainer, folder: Path) -> dict[str, Any]:
    """Measures the exported model in `folder`; see the module's docstring for the entries."""
    from transformers import AutoModelForCausalLM

    recipe = trainer.recipe
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = trainer.held_out
    per_token = losses(model, rows)
    targets = int((rows[:, 1:] != -100).sum())
    mean = per_token.sum().item() / targets

    full = rows[(rows != -100).all(1)][:48]
    if not len(full):
        raise LemoError(f"no held-out document fills the context; {recipe.context_length} tokens; raise held_out_share")
    by_context = {}
    contexts = [length for length in (TARGETS, 128, 256, 512, 1024) if length <= recipe.context_length]
    for length in contexts:
        # The last target is the same everywhere; `length` counts the tokens before the last target.
        by_context[str(length)] = losses(model, full[:, -length - 1 :])[:, -TARGETS // 2 :].mean().item()
    half = recipe.context_length // 2
    text = full[:16, :half]
    noise = torch.randint(2, recipe.vocab_size, text.shape, generator=torch.Generator().manual_seed(0))
    copies = {}
    for name, once in (("repeated_text", text), ("repeated_noise", noise)):
        twice = losses(model, torch.cat([once, once], dim=1))
        copies[name] = {"first_copy_loss": twice[:, : half - 1].mean().item(), "second_copy_loss": twice[:, half:].mean().item()}

    model.set_attn_implementation("eager")  # the only one that returns attention weights
    structure = attention_structure(model, full[:4, :-1])
    stream = torch.cat(trainer.stream.documents).numpy()
    documents = [document.numpy() for document in trainer.held_out_documents]
    seen = trainer.step * recipe.batch_rows * recipe.context_length
    return {
        "python_version": platform.python_version(),
        "packages": recipe.packages,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_bytes": trainer.train_bytes,
        "train_documents": len(trainer.stream.documents),
        "train_tokens": len(stream),
        "steps": trainer.step,
        "minutes": round(trainer.minutes, 1),
        "tokens_seen": seen,
        "epochs": seen / len(stream),
        "rename_from_epoch": recipe.rename_from_epoch,
        "finished": trainer.finished(),
        "held_out_documents": len(documents),
        "held_out_tokens": targets,
        "held_out_loss": mean,
        "held_out_perplexity": math.exp(mean),
        "held_out_bits_per_byte": mean * targets / math.log(2) / trainer.held_out_bytes,
        "unigram_perplexity": ngram_perplexity(stream, documents, 1, recipe.vocab_size),
        "five_gram_perplexity": ngram_perplexity(stream, documents, 5, recipe.vocab_size),
        "loss_by_context": by_context,
        **copies,
        **structure,
        "history": trainer.history,
    }


def render_card(found: dict[str, Any], recipe_path: str) -> str:
    """The model card, every number of it from `measurements.json`."""
    by_context = "\n".join(f"| {length} | {loss:.3f} |" for length, loss in found["loss_by_context"].items())
    layers = "\n".join(
        f"| {layer} | {entropy:.2f} | {first:.2f} | {distant:.2f} |"
        for layer, (entropy, first, distant) in enumerate(
            zip(found["attention_entropy"], found["first_token_share"], found["distant_share"], strict=True)
        )
    )
    text, noise = found["repeated_text"], found["repeated_noise"]
    copies = (
        "It copies from its context only weakly (see the repeated texts). "
        if text["second_copy_loss"] > 0.5 * text["first_copy_loss"]
        else ""
    )
    renamed = (
        f"From epoch {found['rename_from_epoch'] + 1} on, half of the files had some of their identifiers renamed. "
        if found["rename_from_epoch"] is not None
        else ""
    )
    unfinished = "" if found["finished"] else "\n> An intermediate export: training was still running.\n"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: code
tags: [python, llama, tiny]
---

# python-llama-4m
{unfinished}
A Llama of {found["parameters"]:,} parameters for Python source text, with a byte-level BPE of 4096 tokens and a context of 1024
tokens. It exists so that lemo_hf can be tried, tested and measured offline on a real model; it writes plausible-looking Python and
nothing more.

## How it was made
`python -m lemo_hf.base_model {recipe_path}` (or `make base`), on the sources of Python {found["python_version"]}
({", ".join(found["packages"])}, without tests, duplicates removed): {found["train_documents"]} files, {found["train_bytes"]:,} bytes,
{found["train_tokens"]:,} tokens. {found["steps"]} steps, {found["tokens_seen"]:,} tokens ({found["epochs"]:.1f} epochs) in
{found["minutes"]} minutes on 2 CPU cores; Muon for the hidden matrices, AdamW for embeddings and norms, bfloat16 autocast.
{renamed}Tokenizer and model saw the training files only. A file is held out if the hash of its name says so (`lemo_hf.text_data.is_held_out`, share 0.05).
`<|endoftext|>` is bos and eos at once and stands before each document; `<|pad|>` is distinct.

## Measured
On {found["held_out_documents"]} held-out files ({found["held_out_tokens"]:,} tokens), shipped bfloat16 weights, windows of 1024 tokens:

| model | perplexity a token |
| --- | --- |
| this one | {found["held_out_perplexity"]:.2f} ({found["held_out_bits_per_byte"]:.3f} bits a byte) |
| 5-gram, Witten-Bell, same tokens | {found["five_gram_perplexity"]:.2f} |
| unigram | {found["unigram_perplexity"]:.1f} |

Is attention used? Loss (nats a token) of the same 32 targets given this many tokens before the last of them:

| context | loss |
| --- | --- |
{by_context}

Text laid twice in a row: loss {text["first_copy_loss"]:.2f} in the first copy, {text["second_copy_loss"]:.2f} in the second; random tokens
{noise["first_copy_loss"]:.2f} and {noise["second_copy_loss"]:.2f}. Attention of queries from token 64 on, by layer (entropy over that of
uniform attention; share on the first token; share on tokens more than 64 back, the first left out):

| layer | entropy | first token | distant |
| --- | --- | --- | --- |
{layers}

All figures and the training curve are in `measurements.json`.

## Limits
Python only, 1024 tokens, far too small to be relied on for code. {copies}Held-out files come from the same library as the training files, so
perplexity on other people's code is higher. The training text is the Python standard library (PSF licence); short passages of it may be
reproduced.
"""


def export(trainer: BaseModelTrainer, recipe_path: str) -> dict[str, Any]:
    """Writes the current weights as a stock Llama in bfloat16 to `recipe.export_dir`, measures them, writes the card.

    Returns:
        The measurements.
    """
    import copy

    from transformers import GenerationConfig

    folder = Path(trainer.recipe.export_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(trainer.model).to(torch.bfloat16)
    model.config.use_cache = True
    tokenizer = trainer.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = measure(trainer, folder)
    (folder / "measurements.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "README.md").write_text(render_card(found, recipe_path))
    return found
