import json

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, atomic_path, load_lemo_files, read_lemo_files, save_lemo_files
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError
from lemo_hf.models.modeling_lemo_llama import LemoLlamaForCausalLM
from lemo_hf.models.pattern_predictor import PatternPredictor
from lemo_hf.registry import lemo_config_from

ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.fixture
def make_model(tiny_llama_config):
    def make(seed=0, **fields):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LemoLlamaForCausalLM(lemo_config_from(tiny_llama_config, LemoConfig(**{"block_size": 16, **fields})))

    return make


def predictors_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "lemo_predictor" in name}


def state_of(model):
    return predictors_of(model), model.config.lemo.to_dict()


def same_state(first, second):
    return first[1] == second[1] and all(torch.equal(first[0][name], second[0][name]) for name in first[0] | second[0])


def test_predictors_thresholds_and_settings_come_back(make_model, tmp_path):
    saved = make_model(0, keep_ratio=0.3, thresholds=[0.1, 0.2, 0.3], selection="threshold")
    inject_adapter_in_model(LoraConfig(target_modules="all-linear"), saved)
    save_lemo_files(saved, tmp_path)
    loaded = make_model(1)
    assert not same_state(state_of(saved), state_of(loaded))
    load_lemo_files(loaded, tmp_path)
    assert same_state(state_of(saved), state_of(loaded))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, PREDICTORS_FILE]


def test_pruned_sizes_come_back(make_model, tmp_path):
    saved = make_model()
    saved.model.layers[1].lemo_predictor = PatternPredictor(64, [5, 7, 9, 11], 32)
    saved.model.layers[1].lemo_predictor.reset_parameters()
    save_lemo_files(saved, tmp_path)
    loaded = make_model(1)
    load_lemo_files(loaded, tmp_path)
    assert loaded.model.layers[1].lemo_predictor.sizes == [5, 7, 9, 11]
    assert same_state(state_of(saved), state_of(loaded))


def test_config_of_the_longer_context_lies_beside_the_adapter(make_model, tiny_llama_config, tmp_path):
    tiny_llama_config.rope_parameters = ROPE
    tiny_llama_config.max_position_embeddings = 2048
    save_lemo_files(make_model(), tmp_path)
    block, base_config = read_lemo_files(tmp_path)
    assert base_config == {"rope_parameters": ROPE, "max_position_embeddings": 2048}
    assert block.block_size == 16


def test_a_stock_model_is_refused(tiny_llama, tmp_path):
    with pytest.raises(LemoConfigError, match="carries no LeMo"):
        save_lemo_files(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite_tensors(folder, change):
    tensors = load_file(folder / PREDICTORS_FILE)
    change(tensors)
    save_file(tensors, folder / PREDICTORS_FILE)


def rewrite_config(folder, **changes):
    values = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(values | changes))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


BAD_FILES = {
    "missing predictors": (lambda f: (f / PREDICTORS_FILE).unlink(), "does not exist"),
    "missing config": (lambda f: (f / CONFIG_FILE).unlink(), "does not exist"),
    "truncated data": (lambda f: cut(f / PREDICTORS_FILE, -100), "corrupt or truncated"),
    "truncated header": (lambda f: cut(f / PREDICTORS_FILE, 20), "corrupt or truncated"),
    "empty": (lambda f: cut(f / PREDICTORS_FILE, 0), "corrupt or truncated"),
    "absurd header": (lambda f: (f / PREDICTORS_FILE).write_bytes(b"\xff" * 64), "corrupt or truncated"),
    "missing tensor": (
        lambda f: rewrite_tensors(f, lambda t: t.pop("layers.2.key.matrices.0")),
        "layers.2.key.matrices.0 is missing",
    ),
    "foreign tensor": (lambda f: rewrite_tensors(f, lambda t: t.update(other=torch.zeros(1))), "needs no such tensor"),
    "other shape": (
        lambda f: rewrite_tensors(f, lambda t: t.update({"layers.0.query.matrices.0": torch.zeros(3, 4)})),
        r"is \(3, 4\), the model needs \(64, 32\)",
    ),
    "truncated config": (lambda f: cut(f / CONFIG_FILE, 40), "not JSON"),
    "absurd widths": (lambda f: rewrite_config(f, predictor_sizes=[[10**12] * 4] * 3), "between 1 and hidden_size 64; got"),
    "negative widths": (lambda f: rewrite_config(f, predictor_sizes=[[-1] * 4] * 3), "must list four widths per layer"),
    "layers too few": (lambda f: rewrite_config(f, predictor_sizes=[[32] * 4] * 2), "lists 2 layers, the model has 3"),
    "thresholds too few": (lambda f: rewrite_config(f, thresholds=[0.5]), "lists 1 layers"),
    "keep ratio": (lambda f: rewrite_config(f, keep_ratio=1.5), r"must be in \(0, 1\]"),
    "unknown setting": (lambda f: rewrite_config(f, keep_ratios=0.5), "did you mean 'keep_ratio'"),
    "newer schema": (lambda f: rewrite_config(f, schema_version=99), "schema_version 99"),
    "rope that is no mapping": (lambda f: rewrite_config(f, base_config={"rope_parameters": [1]}), "rope_parameters is no such"),
    "nested rope": (lambda f: rewrite_config(f, base_config={"rope_parameters": {"factor": {}}}), "rope_parameters is no such"),
    "context": (
        lambda f: rewrite_config(f, base_config={"max_position_embeddings": 10**30}),
        "max_position_embeddings is no such",
    ),
    "whole numbers": (
        lambda f: rewrite_tensors(f, lambda t: t.update({"layers.0.query.matrices.0": torch.zeros(64, 32, dtype=torch.int64)})),
        "matrices.0' is I64, predictors are float32",
    ),
    "not a number": (
        lambda f: rewrite_tensors(f, lambda t: t["layers.1.query.matrices.0"][3].fill_(torch.nan)),
        "layers.1.query.matrices.0 holds values that are not finite",
    ),
    "deeply nested config": (lambda f: (f / CONFIG_FILE).write_text('{"a":' * 10**5), "not JSON"),
    "endless number": (lambda f: (f / CONFIG_FILE).write_text('{"seed": ' + "9" * 5000 + "}"), "not JSON"),
    "endless config": (lambda f: (f / CONFIG_FILE).write_bytes(b" " * (2**24 + 1)), "too large for what it should hold"),
    "foreign base config": (lambda f: rewrite_config(f, base_config={"auto_map": {"x": "../y"}}), "base_config may hold"),
}


@pytest.mark.parametrize("damage", BAD_FILES, ids=lambda name: name.replace(" ", "-"))
def test_bad_files_are_refused_in_one_line_and_change_nothing(damage, make_model, tmp_path):
    save_lemo_files(make_model(0, keep_ratio=0.3), tmp_path)
    spoil, says = BAD_FILES[damage]
    spoil(tmp_path)
    model = make_model(1)
    before = state_of(model)
    with pytest.raises(LemoError, match=says) as refused:
        load_lemo_files(model, tmp_path)
    assert "\n" not in str(refused.value)
    assert same_state(before, state_of(model))


def test_predictors_of_another_width_are_refused(make_model, tiny_llama_config, tmp_path):
    save_lemo_files(make_model(), tmp_path)
    tiny_llama_config.hidden_size, tiny_llama_config.head_dim = 32, 8
    with pytest.raises(LemoError, match="predictors do not fit the model"):
        load_lemo_files(make_model(), tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "card.md"
    path.write_text("old")

    def write():
        with atomic_path(path) as partial:
            partial.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
