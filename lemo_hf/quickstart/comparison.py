"""The main job on the embedded base model: extend its context from 1024 to 4096 tokens, with stock LoRA and with LeMo.

    python -m lemo_hf.quickstart            (make quickstart)

Three arms, the same seed, adapters and data: the stock `Trainer`, LeMo's exact form (sampled blocks) and its form of kept keys
(predicted, most informative blocks), half of the tokens kept. The arms' steps are timed in turns first, so that a busy machine slows
all of them. Each arm then trains `--steps` steps and is evaluated (equal steps), and a LeMo arm goes on for as many steps as fit into the
time of stock's, its own phases counted in, and is evaluated again (equal time). Perplexity is always that of the dense forward pass
on text of another package. Writes adapters, results.json and plots to `outputs/quickstart/`.
"""

import argparse
import math
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from .. import AutoLemoModelForCausalLM, LemoConfig, LemoTrainer, LemoTrainingArguments
from ..evaluation.block_recall import measure_recall
from ..evaluation.perplexity import Perplexity, dense_perplexity, paired_difference
from ..hub.model_card import Interval
from ..loading import without_peft_deprecation
from ..models.sparse_decoder import sparse_backbone
from ..profiling.activation_memory import ActivationMemory
from ..profiling.flops import FlopCounter
from ..text_data import pack_documents, python_sources, spread_samples
from .report import Arm, Measured, draw_plots, table, write_page, write_results

BASE = Path(__file__).parents[1] / "assets" / "python-llama-4m"
SEQ_LEN = 4096
LEARNING_RATE = 1e-3
BASE_CONTEXT = 1024
# The base was trained on the standard library; these are other people's packages, each held out from it.
TRAIN_PACKAGES = ("networkx", "accelerate", "peft")
EVALUATION_PACKAGES = ("huggingface_hub", "datasets")
EVALUATION_WINDOWS = 24


ARMS = (
    Arm("stock", "LoRA, stock Trainer", None),
    Arm("exact", "LeMo exact, sampled", LemoConfig(attention_forward="exact", selection="sampled", keep_ratio=0.5)),
    Arm(
        "kept_keys",
        "LeMo kept keys, predicted",
        LemoConfig(
            attention_forward="kept_keys",
            selection="ratio",
            keep_ratio=0.5,
            block_reduction="mean",
            predictor_features=40,
        ),
    ),
)


class Comparison(TrainerCallback):
    """Times the steps, evaluates at equal steps and stops at equal time.

    Args:
        measured: Where what is seen goes.
        steps: Steps of the comparison at equal steps.
        pace: Seconds of a step, stock's and the arm's own.
        evaluate: Called with the point's name and the model.
    """

    def __init__(self, measured: Measured, steps: int, pace: tuple[float, float], evaluate: Any) -> None:
        self.measured, self.steps, self.pace, self.evaluate = measured, steps, pace, evaluate

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if not self.measured.step_seconds:
            # LeMo's phases run before the first step.
            self.measured.phase_seconds = self.started - self.begun
            stock, own = self.pace
            in_time = math.floor((self.steps * stock - self.measured.phase_seconds) / own + 1e-9)
            self.measured.steps_at_equal_time = max(self.steps, in_time)
            self.bar = tqdm(total=self.measured.steps_at_equal_time, desc="steps", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measured.step_seconds.append(time.perf_counter() - self.started)
        self.bar.update()
        if state.global_step == self.steps:
            self.evaluate("equal_steps", model)
        if state.global_step == self.measured.steps_at_equal_time:
            if state.global_step > self.steps:
                self.evaluate("equal_time", model)
            control.should_training_stop = True
            self.bar.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.measured.losses.append((state.global_step, sum(self.measured.step_seconds), logs["loss"]))
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
        shares = {name: value for name, value in (logs or {}).items() if name.startswith("kept_share/layer_")}
        if shares:
            self.measured.kept_share.append({"step": state.global_step, **shares})


def context() -> dict[str, Any]:
    """Config fields that extend the base's context by YaRN, from which LoRA goes on (linear interpolation starts far worse)."""
    rope = {
        "rope_type": "yarn",
        "factor": SEQ_LEN / BASE_CONTEXT,
        "original_max_position_embeddings": BASE_CONTEXT,
        "rope_theta": 10000.0,
    }
    return {"rope_parameters": rope, "max_position_embeddings": SEQ_LEN}


def load(arm: Arm) -> Any:
    """The base with its context extended and a fresh adapter, the same one in every arm."""
    model: Any
    if arm.lemo is None:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, **context())
    else:
        model = AutoLemoModelForCausalLM.from_pretrained(BASE, lemo=arm.lemo, dtype=torch.float32, **context())
    set_seed(0)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with without_peft_deprecation():
        return get_peft_model(model, adapter)


def arguments(arm: Arm, folder: Path, steps: int) -> TrainingArguments:
    """The same training arguments for every arm; the rate is constant, so that a longer run begins like a shorter one."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "use_cpu": True,
        "disable_tqdm": False,
        "dataloader_pin_memory": False,
    }
    if arm.lemo is None:
        return TrainingArguments(**common)
    return LemoTrainingArguments(**common, **(PHASES if arm.lemo.needs_predictors else {}))


# Predictors of signed means start from the layers' own projections: a few documents are enough.
PHASES: dict[str, Any] = {"predictor_documents": 8}


def train(
    arm: Arm, folder: Path, data: Dataset, evaluation: Any, steps: int, pace: tuple[float, float]
) -> tuple[Any, Measured, dict[str, Perplexity]]:
    """Runs one arm.

    Args:
        arm: The arm.
        folder: Where its adapter goes.
        data: Training windows, `SEQ_LEN` tokens each.
        evaluation: Windows for dense perplexity.
        steps: Steps of the comparison at equal steps.
        pace: Seconds of a step, stock's and the arm's own.

    Returns:
        The trained model, what was measured on the way, and its perplexities by when they were taken.
    """
    print(f"\n{arm.title}")
    measured = Measured(arm.title)
    scores: dict[str, Perplexity] = {}

    def evaluate(when: str, model: Any) -> None:
        scores[when] = dense_perplexity(model, evaluation)

    model = load(arm)
    limit = steps if arm.lemo is None else len(data)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"model": model, "args": arguments(arm, folder, limit), "train_dataset": data}
    trainer_class = Trainer if arm.lemo is None else LemoTrainer
    compare = Comparison(measured, steps, pace, evaluate)
    trainer = trainer_class(**settings, data_collator=default_data_collator, callbacks=[compare])
    # Trainer would print every step's metrics by layer; they go to results.json, and a bar to the screen.
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    trainer.save_model(str(folder))
    if arm.lemo is None:
        trainer.save_state()  # its log, for `lemo report --baseline`; LemoTrainer keeps one of its own
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which the stock Trainer writes
    measured.perplexity = {when: score.perplexity for when, score in scores.items()}
    measured.intervals = {when: asdict(Interval.of(score)) for when, score in scores.items()}
    return model, measured, scores


def profile_step(model: Any, sample: dict[str, torch.Tensor], measured: Measured) -> None:
    """Counts one training step's saved bytes, by part of the model, and its FLOPs, forward and backward."""
    batch = default_data_collator([sample])
    model.train()
    with ActivationMemory(model) as memory:
        loss = model(**batch).loss
    del loss
    with FlopCounter(model) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    measured.saved_bytes = {str(part): float(size) for part, size in memory.saved.by("part").items()}
    measured.flops = float(counter.flops.total)


def time_steps(models: dict[str, Any], sample: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of forward and backward, the arms taking turns so that a busy machine slows all of them."""
    batch = default_data_collator([sample])
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            model.train()
            started = time.perf_counter()
            model(**batch).loss.backward()
            seconds[name].append(time.perf_counter() - started)
            model.zero_grad()
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(arguments_given: list[str] | None = None) -> None:
    """Runs the arms, prints the table and writes `outputs/quickstart/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="training steps compared (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="folder to write (default: %(default)s)")
    args = parser.parse_args(arguments_given)
    started = time.perf_counter()
    transformers_logging.disable_progress_bar()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = pack_documents(tokenizer, python_sources(TRAIN_PACKAGES), SEQ_LEN)
    windows = pack_documents(tokenizer, python_sources(EVALUATION_PACKAGES), SEQ_LEN)
    evaluation = spread_samples(windows, EVALUATION_WINDOWS)
    print(
        f"{len(data)} training windows of {SEQ_LEN} tokens from {', '.join(TRAIN_PACKAGES)}; "
        f"{len(evaluation)} for evaluation from {', '.join(EVALUATION_PACKAGES)}"
    )
    before = dense_perplexity(load(ARMS[0]), evaluation, description="perplexity before")
    measured: dict[str, Measured] = {}
    models: dict[str, Any] = {}
    scores: dict[str, dict[str, Perplexity]] = {}
    print("\nTiming steps of the three arms in turns")
    seconds = time_steps({arm.name: load(arm) for arm in ARMS}, data[0], rounds=5)
    for arm in ARMS:
        pace = seconds["stock"], seconds[arm.name]
        models[arm.name], found, scores[arm.name] = train(arm, args.out / arm.name, data, evaluation, args.steps, pace)
        measured[arm.name] = found
        for when, score in scores[arm.name].items():
            if arm.lemo is not None:
                difference = paired_difference(scores["stock"]["equal_steps"], score)
                found.versus_stock[when] = {**asdict(difference), "text": str(difference)}
        if arm.lemo is not None and arm.lemo.needs_predictors:
            report = measure_recall(
                sparse_backbone(models[arm.name]),
                [default_data_collator([evaluation[i]]) for i in range(min(8, len(evaluation)))],
            )
            found.recall, found.chance = report.layers, report.chance
    for name, model in models.items():
        profile_step(model, evaluation[0], measured[name])
    text = table(before, measured, seconds)
    print(f"\n{text}\n")
    draw_plots(measured, models["kept_keys"], evaluation[0], args.out)
    config = {
        "base": BASE.name,
        "license": ModelCard.load(BASE / "README.md").data.license,
        "base_config": context(),
        "tokens": SEQ_LEN,
        "batch": 1,
        "steps": args.steps,
        "dtype": "float32 base and adapters, no autocast",
        "lora": "r=8 on q, k, v, o",
        "learning_rate": LEARNING_RATE,
        "train": TRAIN_PACKAGES,
        "evaluation": EVALUATION_PACKAGES,
    }
    write_results(ARMS, measured, seconds, before, config, args.out)
    (args.out / "table.txt").write_text(text + "\n")
    page = write_page(args.out)
    print(
        f"Adapters, results.json and plots are in {args.out}/, all of it on one page in {page} ({(time.perf_counter() - started) / 60:.1f} minutes in all)"
    )
