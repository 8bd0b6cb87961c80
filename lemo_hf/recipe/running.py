"""From a checked recipe to a trained adapter: base model, text, `LemoTrainer`, results and card."""

import dataclasses
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..errors import LemoError
from ..evaluation.perplexity import dense_perplexity
from ..hub.card_metadata import public_name
from ..hub.lemo_files import PREDICTORS_FILE, atomic_path, check_predictor_shapes, read_lemo_files
from ..hub.model_card import Interval, RunResults
from ..hub.push import required_token
from ..loading import (
    SavedAdapter,
    extended_config,
    load_tokenizer,
    model_location,
    one_line_errors,
    put_adapter_on,
    read_adapter,
    without_peft_deprecation,
)
from ..models.lemo_config import LemoConfigError
from ..registry import AutoLemoModelForCausalLM
from ..text_data import PackedDocuments
from ..training.arguments import LemoTrainingArguments
from ..training.faults.whole_checkpoints import checkpoints, last_whole_checkpoint, require_whole
from ..training.lemo_run import has_progress
from ..training.run_card import results_of
from ..training.scale_out.processes import Processes, within_forward
from ..training.trainer import LemoTrainer, holds_run
from .reading import Recipe
from .samples import collator_of, load_samples

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
# Values of `resume_from_checkpoint`: the newest whole checkpoint of output_dir; the same if there is one, else from the start.
LAST, AUTO = "last", "auto"


def go_on_from(saved: SavedAdapter, recipe: Recipe, arguments: LemoTrainingArguments) -> None:
    """Has the run take up an adapter's predictors and thresholds, as far as the recipe does not say otherwise.

    Args:
        saved: The adapter.
        recipe: Its `lemo` block gets the thresholds.
        arguments: Name the predictors afterwards, which are fitted further before the first step only if the recipe asks for it.

    Raises:
        LemoError: If the run would read predictors that the adapter's run has not handed on.
    """
    if Path(saved.base).name != Path(recipe.model.model).name:
        logger.warning(
            "adapter names another base model than the recipe; %r, %r; %s", saved.base, recipe.model.model, saved.location
        )
    if saved.lemo is None or arguments.predictors:
        return
    if saved.has_predictors:
        arguments.predictors = str(saved.folder)
    if not arguments.predictor_documents:
        recipe.lemo.update(thresholds=saved.block_for(recipe.lemo).thresholds)
        arguments.predictor_documents = 0 if saved.has_predictors else None


def load_model(recipe: Recipe, overrides: dict[str, Any], saved: SavedAdapter | None = None) -> Any:
    """The LeMo model with its adapter, a fresh one seeded by the recipe or the one that training goes on from.

    Args:
        recipe: The recipe.
        overrides: Config fields to load the base with, from [`extended_config`].
        saved: What training goes on from.
    """
    from peft import LoraConfig, get_peft_model

    fields, lora = recipe.model, recipe.lora
    with one_line_errors("base model cannot be loaded", fields.model):
        model: Any = AutoLemoModelForCausalLM.from_pretrained(
            model_location(fields.model), lemo=recipe.lemo, revision=fields.revision, dtype=fields.dtype, **overrides
        )
    set_seed(recipe.seed)
    if saved is not None:
        return put_adapter_on(model, saved, is_trainable=True, autocast_adapter_dtype=lora.lora_dtype == "float32")
    adapter = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        modules_to_save=lora.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )
    with one_line_errors("adapter cannot be added", str(lora.lora_target_modules)), without_peft_deprecation():
        # The revision goes into the adapter's config, so that it is loaded onto the base that it was trained on.
        float32 = lora.lora_dtype == "float32"
        return get_peft_model(model, adapter, autocast_adapter_dtype=float32, revision=fields.revision)


def resume_checkpoint(recipe: Recipe, resume: str | None) -> str | bool | None:
    """The checkpoint to go on from, `None` for a new run, `True` for one that was stopped before its first checkpoint.

    Args:
        recipe: The recipe; its output folder is looked at, not touched.
        resume: A checkpoint's folder, "last" or "auto".

    Raises:
        LemoError: If there is no such checkpoint or it is not whole, or a new run's output folder holds something already.
    """
    folder = recipe.output_dir
    if folder.exists() and not folder.is_dir():
        raise LemoError(f"output_dir is a file; {str(folder)!r}; choose another output_dir")
    if resume is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise LemoError(
                f"output folder holds another run; {str(folder)!r}; choose another output_dir, delete the folder, "
                f"or go on from its newest checkpoint with --resume_from_checkpoint {LAST}"
            )
        return None
    if resume not in (LAST, AUTO):
        require_whole(resume)
        return resume
    found = last_whole_checkpoint(folder)
    if found is None and has_progress(folder):
        return True
    if found is None and resume == AUTO and not holds_run(folder):
        return None  # stopped before it had anything to go on from, or never started
    if found is None:
        if checkpoints(folder):
            raise LemoError(f"no whole checkpoint to go on from; {str(folder)!r}; start without resuming in another output_dir")
        raise LemoError(f"no checkpoint to go on from; {str(folder)!r}; start without resuming")
    return found


def run_recipe(recipe: Recipe) -> RunResults:
    """Trains and writes the run's folder: adapter, LeMo files, tokenizer, results.json, recipe.yaml, README.md.

    Everything that can be refused is checked before the folder is made; a run refused later but before it has anything to go
    on from leaves no folder behind.

    Raises:
        LemoError: For bad input.
        LemoConfigError: If the LeMo block does not fit the model.
    """
    arguments = recipe.training_arguments()
    checkpoint = resume_checkpoint(recipe, arguments.resume_from_checkpoint)
    if arguments.push_to_hub:
        required_token(arguments.hub_token)
    saved = read_adapter(recipe.lora.adapter) if recipe.lora.adapter else None
    if saved is not None:
        go_on_from(saved, recipe, arguments)
    config, overrides = extended_config(recipe.model, recipe.data.seq_len, saved)
    recipe.lemo.validate_for(config.num_hidden_layers)
    if arguments.predictors:
        block, _ = read_lemo_files(arguments.predictors)
        check_predictor_shapes(Path(arguments.predictors) / PREDICTORS_FILE, block, config.num_hidden_layers, config.hidden_size)
    tokenizer = load_tokenizer(recipe.model)
    # It is saved beside the model: truncation is to know the context that the run extends to.
    tokenizer.model_max_length = overrides.get("max_position_embeddings", tokenizer.model_max_length)
    train_samples, held_out = load_samples(recipe.data, tokenizer, recipe.lemo.block_size)
    model = load_model(recipe, overrides, saved)

    new_folder = not recipe.output_dir.exists()
    try:
        trainer = LemoTrainer(
            model=model,
            args=arguments,
            train_dataset=train_samples,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=collator_of(recipe.data),
        )
        # After the trainer has put the model on its device; one that is to be sharded is not there yet.
        before = None if trainer.is_fsdp_enabled else _perplexity(model, held_out, "perplexity before")
        if on_gpu := torch.cuda.is_available() and not arguments.use_cpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        train_seconds = time.perf_counter() - began
        peak_gpu_bytes = float(torch.cuda.max_memory_allocated()) if on_gpu else None
    except (LemoError, LemoConfigError):
        folder = recipe.output_dir
        is_ours = new_folder and not Processes().rank
        if is_ours and folder.is_dir() and get_last_checkpoint(str(folder)) is None and not has_progress(folder):
            shutil.rmtree(folder)
        raise
    measured = results_of(trainer.lemo_run, model, train_samples, trainer.state.log_history, outcome.global_step)
    results = dataclasses.replace(
        measured,
        base_model=public_name(recipe.model.model),
        data=recipe.data.source,
        seq_len=recipe.data.seq_len,
        base_config=overrides,
        datasets=recipe.data.hub_datasets,
        recipe=recipe.to_yaml(public=True),
        train_seconds=train_seconds,
        peak_gpu_bytes=peak_gpu_bytes,
        perplexity_before=before,
        perplexity_after=within_forward(model, lambda: _perplexity(model, held_out, "perplexity after")),
        evaluation_data=recipe.data.held_out_source,
        started_from=public_name(saved.location) if saved else "",
        language=recipe.data.languages,
        license=recipe.model.license,
    )
    save_run(trainer, recipe, results)
    return results


def save_run(trainer: Any, recipe: Recipe, results: RunResults) -> None:
    """Writes the files of a finished run into the recipe's output folder; the card's hand-written parts survive."""
    trainer.results, trainer.title = results, recipe.name
    trainer.save_model(_internal_call=True)  # any other call would push before the recipe lies there
    # What is pushed holds no paths of this machine.
    if trainer.args.should_save:
        with atomic_path(recipe.output_dir / RECIPE_FILE) as partial:
            partial.write_text(recipe.to_yaml(public=trainer.args.push_to_hub), encoding="utf-8")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _perplexity(model: Any, samples: PackedDocuments | None, description: str) -> Interval | None:
    if samples is None:
        return None
    return Interval.of(dense_perplexity(model, samples, description=None if Processes().rank else description))
