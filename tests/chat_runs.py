"""Tiny runs of trl's trainer that the tests share: a tokenizer with a chat template, conversations, and a LeMo model on them."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from references.tiny_models import lemo_model, stock_model
from tiny_recipe import TEXT, document
from training_runs import SMALL_AND_QUIET
from trl import SFTConfig, SFTTrainer

from lemo_hf import LemoTrainingArguments, lemo_callbacks
from lemo_hf.base_model.data import train_tokenizer
from lemo_hf.text_data import TextDocument

disable_progress_bars()
VOCABULARY = 300
# The words of every prompt and answer, and generation markers around what an assistant says.
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


@cache
def _trained_tokenizer() -> Any:
    return train_tokenizer([TextDocument("words", f"{TEXT} user assistant system")], VOCABULARY, 512)


def tokenizer(template: str | None = MARKED) -> Any:
    """A tokenizer of 300 tokens with a chat template."""
    made = copy.deepcopy(_trained_tokenizer())
    made.chat_template = template
    return made


def conversation(seed: int, words: int = 20) -> list[dict[str, str]]:
    """A question, or a document, of `words` words and an answer of 15."""
    return [{"role": "user", "content": document(seed, words)}, {"role": "assistant", "content": document(seed + 50, 15)}]


def conversations(count: int = 8) -> Dataset:
    """Conversations of different lengths."""
    return Dataset.from_list([{"messages": conversation(seed, 20 + 5 * seed)} for seed in range(count)])


def prompts_and_completions(count: int = 8) -> Dataset:
    """The same text as prompts and completions."""
    rows = [conversation(seed, 20 + 5 * seed) for seed in range(count)]
    return Dataset.from_list([{"prompt": f"{user['content']} ", "completion": answer["content"]} for user, answer in rows])


def texts(count: int = 8) -> Dataset:
    """Documents without roles."""
    return Dataset.from_list([{"text": document(seed, 20 + 5 * seed)} for seed in range(count)])


def model(lemo: dict[str, Any] | None) -> Any:
    """The stock model for `None`, else a LeMo one with the same weights."""
    stock = stock_model(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    return stock if lemo is None else lemo_model(stock, **lemo)


def sft_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of every run: 3 steps, logged each, without reporters."""
    values = {
        "output_dir": str(folder),
        "max_steps": 3,
        **SMALL_AND_QUIET,
        "bf16": False,
        "activation_checkpointing": False,
        "max_length": 256,
    }
    return {**values, **changes}


def sft_trainer(folder: Path, lemo: dict[str, Any] | None, data: Dataset, template: str | None = MARKED, **changes: Any) -> Any:
    """trl's own trainer, with LeMo's callbacks for a LeMo model."""
    own = LemoTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, predictor_documents=2, probe_steps=0)
    adapter = {} if "model" in changes else {"peft_config": LoraConfig(**LORA)}
    return SFTTrainer(
        model=changes.pop("model", None) or model(lemo),
        args=SFTConfig(**sft_values(folder, **changes)),
        train_dataset=data,
        processing_class=tokenizer(template),
        callbacks=None if lemo is None else lemo_callbacks(own),
        **adapter,
    )


def steps(trainer: Any) -> list[dict[str, float]]:
    """The logs of the steps."""
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def losses(trainer: Any) -> torch.Tensor:
    """The logged losses."""
    return torch.tensor([logs["loss"] for logs in steps(trainer)])
