"""Trains the embedded base model: a small Llama on the Python sources of the running interpreter.

    python -m lemo_hf.base_model recipes/base_python_1k.yaml

Training follows plain causal language modelling over documents laid end to end, reshuffled and cut anew (with a
random offset) each epoch. Hidden matrices are stepped by Muon, embeddings and norms by AdamW, under a
warmup / constant / linear-decay schedule whose progress is the larger share of the step and the wall-clock budget:
a machine that slows down still finishes its decay in time. Master weights are float32, matrix products bfloat16.

Rerunning the command resumes from the last checkpoint. A run bounded by steps alone is the same, bit for bit, however
often it was stopped; one bounded by minutes depends on the clock by its nature.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ..errors import LemoError
from ..text_data import TextDocument, python_sources, split_documents, tokenize_documents
from .data import TokenStream, held_out_rows, train_tokenizer
from .recipe import IDENTITY, BaseModelRecipe
from .renaming import DocumentRenaming

# Where the shipped model lies in an installed package.
BASE_MODEL_FOLDER = Path(__file__).parents[1] / "assets" / "python-llama-4m"


def token_losses(model: Any, rows: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of each target, float32 `(rows * context_length,)`; targets of -100 give 0.

    Args:
        model: a causal language model.
        rows: token ids, `(rows, context_length + 1)`; those of -100 stand at the end of a row.
        labels: what to predict where that is not `rows` itself, in the same shape.

    Matrix products run in bfloat16 under autocast; only the hidden states and one microbatch of logits are live.
    """
    # Each weight is cast once a pass, so a cache would save nothing, and threads would share it.
    with torch.autocast(rows.device.type, torch.bfloat16, cache_enabled=False):
        hidden = model.model(input_ids=rows[:, :-1].clamp(min=0)).last_hidden_state
        logits = model.lm_head(hidden)
    targets = (rows if labels is None else labels)[:, 1:].flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none", ignore_index=-100)


def build_model(recipe: BaseModelRecipe, tokenizer: Any) -> Any:
    """A freshly initialised stock Llama of the recipe's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model


def build_optimizers(model: Any, recipe: BaseModelRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings (tied to the output) and norms."""
    matrices = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "layers" in name]
    rest = [parameter for name, parameter in model.named_parameters() if parameter.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def run_progress(step: int, minutes: float, recipe: BaseModelRecipe) -> float:
    """Fraction of the run that is over, by steps or by the clock, whichever is further."""
    by_clock = 0.0 if recipe.max_minutes is None else minutes / recipe.max_minutes
    return max(step / recipe.max_steps, by_clock)


def learning_rate_factor(step: int, minutes: float, recipe: BaseModelRecipe) -> float:
    """Share of the peak learning rate at a step (0-based) after `minutes` of training: warmup, constant, linear decay."""
    warmup = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    left = 1.0 - run_progress(step, minutes, recipe)
    return max(0.0, min(warmup, left / recipe.decay_share if recipe.decay_share else 1.0))


class BaseModelTrainer:
    """The training loop with its checkpoints; `run` trains from wherever the last checkpoint stands.

    Args:
        recipe: what to train.
        documents: texts to train on instead of the recipe's packages.
        held_out: texts to measure on instead of the share of the documents that the recipe holds out.
        device: where the model is trained.
    """

    def __init__(
        self,
        recipe: BaseModelRecipe,
        documents: list[TextDocument] | None = None,
        held_out: list[TextDocument] | None = None,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.folder = Path(recipe.output_dir)
        # One single-threaded worker a core, taking microbatches from a queue: on a shared machine this loses far less
        # than operators split over all cores, each of which waits for the slowest core. Muon's many small products in
        # the main thread slow down up to 60 times by such waiting and take little time on one core.
        torch.set_num_threads(1)
        self.workers = ThreadPoolExecutor(recipe.threads, initializer=torch.set_num_threads, initargs=(1,))
        documents = python_sources(recipe.packages) if documents is None else documents
        train = documents
        if held_out is None:
            train, held_out = split_documents(documents, recipe.held_out_share)
        if not train or not held_out:
            raise LemoError(
                f"split leaves a side empty; {len(train)} training and {len(held_out)} held-out documents; give more text"
            )
        self.held_out_bytes = sum(len(document.text.encode()) for document in held_out)
        self.train_bytes = sum(len(document.text.encode()) for document in train)
        self.tokenizer = self._tokenizer(train)

        def training_tokens(documents: list[TextDocument]) -> list[list[int]]:
            return [ids[:-1] for ids in tokenize_documents(self.tokenizer, documents)]

        renaming = None
        if recipe.rename_from_epoch is not None:
            renaming = DocumentRenaming(train, recipe.rename_from_epoch, recipe.seed, training_tokens)
        self.stream = TokenStream(training_tokens(train), recipe.context_length, recipe.seed, renaming)
        held_out_ids = tokenize_documents(self.tokenizer, held_out)
        self.held_out_documents = [torch.tensor(ids, dtype=torch.int32) for ids in held_out_ids]
        self.held_out = held_out_rows(held_out_ids, recipe.context_length)
        self.model = build_model(recipe, self.tokenizer).to(device)
        self.parameters = list(self.model.parameters())
        self.optimizers = build_optimizers(self.model, recipe)
        self.step = 0
        self.minutes = 0.0
        self.history: list[dict[str, float]] = []
        self._resume()

    def _tokenizer(self, train: list[TextDocument]) -> Any:
        from transformers import PreTrainedTokenizerFast

        place = self.folder / "tokenizer"
        if not (place / "tokenizer.json").is_file():
            train_tokenizer(train, self.recipe.vocab_size, self.recipe.context_length).save_pretrained(place)
        return PreTrainedTokenizerFast.from_pretrained(place)

    # Checkpoints: tensors in safetensors, the rest in JSON; a folder becomes visible by one rename.

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.named_parameters()}
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{index}.{key}.{name}"] = torch.as_tensor(value)
        return {name: value.detach().contiguous() for name, value in tensors.items()}

    def save_checkpoint(self) -> None:
        """Writes `checkpoint-<step>` and removes older ones."""
        final = self.folder / f"checkpoint-{self.step:06d}"
        if final.exists():
            return
        partial = self.folder / f".{final.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        save_file(self._state_tensors(), partial / "state.safetensors")
        state = {"step": self.step, "minutes": self.minutes, "history": self.history, "recipe": vars(self.recipe)}
        (partial / "state.json").write_text(json.dumps(state))
        os.replace(partial, final)
        for old in sorted(self.folder.glob("checkpoint-*"))[:-1]:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()

    def _resume(self) -> None:
        checkpoints = sorted(self.folder.glob("checkpoint-*"))
        if not checkpoints:
            return
        state = json.loads((checkpoints[-1] / "state.json").read_text())
        for name in IDENTITY:
            there, here = state["recipe"][name], getattr(self.recipe, name)
            if there != here:
                raise LemoError(
                    f"output_dir holds another run; {str(self.folder)!r} has {name}={there}, the recipe {here}; choose another folder"
                )
        try:
            tensors = load_file(checkpoints[-1] / "state.safetensors")
        except SafetensorError as error:
            raise LemoError(f"checkpoint is corrupt ({error}); {str(checkpoints[-1])!r}; remove it to start anew") from error
        self.step, self.minutes, self.history = state["step"], state["minutes"], state["history"]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for index, optimizer in enumerate(self.optimizers):
            restored: dict[int, dict[str, torch.Tensor]] = {}
            prefix = f"optimizer.{index}."
            for name, value in tensors.items():
                if name.startswith(prefix):
                    key, entry = name.removeprefix(prefix).split(".", 1)
                    restored.setdefault(int(key), {})[entry] = value
            whole = optimizer.state_dict()
            optimizer.load_state_dict({"state": restored, "param_groups": whole["param_groups"]})
        print(f"resumed at step {self.step} after {self.minutes:.1f} minutes", flush=True)

    def _gradients(self, rows: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        """Mean loss of a microbatch and its gradients, in the order of `self.parameters`."""
        loss = token_losses(self.model, rows).mean()
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def train_step(self) -> float:
        """One optimizer step; returns the mean training loss in nats a token.

        Raises:
            LemoError: the loss is not finite.
        """
        recipe = self.recipe
        factor = learning_rate_factor(self.step, self.minutes, recipe)
        for optimizer, peak in zip(self.optimizers, (recipe.learning_rate, recipe.embedding_learning_rate), strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        rows = self.stream.rows(self.step * recipe.batch_rows, recipe.batch_rows).to(self.device)
        microbatches = rows.split(recipe.micro_batch_rows)
        if run_progress(self.step, self.minutes, recipe) < recipe.short_context_share:
            short = recipe.short_context_length
            microbatches = tuple(batch.unfold(1, short + 1, short).flatten(0, 1) for batch in microbatches)
        total = 0.0
        # Summed in the order of the rows, whichever worker ends first: the result is the same bit for bit.
        for loss, gradients in self.workers.map(self._gradients, microbatches):
            total += loss / len(microbatches)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        for parameter in self.parameters:
            parameter.grad /= len(microbatches)
        if not math.isfinite(total):
            raise LemoError(
                f"loss is not finite; {total} at step {self.step}; lower learning_rate and rerun from the last checkpoint"
            )
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def finished(self) -> bool:
        """Whether the step or the wall-clock budget is used up."""
        limit = self.recipe.max_minutes
        return self.step >= self.recipe.max_steps or (limit is not None and self.minutes >= limit)

    def evaluate(self, rows: torch.Tensor) -> dict[str, float]:
        """Held-out loss (nats a token) and perplexity (a token) of the current weights on `rows`."""

        @torch.no_grad()
        def total(batch: torch.Tensor) -> float:
            return token_losses(self.model, batch.to(self.device)).sum().item()

        tokens = int((rows[:, 1:] != -100).sum())
        loss = sum(self.workers.map(total, rows.split(self.recipe.micro_batch_rows))) / tokens
        return {"held_out_loss": loss, "held_out_perplexity": math.exp(loss), "held_out_tokens": tokens}

    def run(
        self, stop_at: int | None = None, minutes: float | None = None, at_checkpoint: Callable[[], None] | None = None
    ) -> None:
        """Trains to the end of the budget (a checkpoint is left there). Evaluation rows are spread evenly over the held-out split.

        Args:
            stop_at: stop at this step.
            minutes: stop after so many minutes of this call.
            at_checkpoint: called after each checkpoint.
        """
        recipe = self.recipe
        slice_rows = self.held_out[:: max(1, len(self.held_out) // recipe.eval_rows)][: recipe.eval_rows]
        begun = time.monotonic()
        clock = begun - self.minutes * 60
        last_checkpoint = self.minutes
        running: list[float] = []
        mark, mark_step = time.monotonic(), self.step

        def called_off() -> bool:
            return self.step == stop_at or (minutes is not None and time.monotonic() - begun >= minutes * 60)

        while not self.finished() and not called_off():
            running.append(self.train_step())
            self.minutes = (time.monotonic() - clock) / 60
            if self.step % recipe.eval_every == 0 or self.finished():
                speed = (self.step - mark_step) * recipe.batch_rows * recipe.context_length / (time.monotonic() - mark)
                record = {
                    "step": self.step,
                    "minutes": round(self.minutes, 2),
                    "train_loss": sum(running) / len(running),
                    **self.evaluate(slice_rows),
                }
                self.history.append(record)
                print(
                    f"step {self.step} {self.minutes:.1f} min, epoch {self.step * recipe.batch_rows / self.stream.rows_per_epoch:.2f}: "
                    f"train loss {record['train_loss']:.4f}, held-out perplexity {record['held_out_perplexity']:.3f}, "
                    f"{speed:.0f} tokens/s, rate x{learning_rate_factor(self.step, self.minutes, recipe):.2f}",
                    flush=True,
                )
                running, mark, mark_step = [], time.monotonic(), self.step
                self.minutes = (time.monotonic() - clock) / 60
            if self.minutes - last_checkpoint >= recipe.checkpoint_minutes:
                self.save_checkpoint()
                last_checkpoint = self.minutes
                if at_checkpoint is not None:
                    at_checkpoint()
        self.save_checkpoint()
        if at_checkpoint is not None:
            at_checkpoint()


def main(arguments: list[str] | None = None) -> int:
    """Command line: trains (or resumes) the recipe and exports the model at the end."""
    parser = argparse.ArgumentParser(prog="python -m lemo_hf.base_model", description="Train the embedded base model.")
    parser.add_argument("recipe", help="flat YAML recipe, for example recipes/base_python_1k.yaml")
    parser.add_argument("--export-only", action="store_true", help="export the last checkpoint without training further")
    options = parser.parse_args(arguments)
    try:
        return _train_and_export(options.recipe, options.export_only)
    except LemoError as error:
        print(error, file=sys.stderr)
        return 2


def _train_and_export(recipe_path: str, export_only: bool) -> int:
    from .export import export

    recipe = BaseModelRecipe.load(recipe_path)
    trainer = BaseModelTrainer(recipe)
    if export_only and trainer.step == 0:
        raise LemoError(f"there is no checkpoint to export; {recipe.output_dir!r}; train first, without --export-only")
    print(
        f"{sum(p.numel() for p in trainer.model.parameters())} parameters, {trainer.train_bytes} bytes of training text, "
        f"{trainer.stream.rows_per_epoch} rows an epoch, {len(trainer.held_out)} held-out rows, Python {platform.python_version()}",
        flush=True,
    )
    if not export_only:
        trainer.run()
    found = export(trainer, recipe_path)
    print(
        f"exported step {trainer.step} to {recipe.export_dir}: held-out perplexity {found['held_out_perplexity']:.3f} "
        f"(5-gram {found['five_gram_perplexity']:.1f}, unigram {found['unigram_perplexity']:.0f})",
        flush=True,
    )
    return 0
