"""The quality bench's base models: trained on Python sources mixed with synthetic retrieval, so that far context is of use to them.

    python -m benchmarks.quality.base --size small --out outputs/quality/base_small
    python -m benchmarks.quality.base --size large --out outputs/quality/base_large --minutes 8      (again and again)

- `small`: the embedded base (3.95 M parameters), trained on at its context of 1024 for 45 minutes of two cores.
- `large`: 88 M parameters from scratch at a context of 2048, with a tokenizer of its own, in bfloat16 on a GPU: some calls of 8 minutes.

14 of 20 rows are text of the corpus's `base` split, 6 are dense retrieval rows, where answers alone are learnt; each row counts the same.
Run again, it resumes from `<out>-run/`; on a CPU a run bounded by steps is the same bit for bit however often it was stopped.
`<out>` is a link to the newest exported model (float32), replaced at once, every ten minutes and at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.corpus import BASE_BYTES, BASE_PACKAGES, LARGE_BASE_BYTES, held_out_documents, training_documents
from benchmarks.quality.retrieval import TASKS, sample, training_row
from lemo_hf.base_model.data import TokenStream
from lemo_hf.base_model.recipe import BaseModelRecipe
from lemo_hf.base_model.training import BASE_MODEL_FOLDER, BaseModelTrainer, token_losses
from lemo_hf.errors import LemoError
from lemo_hf.text_data import TextDocument

# Of so many rows, so many are retrieval rows, spread evenly.
MIX_ROWS, RETRIEVAL_ROWS = 20, 6
HAYSTACK_TOKENS = 2_000_000
EVERY_HELD_OUT = 12  # documents in the training curve's held-out text; the final measurement takes all of them
_SHARED: dict[str, Any] = {"packages": list(BASE_PACKAGES), "short_context_share": 0.0, "checkpoint_minutes": 10.0}
SIZES = {
    "small": BaseModelRecipe(
        **_SHARED,
        short_context_length=1024,
        rename_from_epoch=0,
        learning_rate=0.005,
        embedding_learning_rate=0.0025,
        warmup_steps=30,
        max_steps=100_000,
        max_minutes=45.0,
        decay_share=0.5,
        eval_every=100,
        eval_rows=24,
    ),
    "large": BaseModelRecipe(
        **_SHARED,
        vocab_size=16_384,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=2048,
        context_length=2048,
        short_context_length=2048,
        batch_rows=128,
        micro_batch_rows=16,
        learning_rate=0.004,
        embedding_learning_rate=0.002,
        warmup_steps=100,
        max_steps=800,
        decay_share=0.3,
        eval_every=100,
        eval_rows=64,
        threads=1,
    ),
}


class MixedStream:
    """Rows of text and of retrieval, a pure function of (seed, row number).

    A token that is read but not asked for stands as its complement `~token`, so that one tensor holds inputs and labels.

    Args:
        text: The rows of text.
        tokenizer: The model's.
        haystack: Token ids that retrieval rows take their filler from; every other of them has made-up lines.
    """

    def __init__(self, text: TokenStream, tokenizer: Any, haystack: torch.Tensor) -> None:
        self.text = text
        self.tokenizer = tokenizer
        self.haystack = haystack
        self.documents = text.documents
        kinds = [(row * RETRIEVAL_ROWS) % MIX_ROWS < RETRIEVAL_ROWS for row in range(MIX_ROWS)]
        self.is_retrieval = kinds
        self.text_before = [sum(not kind for kind in kinds[:row]) for row in range(MIX_ROWS)]
        self.rows_per_epoch = text.rows_per_epoch * MIX_ROWS // (MIX_ROWS - RETRIEVAL_ROWS)

    def _row(self, number: int) -> torch.Tensor:
        cycle, place = divmod(number, MIX_ROWS)
        if not self.is_retrieval[place]:
            return self.text.rows(cycle * (MIX_ROWS - RETRIEVAL_ROWS) + self.text_before[place], 1)[0]
        generator = torch.Generator().manual_seed(self.text.seed * 1_000_003 + number)
        haystack = self.haystack if torch.rand(1, generator=generator) < 0.5 else None
        row = training_row(self.tokenizer, self.text.context_length, generator, haystack)
        encoded = torch.where(row["labels"] == -100, ~row["input_ids"], row["input_ids"])
        return torch.cat([encoded, torch.tensor([~self.tokenizer.eos_token_id])])

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count` of the endless stream, int64 `(count, context_length + 1)`."""
        return torch.stack([self._row(number) for number in range(first, first + count)])


def inputs_and_labels(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tells the rows of a `MixedStream` apart into token ids and labels (-100 where nothing is asked)."""
    return torch.where(rows < 0, ~rows, rows), rows.masked_fill(rows < 0, -100)


@torch.no_grad()
def retrieval_scores(model: Any, samples: Sequence[dict[str, Any]], autocast: bool = True) -> list[dict[str, float]]:
    """Of each sample, whether every token of its answer is the most probable one (`right`), the share that is, and their loss.

    Args:
        model: A causal language model.
        samples: As `retrieval.sample` makes them.
        autocast: Matrix products in bfloat16, as in training.
    """
    found = []
    device = next(model.parameters()).device
    for each in samples:
        ((start, end),) = each["answers"]
        ids = each["input_ids"][None].to(device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False, enabled=autocast):
            hidden = model.model(input_ids=ids).last_hidden_state[:, start - 1 : end - 1]
            logits = model.lm_head(hidden)[0].float()
        answer = ids[0, start:end]
        hits = logits.argmax(-1) == answer
        loss = torch.nn.functional.cross_entropy(logits, answer)
        found.append({"right": float(hits.all()), "tokens_right": hits.float().mean().item(), "loss": loss.item()})
    return found


class QualityTrainer(BaseModelTrainer):
    """The embedded base's training loop on the mix of text and retrieval.

    Args:
        recipe: One of `SIZES`, or a changed one.
        documents, held_out: Texts to train and to measure on.
        start: A model to go on from, with its tokenizer; `None` trains a tokenizer and begins with random weights.
        device: Where to train.
    """

    def __init__(
        self,
        recipe: BaseModelRecipe,
        documents: list[TextDocument],
        held_out: list[TextDocument],
        start: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.start = start
        if start is not None:
            place = Path(recipe.output_dir) / "tokenizer"
            place.mkdir(parents=True, exist_ok=True)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(start / name, place / name)
        super().__init__(recipe, documents, held_out, device)
        if start is not None and self.step == 0:
            self._load_weights(start)
        text = self.stream
        haystack = torch.cat(text.documents)[:HAYSTACK_TOKENS]
        self.stream = MixedStream(text, self.tokenizer, haystack)  # type: ignore[assignment]
        self.probes = [
            sample(task, self.tokenizer, recipe.context_length, depth, torch.Generator().manual_seed(index))
            for task in TASKS
            for index, depth in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
        ]

    def _load_weights(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        there = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(there.state_dict())

    def _gradients(self, rows: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        """Mean over the rows of each row's mean loss over what it asks, and its gradients."""
        inputs, labels = inputs_and_labels(rows)
        losses = token_losses(self.model, inputs, labels).view(len(rows), -1)
        asked = (labels[:, 1:] != -100).sum(1).clamp(min=1)
        loss = (losses.sum(1) / asked).mean()
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def evaluate(self, rows: torch.Tensor) -> dict[str, float]:
        """As the base's, and by task the retrieval loss and share of right tokens on a few contexts of made-up lines."""
        found = super().evaluate(rows)
        scores = retrieval_scores(self.model, self.probes)
        each = len(scores) // len(TASKS)
        for index, task in enumerate(TASKS):
            part = scores[index * each : (index + 1) * each]
            found[f"{task}_loss"] = sum(score["loss"] for score in part) / each
            found[f"{task}_right"] = sum(score["right"] for score in part) / each
            print(f"  {task}: loss {found[f'{task}_loss']:.3f}, right {found[f'{task}_right']:.2f}", end="")
        print(flush=True)
        return found

    def export(self, out: Path) -> None:
        """Writes the current weights beside the checkpoints and points `out` at them; the export before stays."""
        folder = self.folder / f"export-{self.step:06d}"
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.model.config.use_cache = True
        self.model.save_pretrained(partial)
        self.model.config.use_cache = False
        self.tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        link = out.with_name(f".{out.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(folder, out.parent))
        os.replace(link, out)
        for old in sorted(self.folder.glob("export-*"))[:-2]:
            shutil.rmtree(old)


def base_trainer(size: str, out: Path, total_minutes: float | None = None) -> QualityTrainer:
    """The trainer of a size, resumed from its last checkpoint beside `out`.

    Raises:
        LemoError: Unknown size, or `out` is something other than an export of this command.
    """
    if size not in SIZES:
        raise LemoError(f"unknown size; {size!r}; choose one of {', '.join(SIZES)}")
    if out.exists() and not out.is_symlink():
        raise LemoError(f"there is something else in the way; {str(out)!r} is no link to an export; choose another --out")
    recipe = dataclasses.replace(SIZES[size], output_dir=str(out.with_name(f"{out.name}-run")), export_dir=str(out))
    if total_minutes is not None:
        recipe = dataclasses.replace(recipe, max_minutes=total_minutes)
    device = "cuda" if size == "large" and torch.cuda.is_available() else "cpu"
    start = BASE_MODEL_FOLDER if size == "small" else None
    base_bytes = BASE_BYTES if size == "small" else LARGE_BASE_BYTES
    return QualityTrainer(
        recipe, training_documents("base", base_bytes=base_bytes), held_out_documents()[::EVERY_HELD_OUT], start, device
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line: trains or resumes a base and exports it on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path, required=True, help="link to the exported model; the run lies beside it in <out>-run")
    parser.add_argument("--minutes", type=float, help="stop this call after so many minutes (default: when the run is over)")
    parser.add_argument(
        "--total-minutes", type=float, help="length of the whole run, whose end lowers the rates, where not the size's own"
    )
    options = parser.parse_args(arguments)
    try:
        trainer = base_trainer(options.size, options.out, options.total_minutes)
        print(
            f"{sum(p.numel() for p in trainer.parameters)} parameters, {trainer.train_bytes} bytes of text, "
            f"{trainer.stream.rows_per_epoch} rows an epoch, {len(trainer.held_out)} held-out rows",
            flush=True,
        )
        trainer.run(minutes=options.minutes, at_checkpoint=lambda: trainer.export(options.out))
    except LemoError as error:
        print(error, file=sys.stderr)
        return 2
    state = "finished" if trainer.finished() else "stopped; run it again to go on"
    print(f"{state} at step {trainer.step} after {trainer.minutes:.1f} minutes; model in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
