import dataclasses
from pathlib import Path

import pytest
import torch

from lemo_hf.base_model.recipe import BaseModelRecipe
from lemo_hf.errors import LemoError
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.recipe import DataFields, LoraFields, ModelFields, describe_fields, read_recipe, recipe_fields
from lemo_hf.training.arguments import LemoTrainingArguments

RECIPES = Path(__file__).parent.parent / "recipes"
MINIMAL = "model: some/model\nseq_len: 256\npython_packages: [networkx]\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(more="", whole=MINIMAL):
        path = tmp_path / "mine.yaml"
        path.write_text(whole + more)
        return path

    return write


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_what_it_needs(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Memory:" in header
    assert f"recipes/{path.name}" in header  # the command
    if path.stem.startswith("base_"):
        assert BaseModelRecipe.load(path).packages
        return
    recipe = read_recipe(path)
    if recipe.values.get("use_cpu") or torch.cuda.is_available():
        assert recipe.training_arguments().max_steps == recipe.values["max_steps"]
    assert read_recipe(path, {"seed": "7"}).lemo.seed == 7


def test_fields_are_those_of_the_dataclasses():
    parts = (ModelFields, DataFields, LoraFields, LemoConfig, LemoTrainingArguments)
    names = [field.name for part in parts for field in dataclasses.fields(part) if field.init]
    assert set(recipe_fields()) == set(names)
    assert {name for name in names if names.count(name) > 1} == {"seed"}  # one name, one meaning


def test_help_lists_every_field_and_describes_ours():
    text = describe_fields()
    for name, field in recipe_fields().items():
        assert name in text
        assert field.description, f"{name} has no description"


@pytest.mark.parametrize(
    ("given", "nearest"), [("learning_rat", "learning_rate"), ("keep-ratio", "keep_ratio"), ("selectoin", "selection")]
)
def test_unknown_field_is_refused_with_the_nearest_name(recipe_file, given, nearest):
    with pytest.raises(LemoError, match=f"no field '{given}'.*did you mean '{nearest}'") as in_file:
        read_recipe(recipe_file(f"{given}: 1\n"))
    assert "\n" not in str(in_file.value)
    with pytest.raises(LemoError, match=f"did you mean '{nearest}'"):
        read_recipe(recipe_file(), {given: "1"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("learning_rate: fast", "learning_rate must be a number; got 'fast'"),
        ("learning_rate: '3'", "a number; got '3'"),
        ("learning_rate: true", "a number; got True"),
        ("max_steps: 5.5", "a whole number; got 5.5"),
        ("bf16: yes", "true or false; got 'yes'"),
        ("layout: rows", "one of packed, windows; got 'rows'"),
        ("eval_strategy: sometimes", "one of no, steps, epoch; got 'sometimes'"),
        ("data_files: corpus.txt", "a list of texts or null; got 'corpus.txt'"),
        ("thresholds: [a]", "a list of numbers or null"),
        ("lora_target_modules: all", "all-linear"),
        ("schema_version: null", "a whole number; got None"),
    ],
)
def test_wrong_type_is_refused_in_one_line(recipe_file, line, says):
    with pytest.raises(LemoError) as refused:
        read_recipe(recipe_file(line + "\n"))
    message = str(refused.value)
    assert says in message
    assert message.count("; ") >= 2
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("max_steps", "-1", -1),
        ("bf16", "false", False),
        ("eval_strategy", "no", "no"),
        ("run_name", "123", "123"),
        ("keep_ratio", "0.3,0.5", [0.3, 0.5]),
        ("keep_ratio", "[0.3, 0.5]", [0.3, 0.5]),
        ("lora_target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("sampling_temperature", "null", None),
        ("lr_scheduler_kwargs", "{min_lr: 1e-6}", {"min_lr": 1e-6}),
    ],
)
def test_overrides_are_read_by_the_type_of_their_field(recipe_file, name, text, value):
    read = read_recipe(recipe_file(f"{name}: null\n" if name == "sampling_temperature" else ""), {name: text}).values[name]
    assert read == value
    assert type(read) is type(value)


def test_wrong_override_is_refused(recipe_file):
    with pytest.raises(LemoError, match="max_steps must be a whole number; got 'many' on the command line"):
        read_recipe(recipe_file(), {"max_steps": "many"})


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        ("- a\n", "not a list of 'field: value' lines"),
        ("", "not a list of 'field: value' lines"),
        ("model: [1\n", "not YAML"),
        (MINIMAL + "model: other\n", "given twice"),
        ("seq_len: 256\npython_packages: [a]\n", "lacks the field 'model'"),
        ("model: a\nseq_len: 256\n", "got none of them"),
        (MINIMAL + "dataset: b\n", "got dataset, python_packages"),
        (MINIMAL.replace("256", "63"), "seq_len 63 is shorter than one block (block_size=64)"),
        (MINIMAL + "held_out_share: 1.0\n", "held_out_share must be in [0, 1)"),
        (MINIMAL + "max_eval_samples: 0\n", "max_eval_samples must be at least 1"),
        (MINIMAL + "lora_r: 0\n", "lora_r must be at least 1"),
    ],
)
def test_recipes_that_make_no_run_are_refused_in_one_line(recipe_file, whole, says):
    with pytest.raises(LemoError) as refused:
        read_recipe(recipe_file(whole=whole))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.01", "[0.5, 2]"])
def test_keep_ratio_outside_its_domain_is_refused(recipe_file, ratio):
    with pytest.raises(LemoConfigError, match=r"must be in \(0, 1\]; got"):
        read_recipe(recipe_file(f"keep_ratio: {ratio}\n"))


def test_missing_recipe_is_refused(tmp_path):
    with pytest.raises(LemoError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")


def test_values_reach_their_dataclasses_and_seed_reaches_both(recipe_file):
    recipe = read_recipe(recipe_file("keep_ratio: 0.3\nlora_r: 4\nmax_steps: 3\nseed: 5\nuse_cpu: true\n"))
    arguments = recipe.training_arguments()
    assert (recipe.lemo.keep_ratio, recipe.lora.lora_r, arguments.max_steps) == (0.3, 4, 3)
    assert recipe.lemo.seed == arguments.seed == recipe.seed == 5
    assert Path(arguments.output_dir) == recipe.output_dir == Path("outputs/mine")


def test_what_transformers_refuses_is_one_line(recipe_file):
    with pytest.raises(LemoError, match="training arguments are refused") as refused:
        read_recipe(recipe_file("use_cpu: true\ndebug: sometimes\n")).training_arguments()
    assert "\n" not in str(refused.value)


def test_written_recipe_gives_the_same_run_and_no_secret(recipe_file, tmp_path):
    recipe = read_recipe(
        recipe_file("learning_rate: 1e-4\neval_strategy: no\nhub_token: hf_secret\n"), {"output_dir": str(tmp_path)}
    )
    text = recipe.to_yaml()
    assert "hf_secret" not in text
    again = read_recipe(recipe_file(whole=text))
    assert again.values == {name: value for name, value in recipe.values.items() if name != "hub_token"}


def test_public_recipe_names_no_local_folder(recipe_file, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("text")
    whole = f"model: {tmp_path}\nseq_len: 256\ndata_files: [{corpus}]\noutput_dir: {tmp_path}/out\n"
    whole += f"fsdp_config: {tmp_path}/fsdp.json\ntrackio_space_id: ~/space\nlr_scheduler_kwargs: {{table: {tmp_path}/rates}}\n"
    text = read_recipe(recipe_file(whole=whole)).to_yaml(public=True)
    assert str(tmp_path.parent) not in text
    for kept in ("corpus.txt", "fsdp.json", "trackio_space_id: space", "rates"):
        assert kept in text


def test_data_are_named_without_their_folders(tmp_path):
    local = DataFields(seq_len=256, dataset=str(tmp_path), held_out_files=[str(tmp_path / "held_out.txt")])
    assert local.source == f"data set {tmp_path.name}, train"
    assert local.hub_datasets == []
    assert local.held_out_source == "local files held_out.txt"
    hub = DataFields(seq_len=256, dataset="org/books", dataset_config="long")
    assert (hub.source, hub.hub_datasets, hub.held_out_source) == ("data set org/books (long), train", ["org/books"], "")


def test_languages_are_those_given_or_known():
    assert DataFields(seq_len=256, python_packages=["stdlib"]).languages == ["code"]
    assert DataFields(seq_len=256, dataset="org/books", language=["en"]).languages == ["en"]
    assert DataFields(seq_len=256, dataset="org/books").languages == []
