"""Exports of a run: what others load, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from references.tiny_models import random_tokens
from remote_process import run_remote
from safetensors.torch import load_file, save_file
from tiny_recipe import write_source
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lemo_hf import AutoLemoModelForCausalLM, LemoConfig, cli
from lemo_hf.errors import LemoError
from lemo_hf.hub.export import export_run
from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, predictor_tensors, read_lemo_files
from lemo_hf.hub.model_card import BEGIN, RunResults
from lemo_hf.loading import load_saved_model
from lemo_hf.models.sparse_decoder import sparse_backbone

TOKENS = torch.stack([random_tokens(100, seed) for seed in (1, 2)])
KINDS = ("adapter", "merged", "remote-code")
CARD = "README.md"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def ends(arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(each) for each in arguments])
    assert end.value.code == code


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def run(source):
    """A run whose selection reads predictors and thresholds, so that all of it has to arrive."""
    settings = (
        "--selection",
        "threshold",
        "--attention_forward",
        "sparse",
        "--predictor_documents",
        "2",
        "--calibrate_documents",
        "1",
    )
    ends(["train", source / "recipe.yaml", *settings, "--prune_documents", "1", "--prune_share", "0.6"])
    return source / "out"


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for kind in KINDS:
        ends(["export", run, "--to", kind, "--output", folder / kind])
    return folder


@pytest.fixture(scope="module")
def logits(run):
    """Of the adapter as it is evaluated: on the stock base under the run's positions."""
    return logits_of(load_saved_model(str(run))[0])


def logits_of(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def files_of(folder):
    return {path.name for path in folder.iterdir()}


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_kind_holds_its_files_and_a_card(exports, run):
    adapter = {"adapter_config.json", "adapter_model.safetensors", CONFIG_FILE, PREDICTORS_FILE}
    model = {"config.json", "generation_config.json", "model.safetensors"}
    common = {CARD, "kept_share.png"} | TOKENIZER
    assert files_of(exports / "adapter") == adapter | common
    assert files_of(exports / "merged") == model | common
    code = files_of(exports / "remote-code") - model - common
    assert {"configuration_lemo_llama.py", "modeling_lemo_llama.py", "pattern_predictor.py"} <= code
    assert all(name.endswith(".py") for name in code)
    after = RunResults.read(run / "results.json").perplexity_after
    for kind in KINDS:
        card = (exports / kind / CARD).read_text()
        assert card.startswith("---\n")
        assert f"# {kind}" in card
        assert f"{after.value:.3f}" in card
        assert str(run.parent) not in card
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in (exports / kind).iterdir())
        tokenizer = AutoTokenizer.from_pretrained(exports / kind)
        assert tokenizer("the model keeps")["input_ids"] == AutoTokenizer.from_pretrained(run)("the model keeps")["input_ids"]


def test_the_adapter_is_the_runs_bit_for_bit(exports, run, source, logits):
    for name in ("adapter_model.safetensors", PREDICTORS_FILE, CONFIG_FILE):
        assert (exports / "adapter" / name).read_bytes() == (run / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(source / "base", **read_lemo_files(exports / "adapter")[1])
    assert torch.equal(logits_of(PeftModel.from_pretrained(base, exports / "adapter")), logits)


def test_the_merged_checkpoint_is_a_stock_one(exports, run, logits):
    config = json.loads((exports / "merged" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"lemo", "auto_map"} & set(config)
    under = read_lemo_files(run)[1]
    assert {name: config[name] for name in under} == under
    assert config["max_position_embeddings"] == 128
    assert not any("lemo" in name for name in load_file(exports / "merged" / "model.safetensors"))
    model, info = LlamaForCausalLM.from_pretrained(exports / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(model), logits, rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits, logits_of(LlamaForCausalLM.from_pretrained(run.parent / "base", **under)))


def test_the_remote_code_folder_brings_predictors_and_thresholds(exports, run):
    block, _ = read_lemo_files(run)
    assert block.thresholds is not None
    assert block.predictor_sizes != [[block.predictor_rank] * 4] * 2
    model = AutoModelForCausalLM.from_pretrained(exports / "remote-code")
    assert model.config.lemo.to_dict() == block.to_dict()
    stored = load_file(run / PREDICTORS_FILE)
    found = predictor_tensors(sparse_backbone(model))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(exports / "merged"))
    assert torch.equal(logits_of(model), merged)
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(exports / "remote-code")), merged)


def test_a_remote_code_folder_can_be_saved_from_there_and_loaded_again(exports, tmp_path):
    first, second = run_remote(exports / "remote-code", tmp_path, TOKENS)
    model = AutoModelForCausalLM.from_pretrained(exports / "remote-code")
    assert torch.equal(first["logits"], logits_of(model))
    assert torch.equal(first["loss"], model.train()(input_ids=TOKENS, labels=TOKENS).loss.detach())
    for name in first:
        assert torch.equal(first[name], second[name])
    code = {path.name: path.read_bytes() for path in (exports / "remote-code").glob("*.py")}
    config = json.loads((exports / "remote-code" / "config.json").read_text())
    for turn in (1, 2):
        saved = tmp_path / f"saved_{turn}"
        assert {path.name: path.read_bytes() for path in saved.glob("*.py")} == code
        assert json.loads((saved / "config.json").read_text())["auto_map"] == config["auto_map"]
        assert (saved / "generation_config.json").is_file()


def test_save_pretrained_of_a_trained_model_is_as_complete(run, exports, tmp_path):
    model = AutoLemoModelForCausalLM.from_pretrained(run).merge_and_unload()
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == files_of(exports / "remote-code") - TOKENIZER - {CARD, "kept_share.png"}
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (exports / "remote-code" / name).read_bytes()


def test_a_16_bit_base_is_merged_in_its_own_type_or_the_one_asked_for(run, source, logits, tmp_path):
    AutoModelForCausalLM.from_pretrained(source / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    for name, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        folder = export_run(run, "remote-code", tmp_path / name, base=str(tmp_path / "base"), dtype=name)
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        stored = load_file(folder / "model.safetensors")
        assert {weight.dtype for key, weight in stored.items() if "lemo_predictor" not in key} == {dtype}
        assert {weight.dtype for key, weight in stored.items() if "lemo_predictor" in key} == {torch.float32}
        found = logits_of(AutoModelForCausalLM.from_pretrained(folder)).float()
        torch.testing.assert_close(found, logits, rtol=0.05, atol=0.01)


def test_a_checkpoint_is_exported_as_it_stood(run, tmp_path):
    folder = export_run(run / "checkpoint-2", "adapter", tmp_path / "early")
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        run / "checkpoint-2" / "adapter_model.safetensors"
    ).read_bytes()
    card = (folder / CARD).read_text()
    assert "| Optimizer steps | 2 |" in card
    assert "local files train.jsonl" in card
    results = RunResults.read(run / "results.json")
    assert f"{results.perplexity_before.value:.3f}" in card
    assert f"{results.perplexity_after.value:.3f}" not in card
    assert export_run(run / "checkpoint-2", "merged") == run / "checkpoint-2-merged"
    shutil.rmtree(run / "checkpoint-2-merged")


def test_text_that_a_person_added_travels(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    (copy / CARD).write_text((copy / CARD).read_text() + "\n## Notes\n\nMine.\n")
    card = (export_run(copy, "merged", tmp_path / "merged") / CARD).read_text()
    assert card.count("Mine.") == card.count(BEGIN) == 1


def test_a_run_of_all_weights_has_no_adapter_to_export(exports, tmp_path):
    """Such a run's folder is what save_pretrained writes."""
    for kind in ("merged", "remote-code"):
        folder = export_run(exports / "remote-code", kind, tmp_path / kind)
        again = load_file(folder / "model.safetensors")
        before = load_file(exports / kind / "model.safetensors")
        assert again.keys() == before.keys()
        assert all(torch.equal(again[name], before[name]) for name in before)
    with pytest.raises(LemoError, match=r"run has no adapter.*--to merged"):
        export_run(exports / "remote-code", "adapter", tmp_path / "adapter")


# Going on from an adapter.


def test_training_goes_on_from_an_adapter_with_its_predictors_and_thresholds(run, exports, source, tmp_path, capsys):
    block, under = read_lemo_files(run)
    settings = ("--selection", "threshold", "--attention_forward", "sparse", "--rope_type", "checkpoint", "--max_steps", "1")
    out = tmp_path / "out"
    ends(
        [
            "train",
            source / "recipe.yaml",
            "--adapter",
            exports / "adapter",
            *settings,
            "--learning_rate",
            "0",
            "--output_dir",
            out,
        ]
    )
    assert (out / "adapter_model.safetensors").read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    assert (out / PREDICTORS_FILE).read_bytes() == (run / PREDICTORS_FILE).read_bytes()
    found, positions = read_lemo_files(out)
    assert (found.thresholds, found.predictor_sizes) == (block.thresholds, block.predictor_sizes)
    assert positions == under
    before, after = (RunResults.read(folder / "results.json") for folder in (out, run))
    assert before.perplexity_before.value == pytest.approx(after.perplexity_after.value, rel=1e-6)
    assert before.kept_share is not None


def test_predictors_of_an_adapter_are_fitted_further_when_asked(run, exports, source, tmp_path):
    settings = ("--selection", "ratio", "--attention_forward", "sparse", "--max_steps", "1", "--predictor_documents", "1")
    out = tmp_path / "out"
    rate = ("--predictor_learning_rate", "1e-5")
    ends(["train", source / "recipe.yaml", "--adapter", exports / "adapter", *settings, *rate, "--output_dir", out])
    before, after = (load_file(folder / PREDICTORS_FILE) for folder in (run, out))
    assert not all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


def test_training_goes_on_from_a_remote_code_folder_under_other_settings(run, exports, source, tmp_path):
    block, _ = read_lemo_files(run)
    settings = LemoConfig(block_size=16, keep_ratio=0.4, selection="ratio")
    model = AutoLemoModelForCausalLM.from_pretrained(exports / "remote-code", lemo=settings)
    lemo, stored = model.config.lemo, load_file(run / PREDICTORS_FILE)
    assert (lemo.keep_ratio, lemo.thresholds, lemo.predictor_sizes) == (0.4, block.thresholds, block.predictor_sizes)
    assert all(torch.equal(value, stored[name]) for name, value in predictor_tensors(sparse_backbone(model)).items())
    for folder in (exports / "remote-code", exports / "adapter"):
        with pytest.raises(LemoError, match=r"pool blocks of 16, block_size=32 is asked for.*train predictors"):
            AutoLemoModelForCausalLM.from_pretrained(folder, lemo=LemoConfig(block_size=32, selection="ratio"))


def test_an_adapter_folder_loads_as_a_model_that_trains(run, logits):
    model = AutoLemoModelForCausalLM.from_pretrained(run, is_trainable=True, lemo=LemoConfig(block_size=16, keep_ratio=0.4))
    assert torch.equal(logits_of(model), logits)
    lemo, found = sparse_backbone(model).config.lemo, read_lemo_files(run)[0]
    assert (lemo.keep_ratio, lemo.thresholds, lemo.predictor_sizes) == (0.4, found.thresholds, found.predictor_sizes)
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    frozen = AutoLemoModelForCausalLM.from_pretrained(run)
    assert not any(weight.requires_grad for weight in frozen.parameters())


# What is refused.


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    return tmp_path / "run"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantise(copy):
    base = copy.with_name("base")
    shutil.copytree(copy / json.loads((copy / "adapter_config.json").read_text())["base_model_name_or_path"], base)
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    edit(copy / "adapter_config.json", base_model_name_or_path=str(base))


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def spoil(copy):
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}, copy / "adapter_model.safetensors")


def foreign(copy):
    # An adapter of a model with other layers.
    weights = load_file(copy / "adapter_model.safetensors")
    save_file({name.replace("layers.1", "layers.7"): each for name, each in weights.items()}, copy / "adapter_model.safetensors")


FAULTS = {
    "no adapter": (lambda copy: shutil.rmtree(copy) or copy.mkdir(), KINDS, "folder holds no adapter"),
    "no weights": (lambda copy: (copy / "adapter_model.safetensors").unlink(), KINDS, "adapter"),
    "no predictors": (lambda copy: (copy / PREDICTORS_FILE).unlink(), KINDS[::2], "train new ones"),
    "truncated predictors": (lambda copy: cut(copy / PREDICTORS_FILE), KINDS[::2], "corrupt or truncated"),
    "foreign predictors": (
        lambda copy: edit(copy / CONFIG_FILE, predictor_sizes=[[8] * 4] * 2),
        ("remote-code",),
        "or train new ones",
    ),
    "no block": (lambda copy: (copy / CONFIG_FILE).unlink(), KINDS, "the positions it was trained under are unknown"),
    "future block": (lambda copy: edit(copy / CONFIG_FILE, schema_version=99), KINDS, "upgrade lemo_hf"),
    "truncated adapter": (lambda copy: cut(copy / "adapter_model.safetensors"), KINDS, "corrupt or truncated"),
    "adapter of NaN": (spoil, KINDS[1:], "adapter cannot be merged"),
    "adapter of another model": (foreign, KINDS[1:], "does not fit the base model"),
    "quantised base": (quantise, KINDS[1:], "base model is quantised"),
    "base is gone": (
        lambda copy: edit(copy / "adapter_config.json", base_model_name_or_path="/nowhere/model"),
        KINDS[1:],
        "model folder does not exist; '/nowhere/model'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_damaged_run_is_refused_and_nothing_is_written(fault, copy, tmp_path):
    damage, kinds, says = FAULTS[fault]
    damage(copy)
    before = sorted(tmp_path.iterdir())
    for kind in kinds:
        with pytest.raises(LemoError) as error:
            export_run(copy, kind, tmp_path / "out")
        assert says in str(error.value)
        assert "\n" not in str(error.value)
        assert str(error.value).count("; ") >= 1
    assert sorted(tmp_path.iterdir()) == before


def test_missing_predictors_do_not_keep_the_weights_from_being_merged(copy, tmp_path, exports):
    (copy / PREDICTORS_FILE).unlink()
    edit(copy / CONFIG_FILE, selection="sampled")
    folder = export_run(copy, "merged", tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == (exports / "merged" / "model.safetensors").read_bytes()


def test_a_folder_that_holds_something_is_left_alone(run, exports, tmp_path, capsys):
    before = snapshot(exports / "adapter")
    ends(["export", run, "--to", "merged", "--output", exports / "adapter"], code=2)
    assert "output folder exists already" in capsys.readouterr().err
    assert snapshot(exports / "adapter") == before
    (tmp_path / "empty").mkdir()
    ends(["export", run, "--to", "adapter", "--output", tmp_path / "empty"])
    assert snapshot(tmp_path / "empty").keys() == before.keys()


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_an_export_that_breaks_off_leaves_nothing(error, run, tmp_path, monkeypatch):
    def breaks(self, folder, *args, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", breaks)
    with pytest.raises((LemoError, KeyboardInterrupt), match=r"room, and permission|^$"):
        export_run(run, "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{run}"], "add --to adapter"),
        (["{run}", "--to", "merged", "--public"], "add --push USER/NAME"),
        (["{run}/none", "--to", "merged"], "run folder does not exist"),
        (["{run}/checkpoint-2/optimizer.pt", "--to", "merged"], "run folder does not exist"),
    ],
    ids=["nothing to do", "public without push", "no run", "file"],
)
def test_bad_input_of_the_command_ends_in_one_line(arguments, says, run, capsys):
    ends(["export", *(each.format(run=run) for each in arguments)], code=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
