"""What holds for every architecture when its LeMo model turns stock again, and when PEFT adapts it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references.tiny_models import random_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_hf import LemoConfig
from lemo_hf.hub.export import as_stock
from lemo_hf.registry import ARCHITECTURES, lemo_config_from

TOKENS = random_tokens(100, 1)[None]


def tiny(stock_type):
    """A LeMo model of each architecture, small, with every config value that the architecture insists on left to it."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        **(
            {"ffn_dim": 64, "word_embed_proj_dim": 32}
            if stock_type == "opt"
            else {"num_key_value_heads": 2, "intermediate_size": 64}
        ),
    }
    config = AutoConfig.for_model(stock_type, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(config)
        model = ARCHITECTURES[stock_type][1](lemo_config_from(config, LemoConfig(block_size=16, predictor_rank=8)))
    model.load_state_dict(stock.state_dict(), strict=False)
    return stock.eval(), model.eval()


@pytest.mark.parametrize("stock_type", ARCHITECTURES)
def test_every_architecture_turns_stock_again(stock_type, tmp_path):
    stock, model = tiny(stock_type)
    as_stock(model).save_pretrained(tmp_path)
    found, info = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(found.eval()(TOKENS).logits, stock(TOKENS).logits)
    left, right = (each.config.to_dict() for each in (found, stock))
    differing = {name for name in left | right if left.get(name) != right.get(name)}
    assert differing <= {"dtype", "architectures", "_name_or_path", "transformers_version"}


@pytest.mark.parametrize("stock_type", ARCHITECTURES)
def test_peft_adapts_the_same_modules_as_in_the_stock_model(stock_type):
    adapted = [
        {
            name.replace("base_model.model.", "")
            for name, _ in get_peft_model(model, LoraConfig()).named_parameters()
            if "lora" in name
        }
        for model in tiny(stock_type)
    ]
    assert adapted[0] == adapted[1] != set()
