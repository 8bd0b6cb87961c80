import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_runs import RandomText, tiny_arguments, tiny_lemo_model
from transformers import LlamaForCausalLM, TrainingArguments

from lemo_hf import LemoTrainer
from lemo_hf.hub.model_card import render_card
from lemo_hf.training.run_card import adapter_in_words, precision_in_words, results_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_says_what_it_was_and_what_it_measured(lora, tmp_path):
    model = tiny_lemo_model(lora=lora, selection="ratio", attention_forward="sparse")
    trainer = LemoTrainer(model=model, args=tiny_arguments(tmp_path), train_dataset=RandomText())
    trainer.train()
    history = trainer.state.log_history
    found = results_of(trainer.lemo_run, model, RandomText(), history, 6)
    assert found.adapter == ("LoRA r=2, alpha=8 on k_proj, o_proj, q_proj, v_proj" if lora else "")
    assert found.precision == ("float32 base, float32 adapters, no autocast" if lora else "float32 weights, no autocast")
    assert (found.batch, found.steps, found.seq_len) == (2, 6, 96)
    saved = [logs["saved_bytes"] for logs in history if "saved_bytes" in logs]
    assert len(saved) == 6
    assert found.saved_bytes == statistics.fmean(saved)
    assert [logs["recall_of_positions"] for logs in history if "recall_of_positions" in logs][-1] == found.recall_positions
    text = render_card(found, "mine", kind="adapter" if lora else "remote-code")
    assert f"| Saved for the backward pass by one forward pass of 2 × 96 tokens | {found.saved_bytes / 2**20:.0f} MiB |" in text
    assert f"knows positions only: {found.recall_positions:.3f}" in text


def test_adapters_in_words(tiny_llama):
    assert adapter_in_words(tiny_llama) == ""
    everywhere = get_peft_model(tiny_llama, LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    assert adapter_in_words(everywhere) == "LoRA r=3, alpha=5 on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def test_precision_in_words(tiny_llama_config, tmp_path):
    model = LlamaForCausalLM(tiny_llama_config).to(torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    args = TrainingArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to="none")
    assert precision_in_words(adapted, args) == "bfloat16 base, float32 adapters, bfloat16 autocast"
