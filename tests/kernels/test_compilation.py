"""Every kernel compiles for an H200 on a machine without one, and fits its registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/compile_kernels.py"


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_large_spills(tmp_path):
    # A process of its own: here kernels are made for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--capability", "90", "--out", str(tmp_path / "kernels.json")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert len({entry["kernel"] for entry in kernels}) >= 10
    for entry in kernels:
        assert entry["shared_bytes"] <= 227 * 1024, entry
        assert entry["stack_bytes"] + entry["local_bytes"] <= 64, entry
