"""The kernels under CUDA's memory checker, for benchmarks/gpu_suite.py: no access beyond a tensor, whatever row numbers say."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from agreement import PartFailure

TOOL = "compute-sanitizer"
# A few tests of every kernel, by a word of their names: strides, odd sizes, rows that are not there. The checker slows a kernel down by
# some ten times.
FILES = (
    "token_movement", "row_norm", "rotary", "gated_mlp", "block_features", "attention_kernels", "kept_key_kernel", "nearby_kernel",
    "block_score_kernels", "loss_kernel",
)  # fmt: skip
WORDS = "contiguous or stride or wrong_row or out_of_range or one_row or one_kept_row"
# What the checker ends with if it has found something; pytest has 0 to 5.
_FOUND = 99


def find_tool() -> str | None:
    """Where the checker is: on the path, or in the CUDA toolkit's folder."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(toolkit) / "bin") for toolkit in toolkits if toolkit)]
    return shutil.which(TOOL, path=os.pathsep.join(folders))


def run_memory_check(tests: Path, run: Callable[[list[str], float], CompletedProcess[str]], tiny: bool) -> dict[str, Any]:
    """A few tests of each kernel under the checker; without the checker the reason why not.

    Args:
        tests: Folder of the kernels' tests.
        run: Runs a command within some seconds.
        tiny: One file alone.

    Returns:
        `summary`, pytest's last line, and `checker`, the checker's; or `skipped`.

    Raises:
        PartFailure: If the checker finds something, or a test fails.
    """
    tool = find_tool()
    if tool is None:
        reason = f"{TOOL} is not on this machine (it comes with the CUDA toolkit, not with torch)"
        print(f"memory check skipped: {reason}", flush=True)
        return {"skipped": reason}
    # Every tensor an allocation of its own: between those of one large block the checker sees no border.
    command = ["env", "-u", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck"]
    command += [
        "--error-exitcode",
        str(_FOUND),
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-rf",
        "-m",
        "",
        "-k",
        WORDS,
    ]
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        command += ["-W", f"ignore::{kind}"]
    done = run([*command, *(str(tests / f"test_{name}.py") for name in FILES[: 1 if tiny else None])], 450)
    lines = done.stdout.strip().splitlines()
    said = [line for line in (*lines, *done.stderr.splitlines()) if line.startswith("=========")]
    found = {"tool": tool, "tests": WORDS, "checker": said[-1] if said else ""}
    found["summary"] = next((line for line in reversed(lines) if not line.startswith("=========")), "")
    if done.returncode:
        what = "the memory checker has found something" if done.returncode == _FOUND else "a test fails under the memory checker"
        raise PartFailure(f"{what}; exit code {done.returncode}; {done.stdout[-5000:]}{done.stderr[-2000:]}", found)
    return found
