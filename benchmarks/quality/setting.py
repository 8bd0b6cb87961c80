"""What the arms of a comparison share: base model, length, adapter, schedule; and an arm's model and training arguments made from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

from benchmarks.quality.arms import Arm
from benchmarks.quality.choices import CHOICES
from lemo_hf import AutoLemoModelForCausalLM, LemoTrainingArguments
from lemo_hf.loading import without_peft_deprecation

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear"}


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share.

    Args:
        base: Folder of the base model.
        tokens: Tokens of a row; the base's context is extended to it.
        steps: Steps of stock's.
        learning_rate, schedule, warmup_steps: Peak rate; `"constant"` or `"linear"` after the warm-up.
        rank: Of the adapters; alpha is twice as much.
        sizes: How much is measured: a name of `measures.SIZES`.
        cost_rounds: Rounds in which steps are timed.
        predictors: Folder with predictors to start from, where an arm reads any of the maximum's; those of the mean are read off
            the model's own projections.
        predictor_documents: Documents that they are fitted on before the first step.
        mixed: Whether training runs under bfloat16 autocast; weights and adapters are float32 in any case.
        text: What is trained on and measured: a name of `rows.TEXTS`.
        accumulation: Rows of a step, one after the other.
    """

    base: str
    tokens: int
    steps: int = 32
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 3
    rank: int = 8
    sizes: str = "brief"
    cost_rounds: int = 5
    predictors: str | None = None
    predictor_documents: int = 8
    mixed: bool = True
    text: str = "python"
    accumulation: int = 1

    @property
    def name(self) -> str:
        """What result files of the setting are called by."""
        of = f"{self.tokens}t-{self.steps}s-{self.schedule}-{self.learning_rate:g}-{self.sizes}"
        of += "" if self.text == "python" else f"-{self.text}"
        return of if self.accumulation == 1 else f"{of}-{self.accumulation}x"


def device_here() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def context_fields(base: str, tokens: int) -> dict[str, Any]:
    """Config fields that extend a base's context to `tokens` by YaRN (linear interpolation starts far worse)."""
    config = AutoConfig.from_pretrained(base)
    own = config.max_position_embeddings
    theta = config.rope_parameters["rope_theta"]
    rope = {"rope_type": "yarn", "factor": tokens / own, "original_max_position_embeddings": own, "rope_theta": theta}
    return {"rope_parameters": rope, "max_position_embeddings": tokens}


def load(arm: Arm, setting: Setting, seed: int) -> Any:
    """The base with its context extended and a fresh adapter, the same one in all arms of a seed and of the same targets."""
    changes = context_fields(setting.base, setting.tokens)
    model: Any
    if arm.config is None:
        model = AutoModelForCausalLM.from_pretrained(setting.base, dtype=torch.float32, **changes)
    else:
        lemo = replace(arm.config, seed=seed)
        model = AutoLemoModelForCausalLM.from_pretrained(setting.base, lemo=lemo, dtype=torch.float32, **changes)
    set_seed(seed)
    adapter = LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules=list(arm.targets), task_type="CAUSAL_LM")
    with without_peft_deprecation():
        return get_peft_model(model, adapter).to(device_here())


def reads_predictors(arm: Arm) -> bool:
    """Whether an arm's training steps read pattern predictors."""
    if arm.config is None:
        return False
    choice = {} if arm.choice is None else CHOICES[arm.choice].lemo
    return replace(arm.config, **choice).needs_predictors and (arm.choice is None or CHOICES[arm.choice].ranking is None)


def arguments(arm: Arm, setting: Setting, seed: int, folder: str, steps: int) -> TrainingArguments:
    """The same training arguments for every arm."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": setting.accumulation,
        "max_steps": steps,
        "learning_rate": setting.learning_rate,
        "lr_scheduler_type": SCHEDULES[setting.schedule],
        "warmup_steps": setting.warmup_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "train_sampling_strategy": "sequential",  # the rows of a seed are in their order
        "bf16": setting.mixed,
        "use_cpu": device_here().type == "cpu",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if arm.config is None:
        return TrainingArguments(**common)
    phases: dict[str, Any] = {"probe_steps": 0, "dense_tail_share": arm.tail, **arm.training}
    if reads_predictors(arm):
        phases["predictor_documents"] = setting.predictor_documents
        if setting.predictors is not None and arm.config.block_reduction == "max":
            phases |= {"predictors": setting.predictors, "predictor_steps": 2, "predictor_learning_rate": 1e-3}
    return LemoTrainingArguments(**common, **phases)


def identity(base: str) -> str:
    """Hash of a base's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(base).glob("model*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
