"""The two files that lie beside a PEFT adapter, `lemo_predictors.safetensors` and `lemo_config.json`: the one place of their format.

`lemo_predictors.safetensors` holds every layer's pattern predictor. `lemo_config.json` holds the `lemo` block (thresholds and
pruned predictor sizes included) and, as `base_config`, the fields of the base model's config that a longer context changes:
whoever loads the adapter on the stock model has to pass them (RoPE scaling above all), or every position is another one than the
adapter learned, and a PEFT adapter has no place for them. The sizes that pruning left stand in the block, so a block and its
predictors are written and read together.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LemoError
from ..models.lemo_config import LemoConfig, LemoConfigError, shown
from ..models.pooled_predictor import layer_predictor
from ..models.sparse_causal_lm import predictor_fault
from ..models.sparse_decoder import sparse_backbone

PREDICTORS_FILE = "lemo_predictors.safetensors"
CONFIG_FILE = "lemo_config.json"
BASE_CONFIG = "base_config"
# What fine-tuning for a longer context changes in the base model's config. Reading sets these fields and no others.
CONTEXT_FIELDS = ("rope_parameters", "max_position_embeddings")
# Found by a run's phases and worth as much as its predictors; all other fields of the block are settings.
FOUND_FIELDS = ("thresholds", "predictor_sizes", "predictor_rank", "predictor_features")
# No JSON file of ours comes near it.
_LARGEST_JSON = 16 * 2**20  # bytes


# Files that are either whole or not there.


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    partial = Path(name)
    partial.chmod(0o644)  # mkstemp makes files private; results are for others too
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file."""
    with atomic_path(path) as partial:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        LemoError: If the file is missing, corrupt or truncated.
    """
    with opened_tensors(path) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118 (no mapping)


@contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file as `safe_open` gives it: its header is read, and checked against the file's length, but no tensor.

    Raises:
        LemoError: If the file is missing, corrupt or truncated.
    """
    if not path.is_file():
        raise LemoError(f"file does not exist; {str(path)!r}; name a folder that a LeMo run saved, or train predictors")
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise LemoError(
            f"file is corrupt or truncated ({reason}); {str(path)!r}, {path.stat().st_size} bytes; copy it again, or train anew"
        ) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping.

    Raises:
        LemoError: If the file is missing, far too large or no JSON mapping.
    """
    if not path.is_file():
        raise LemoError(f"file does not exist; {str(path)!r}; name a folder that a LeMo run saved")
    if path.stat().st_size > _LARGEST_JSON:
        raise LemoError(f"file is too large for what it should hold; {str(path)!r}, {path.stat().st_size} bytes; copy it again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of thousands of digits; nesting as deep
        raise LemoError(f"file is not JSON ({error}); {str(path)!r}; copy it again, or train anew") from error
    if not isinstance(values, dict):
        raise LemoError(f"file holds no JSON mapping; {str(path)!r}; copy it again, or train anew")
    return values


# The block and its predictors.


def context_config(model: nn.Module) -> dict[str, Any]:
    """The model's values of the config fields that a longer context changes, as plain JSON types."""
    config: Any = model.config
    values = config.to_dict()
    return {name: values[name] for name in CONTEXT_FIELDS if values.get(name) is not None}


def predictor_tensors(backbone: Any) -> dict[str, Tensor]:
    """All predictor parameters by name, `layers.<layer>.<query|key>.matrices.<i>` and `layers.<layer>.distance.0`."""
    return {
        f"layers.{index}.{name}": weight
        for index, layer in enumerate(backbone.layers)
        for name, weight in layer.lemo_predictor.named_parameters()
    }


def record_predictor_sizes(backbone: Any) -> None:
    """Writes the present sizes into the lemo block, so that loading builds the right shapes."""
    backbone.config.lemo.update(predictor_sizes=[layer.lemo_predictor.sizes for layer in backbone.layers])


def with_found(block: LemoConfig, found: LemoConfig, source: str) -> LemoConfig:
    """The settings in `block` with what a run's phases found: its predictors' sizes, and its thresholds unless `block` has its own.

    Args:
        block: How to eliminate tokens from here on.
        found: The block of the run whose predictors are used.
        source: Names that run in errors.

    Raises:
        LemoError: If `block` reads the predictors under another block size or reduction than theirs.
    """
    if block.needs_predictors and block.block_size != found.block_size:
        raise LemoError(
            f"predictors do not fit the settings: they pool blocks of {found.block_size}, block_size={block.block_size} is asked for; "
            f"{source!r}; set the same block_size, or train predictors for this one"
        )
    taken = {name: getattr(found, name) for name in FOUND_FIELDS}
    if block.needs_scores:
        require_reduction(block, found, source)
    else:
        taken["block_reduction"] = found.block_reduction  # the predictors', which lie unused
    return replace(block, **(taken | ({} if block.thresholds is None else {"thresholds": block.thresholds})))


def require_reduction(wanted: LemoConfig, found: LemoConfig, source: str) -> None:
    """Compares the block scores that predictors were fitted to with those that are asked for.

    Raises:
        LemoError: If they are others.
    """
    if wanted.block_reduction != found.block_reduction:
        raise LemoError(
            f"predictors do not fit the settings: they foretell block_reduction={found.block_reduction!r}, "
            f"{wanted.block_reduction!r} is asked for; {source!r}; set the same, or train predictors for this one"
        )


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
    for name, is_sound in (("rope_parameters", _is_rope), ("max_position_embeddings", _is_context)):
        if name in base_config and not is_sound(base_config[name]):
            raise LemoError(
                f"{name} is no such thing; got {shown(base_config[name])} in {str(path)!r}; restore the file from its run"
            )
    try:
        return LemoConfig.from_dict(values), base_config
    except LemoConfigError as error:
        raise LemoError(str(error)) from error


def _is_context(tokens: Any) -> bool:
    return isinstance(tokens, int) and not isinstance(tokens, bool) and 0 < tokens < 2**31


def _is_rope(values: Any) -> bool:
    # Numbers, names and lists of numbers, one for each pair of a head's dimensions.
    def is_plain(value: Any) -> bool:
        return value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))

    return isinstance(values, dict) and all(
        is_plain(value) or (isinstance(value, list) and all(map(is_plain, value))) for value in values.values()
    )


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
    path = Path(folder) / PREDICTORS_FILE
    check_predictor_shapes(path, block, len(backbone.layers), backbone.config.hidden_size)
    tensors, _ = read_tensors(path)
    _require_sound(tensors, backbone, str(path))
    backbone.config.lemo.update(**block.to_dict())
    _install(backbone, tensors, block)


def load_predictors(backbone: Any, folder: str | Path) -> None:
    """Loads the predictors in `folder`, and nothing else, into a model, which takes on their sizes.

    Args:
        backbone: A model with `SparseBackbone` among its bases; on an error it is unchanged.
        folder: Where `save_lemo_files` wrote.

    Raises:
        LemoError: If a file is missing or damaged, or the predictors do not fit the model.
    """
    block, _ = read_lemo_files(folder)
    path = Path(folder) / PREDICTORS_FILE
    check_predictor_shapes(path, block, len(backbone.layers), backbone.config.hidden_size)
    set_predictors(backbone, read_tensors(path)[0], block, str(path))


def set_predictors(backbone: Any, tensors: dict[str, Tensor], block: LemoConfig, source: str) -> None:
    """Gives a model the predictors in `tensors`, made under `block`; `source` names them in errors.

    Raises:
        LemoError: If the predictors do not fit the model; it is unchanged then.
    """
    block_size = backbone.config.lemo.block_size
    if block.block_size != block_size:
        raise LemoError(
            f"predictors do not fit the model: they pool blocks of {block.block_size}, the model has block_size={block_size}; "
            f"{source!r}; set the same block_size, or train predictors for this one"
        )
    require_reduction(backbone.config.lemo, block, source)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_shapes(shapes, block, len(backbone.layers), backbone.config.hidden_size, source)
    _require_sound(tensors, backbone, source)
    _install(backbone, tensors, block)


def check_predictor_shapes(path: Path, block: LemoConfig, layers: int, hidden_size: int) -> None:
    """Compares the header of a predictor file with what the block and the model need, without reading a tensor.

    Raises:
        LemoError: If they do not fit, or the file is missing, corrupt or truncated.
    """
    needed = _needed_shapes(block, layers, hidden_size, str(path))
    size, expected = path.stat().st_size if path.is_file() else 0, 4 * sum(map(math.prod, needed.values()))
    if size > expected + _LARGEST_JSON:  # opening maps the whole file
        raise _misfit(f"the file has {size} bytes, predictors of these sizes have {expected}", str(path))
    with opened_tensors(path) as stored:
        parts = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
        others = [f"{shown(name)} is {part.get_dtype()}" for name, part in parts.items() if part.get_dtype() != "F32"]
    require_shapes(shapes, block, layers, hidden_size, str(path))
    if others:
        raise _misfit(f"{others[0]}, predictors are float32", str(path))


def require_shapes(found: dict[str, tuple[int, ...]], block: LemoConfig, layers: int, hidden_size: int, source: str) -> None:
    """Compares shapes, by the names of [`predictor_tensors`], with those that a block and a model need.

    Args:
        found: The shapes that there are.
        block: The block that they are to serve.
        layers, hidden_size: Of the model.
        source: Names them in errors.

    Raises:
        LemoError: If one is missing, too many or another.
    """
    needed = _needed_shapes(block, layers, hidden_size, source)
    for name in sorted(needed.keys() | found.keys()):
        if found.get(name) != needed.get(name):
            has = shown(found[name]) if name in found else "missing"
            raise _misfit(f"{shown(name)[1:-1]} is {has}, the model needs {needed.get(name, 'no such tensor')}", source)


def _needed_shapes(block: LemoConfig, layers: int, hidden_size: int, source: str) -> dict[str, tuple[int, ...]]:
    try:
        block.validate_for(layers, hidden_size)
    except LemoConfigError as error:
        raise LemoError(f"predictors do not fit the model: {error} ({source!r})") from error
    needed: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        with torch.device("meta"):
            predictor = layer_predictor(block, hidden_size, layer)
        needed |= {f"layers.{layer}.{name}": tuple(weight.shape) for name, weight in predictor.named_parameters()}
    return needed


def _misfit(fact: str, source: str) -> LemoError:
    return LemoError(f"predictors do not fit the model: {fact}; {source!r}; use those of a run on this model, or train new ones")


def _require_sound(tensors: dict[str, Tensor], backbone: Any, source: str) -> None:
    for name, tensor in tensors.items():
        if fault := predictor_fault(name, tensor, backbone):
            raise _misfit(fault, source)


def _install(backbone: Any, tensors: dict[str, Tensor], block: LemoConfig) -> None:
    # Shapes have been compared.
    for index, layer in enumerate(backbone.layers):
        prefix = f"layers.{index}."
        predictor = layer_predictor(block, backbone.config.hidden_size, index)
        predictor.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        device = next(layer.lemo_predictor.parameters()).device
        layer.lemo_predictor = predictor.to(device).requires_grad_(False).train(layer.training)
    fields = "predictor_sizes", "predictor_rank", "predictor_features"
    backbone.config.lemo.update(**{name: getattr(block, name) for name in fields})
