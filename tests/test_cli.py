import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from tiny_recipe import write_source
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lemo_hf import cli
from lemo_hf.evaluation.perplexity_metric import PerplexityMetric
from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, read_lemo_files
from lemo_hf.hub.model_card import RunResults
from lemo_hf.text_data import PackedDocuments, spread_samples


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tiny base model of context 64, its tokenizer, text and a recipe."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def trained(source):
    """The folder of a finished run of 3 steps, and what the command printed."""
    cli_ends(["train", str(source / "recipe.yaml")], code=0)
    return source / "out"


def cli_ends(arguments, code):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == code


@pytest.fixture
def refused(capsys):
    """Runs a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run(*arguments):
        capsys.readouterr()
        cli_ends([str(each) for each in arguments], code=2)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lemo: ") or "Traceback" in line]
        assert len(lines) == 1
        assert lines[0].count("; ") >= 1
        return lines[0]

    return run


def test_train_writes_the_files_of_a_run(trained):
    files = {path.name for path in trained.iterdir()}
    assert files >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        PREDICTORS_FILE,
        CONFIG_FILE,
        "README.md",
        "results.json",
        "recipe.yaml",
        "tokenizer.json",
        "checkpoint-2",
        "checkpoint-3",
    }
    assert not any(name.endswith((".partial", ".bin")) for name in files)
    assert all(name.endswith("weight") for name in load_file(trained / "adapter_model.safetensors"))
    results = RunResults.read(trained / "results.json")
    assert results.steps == 3
    assert results.perplexity_after.tokens == results.perplexity_before.tokens > 0
    assert results.perplexity_after.value < results.perplexity_before.value
    text = (trained / "README.md").read_text()
    assert f"{results.perplexity_after.value:.3f}" in text
    assert ModelCard(text).data.library_name == "peft"
    assert str(trained.parent) not in text
    assert read_lemo_files(trained)[1]["max_position_embeddings"] == 128
    assert AutoTokenizer.from_pretrained(trained).model_max_length == 128  # of a base with a context of 64


def test_every_layers_kept_share_is_in_the_results(trained):
    shares = RunResults.read(trained / "results.json").kept_share
    assert len(shares) == 2
    assert all(0.3 < share < 0.9 for share in shares)


def test_recall_of_predicted_selection_reaches_results_and_card(source, tmp_path):
    out = tmp_path / "out"
    form = ["--selection", "ratio", "--attention_forward", "sparse", "--predictor_documents", "2"]
    cli_ends(["train", str(source / "recipe.yaml"), "--output_dir", str(out), *form], code=0)
    results = RunResults.read(out / "results.json")
    assert all(0 <= recall <= 1 for recall in results.recall)
    assert 0 < results.recall_chance < 1
    text = (out / "README.md").read_text()
    for layer in range(2):
        assert f"| {layer} | {results.kept_share[layer]:.3f} | {results.recall[layer]:.3f} |" in text
    assert results.lemo["predictor_sizes"] == read_lemo_files(out)[0].predictor_sizes


def test_eval_is_the_adapter_on_the_stock_model(trained, source, capsys, tmp_path):
    out = tmp_path / "eval.json"
    data = ["--data", str(source / "held_out.jsonl")]
    cli_ends(["eval", str(trained), *data, "--sparse", "--output", str(out)], code=0)
    shown = capsys.readouterr().out
    assert "dense perplexity at 128 tokens" in shown
    assert "sparse-forward perplexity, optimistic" in shown
    values = json.loads(out.read_text())
    after = RunResults.read(trained / "results.json").perplexity_after
    assert values["dense_perplexity"]["value"] == pytest.approx(after.value, rel=1e-5)
    assert values["dense_perplexity"]["low"] < after.value < values["dense_perplexity"]["high"]

    # As a reader of the card loads it: the stock class, PEFT, and the config fields that the card names.
    base = AutoModelForCausalLM.from_pretrained(source / "base", **read_lemo_files(trained)[1])
    model = PeftModel.from_pretrained(base, trained).eval()
    assert model.config.model_type == "llama"
    assert not any("predictor" in name for name, _ in model.named_parameters())


def test_eval_on_a_cpu_is_in_float32_and_says_so(trained, source, capsys, tmp_path):
    """The run trained and measured a float32 model; a base that was saved in 16 bits must not change that."""
    shutil.copytree(source / "base", tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(source / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    adapter = tmp_path / "out" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    out = tmp_path / "eval.json"
    for name, length in (("out", 128), ("base", 64)):
        cli_ends(["eval", str(tmp_path / name), "--data", str(source / "held_out.jsonl"), "--output", str(out)], code=0)
        assert f"dense perplexity at {length} tokens, float32: " in capsys.readouterr().out
        assert json.loads(out.read_text())["dtype"] == "float32"


def test_eval_computes_through_the_metric(source, capsys, monkeypatch, tmp_path):
    def compute(self, predictions, references):
        return {"dense_perplexity": 123.456, "dense_loss": 1.0, "tokens": sum(references), "documents": len(references)}

    monkeypatch.setattr(PerplexityMetric, "_compute", compute)
    out = tmp_path / "eval.json"
    cli_ends(["eval", str(source / "base"), "--data", str(source / "held_out.jsonl"), "--output", str(out)], code=0)
    assert "float32: 123.456 (" in capsys.readouterr().out
    values = json.loads(out.read_text())
    assert values["dense_perplexity"]["value"] == 123.456


def test_eval_takes_a_plain_model_and_python_sources(source, capsys):
    cli_ends(["eval", str(source / "base"), "--python", "evaluate", "--max-samples", "2"], code=0)
    assert "dense perplexity at 64 tokens" in capsys.readouterr().out


def test_a_run_goes_on_from_its_newest_checkpoint(trained, source, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(trained, folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy note.\n")
    recipe = str(source / "recipe.yaml")
    cli_ends(["train", recipe, "--output_dir", str(folder), "--max_steps", "4", "--resume_from_checkpoint", "last"], code=0)
    assert RunResults.read(folder / "results.json").steps == 4
    assert "My note." in (folder / "README.md").read_text()


def test_overrides_reach_the_run_in_both_spellings(source, tmp_path, monkeypatch):
    seen = {}

    def record(recipe):
        seen.update(recipe.values)
        return RunResults("m", "t", 128, {}, steps=0, train_seconds=0.0)

    monkeypatch.setattr("lemo_hf.recipe.running.run_recipe", record)
    cli_ends(["train", str(source / "recipe.yaml"), "--keep_ratio", "0.3", "--max_steps=-1"], code=0)
    assert (seen["keep_ratio"], seen["max_steps"], seen["seq_len"]) == (0.3, -1, 128)


BAD_RUNS = {
    "unknown field": (["--learning_rat", "1"], "did you mean 'learning_rate'"),
    "wrong type": (["--max_steps", "many"], "max_steps must be a whole number; got 'many'"),
    "keep ratio 0": (["--keep_ratio", "0"], "keep_ratio is the share of blocks kept and must be in (0, 1]; got 0"),
    "keep ratio above 1": (["--keep_ratio", "1.5"], "must be in (0, 1]; got 1.5"),
    "keep ratio per layer": (["--keep_ratio", "0.5,0.5,0.5"], "keep_ratio lists 3 layers, the model has 2"),
    "missing data": (["--data_files", "none.txt"], "data file does not exist; 'none.txt'"),
    "empty data": (["--data_files", "{folder}/empty.txt"], "data is empty"),
    "too little data": (["--data_files", "{folder}/short.txt"], "data does not fill one sample of seq_len=128"),
    "nothing held out": (["--held_out_files", "null", "--held_out_share", "0.0001"], "held_out_share leaves no document"),
    "sample shorter than a block": (["--seq_len", "8"], "seq_len 8 is shorter than one block (block_size=16)"),
    "context too long": (["--rope_type", "checkpoint"], "seq_len 128 is longer than the model's context of 64"),
    "missing model": (["--model", "{folder}/none"], "model folder does not exist"),
    "unsupported architecture": (["--model", "{folder}/gpt2"], "no LeMo classes for model type 'gpt2'; supported: llama"),
    "truncated weights": (["--model", "{folder}/truncated"], "file is corrupt or truncated"),
    "missing predictors": (["--predictors", "{folder}/base"], "name a folder that a LeMo run saved"),
    "predictors that do not fit": (["--predictors", "{folder}/foreign"], "predictors do not fit the model"),
    "truncated predictors": (["--predictors", "{folder}/cut"], "file is corrupt or truncated"),
    "adapter on nothing": (["--lora_target_modules", "w_proj"], "adapter cannot be added"),
    "no checkpoint": (["--resume_from_checkpoint", "last"], "no checkpoint to go on from"),
    "no value": (["--max_steps"], "override has no value; '--max_steps'"),
    "stray word": (["keep_ratio", "0.5"], "unexpected argument; 'keep_ratio'"),
    "given twice": (["--seed", "1", "--seed", "2"], "override is given twice; 'seed'"),
}


@pytest.fixture(scope="module")
def bad_inputs(source, trained):
    """Beside the good inputs, the bad ones that a run can be pointed at."""
    (source / "empty.txt").write_text(" \n")
    (source / "short.txt").write_text("too short")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(source / "gpt2")
    shutil.copytree(source / "base", source / "truncated")
    weights = source / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name in ("foreign", "cut"):
        (source / name).mkdir()
        for file in (CONFIG_FILE, PREDICTORS_FILE):
            shutil.copy(trained / file, source / name / file)
    block = json.loads((source / "foreign" / CONFIG_FILE).read_text())
    (source / "foreign" / CONFIG_FILE).write_text(json.dumps(block | {"predictor_sizes": [[8, 8, 8, 8]] * 5}))
    predictors = source / "cut" / PREDICTORS_FILE
    predictors.write_bytes(predictors.read_bytes()[:-10])
    return source


@pytest.mark.parametrize("case", BAD_RUNS, ids=lambda name: name.replace(" ", "-"))
def test_bad_input_ends_in_one_line_and_leaves_nothing(case, bad_inputs, tmp_path, refused):
    overrides, says = BAD_RUNS[case]
    out = tmp_path / "out"
    arguments = ["train", bad_inputs / "recipe.yaml", "--output_dir", out]
    assert says in refused(*arguments, *(each.format(folder=bad_inputs) for each in overrides))
    assert not out.exists()


def test_a_folder_with_another_run_is_refused_and_untouched(trained, source, refused):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert "output folder holds another run" in refused("train", source / "recipe.yaml")
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_bad_input_of_eval_ends_in_one_line(bad_inputs, trained, tmp_path, refused):
    data = ["--data", bad_inputs / "held_out.jsonl"]
    assert "one of --data, --dataset and --python; got none of them" in refused("eval", trained)
    assert "got --data and --python" in refused("eval", trained, *data, "--python", "evaluate")
    assert "does not exist" in refused("eval", trained, "--data", "none.txt")
    assert "model folder does not exist" in refused("eval", bad_inputs / "none", *data)
    assert "longer than the model's context of 128" in refused("eval", trained, *data, "--seq-len", "256")
    assert "is a stock one" in refused("eval", bad_inputs / "base", *data, "--sparse")
    assert "file is corrupt or truncated" in refused("eval", bad_inputs / "truncated", *data)
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut, ignore=shutil.ignore_patterns("checkpoint-*"))
    (cut / PREDICTORS_FILE).write_bytes(b"\x00" * 30)
    assert "corrupt or truncated" in refused("eval", cut, *data, "--sparse")
    (cut / "adapter_model.safetensors").write_bytes(b"\x00" * 30)
    assert "corrupt or truncated" in refused("eval", cut, *data)


def test_fewer_samples_still_come_from_the_whole_text():
    samples = PackedDocuments([{"input_ids": torch.tensor([number])} for number in range(10)], 1)
    assert [int(each["input_ids"]) for each in spread_samples(samples, 4).samples] == [0, 2, 5, 7]
    assert len(spread_samples(samples, 99)) == len(spread_samples(samples, None)) == 10


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["train", "eval"]),
        (["train", "--help"], ["--keep_ratio", "--seq_len", "per_device_train_batch_size", "lemo train recipes/"]),
        (["eval", "--help"], ["--sparse", "optimistic", "lemo eval outputs/"]),
    ],
    ids=lambda value: " ".join(value) if "--help" in value else None,
)
def test_help_shows_commands_options_and_examples(arguments, shown, capsys):
    cli_ends(arguments, code=0)
    text = capsys.readouterr().out
    for part in shown:
        assert part in text


def test_the_command_is_light_until_it_works():
    code = "import sys, lemo_hf.cli; print(int('datasets' in sys.modules or 'transformers.trainer' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0"
