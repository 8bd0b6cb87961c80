"""Whether the installed torch, transformers and the like are versions that this release runs on.

The range stands in pyproject.toml alone. A source checkout reads that file, so that an editable install whose metadata is older
than the file is not judged by yesterday's range; an installed wheel reads its own metadata, which was made from it.
"""

import tomllib
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

DISTRIBUTION = "lemo-hf"
_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


class UnsupportedVersionError(ImportError):
    """A package is older than this release of lemo_hf can work with."""


class UntestedVersionWarning(UserWarning):
    """A package is newer than those that this release of lemo_hf was run with."""


def declared_requirements(pyproject: Path = _PYPROJECT) -> list[str]:
    """What lemo_hf needs besides its extras, such as `transformers>=5.17,<5.24`; empty where nothing says.

    Args:
        pyproject: The file of a source checkout, if this is one.
    """
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == DISTRIBUTION:
            return list(project["dependencies"])
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []  # copied by hand, without a record of what it needs
    return [line for line in declared if "extra ==" not in line]


def check_versions(requirements: Iterable[str]) -> None:
    """Compares what is installed with `requirements`; a package that pip knows nothing of is left to its own import.

    Args:
        requirements: As `declared_requirements` gives them.

    Raises:
        UnsupportedVersionError: If a package is older than its lower bound, or another version that cannot work.
    """
    for line in requirements:
        requirement = Requirement(line)
        try:
            installed = Version(metadata.version(requirement.name))
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue
        # Vendors' containers carry builds such as 2.11.0a0+nv25.11, which are as good as the release.
        if requirement.specifier.contains(installed.base_version):
            continue
        # Lower bound first, whatever order the file or the metadata has.
        bounds = sorted(requirement.specifier, key=lambda bound: Version(bound.version))
        name, wanted = requirement.name, ",".join(map(str, bounds))
        limits = [Version(bound.version) for bound in bounds if bound.operator in ("<", "<=")]
        if limits and installed.release >= min(limits).release:
            warnings.warn(
                f"this release of lemo_hf was tested with {name} {wanted} and may not work with others; found {name} {installed}; "
                f"upgrade lemo_hf, or pip install '{name}{wanted}'",
                UntestedVersionWarning,
                stacklevel=2,
            )
        else:
            raise UnsupportedVersionError(
                f"lemo_hf needs {name} {wanted}; found {name} {installed}; pip install '{name}{wanted}'"
            )
