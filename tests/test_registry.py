import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from references.tiny_models import add_lora, lemo_model, random_tokens, stock_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaForCausalLM

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig
from lemo_hf.errors import LemoError
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.registry import lemo_config_from

TOKENS = random_tokens(40, 0)[None]


@pytest.fixture
def stock_folder(tmp_path):
    stock_model().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def upstream_log(monkeypatch):
    """What transformers logs at warning level or above; its loggers do not propagate to pytest's own handler."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Handler(logging.WARNING)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def same_weights(model, other, ignored="lemo_predictor"):
    mine = {name: weight for name, weight in model.state_dict().items() if ignored not in name}
    theirs = {name: weight for name, weight in other.state_dict().items() if ignored not in name}
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)


def test_a_stock_checkpoint_loads_without_a_word(stock_folder, upstream_log, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoLemoModelForCausalLM.from_pretrained(stock_folder, lemo=LemoConfig(keep_ratio=0.25))
    assert upstream_log == []
    printed = capfd.readouterr()
    assert "lemo" not in printed.out + printed.err
    assert "predictor" not in printed.out + printed.err
    assert isinstance(model, LemoLlamaForCausalLM)
    assert not model.training
    assert model.config.lemo.keep_ratio == 0.25
    assert same_weights(model, stock_model())
    assert torch.equal(model(TOKENS).logits, stock_model()(TOKENS).logits)


def test_predictors_of_a_stock_checkpoint_are_initialised(stock_folder):
    model = AutoLemoModelForCausalLM.from_pretrained(stock_folder, lemo=LemoConfig(predictor_rank=16))
    for name, weight in model.named_parameters():
        if "lemo_predictor.distance" in name:
            assert not weight.any()
        elif "lemo_predictor" in name:
            assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.3), name


def test_predictors_stay_frozen_whatever_they_are_loaded_from(stock_folder, tmp_path):
    """Or full fine-tuning would count, shard and checkpoint them as trained weights."""
    lemo_model(stock_model()).save_pretrained(tmp_path / "lemo")
    for folder in (stock_folder, tmp_path / "lemo"):
        model = AutoLemoModelForCausalLM.from_pretrained(folder)
        assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {
            name for name, _ in model.named_parameters() if "lemo_predictor" in name
        }


@pytest.mark.parametrize("seed", [0, 1])
def test_initialisation_follows_the_global_seed(stock_folder, seed):
    results = []
    for _ in range(2):
        torch.manual_seed(seed)
        model = AutoLemoModelForCausalLM.from_pretrained(stock_folder)
        results.append(next(model.model.layers[0].lemo_predictor.parameters()))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, torch.float16])
def test_predictors_are_float32_in_a_16_bit_model(stock_folder, dtype):
    model = AutoLemoModelForCausalLM.from_pretrained(stock_folder, dtype=dtype)
    for name, weight in model.named_parameters():
        wanted = torch.float32 if "lemo_predictor" in name else getattr(torch, str(dtype).removeprefix("torch."))
        assert weight.dtype == wanted, name
    model.train()
    model.config.lemo.update(selection="ratio", block_size=8)
    assert model(TOKENS, labels=TOKENS).loss.isfinite()


def test_a_16_bit_checkpoint_keeps_its_dtype_unless_asked(tmp_path):
    stock_model().bfloat16().save_pretrained(tmp_path)
    assert AutoLemoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16
    assert AutoLemoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_other_arguments_arrive(stock_folder):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    model = AutoLemoModelForCausalLM.from_pretrained(stock_folder, rope_parameters=rope, attn_implementation="eager")
    assert model.config.rope_parameters["factor"] == 4.0
    assert model.config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(stock_folder)
    config.max_position_embeddings = 77
    config._attn_implementation = "eager"
    model = AutoLemoModelForCausalLM.from_pretrained(stock_folder, config=config)
    assert (model.config.max_position_embeddings, model.config._attn_implementation) == (77, "eager")
    assert AutoLemoModelForCausalLM.from_pretrained(stock_folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("auto", [AutoLemoModelForCausalLM, AutoModelForCausalLM])
def test_a_lemo_checkpoint_comes_back_whole(tmp_path, upstream_log, auto):
    lemo = {
        "keep_ratio": [0.25, 0.5],
        "predictor_sizes": [[3, 4, 5, 6], [7, 8, 9, 2]],
        "selection": "ratio",
        "dense_layers": [-1],
    }
    model = lemo_model(stock_model(), **lemo)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["lemo"] == model.config.lemo.to_dict()
    again = auto.from_pretrained(tmp_path)
    assert upstream_log == []
    assert type(again) is LemoLlamaForCausalLM
    assert again.config.lemo == model.config.lemo
    assert same_weights(again, model, ignored="nothing")
    assert again.model.layers[1].lemo_predictor.sizes == [7, 8, 9, 2]


def test_saved_predictors_keep_their_float32_bits_in_a_16_bit_model(tmp_path):
    model = lemo_model(stock_model())
    model.save_pretrained(tmp_path)
    again = AutoLemoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, weight in again.named_parameters():
        if "lemo_predictor" in name:
            assert weight.dtype == torch.float32
            assert torch.equal(weight, model.get_parameter(name)), name
        else:
            assert weight.dtype == torch.bfloat16


def test_a_lemo_checkpoint_takes_another_block_when_given(tmp_path):
    lemo_model(stock_model(), keep_ratio=0.25).save_pretrained(tmp_path)
    model = AutoLemoModelForCausalLM.from_pretrained(
        tmp_path, lemo=LemoConfig(keep_ratio=0.75, predictor_rank=8, predictor_features=8)
    )
    assert model.config.lemo.keep_ratio == 0.75


def test_the_stock_class_loads_a_lemo_checkpoint(tmp_path):
    model = lemo_model(stock_model(seed=4)).eval()
    model.save_pretrained(tmp_path)
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same_weights(stock, model)
    assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


def test_weights_keep_their_stock_names():
    names = {name for name in lemo_model(stock_model()).state_dict() if "lemo_predictor" not in name}
    assert names == set(stock_model().state_dict())


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["lemo"].update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_ration": 0.5}, "no field 'keep_ration'; did you mean 'keep_ratio'"),
        ({"schema_version": 99, "new": 1}, "schema_version 99.*upgrade lemo_hf"),
        ({"keep_ratio": [0.5]}, "lists 1 layers, the model has 2"),
    ],
)
def test_a_block_that_cannot_be_honoured_is_named(tmp_path, changes, message):
    lemo_model(stock_model()).save_pretrained(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        AutoLemoModelForCausalLM.from_pretrained(tmp_path)


def test_loaded_predictors_of_a_layer_survive_when_others_are_missing(tmp_path):
    """A checkpoint that lacks one layer's predictor: that one is initialised, the others are what was saved."""
    model = lemo_model(stock_model())
    for layer in model.model.layers:
        layer.lemo_predictor.distance[0].data.fill_(0.5)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert any("layers.1.lemo_predictor" in name for name in weights)
    save_file(
        {name: weight for name, weight in weights.items() if "layers.1.lemo_predictor" not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    again = AutoLemoModelForCausalLM.from_pretrained(tmp_path)
    first = zip(again.model.layers[0].lemo_predictor.parameters(), model.model.layers[0].lemo_predictor.parameters(), strict=True)
    assert all(torch.equal(mine, saved) for mine, saved in first)
    *matrices, distances = again.model.layers[1].lemo_predictor.parameters()
    assert all(0.1 < weight.std() < 2 for weight in matrices)
    assert not distances.any()


def test_a_folder_without_config_is_said_to_be_one(tmp_path):
    with pytest.raises(LemoError, match=r"no model is there; .* has no config.json; name the folder or Hub id of a model"):
        AutoLemoModelForCausalLM.from_pretrained(tmp_path)


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path):
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(
        LemoError, match=r"no LeMo classes for model type 'gpt2'; supported: llama, mistral, opt, .*; choose"
    ) as error:
        AutoLemoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_lemo_config_keeps_its_block():
    config = lemo_config_from(stock_model().config, LemoConfig(keep_ratio=0.3))
    assert lemo_config_from(config).lemo.keep_ratio == 0.3
    assert lemo_config_from(config, LemoConfig(keep_ratio=0.6)).lemo.keep_ratio == 0.6


STOCK_PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("lemo"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
try:
    import lemo_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("lemo_hf must not be importable here")
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
base, tokens, *adapters = sys.argv[1:]
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert type(model.get_base_model()).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        save_file({"logits": model(load_file(tokens)["tokens"]).logits}, adapter + "/logits.safetensors")
"""


def trained_adapter(stock_folder, folder, form):
    """Saves an adapter trained for a few steps and returns our dense evaluation's logits."""
    nearby = 7 if form == "kept_keys" else None
    lemo = LemoConfig(block_size=8, attention_forward=form, nearby_tokens=nearby, checkpoint="kept_rows")
    model = add_lora(AutoLemoModelForCausalLM.from_pretrained(stock_folder, lemo=lemo))
    with torch.no_grad():
        untrained = model.eval()(TOKENS).logits
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    assert not any("lemo" in name for name in load_file(folder / "adapter_model.safetensors"))
    with torch.no_grad():
        trained = model.eval()(TOKENS).logits
    assert not torch.allclose(trained, untrained, atol=1e-3)
    return trained


def test_adapters_serve_on_stock_libraries_alone(stock_folder, tmp_path):
    folders = {form: tmp_path / form for form in ("sparse", "exact", "kept_keys")}
    wanted = {form: trained_adapter(stock_folder, folder, form) for form, folder in folders.items()}
    save_file({"tokens": TOKENS}, tmp_path / "tokens.safetensors")
    arguments = map(str, (stock_folder, tmp_path / "tokens.safetensors", *folders.values()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", STOCK_PROGRAM, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for form, folder in folders.items():
        assert torch.equal(load_file(folder / "logits.safetensors")["logits"], wanted[form])
