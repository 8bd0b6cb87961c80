"""The two files that lie beside a PEFT adapter, and how they come back.

`lemo_predictors.safetensors` holds every layer's pattern predictor. `lemo_config.json` holds the `lemo` block (thresholds and
pruned predictor sizes included) and, as `base_config`, the fields of the base model's config that a longer context changes:
whoever loads the adapter on the stock model has to pass them (RoPE scaling above all), or every position is another one than the
adapter learned, and a PEFT adapter has no place for them.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import LemoError
from ..models.lemo_config import LemoConfig, LemoConfigError
from ..models.pattern_predictor import PatternPredictor
from ..models.sparse_decoder import sparse_backbone
from ..training.predictor_files import (
    CONFIG_FILE,
    PREDICTORS_FILE,
    load_predictors,
    predictor_tensors,
    read_json,
    record_predictor_sizes,
    write_json,
    write_tensors,
)

BASE_CONFIG = "base_config"
# What fine-tuning for a longer context changes in the base model's config. Reading sets these fields and no others.
CONTEXT_FIELDS = ("rope_parameters", "max_position_embeddings")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    partial = Path(name)
    partial.chmod(0o644)  # mkstemp makes files private; results are for others too
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def context_config(model: nn.Module) -> dict[str, Any]:
    """The model's values of the config fields that a longer context changes, as plain JSON types."""
    config: Any = model.config
    values = config.to_dict()
    return {name: values[name] for name in CONTEXT_FIELDS if values.get(name) is not None}


def save_lemo_files(model: nn.Module, folder: str | Path) -> None:
    """Writes `lemo_predictors.safetensors` and `lemo_config.json` into `folder`, each whole or not at all.

    Args:
        model: A LeMo model, wrapped by PEFT or not.
        folder: Created if it does not exist.

    Raises:
        LemoConfigError: If `model` is no LeMo model.
    """
    backbone: Any = sparse_backbone(model)
    record_predictor_sizes(backbone)
    block = backbone.config.lemo.to_dict()
    write_tensors(Path(folder) / PREDICTORS_FILE, predictor_tensors(backbone), {"format": "pt"})
    write_json(Path(folder) / CONFIG_FILE, {**block, BASE_CONFIG: context_config(model)})


def read_lemo_files(folder: str | Path) -> tuple[LemoConfig, dict[str, Any]]:
    """The `lemo` block in `folder`, and the config fields to load the base model with.

    Raises:
        LemoError: If `lemo_config.json` is missing or holds anything else.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path)
    base_config = values.pop(BASE_CONFIG, {})
    if not isinstance(base_config, dict) or not set(base_config) <= set(CONTEXT_FIELDS):
        raise LemoError(f"{BASE_CONFIG} may hold {', '.join(CONTEXT_FIELDS)} only; {str(path)!r}; restore the file from its run")
    try:
        return LemoConfig.from_dict(values), base_config
    except LemoConfigError as error:
        raise LemoError(str(error)) from error


def load_lemo_files(model: nn.Module, folder: str | Path) -> None:
    """Gives `model` the predictors, the thresholds and the other settings in `folder`; on an error it is unchanged.

    Args:
        model: A LeMo model, wrapped by PEFT or not.
        folder: Where `save_lemo_files` wrote.

    Raises:
        LemoError: If a file is missing, corrupt or does not fit the model. Shapes are compared before anything is allocated.
        LemoConfigError: If `model` is no LeMo model.
    """
    backbone: Any = sparse_backbone(model)
    block, _ = read_lemo_files(folder)
    check_predictor_shapes(Path(folder) / PREDICTORS_FILE, block, len(backbone.layers), backbone.config.hidden_size)
    settings = {**block.to_dict(), "predictor_sizes": backbone.config.lemo.predictor_sizes}
    before = backbone.config.lemo.to_dict()
    backbone.config.lemo.update(**settings)
    try:
        load_predictors(backbone, folder)
    except LemoError:
        backbone.config.lemo.update(**before)
        raise


def check_predictor_shapes(path: Path, block: LemoConfig, layers: int, hidden_size: int) -> None:
    """Compares the header of a predictor file with what the block and the model need, without reading a tensor.

    Raises:
        LemoError: If they do not fit, or the file is missing, corrupt or truncated.
    """
    if not path.is_file():
        raise LemoError(f"predictors are missing; {str(path)!r}; name a folder that a LeMo run saved, or train predictors")
    try:
        block.validate_for(layers)
        with safe_open(path, framework="pt") as stored:
            found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except LemoConfigError as error:
        raise _misfit(path, str(error)) from error
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise LemoError(
            f"predictor file is corrupt or truncated ({reason}); {str(path)!r}, {path.stat().st_size} bytes; "
            "copy it again, or train predictors"
        ) from error
    needed: dict[str, tuple[int, ...]] = {}
    for layer, sizes in enumerate(block.predictor_sizes or [[block.predictor_rank] * 4] * layers):
        if len(sizes) != 4 or not all(isinstance(size, int) and 0 < size <= hidden_size for size in sizes):
            raise _misfit(path, f"layer {layer} has widths {sizes}, the model's hidden_size is {hidden_size}")
        with torch.device("meta"):
            predictor = PatternPredictor(hidden_size, sizes, block.predictor_features)
        needed |= {f"layers.{layer}.{name}": tuple(weight.shape) for name, weight in predictor.named_parameters()}
    for name in sorted(needed.keys() | found.keys()):
        if found.get(name) != needed.get(name):
            raise _misfit(path, f"{name} is {found.get(name, 'missing')}, the model needs {needed.get(name, 'no such tensor')}")


def _misfit(path: Path, fact: str) -> LemoError:
    return LemoError(
        f"predictors do not fit the model: {fact}; {str(path)!r}; use those of a run on this model, or train new ones"
    )
