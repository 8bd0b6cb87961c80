"""Without a GPU the interpreter says that a kernel computes the right thing; this says that it compiles for one, and fits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "torch-ext" / "lemo_kernels"
PROGRAM = Path(__file__).parents[1] / "references" / "compile_for_gpu.py"


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h200_and_fits_into_its_shared_memory(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, "bfloat16"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    launched = {
        f"{path.stem}.{name}"
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"(\w+_kernel)(?:\[|, \")", path.read_text())
    }
    assert len(launched) >= 14
    assert launched <= shared.keys(), "every kernel is launched by some probe"
    assert max(shared.values()) <= 227 * 1024
