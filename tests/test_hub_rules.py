"""Files in lemo_hf/models travel to the Hub as they are: what they may import, and what the loader of remote code misreads."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

import lemo_hf.models

ALLOWED = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names} - {"importlib", "pkgutil", "runpy"}
# Imported where it is there, by one file and at module level: what the loader of remote code passes over.
OPTIONAL = {"kernel_switch.py": "lemo_kernels"}
# Ways to another file that the loader of remote code does not see: it would not be copied.
UNSEEN = {"__file__", "__import__", "__package__", "__path__"}
FOLDER = Path(lemo_hf.models.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))


def faults(path, siblings):
    """What is wrong with a file's imports, as lines of text."""
    found, relative = [], set()
    tree = ast.parse(path.read_text())
    guarded = [
        statement
        for block in tree.body
        if isinstance(block, ast.Try) and [getattr(each.type, "id", None) for each in block.handlers] == ["ImportError"]
        for statement in block.body
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node in guarded and [a.name for a in node.names] == [OPTIONAL.get(path.name)]:
            continue
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            if node.module.split(".")[0] not in ALLOWED:
                found.append(f"from {node.module}")
        elif isinstance(node, ast.ImportFrom):
            relative.add("." * (node.level - 1) + (node.module or ""))
            if node.level > 1 or node.module not in siblings:
                found.append(f"from {'.' * node.level}{node.module or ''}")
        elif isinstance(node, ast.Name) and node.id in UNSEEN:
            found.append(node.id)
    # The loader of remote code goes by lines of text, docstrings among them, and misses what begins in mid-line.
    by_text = set(get_relative_imports(path))
    found += [f"text: from .{name}" for name in by_text - relative]
    found += [f"not copied: from .{name}" for name in relative - by_text]
    return found


def test_the_folder_is_flat():
    assert FILES
    assert not [path for path in FOLDER.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_what_travels_with_it_only(path):
    assert faults(path, {each.stem for each in FILES}) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import peft", "import peft"),
        ("def f():\n    import numpy as np", "import numpy"),
        ("from lemo_hf.errors import LemoError", "from lemo_hf.errors"),
        ("from ..errors import LemoError", "from ..errors"),
        ("from . import lemo_config", "from ."),
        ("from .sub.lemo_config import LemoConfig", "from .sub.lemo_config"),
        ("import math; from .lemo_config import LemoConfig", "not copied: from .lemo_config"),
        ("import importlib\nimportlib.import_module('lemo_hf')", "import importlib"),
        ("TABLE = open(__file__ + '.json')", "__file__"),
        ('"""\n    from .old_name import gone\n"""', "text: from .old_name"),
    ],
)
def test_the_rules_find_what_breaks_them(source, fault, tmp_path):
    (tmp_path / "file.py").write_text(source)
    assert fault in faults(tmp_path / "file.py", {"lemo_config"})


GUARDED = "try:\n    import lemo_kernels\nexcept ImportError:\n    lemo_kernels = None\n"


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("kernel_switch.py", GUARDED, []),
        ("kernel_switch.py", "import lemo_kernels", ["import lemo_kernels"]),
        ("kernel_switch.py", GUARDED.replace("ImportError", "OSError"), ["import lemo_kernels"]),
        ("kernel_switch.py", "def f():\n    " + GUARDED.replace("\n", "\n    "), ["import lemo_kernels"]),
        ("row_operations.py", GUARDED, ["import lemo_kernels"]),
    ],
)
def test_kernels_are_imported_in_one_file_at_module_level_and_may_be_missing(name, source, found, tmp_path):
    (tmp_path / name).write_text(source)
    assert faults(tmp_path / name, {"lemo_config"}) == found


def test_what_is_allowed_is(tmp_path):
    lines = (
        "import math",
        "import torch.nn as nn",
        "from huggingface_hub import dataclasses",
        "from .lemo_config import LemoConfig",
    )
    (tmp_path / "file.py").write_text("\n".join(lines))
    assert faults(tmp_path / "file.py", {"lemo_config"}) == []
