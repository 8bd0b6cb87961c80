"""A tiny base model, its tokenizer, text and a recipe: what the tests of the command line train and export."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lemo_hf.base_model.data import train_tokenizer
from lemo_hf.text_data import TextDocument

TEXT = "the model keeps some blocks and leaves other blocks out of each layer in every step of the run"
WORDS = TEXT.split()
RECIPE = """
model: {folder}/base
dtype: float32
rope_type: linear
data_files: [{folder}/train.jsonl]
held_out_files: [{folder}/held_out.jsonl]
seq_len: 128
layout: packed
block_size: 16
lora_r: 4
max_steps: 3
per_device_train_batch_size: 1
learning_rate: 1e-2
logging_steps: 1
save_steps: 2
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
output_dir: {folder}/out
"""


def document(seed: int, words: int = 60) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_source(folder: Path) -> Path:
    """Fills a folder with a tiny base model of context 64, its tokenizer, text and a recipe; returns it."""
    tokenizer = train_tokenizer([TextDocument("words", TEXT)], 300, 64)
    tokenizer.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "base")
    write_jsonl(folder / "train.jsonl", [document(seed) for seed in range(20)])
    write_jsonl(folder / "held_out.jsonl", [document(seed) for seed in range(100, 106)])
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder
