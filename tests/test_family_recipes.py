"""Each family's recipe against the published shape of its model, on the meta device: nothing is fetched, nothing allocated."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_hf.errors import LemoError
from lemo_hf.loading import extended_config
from lemo_hf.profiling.estimate.model_shapes import SHAPES
from lemo_hf.recipe import read_recipe
from lemo_hf.registry import lemo_config_from

RECIPES = Path(__file__).parent.parent / "recipes"
# Recipe -> the shape, what differs from it, parameters as published, and positions scaled by.
FAMILIES = {
    "llama3_8b_lora_32k": ("Llama-3-8B", {}, 8_030_261_248, 4.0),
    "llama31_8b_lora_32k": ("Llama-3.1-8B", {}, 8_030_261_248, None),
    "llama2_7b_lora_16k": ("Llama-2-7B", {}, 6_738_415_616, 4.0),
    "mistral_7b_lora_32k": ("Mistral-7B", {"vocab_size": 32000, "sliding_window": 4096}, 7_241_732_096, None),
    "opt_6.7b_lora_2k": ("OPT-6.7B", {}, 6_658_473_984, None),
    "qwen3_8b_lora_32k": ("Qwen3-8B", {}, 8_190_735_360, None),
    "qwen3_8b_answers_32k": ("Qwen3-8B", {}, 8_190_735_360, None),
    "llama3_8b_pretrain_64k": ("Llama-3-8B", {}, 8_030_261_248, 8.0),
    "llama3_8b_block_sparse_64k": ("Llama-3-8B", {}, 8_030_261_248, 8.0),
}


def recipe_on_disk(name, folder, **overrides):
    """The recipe, with a config.json of its model's shape in place of the Hub."""
    shape, changes, _, _ = FAMILIES[name]
    (folder / "config.json").write_text(json.dumps({**SHAPES[shape], **changes}))
    recipe = read_recipe(RECIPES / f"{name}.yaml", overrides)
    return dataclasses.replace(recipe.model, model=str(folder)), recipe


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_recipe_fits_its_model(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, _, parameters, factor = FAMILIES[name]
    base, recipe = recipe_on_disk(name, tmp_path)
    _, fields = extended_config(base, recipe.data.seq_len)
    assert fields.get("rope_parameters", {}).get("factor") == factor
    config = lemo_config_from(AutoConfig.from_pretrained(tmp_path, **fields), recipe.lemo)
    assert recipe.data.seq_len <= config.max_position_embeddings
    assert recipe.data.seq_len > recipe.lemo.block_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        predictors = sum(weight.numel() for key, weight in model.named_parameters() if "lemo_predictor" in key)
        assert sum(weight.numel() for weight in model.parameters()) - predictors == parameters
        assert 0 < predictors < 0.01 * parameters
        targets = recipe.lora.lora_target_modules
        tuned = get_peft_model(model, LoraConfig(r=recipe.lora.lora_r, target_modules=targets))
    if targets == "all-linear":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = [key for key, weight in tuned.named_parameters() if weight.requires_grad]
    assert len(adapters) == 2 * len(targets) * config.num_hidden_layers
    assert all(any(f".{target}." in key for target in targets) for key in adapters)


def test_learned_positions_are_not_extended(tmp_path):
    for overrides in ({"seq_len": "4096"}, {"rope_type": "linear"}, {"rope_theta": "1e5"}):
        base, recipe = recipe_on_disk("opt_6.7b_lora_2k", tmp_path, **overrides)
        with pytest.raises(LemoError, match=r"learned positions.*2048") as error:
            extended_config(base, recipe.data.seq_len)
        assert "\n" not in str(error.value)
