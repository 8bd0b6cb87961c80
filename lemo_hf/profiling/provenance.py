"""Where a measured figure comes from: commit, versions and machine, for every result file."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# What a run writes: results of earlier runs of the same commit change nothing that this one computes.
_WRITTEN = ("benchmarks/results", "docs", "*.md")
PACKAGES = ("lemo-hf", "torch", "transformers", "peft", "accelerate")


def provenance() -> dict[str, object]:
    """Commit (with `+dirty` for uncommitted changes of code), package versions and machine, as JSON types."""
    return {"commit": _commit(), "versions": {name: _version(name) for name in PACKAGES}, "machine": _machine()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None  # installed from a wheel, perhaps inside somebody else's repository
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = ["git", "status", "--porcelain", "-uno", "--", ".", *(f":(exclude){path}" for path in _WRITTEN)]
        status = subprocess.run(changes, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def _machine() -> dict[str, object]:
    machine: dict[str, object] = {
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
