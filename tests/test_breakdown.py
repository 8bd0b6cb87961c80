from importlib import import_module

import pytest
import torch
from torch import nn

from lemo_hf.models.configuration_lemo_llama import LemoLlamaConfig
from lemo_hf.models.lemo_config import LemoConfig
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.profiling.activation_memory import ActivationMemory
from lemo_hf.profiling.breakdown import _PART_OF_CODE, Breakdown, RunningModules
from lemo_hf.profiling.flops import FlopCounter


def test_sums_by_any_fields():
    amounts = Breakdown(("layer", "part"), {(0, "mlp"): 3, (0, "norm"): 1, (1, "mlp"): 4})
    assert amounts.total == 8
    assert list(amounts.by("part").items()) == [("mlp", 7), ("norm", 1)]
    assert amounts.by("part", "layer") == {("mlp", 1): 4, ("mlp", 0): 3, ("norm", 0): 1}


@pytest.mark.parametrize(
    ("path", "layer", "part"),
    [
        ("model.layers.1.self_attn.q_proj", 1, "q,k,v"),
        ("base_model.model.model.layers.0.self_attn.o_proj.lora_A.default", 0, "o_proj"),
        ("model.layers.2.self_attn", 2, "attention"),
        ("model.layers.2.post_attention_layernorm", 2, "norm"),
        ("model.layers.2.mlp.act_fn", 2, "mlp"),
        ("model.layers.2", 2, "residual"),
        ("model.decoder.layers.3.self_attn_layer_norm", 3, "norm"),
        ("model.decoder.layers.3.self_attn.out_proj", 3, "o_proj"),
        ("model.decoder.layers.3.fc2", 3, "mlp"),
        ("model.embed_tokens", None, "embedding"),
        ("model.norm", None, "norm"),
        ("lm_head", None, "loss"),
        ("model", None, "other"),
    ],
)
def test_parts_of_module_paths(path, layer, part):
    model, inner = nn.Module(), None
    for name in path.split("."):
        parent, inner = (model if inner is None else inner), nn.Module()
        parent.add_module(name, inner)
    with RunningModules(model) as modules:
        modules._enter(inner, ())
        assert modules.innermost == (path, layer, part)


def test_an_exception_leaves_no_module_running():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError

    model = nn.Sequential(Failing())
    with RunningModules(model) as modules:
        with pytest.raises(RuntimeError):
            model(torch.zeros(1))
        assert modules.innermost is None


def test_functions_whose_parts_are_told_exist():
    for stem, function in _PART_OF_CODE:
        folder = "profiling.baselines" if stem in ("artifact_lemo", "tokentune") else "models"
        module = import_module(f"lemo_hf.{folder}.{stem}")
        assert function is None or callable(getattr(module, function))


@pytest.mark.parametrize("form", ["exact", "kept_keys", "sparse"])
def test_what_a_layer_multiplies_is_of_a_known_part_in_every_form(tiny_llama_config, form):
    """Forward and backward: the gradient through dropped keys is attention's, though no operator of that name computes it."""
    lemo = {"attention_forward": form, "nearby_tokens": None if form == "exact" else 16, "block_size": 16}
    config = LemoLlamaConfig(**{**tiny_llama_config.to_dict(), "lemo": LemoConfig(**lemo).to_dict()})
    model = LemoLlamaForCausalLM(config).train()
    ids = torch.randint(0, 128, (1, 512))
    with FlopCounter(model) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    flops = counter.flops.by("layer", "phase", "part")
    for phase in ("forward", "backward"):
        parts = {part for layer, when, part in flops if (layer, when) == (1, phase)}
        assert parts == {"q,k,v", "attention", "o_proj", "mlp"}


def test_lemo_layers_are_told_apart(tiny_llama_config):
    kept = {"attention_forward": "sparse", "selection": "ratio", "block_size": 16}
    config = LemoLlamaConfig(**{**tiny_llama_config.to_dict(), "lemo": LemoConfig(**kept).to_dict()})
    model = LemoLlamaForCausalLM(config).train()
    ids = torch.randint(0, 128, (1, 512))
    with FlopCounter(model) as counter:
        with ActivationMemory(model) as memory:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    saved = memory.saved.by("layer", "part")
    parts = {"norm", "q,k,v", "attention", "o_proj", "mlp", "residual"}
    assert {part for layer, part in saved if layer == 1} == parts - {"o_proj"}  # o's input is attention's output
    assert {part for layer, part in saved if layer is None} == {"norm", "loss", "embedding"}
    flops = counter.flops.by("layer", "part")
    assert {part for layer, part in flops if layer == 1} == {"q,k,v", "attention", "o_proj", "mlp", "predictor"}
    # Older releases of transformers multiply rotary frequencies as matrices.
    assert {part for layer, part in flops if layer is None} <= {"loss", "other"}
    assert flops.get((None, "other"), 0) < 1e-3 * flops[None, "loss"]
