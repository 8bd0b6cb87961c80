"""The range in pyproject.toml and what importing lemo_hf says outside it, with versions that only seem to be installed."""

import re
import subprocess
import sys
import textwrap
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lemo_hf
from lemo_hf.supported_versions import UnsupportedVersionError, UntestedVersionWarning, check_versions, declared_requirements

ROOT = Path(lemo_hf.__file__).parents[1]
RANGE = ["transformers>=5.17,<5.24", "torch>=2.11,<2.14", "peft>=0.21"]
INSTALLED = {"transformers": "5.23.0", "torch": "2.13.0+cpu", "peft": "0.21.2"}


@pytest.fixture
def seems_installed(monkeypatch):
    def install(**versions):
        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "version", version)

    return install


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"transformers": "5.17.0"},
        {"transformers": "5.23.9"},
        {"torch": "2.11.0"},
        {"torch": "2.11.0a0+nv25.11"},
        {"torch": "2.12.0.dev20260101+cu130"},
        {"peft": "0.99"},
        {"torch": "not a version"},
    ],
    ids=str,
)
def test_what_is_supported_is_silent(seems_installed, change):
    seems_installed(**{**INSTALLED, **change})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions(RANGE)


def test_a_package_that_pip_does_not_know_is_left_to_its_import(seems_installed):
    seems_installed(transformers="5.23.0")
    check_versions(RANGE)


@pytest.mark.parametrize(
    ("name", "version"), [("transformers", "4.57.6"), ("transformers", "5.16.1"), ("torch", "2.10.1+cu126"), ("peft", "0.20.0")]
)
def test_an_older_version_is_an_import_error_of_one_line(seems_installed, name, version):
    seems_installed(**{**INSTALLED, name: version})
    specifier = next(line for line in RANGE if line.startswith(name)).removeprefix(name)
    with pytest.raises(ImportError) as error:
        check_versions(RANGE)
    assert isinstance(error.value, UnsupportedVersionError)
    message = f"lemo_hf needs {name} {specifier}; found {name} {version}; pip install '{name}{specifier}'"
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("transformers", "5.24"),
        ("transformers", "5.24.0"),
        ("transformers", "6.0.0"),
        ("torch", "2.14.1"),
        ("torch", "2.14.0a0+git1234"),
        ("torch", "3.0"),
    ],
)
def test_a_newer_version_is_one_warning(seems_installed, name, version):
    seems_installed(**{**INSTALLED, name: version})
    with pytest.warns(UntestedVersionWarning, match=re.escape(f"found {name} {version}; upgrade lemo_hf")) as said:
        check_versions(RANGE)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)


def test_the_range_comes_from_pyproject_in_a_checkout_and_from_the_metadata_elsewhere(tmp_path, monkeypatch):
    names = {Requirement(line).name for line in declared_requirements()}
    assert names == {"torch", "transformers", "peft", "accelerate", "safetensors"}
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "somebody-elses"\ndependencies = ["torch>=99"]\n')
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.11,<2.14", "typer>=0.20; extra == 'train'"])
    for folder in (tmp_path, tmp_path / "none"):
        assert declared_requirements(folder / "pyproject.toml") == ["torch>=2.11,<2.14"]

    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", unknown)
    assert declared_requirements(tmp_path / "none" / "pyproject.toml") == []


def test_every_bound_is_tested_with_the_pinned_versions():
    """constraints.txt is what the tests run with: each pin lies in its range, and in the newest minor release of it."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for line in declared_requirements():
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), line
        for bound in requirement.specifier:
            if bound.operator == "<":
                major, minor = map(int, bound.version.split("."))
                assert pins[requirement.name].startswith(f"{major}.{minor - 1}."), line


IMPORT = """
import importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: {version!r} if name == {name!r} else real(name)
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        import lemo_hf
    except ImportError as error:
        import sys
        print("ImportError", error, "torch" in sys.modules)
    print([str(each.message) for each in said if "lemo_hf" in str(each.message)])
"""


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("transformers", "5.16.0", "ImportError lemo_hf needs transformers >=5.17,<5.24; found transformers 5.16.0"),
        ("transformers", "7.0.0", '["this release of lemo_hf was tested with transformers >=5.17,<5.24 and may not work'),
        ("transformers", "5.20.0", "[]"),
    ],
)
def test_importing_the_package_says_it(name, version, says):
    program = textwrap.dedent(IMPORT.format(name=name, version=version))
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.startswith(says), result.stdout
    if says.startswith("ImportError"):
        assert result.stdout.splitlines()[0].endswith("False"), "the check comes before torch is imported"
