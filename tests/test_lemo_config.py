import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from lemo_hf.models import lemo_config
from lemo_hf.models.configuration_lemo_llama import LemoLlamaConfig
from lemo_hf.models.lemo_config import SCHEMA_VERSION, LemoConfig, LemoConfigError
from lemo_hf.registry import lemo_config_from

CHANGED = {
    "enabled": False,
    "block_size": 32,
    "keep_ratio": [0.5, 0.25],
    "mlp_keep_ratio": 0.25,
    "memory_budget": "40GiB",
    "selection": "threshold",
    "thresholds": [0.1, -0.2],
    "sampling_temperature": 2.0,
    "draws": "by_layer",
    "score_source": "true",
    "block_reduction": "mean",
    "attention_forward": "sparse",
    "nearby_tokens": 128,
    "attention_pattern": ["full", "block_sparse"],
    "group_size": 8,
    "pattern_share": 0.5,
    "checkpoint": "kept_rows",
    "offload": "sensitive",
    "offload_budget": "40GiB",
    "dense_layers": [0, -1],
    "segment_size": 17,
    "predictor_rank": 4,
    "predictor_features": 6,
    "predictor_sizes": [[4], [6]],
    "seed": 9,
}


def test_every_field_survives_json():
    config = LemoConfig(**CHANGED)
    assert set(CHANGED) | {"schema_version"} == set(config.to_dict()), "a new field: change it in CHANGED too"
    assert all(config.to_dict()[name] != value for name, value in LemoConfig().to_dict().items() if name != "schema_version")
    assert LemoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_nothing_given_is_the_defaults():
    assert LemoConfig.from_dict(None) == LemoConfig.from_dict({}) == LemoConfig()


@pytest.mark.parametrize(
    ("name", "nearest"), [("keep_ration", "keep_ratio"), ("blocksize", "block_size"), ("attention_foward", "attention_forward")]
)
def test_an_unknown_field_is_named_with_the_nearest(name, nearest):
    with pytest.raises(LemoConfigError, match=f"no field '{name}'; did you mean '{nearest}'"):
        LemoConfig.from_dict({name: 1})


def test_an_unknown_field_without_a_near_one_lists_all():
    with pytest.raises(LemoConfigError, match="known fields: attention_forward, attention_pattern, block_reduction"):
        LemoConfig.from_dict({"zzz": 1})


def test_a_newer_schema_is_named_before_its_new_fields():
    with pytest.raises(LemoConfigError, match=f"schema_version {SCHEMA_VERSION + 1}.*upgrade lemo_hf"):
        LemoConfig.from_dict({"schema_version": SCHEMA_VERSION + 1, "field_of_the_future": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"keep_ratio": 0},
        {"keep_ratio": 0.0},
        {"keep_ratio": -0.5},
        {"keep_ratio": 1.0001},
        {"keep_ratio": float("nan")},
        {"keep_ratio": "0.5"},
        {"keep_ratio": True},
        {"keep_ratio": [0.5, 0.0]},
        {"keep_ratio": []},
        {"nearby_tokens": -1},
        {"attention_forward": "kept_keys", "nearby_tokens": 0},
        {"nearby_tokens": 12.5, "attention_forward": "sparse"},
        {"memory_budget": 40},
        {"memory_budget": "much"},
        {"memory_budget": "-1GiB"},
        {"offload": "all"},
        {"offload": "sensitive", "offload_budget": "-1GiB"},
        {"offload": "sensitive", "offload_budget": "0GiB"},
        {"offload": "sensitive", "offload_budget": 40},
        {"offload": "sensitive", "offload_budget": "much"},
        {"offload_budget": "40GiB"},
        {"block_size": 0},
        {"block_size": 64.0},
        {"block_size": True},
        {"segment_size": -1},
        {"predictor_rank": 0},
        {"predictor_features": None},
        {"selection": "best"},
        {"selection": None},
        {"score_source": "guessed"},
        {"attention_forward": "Sparse"},
        {"checkpoint": "all"},
        {"sampling_temperature": 0},
        {"sampling_temperature": -1.0},
        {"sampling_temperature": float("nan")},
        {"sampling_temperature": "hot"},
        {"schema_version": "1"},
        {"thresholds": 0.5},
        {"thresholds": [0.1, None]},
        {"thresholds": [float("nan")]},
        {"dense_layers": 1},
        {"dense_layers": [0.5]},
        {"enabled": "no"},
        {"seed": 1.5},
        {"seed": "0"},
        {"predictor_sizes": [3]},
    ],
    ids=str,
)
def test_a_value_outside_its_domain_is_refused_in_one_line(change):
    with pytest.raises(LemoConfigError) as error:
        LemoConfig(**change)
    message = str(error.value)
    assert "\n" not in message
    assert next(iter(change)) in message
    assert message.count(";") >= 1, "fact; value; fix"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LemoConfig)])
def test_no_field_takes_just_anything(name):
    with pytest.raises(LemoConfigError, match=f"{name}.*; got <object object at .*; "):
        LemoConfig(**{name: object()})


def test_update_is_all_or_nothing():
    config = LemoConfig()
    with pytest.raises(LemoConfigError):
        config.update(block_size=32, keep_ratio=2.0)
    assert config == LemoConfig()
    config.update(block_size=32, keep_ratio=0.25)
    assert (config.block_size, config.keep_ratio) == (32, 0.25)


def test_update_names_an_unknown_field():
    with pytest.raises(LemoConfigError, match="did you mean 'keep_ratio'"):
        LemoConfig().update(keep_rato=0.3)


@pytest.mark.parametrize(
    "change", [{"keep_ratio": [0.5]}, {"thresholds": [0.1] * 4}, {"predictor_sizes": [[1, 1, 1, 1]]}], ids=str
)
def test_lists_by_layer_must_fit_the_model(change):
    with pytest.raises(LemoConfigError, match="the model has 3"):
        LemoLlamaConfig(num_hidden_layers=3, lemo=LemoConfig(**change))


@pytest.mark.parametrize("layer", [3, -4])
def test_dense_layers_must_exist(layer):
    with pytest.raises(LemoConfigError, match=f"names layer {layer}, the model has 3"):
        LemoConfig(dense_layers=[layer]).validate_for(3)


def test_dense_layers_count_from_the_end_too():
    config = LemoConfig(dense_layers=[0, -1])
    assert [config.is_dense(layer, 4) for layer in range(4)] == [True, False, False, True]
    assert LemoConfig(keep_ratio=[1, 0.5]).is_dense(0, 2)
    assert not LemoConfig(keep_ratio=1, selection="threshold").is_dense(0, 2)


@pytest.mark.parametrize(
    ("fields", "scores", "predictors"),
    [
        ({}, False, False),
        ({"sampling_temperature": 1.0}, True, True),
        ({"selection": "ratio"}, True, True),
        ({"selection": "threshold"}, True, True),
        ({"selection": "ratio", "score_source": "true"}, True, False),
    ],
)
def test_what_a_step_needs(fields, scores, predictors):
    config = LemoConfig(**fields)
    assert (config.needs_scores, config.needs_predictors) == (scores, predictors)


def test_the_model_config_writes_the_whole_block_and_reads_it_back(tmp_path):
    for lemo in (LemoConfig(), LemoConfig(**CHANGED)):
        LemoLlamaConfig(num_hidden_layers=2, lemo=lemo).save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        # Defaults are written too: a later release may change them, a saved model must not change with it.
        assert written["lemo"] == lemo.to_dict()
        assert written["model_type"] == "lemo_llama"
        again = LemoLlamaConfig.from_pretrained(tmp_path)
        assert isinstance(again.lemo, LemoConfig)
        assert again.lemo == lemo


def test_one_block_is_shared_by_reference():
    lemo = LemoConfig()
    config = LemoLlamaConfig(num_hidden_layers=2, lemo=lemo)
    config.lemo.update(keep_ratio=0.3)
    assert lemo.keep_ratio == 0.3


def test_a_stock_config_keeps_its_values():
    stock = LlamaConfig(
        num_attention_heads=8, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, rms_norm_eps=1e-3
    )
    config = lemo_config_from(stock, LemoConfig(keep_ratio=0.25))
    assert config.architectures == ["LemoLlamaForCausalLM"]
    assert config.lemo.keep_ratio == 0.25
    ignored = {"lemo", "architectures", "model_type"}
    assert {k: v for k, v in config.to_dict().items() if k not in ignored} == {
        k: v for k, v in stock.to_dict().items() if k not in ignored
    }


def test_a_block_of_another_copy_of_the_class_is_read(tmp_path, monkeypatch):
    """Remote code has its own copies of these files; whoever loads it passes this package's block."""
    copies = tmp_path / "copied_code"
    copies.mkdir()
    for path in Path(lemo_config.__file__).parent.glob("lemo_config*.py"):
        shutil.copy(path, copies)
    monkeypatch.syspath_prepend(tmp_path)
    remote = importlib.import_module("copied_code.lemo_config")
    read = remote.LemoConfig.from_dict(LemoConfig(**CHANGED))
    assert type(read) is remote.LemoConfig
    assert read.to_dict() == LemoConfig(**CHANGED).to_dict()
    with pytest.raises(LemoConfigError, match="must be a mapping; got list"):
        LemoConfig.from_dict([])


@pytest.mark.parametrize(("form", "nearby"), [("exact", None), ("sparse", 0)])
def test_a_block_of_version_1_says_no_nearby_tokens_by_a_0(form, nearby):
    block = LemoConfig(attention_forward=form).to_dict() | {"schema_version": 1, "nearby_tokens": 0}
    found = LemoConfig.from_dict(block)
    assert (found.nearby_tokens, found.schema_version) == (nearby, SCHEMA_VERSION)
    assert LemoConfig.from_dict(LemoConfig(attention_forward=form, nearby_tokens=0).to_dict()).nearby_tokens == 0
