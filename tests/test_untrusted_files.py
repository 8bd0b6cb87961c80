"""Files from strangers: whatever they hold ends in one readable line before anything large is allocated, and runs no code."""

import json
import math
import string
import struct

import pytest
import torch
from folders_to_spoil import is_one_line
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from references.tiny_models import lemo_model, stock_model

from lemo_hf.errors import LemoError
from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, load_lemo_files, read_lemo_files, save_lemo_files
from lemo_hf.models.configuration_lemo_llama import LemoLlamaConfig
from lemo_hf.models.lemo_config import LemoConfig, LemoConfigError

FIELDS = sorted(LemoConfig().to_dict())
# What json.loads can return, with a liking for what breaks programs.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2, 64, 2**31, 2**63, 10**18, 10**400, -(10**30)]),
    st.floats(),
    st.sampled_from(["sampled", "ratio", "threshold", "exact", "sparse", "kept_keys", "true", "none", "kept_rows", ""]),
    st.text(max_size=20),
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3))
# Values near the edge of what a field takes, so that an example is not refused for its first field alone.
NEAR = st.one_of(
    st.sampled_from([1, 8, 32, 33, 2**31 - 1, 0.5, 1.0, 1e308, math.inf, math.nan, 10**400, True]),
    st.lists(st.sampled_from([0.5, 1, -1, 0, math.inf, math.nan, 10**400, True]), min_size=1, max_size=3),
    st.lists(st.lists(st.sampled_from([1, 8, 32, 33, 0, True]), min_size=3, max_size=5), min_size=2, max_size=2),
)
BLOCKS = st.dictionaries(st.sampled_from([*FIELDS, "keep_ration", "base_config"]), NEAR | JSON, max_size=3)
QUICK = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(values=BLOCKS | JSON)
@example(values={"predictor_rank": 33})
@example(values={"predictor_features": 33})
@example(values={"predictor_sizes": [[8, 8, 8, 8], [8, 8, 8, 33]]})
@example(values={"thresholds": [0.5, math.inf]})
@example(values={"thresholds": [0.5, 10**400]})
@example(values={"sampling_temperature": math.inf})
@example(values={"seed": 2**63})
@example(values={"block_size": 2**31})
def test_any_block_is_read_or_refused_in_one_line(values):
    refused = None
    try:
        lemo = LemoLlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, lemo=values).lemo
    except LemoConfigError as error:
        refused = error
    if refused is not None:
        assert is_one_line(refused)
        return
    assert 0 < min(lemo.ratio_of(layer) for layer in range(2)) <= 1
    assert all(map(math.isfinite, [*(lemo.thresholds or []), lemo.sampling_temperature or 1.0]))
    # What a model of this block allocates beyond a stock one: two networks of three matrices a layer.
    widths = lemo.predictor_sizes or [[lemo.predictor_rank] * 4] * 2
    assert all(1 <= width <= 32 for sizes in widths for width in (*sizes, lemo.predictor_features))
    for size in (lemo.block_size, lemo.segment_size, lemo.seed):
        torch.tensor(size)  # fits 64 bits


def test_a_block_of_any_size_is_refused_in_one_line():
    for values in (
        {"thresholds": [math.nan] * 10**5},
        {"keep_ratio": [2.0] * 10**5},
        {"dense_layers": [0] * 10**5},
        {"predictor_sizes": [[[[[[[[1]]]]]]]] * 10**5},
        {"x" * 10**6: 1},
        {"seed": 10**4000},
        {"selection": "x" * 10**6},
        {"seed": json.loads("[" * 500 + "]" * 500)},
    ):
        with pytest.raises(LemoConfigError) as error:
            LemoLlamaConfig(num_hidden_layers=2, lemo=values)
        assert is_one_line(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """LeMo files of a tiny model as bytes, by name."""
    folder = tmp_path_factory.mktemp("saved")
    save_lemo_files(lemo_model(stock_model()), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def target():
    return lemo_model(stock_model(1))


def state_of(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items() if "lemo_predictor" in name}
    return tensors, model.config.lemo.to_dict()


def loads_or_changes_nothing(model, folder):
    """Whether the files in `folder` were taken; if not, the error was one line and the model is what it was."""
    tensors, block = state_of(model)
    refused = None
    try:
        load_lemo_files(model, folder)
    except LemoError as error:
        refused = error
    after, block_after = state_of(model)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in after.values())
    if refused is not None:
        assert is_one_line(refused)
        assert block == block_after
        assert tensors.keys() == after.keys()
        assert all(torch.equal(tensors[name], after[name]) for name in tensors)
    return refused is None


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


@QUICK
@given(data=st.data())
def test_damaged_predictors_are_refused_or_harmless(data, saved, target, tmp_path):
    content = bytearray(saved[PREDICTORS_FILE])
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the header, where a byte decides about shapes and places.
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from(string.digits.encode()))
    end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    write(tmp_path, {**saved, PREDICTORS_FILE: bytes(content[:end])})
    loads_or_changes_nothing(target, tmp_path)


DTYPES = ("F32", "I32", "U32", "F64", "BF16", "F16", "I64", "U8", "BOOL", "F4", "X")  # two as wide as float32
SIZES = st.integers(0, 70) | st.sampled_from([2**31, 2**62, 2**64, -1])


@QUICK
@given(data=st.data())
def test_headers_of_any_shape_and_dtype_are_refused(data, saved, target, tmp_path):
    header = json.loads(saved[PREDICTORS_FILE][8 : 8 + struct.unpack("<Q", saved[PREDICTORS_FILE][:8])[0]])
    name = data.draw(st.sampled_from([each for each in header if each != "__metadata__"]))
    entry = header[name]
    if data.draw(st.booleans()):
        del header[name]
        name = data.draw(st.sampled_from([name.replace("layers.1", "layers.2"), "x", "layers.0\nx"]) | st.text(max_size=50))
    changed = {
        "dtype": data.draw(st.sampled_from(DTYPES)),
        "shape": data.draw(st.just(entry["shape"]) | st.lists(SIZES, max_size=4)),
        "data_offsets": data.draw(st.just(entry["data_offsets"]) | st.lists(SIZES, min_size=2, max_size=2)),
    }
    if header.get(name) == changed:
        return
    text = json.dumps({**header, name: changed}).encode()
    body = saved[PREDICTORS_FILE][-max(part["data_offsets"][1] for key, part in header.items() if key != "__metadata__") :]
    write(tmp_path, {**saved, PREDICTORS_FILE: struct.pack("<Q", len(text)) + text + body})
    if changed != entry:
        assert not loads_or_changes_nothing(target, tmp_path)


@QUICK
@given(values=BLOCKS | JSON)
def test_any_lemo_config_beside_an_adapter_is_read_or_refused(values, saved, target, tmp_path):
    base = json.loads(saved[CONFIG_FILE])
    content = {**base, **values} if isinstance(values, dict) else values
    write(tmp_path, {**saved, CONFIG_FILE: json.dumps(content).encode()})
    if loads_or_changes_nothing(target, tmp_path):
        _, base_config = read_lemo_files(tmp_path)
        assert set(base_config) <= {"rope_parameters", "max_position_embeddings"}
    write(tmp_path, saved)
    load_lemo_files(target, tmp_path)  # the next example begins with the saved settings
