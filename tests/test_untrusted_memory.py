"""Absurd sizes in files from strangers are refused before memory is taken: in a process that may take little."""

import json
import re
import shutil
import struct
import subprocess
import sys

import pytest
from folders_to_spoil import change_block, rewrite, saved_adapter, saved_model

from lemo_hf.hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE

# Runs in a process of its own that may take 300 MB more than it has once everything is imported.
LIMITED = """
import json, resource, sys
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM
from lemo_hf import AutoLemoModelForCausalLM
from lemo_hf.hub.lemo_files import load_lemo_files, load_predictors
from lemo_hf.loading import load_saved_model
from lemo_hf.models.sparse_decoder import sparse_backbone
good, cases = sys.argv[1], json.loads(sys.argv[2])
model = AutoLemoModelForCausalLM.from_pretrained(good)  # what is imported at first use is imported now
from lemo_hf.training.trainer import LemoTrainer
import peft
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
WAYS = {
    "config": AutoConfig.from_pretrained,
    "model": AutoModelForCausalLM.from_pretrained,
    "lemo model": AutoLemoModelForCausalLM.from_pretrained,
    "command": lambda folder: load_saved_model(folder, sparse=True),
    "lemo files": lambda folder: load_lemo_files(model, folder),
    "predictors": lambda folder: load_predictors(sparse_backbone(model), folder),
}
said = {}
try:
    torch.empty(400 * 2**20, dtype=torch.uint8)
    said["limit"] = "none"
except RuntimeError:
    said["limit"] = "holds"
for name, folder, ways in cases:
    for way in ways:
        try:
            WAYS[way](folder)
            said[f"{name}, {way}"] = "taken"
        except BaseException as error:
            said[f"{name}, {way}"] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""
HUGE = 2**31 - 1
ABSURD_BLOCKS = {
    "rank": {"predictor_rank": HUGE},
    "features": {"predictor_features": HUGE},
    "sizes": {"predictor_sizes": [[HUGE] * 4] * 2},
    "sizes of many layers": {"predictor_sizes": [[8] * 4] * 10**4},
    "thresholds": {"thresholds": [0.5] * 10**4},
}


def lie_about_shapes(folder):
    """A header that promises 2**62 values, over the few bytes there are."""
    content = (folder / PREDICTORS_FILE).read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["layers.0.query.matrices.0"]["shape"] = [2**31, 2**31]
    text = json.dumps(header).encode()
    (folder / PREDICTORS_FILE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def hole(path, size=2**34):
    """A file of that many bytes that takes no room on the disk: a header, one tensor of 16 GB and nothing but zeros."""
    header = json.dumps({"layers.0.query.matrices.0": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits the address space")
def test_absurd_files_ask_for_little_memory(tmp_path):
    folder, adapter_folder, cases = saved_model(tmp_path / "model"), saved_adapter(tmp_path / "adapter"), []

    def case(name, source, ways, spoil):
        copy = tmp_path / f"case {len(cases)}"
        shutil.copytree(source, copy)
        spoil(copy)
        cases.append((name, str(copy), ways))

    for name, changes in ABSURD_BLOCKS.items():
        case(name, folder, ["config", "model", "lemo model"], lambda f, changes=changes: change_block(f, **changes))
        beside = ["lemo model", "command", "lemo files", "predictors"]
        case(f"{name} beside an adapter", adapter_folder, beside, lambda f, changes=changes: rewrite(f / CONFIG_FILE, **changes))
    beside = ["lemo model", "command", "lemo files", "predictors"]
    case("lying header", adapter_folder, beside, lie_about_shapes)
    case("16 GB of predictors", adapter_folder, beside, lambda f: hole(f / PREDICTORS_FILE))
    case("16 GB of settings", adapter_folder, beside, lambda f: hole(f / CONFIG_FILE))
    case(
        "rank of an adapter", adapter_folder, ["lemo model", "command"], lambda f: rewrite(f / "adapter_config.json", r=HUGE // 4)
    )
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), json.dumps(cases)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = json.loads(result.stdout.splitlines()[-1])
    assert said.pop("limit") == "holds"
    assert len(said) == sum(len(ways) for _, _, ways in cases)
    for name, answer in said.items():
        assert re.match(r"Lemo(Config)?Error: [^\n]{20,900}$", answer), (name, answer)
        assert "memory" not in answer, (name, answer)
        assert "allocate" not in answer, (name, answer)
