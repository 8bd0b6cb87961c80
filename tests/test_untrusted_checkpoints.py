"""Checkpoints and adapters from strangers: no pickle is read, no code runs, no file outside is named, nothing large is allocated."""

import builtins
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from folders_to_spoil import change_block, is_one_line, rewrite, saved_adapter, saved_model
from references.tiny_models import stock_model
from safetensors.torch import load_file, save_file
from training_runs import RandomText, tiny_arguments, tiny_lemo_model
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config

from lemo_hf import AutoLemoModelForCausalLM, LemoTrainer, cli
from lemo_hf.errors import LemoError
from lemo_hf.loading import load_saved_model
from lemo_hf.models.lemo_config import LemoConfigError
from lemo_hf.training.faults.whole_checkpoints import SEAL_FILE

OURS = {"api": AutoLemoModelForCausalLM.from_pretrained, "command": load_saved_model}


@pytest.fixture
def pickles_read(monkeypatch):
    """Names of the files that torch unpickles in the test."""
    read, load = [], torch.load

    def recorded(file, *args, **kwargs):
        read.append(Path(file).name)
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", recorded)
    return read


@pytest.fixture
def folder(tmp_path):
    return saved_model(tmp_path / "model")


@pytest.fixture
def adapter_folder(tmp_path):
    return saved_adapter(tmp_path / "adapter")


def pickle_weights(folder, name="pytorch_model.bin"):
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


def pickle_with_index(folder):
    pickle_weights(folder, "part.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "part.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def name_weights(folder, name):
    pickle_weights(folder, "adapter_model.bin")
    rewrite(folder / "config.json", transformers_weights=name)


def name_shards(folder, shard):
    """The weights lie beside the folder, and in a pickle within; an index names `shard`."""
    names = load_file(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    pickle_weights(folder, "part.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)} if shard else {"metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle_an_adapter(folder):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "r": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({}, folder / "adapter_model.bin")


def cut(path, end=-50):
    path.write_bytes(path.read_bytes()[:end])


BAD_WEIGHTS = {
    "pickle": (pickle_weights, "weights are a pickle"),
    "pickle with an index": (pickle_with_index, "weights are a pickle"),
    "pickle named by the config": (lambda f: name_weights(f, "adapter_model.bin"), "own folder only; got 'adapter_model.bin'"),
    "pickle named by the index": (lambda f: name_shards(f, "part.bin"), "own folder only; got 'part.bin'"),
    "pickled adapter beside it": (pickle_an_adapter, "adapter has no adapter_model.safetensors"),
    "file above": (lambda f: name_weights(f, "../elsewhere.safetensors"), "own folder only; got '../elsewhere.safetensors'"),
    "shards above": (lambda f: name_shards(f, "../elsewhere.safetensors"), "own folder only; got '../elsewhere.safetensors'"),
    "shards anywhere": (lambda f: name_shards(f, str(f.parent / "elsewhere.safetensors")), "own folder only; got '/"),
    "number for a name": (lambda f: name_weights(f, 5), "own folder only; got 5"),
    "index of nothing": (lambda f: name_shards(f, None), "has no weight_map"),
    "missing shard": (lambda f: name_shards(f, "gone.safetensors"), "file does not exist"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "folder has no weights"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "file is corrupt or truncated"),
    "cut header": (lambda f: cut(f / "model.safetensors", 60), "file is corrupt or truncated"),
}


@pytest.mark.parametrize("load", OURS)
@pytest.mark.parametrize("case", BAD_WEIGHTS, ids=lambda name: name.replace(" ", "-"))
def test_weights_that_are_no_safetensors_of_the_folder_are_refused(folder, case, load, pickles_read):
    spoil, says = BAD_WEIGHTS[case]
    spoil(folder)
    with pytest.raises(LemoError, match=re.escape(says)) as refused:
        OURS[load](str(folder))
    assert is_one_line(refused.value)
    assert pickles_read == []


@pytest.mark.parametrize("case", ["pickle", "pickle named by the config"])
def test_the_stock_loader_does_read_those_pickles(folder, case, pickles_read):
    """Or the test above would see nothing to refuse."""
    BAD_WEIGHTS[case][0](folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert pickles_read


def test_a_pickle_is_not_read_on_request_either(folder, pickles_read):
    with pytest.raises(LemoError, match="pickled weights are not read; use_safetensors=False"):
        AutoLemoModelForCausalLM.from_pretrained(folder, use_safetensors=False)
    assert pickles_read == []


@pytest.mark.parametrize("load", OURS)
def test_an_adapter_s_pickle_is_not_read(adapter_folder, load, pickles_read):
    torch.save(load_file(adapter_folder / "adapter_model.safetensors"), adapter_folder / "adapter_model.bin")
    (adapter_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LemoError, match=r"adapter has no adapter_model.safetensors") as refused:
        OURS[load](str(adapter_folder))
    assert is_one_line(refused.value)
    assert pickles_read == []


SPOILT_CHECKPOINTS = {
    "pickle": (pickle_weights, "weights are a pickle"),
    "empty state": (lambda f: (f / "lemo_state.json").write_text("{}"), "its phase is missing"),
    "list for a state": (lambda f: (f / "lemo_state.json").write_text("[]"), "holds no JSON mapping"),
    "words for settings": (lambda f: rewrite(f / "lemo_state.json", settings="x"), "its settings is missing or no dict"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = tiny_arguments(folder, max_steps=1, save_strategy="steps", save_steps=1)
    LemoTrainer(model=tiny_lemo_model(lora=False), args=arguments, train_dataset=RandomText()).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize("case", SPOILT_CHECKPOINTS, ids=lambda name: name.replace(" ", "-"))
def test_a_spoilt_checkpoint_is_not_resumed_from(checkpoint, case, tmp_path, pickles_read):
    spoil, says = SPOILT_CHECKPOINTS[case]
    shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / SEAL_FILE).unlink()  # which a stranger writes as well as anything else
    spoil(tmp_path / "checkpoint-1")
    resumed = LemoTrainer(model=tiny_lemo_model(lora=False), args=tiny_arguments(tmp_path / "b"), train_dataset=RandomText())
    with pytest.raises(LemoError, match=says) as refused:
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert is_one_line(refused.value)
    assert "pytorch_model.bin" not in pickles_read


# --- Predictors among a model's weights ---


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.lemo_predictor.query.matrices.0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.update({NAME: torch.zeros(3, 4)}), r"layers.1.query.matrices.0 is (3, 4), the model needs (32, 8)"),
        (lambda w: w.pop(NAME), "layers.1.query.matrices.0 is missing"),
        (
            lambda w: w.update({NAME.replace("0", "7"): torch.zeros(1)}),
            "layers.1.query.matrices.7 is (1,), the model needs no such tensor",
        ),
    ],
    ids=["shape", "missing matrix", "matrix too many"],
)
def test_predictors_of_other_shapes_are_refused(folder, change, says):
    change_weights(folder, change)
    with pytest.raises(LemoError, match="predictors do not fit the model: " + re.escape(says)) as refused:
        AutoLemoModelForCausalLM.from_pretrained(folder)
    assert is_one_line(refused.value)
    assert "or train new ones" in str(refused.value)


def from_pretrained(folder):
    """As whoever does not know this package's loader gets it: the same class, by its name in config.json."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "name", "value", "says"),
    [
        ("llama", "rotary.0", 4, "names rotary frequencies that the model's 4 are not"),
        ("llama", "rotary.0", 0.5, "names rotary frequencies that the model's 4 are not"),
        ("llama", "rotary.0", -2, "names rotary frequencies that the model's 4 are not"),
        ("opt", "rotary.0", 0, "names rotary frequencies that the model's 0 are not"),
        ("llama", "query.matrices.0", float("nan"), "holds values that are not finite"),
        ("llama", "distance.0", float("inf"), "holds values that are not finite"),
    ],
)
@pytest.mark.parametrize("load", [from_pretrained, OURS["api"]])
def test_predictors_with_values_that_none_can_have_are_refused(tmp_path, architecture, name, value, says, load):
    folder = saved_model(tmp_path / "model", architecture=architecture, block_reduction="mean", predictor_features=8)
    load(folder)
    stored = f"model.{'decoder.' if architecture == 'opt' else ''}layers.1.lemo_predictor.{name}"
    change_weights(folder, lambda w: w[stored].view(-1)[1:2].fill_(value))
    says = f"predictors do not fit the model: layers.1.{name} {says}; {str(folder)!r}; use those of a run on this model"
    with pytest.raises(LemoConfigError, match=re.escape(says)) as refused:
        load(folder)
    assert is_one_line(refused.value)


@pytest.mark.parametrize(("selection", "is_said"), [("ratio", True), ("threshold", True), ("sampled", False)])
def test_missing_predictors_are_said_where_they_are_read(folder, selection, is_said, caplog):
    change_block(folder, selection=selection)
    change_weights(folder, lambda w: [w.pop(name) for name in list(w) if "lemo_predictor" in name])
    AutoLemoModelForCausalLM.from_pretrained(folder)
    assert ("no predictors for 2 of 2 layers" in caplog.text) == is_said
    assert ("train them with LemoTrainer" in caplog.text) == is_said


# --- Code ---

FOREIGN_NAMES = ["evil/repo--modeling.Evil", "/tmp/evil.Evil", "../evil.Evil", "sub/evil.Evil", "evil", 5, [["evil.Evil"]]]


@pytest.mark.parametrize("name", FOREIGN_NAMES, ids=str)
@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained, *OURS.values()])
def test_a_lemo_config_cannot_name_code_outside_its_repository(folder, load, name):
    own = json.loads((folder / "config.json").read_text())["auto_map"]
    rewrite(folder / "config.json", auto_map={**own, "AutoModel": name})
    with pytest.raises(
        (LemoConfigError, LemoError), match="auto_map may name classes of files beside the config only"
    ) as refused:
        load(str(folder))
    assert is_one_line(refused.value)


def test_code_that_a_stock_config_names_does_not_travel_on(tmp_path, caplog):
    stock_model().save_pretrained(tmp_path / "stock")
    rewrite(
        tmp_path / "stock" / "config.json", auto_map={"AutoModel": "evil/repo--x.Y", "AutoModelForCausalLM": "evil/repo--x.Y"}
    )
    AutoLemoModelForCausalLM.from_pretrained(tmp_path / "stock", trust_remote_code=True).save_pretrained(tmp_path / "lemo")
    assert "names code of its own (auto_map)" in caplog.text
    assert json.loads((tmp_path / "lemo" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_lemo_llama.LemoLlamaConfig",
        "AutoModelForCausalLM": "modeling_lemo_llama.LemoLlamaForCausalLM",
    }


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command that must end with exit code 2 and one line, without asking anything; returns the line."""

    def asked(*args):
        raise AssertionError("nobody is asked")

    monkeypatch.setattr(builtins, "input", asked)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(each) for each in arguments])
        assert end.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lemo: ") or "Traceback" in line]
        assert len(lines) == 1
        assert is_one_line(lines[0])
        return lines[0]

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "some words " * 200}) + "\n")
    return path


def write_recipe(folder, model, text):
    recipe = f"model: {model}\ndata_files: [{text}]\nseq_len: 64\nblock_size: 16\nmax_steps: 1\noutput_dir: {folder / 'out'}\nuse_cpu: true\n"
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def unknown_type(folder):
    rewrite(
        folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    )


def softcapped(folder):
    Gemma2Config(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=32).save_pretrained(folder)


TYPES = {
    "code of its own": (unknown_type, "no LeMo classes for model type 'evil'"),
    "softcap": (softcapped, "attention is softcapped at 50.0, which LeMo's attention does not compute); supported: llama"),
    "no type": (lambda f: rewrite(f / "config.json", model_type=None), "no LeMo classes for model type None"),
    "list for a type": (lambda f: rewrite(f / "config.json", model_type=["llama"]), "no LeMo classes for model type ['llama']"),
    "list for a config": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "half a config": (lambda f: cut(f / "config.json"), "config.json"),
    "deep config": (lambda f: (f / "config.json").write_text('{"a":' * 10**5), "config.json"),
    "words for numbers": (lambda f: rewrite(f / "config.json", hidden_size="x"), "hidden_size"),
    "no heads": (lambda f: rewrite(f / "config.json", num_attention_heads=0), "config"),
    "newer block": (
        lambda f: change_block(f, schema_version=99, new=1),
        "schema_version 99, this lemo_hf reads up to 2; upgrade lemo_hf",
    ),
    "misspelt block": (lambda f: change_block(f, keep_ration=1), "did you mean 'keep_ratio'"),
}


@pytest.mark.parametrize("case", TYPES, ids=lambda name: name.replace(" ", "-"))
def test_bad_configs_end_in_one_line_by_command_and_by_call(folder, case, tmp_path, text, command):
    spoil, says = TYPES[case]
    spoil(folder)
    recipe = write_recipe(tmp_path, folder, text)
    assert says in command("train", recipe)
    assert not (tmp_path / "out").exists()
    if case != "softcap":  # which stock transformers evaluates
        command("eval", folder, "--data", text)
    with pytest.raises((LemoError, LemoConfigError, OSError)) as refused:
        AutoLemoModelForCausalLM.from_pretrained(folder)
    assert "custom code" not in str(refused.value)
