"""What holds for every architecture when its LeMo model turns stock again, and when PEFT adapts it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references.tiny_models import add_lora, random_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_hf import LemoConfig
from lemo_hf.hub.export import as_stock, export_run
from lemo_hf.hub.lemo_files import save_lemo_files
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


@pytest.mark.parametrize("kind", ["merged", "remote-code"])
@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ["q_proj", "embed_tokens"]},
        {"targets": ["q_proj", "lm_head"]},
        {"targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"targets": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"targets": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"targets": ["q_proj"]},
    ],
    ids=["embeddings", "head", "both, tied", "saved", "some tokens", "neither"],
)
def test_merging_changes_the_weights_that_the_adapter_changes_and_no_tied_ones(lora, kind, tmp_path):
    stock, model = tiny("opt")
    assert stock.config.tie_word_embeddings
    stock.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapted = add_lora(model, **lora).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    wanted = adapted(TOKENS).logits
    assert not torch.allclose(wanted, stock(TOKENS).logits, atol=1e-2)
    adapted.save_pretrained(tmp_path / "run")
    save_lemo_files(adapted, tmp_path / "run")
    found = AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", kind))
    torch.testing.assert_close(found(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
