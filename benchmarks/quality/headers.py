"""Another kind of text than the base has read: C and C++ headers that installed packages bring along, split by project.

Python of other packages leaves a base that is made of Python little to learn beyond its longer context; this text leaves a lot, as a
user's own documents do. No project is in both splits, and near-duplicate files are dropped across them, held-out ones first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.quality.corpus import MAX_FILE_BYTES, drop_near_duplicates
from lemo_hf.errors import LemoError
from lemo_hf.text_data import MIN_CHARACTERS, TextDocument

SUFFIXES = (".h", ".hpp", ".cuh")
# Folders below a package: projects that it is made of or vendors.
PROJECTS = {
    "held_out": ("pyarrow/include", "numpy/_core/include", "torch/include/pybind11", "torch/include/fmt"),
    "extension": (
        *("torch/include/ATen", "torch/include/torch", "torch/include/c10", "torch/include/caffe2"),
        *("torch/include/google", "torch/include/oneapi"),
    ),
}


def _files(project: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of a project's headers; none if its package is not installed."""
    package, _, below = project.partition("/")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in (Path(root) / below).rglob("*"):
            if path.suffix in SUFFIXES and MIN_CHARACTERS <= path.stat().st_size <= MAX_FILE_BYTES:
                yield f"{package}/{path.relative_to(root).as_posix()}", path


@cache
def _documents() -> dict[str, list[TextDocument]]:
    texts: list[TextDocument] = []
    split_of: dict[str, str] = {}
    for split, projects in PROJECTS.items():
        for project in projects:
            for name, path in sorted(_files(project)):
                try:
                    texts.append(TextDocument(name, path.read_text(encoding="utf-8")))
                except UnicodeDecodeError:
                    continue
                split_of[name] = split
    kept, _ = drop_near_duplicates(texts)
    return {split: [document for document in kept if split_of[document.name] == split] for split in PROJECTS}


def header_documents(split: str) -> list[TextDocument]:
    """Headers of a split's projects, `"extension"` to train on or `"held_out"` to measure, sorted by project and name.

    Raises:
        LemoError: Another split, or no headers here.
    """
    if split not in PROJECTS:
        raise LemoError(f"no such split of headers; {split!r}; choose {' or '.join(PROJECTS)}")
    found = _documents()[split]
    if not found:
        raise LemoError(f"no headers of the {split} split here; {', '.join(PROJECTS[split])}; install these packages")
    return found
