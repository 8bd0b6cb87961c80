"""From a checked recipe to a trained adapter: base model, text, `LemoTrainer`, results and card."""

import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import default_data_collator, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..errors import LemoError
from ..evaluation.perplexity import dense_perplexity
from ..hub.lemo_files import PREDICTORS_FILE, atomic_path, check_predictor_shapes, read_lemo_files, write_json
from ..hub.model_card import CARD_FILE, Interval, RunResults, values_by_layer, write_model_card
from ..loading import extended_config, load_tokenizer, model_location, one_line_errors, without_peft_deprecation
from ..models.lemo_config import LemoConfigError
from ..models.sparse_decoder import sparse_backbone
from ..registry import AutoLemoModelForCausalLM
from ..text_data import (
    PackedDocuments,
    TextDocument,
    dataset_documents,
    pack_documents,
    python_sources,
    split_documents,
    spread_samples,
    text_file_documents,
)
from ..training.lemo_run import has_progress
from ..training.trainer import LemoTrainer
from .reading import DataFields, Recipe

RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"
# What the value of `resume_from_checkpoint` means "the newest checkpoint of output_dir".
LAST = "last"


def read_documents(data: DataFields) -> list[TextDocument]:
    """The text that the recipe names."""
    if data.data_files:
        return text_file_documents(data.data_files, data.text_field)
    if data.dataset:
        return dataset_documents(
            data.dataset, data.dataset_config, data.dataset_split, data.dataset_streaming, data.text_field, data.max_documents
        )
    return python_sources(data.python_packages or [])


def load_samples(data: DataFields, tokenizer: Any, block_size: int) -> tuple[PackedDocuments, PackedDocuments | None]:
    """Training and held-out samples of `seq_len` tokens; no held-out ones where the recipe holds nothing out.

    Raises:
        LemoError: If there is too little text on either side.
    """
    documents = read_documents(data)
    held_out: Sequence[TextDocument] = []
    if data.held_out_files:
        held_out = text_file_documents(data.held_out_files, data.text_field)
    elif data.held_out_share:
        documents, held_out = split_documents(documents, data.held_out_share)
        if not held_out:
            raise LemoError(
                f"held_out_share leaves no document to evaluate on; {data.held_out_share} of {len(documents)} documents; "
                "name held_out_files, raise held_out_share, or set it to 0"
            )
    train = pack_documents(tokenizer, documents, data.seq_len, data.layout, block_size)
    train = spread_samples(train, data.max_train_samples)
    if not held_out:
        return train, None
    evaluation = pack_documents(tokenizer, held_out, data.seq_len, data.layout, block_size)
    return train, spread_samples(evaluation, data.max_eval_samples)


def load_model(recipe: Recipe, overrides: dict[str, Any]) -> Any:
    """The LeMo model with a fresh adapter, seeded by the recipe.

    Args:
        recipe: The recipe.
        overrides: Config fields to load the base with, from [`extended_config`].
    """
    from peft import LoraConfig, get_peft_model

    fields, lora = recipe.model, recipe.lora
    with one_line_errors("base model cannot be loaded", fields.model):
        model: Any = AutoLemoModelForCausalLM.from_pretrained(
            model_location(fields.model), lemo=recipe.lemo, revision=fields.revision, dtype=fields.dtype, **overrides
        )
    set_seed(recipe.seed)
    adapter = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.lora_target_modules,
        modules_to_save=lora.lora_modules_to_save,
        task_type="CAUSAL_LM",
    )
    with one_line_errors("adapter cannot be added", str(lora.lora_target_modules)), without_peft_deprecation():
        return get_peft_model(model, adapter, autocast_adapter_dtype=lora.lora_dtype == "float32")


def resume_checkpoint(recipe: Recipe, resume: str | None) -> str | bool | None:
    """The checkpoint to go on from, `None` for a new run, `True` for one that was stopped before its first checkpoint.

    Args:
        recipe: The recipe; its output folder is looked at, not touched.
        resume: A checkpoint's folder, or "last".

    Raises:
        LemoError: If there is no such checkpoint, or a new run's output folder holds something already.
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
    found: str | None = resume
    if resume == LAST:
        found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if found is None and has_progress(folder):
            return True
    if found is None or not Path(found).is_dir():
        raise LemoError(f"no checkpoint to go on from; {str(folder if resume == LAST else resume)!r}; start without resuming")
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
    config, overrides = extended_config(recipe.model, recipe.data.seq_len)
    recipe.lemo.validate_for(config.num_hidden_layers)
    if arguments.predictors:
        block, _ = read_lemo_files(arguments.predictors)
        check_predictor_shapes(Path(arguments.predictors) / PREDICTORS_FILE, block, config.num_hidden_layers, config.hidden_size)
    tokenizer = load_tokenizer(recipe.model)
    train_samples, held_out = load_samples(recipe.data, tokenizer, recipe.lemo.block_size)
    model = load_model(recipe, overrides)

    new_folder = not recipe.output_dir.exists()
    try:
        trainer = LemoTrainer(
            model=model,
            args=arguments,
            train_dataset=train_samples,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=default_data_collator,
        )
        before = _perplexity(model, held_out, "perplexity before")  # after the trainer has put the model on its device
        began = time.perf_counter()
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
    except (LemoError, LemoConfigError):
        folder = recipe.output_dir
        if new_folder and folder.is_dir() and get_last_checkpoint(str(folder)) is None and not has_progress(folder):
            shutil.rmtree(folder)
        raise
    history = trainer.state.log_history
    layers = config.num_hidden_layers
    results = RunResults(
        base_model=recipe.model.model,
        data=recipe.data.source,
        seq_len=recipe.data.seq_len,
        lemo=sparse_backbone(model).config.lemo.to_dict(),  # with what the phases found
        base_config=overrides,
        datasets=[recipe.data.dataset] if recipe.data.dataset and not Path(recipe.data.dataset).exists() else [],
        recipe=recipe.to_yaml(public=True),
        steps=outcome.global_step,
        train_seconds=time.perf_counter() - began,
        kept_share=values_by_layer(history, "kept_share", layers, statistics.fmean),
        recall=values_by_layer(history, "recall", layers, lambda probes: probes[-1]),
        recall_chance=next((logs["recall_of_chance"] for logs in reversed(history) if "recall_of_chance" in logs), None),
        perplexity_before=before,
        perplexity_after=_perplexity(model, held_out, "perplexity after"),
    )
    save_run(trainer, recipe, results)
    return results


def save_run(trainer: Any, recipe: Recipe, results: RunResults) -> None:
    """Writes the files of a finished run into the recipe's output folder; the card's hand-written parts survive."""
    folder = recipe.output_dir
    card = folder / CARD_FILE
    existing = card.read_text(encoding="utf-8") if card.is_file() else None
    trainer.save_model(str(folder))
    with atomic_path(folder / RECIPE_FILE) as partial:
        partial.write_text(recipe.to_yaml(), encoding="utf-8")
    write_json(folder / RESULTS_FILE, results.to_dict())
    write_model_card(results, folder, recipe.name, existing=existing)


def _perplexity(model: Any, samples: PackedDocuments | None, description: str) -> Interval | None:
    return Interval.of(dense_perplexity(model, samples, description=description)) if samples is not None else None
