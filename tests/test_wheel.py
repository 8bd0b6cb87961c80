"""One wheel holds both import packages, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_the_kernels_import_from_it(tmp_path):
    # A copy: building leaves files beside the sources, and what an earlier build left there would come into this one.
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "outputs", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("lemo_hf-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("lemo_hf", "lemo_hf"), ("kernels/torch-ext/lemo_kernels", "lemo_kernels")):
        files = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert files
        assert files <= names
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "lemo_hf" / "assets").rglob("*") if path.is_file()}
    assert assets | {"lemo_hf/py.typed", "lemo_hf/model_cards/card_template.md"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lemo_hf", "lemo_kernels"}
    code = "import lemo_kernels; print(lemo_kernels.__file__)"
    path = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(wheel)}, capture_output=True, text=True).stdout
    assert path.startswith(str(wheel))
