"""Tiny runs that the training tests share: a 2-layer LeMo model with LoRA, random text with repeats, a few steps."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, TrainerCallback

from lemo_hf import LemoConfig, LemoTrainer, LemoTrainingArguments
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.registry import lemo_config_from

SEQ_LEN = 96
BLOCK = 8


class RandomText(Dataset):
    """Samples of random tokens, the same for the same index."""

    def __init__(self, samples: int = 24, seq_len: int = SEQ_LEN) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(3, 128, (samples, seq_len), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index].clone()}


def tiny_lemo_model(lora: bool = True, **lemo: Any) -> Any:
    """The model of every test run, the same weights each time."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    block = LemoConfig(**{"block_size": BLOCK, "predictor_rank": 8, "predictor_features": 8, "segment_size": 64, **lemo})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LemoLlamaForCausalLM(lemo_config_from(config, block))
        for name, weight in model.model.layers.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.data *= 8  # attention with structure: the initial weights score every pair alike
        if lora:
            model = get_peft_model(
                model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
            )
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_(0, 0.02)
    return model


# Of every run here and in chat_runs: steps logged each, without reporters.
SMALL_AND_QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def tiny_arguments(folder: Path, **changes: Any) -> LemoTrainingArguments:
    """Arguments of every test run: 6 steps, logged each, without reporters."""
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        **SMALL_AND_QUIET,
        "predictor_documents": 4,
        "predictor_steps": 2,
        "calibrate_documents": 2,
        "calibrate_rounds": 2,
        "phase_save_documents": 1,
        "probe_steps": 0,
    }
    return LemoTrainingArguments(**{**values, **changes})


def tiny_trainer(folder: Path, lemo: dict[str, Any] | None = None, **changes: Any) -> LemoTrainer:
    """A trainer of a tiny run."""
    model = tiny_lemo_model(**(lemo or {"selection": "ratio", "attention_forward": "sparse"}))
    return LemoTrainer(model=model, args=tiny_arguments(folder, **changes), train_dataset=RandomText())


def curve(trainer: Any) -> list[float]:
    """The logged losses, step by step."""
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


class Killed(Exception):
    """What ends a run as a kill does, but for the process."""


class KillAt(TrainerCallback):
    """Ends a run before the step that follows `step` steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed
