"""The two files that lie beside a PEFT adapter, and how they come back.

`lemo_predictors.safetensors` holds every layer's pattern predictor, float32, under `layers.<i>.query.matrices.<j>` and
`layers.<i>.key.matrices.<j>`. `lemo_config.json` holds the `lemo` block (thresholds and pruned predictor sizes included) and
under `base_config` the fields in which the trained model's config departs from its base checkpoint's: whoever loads the adapter
on the stock model has to pass them (RoPE scaling above all), or every position beyond the old context is wrong.

Files appear by a rename, so a reader finds the old file or the new one, never half of one.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LemoError
from ..models.lemo_config import LemoConfig, LemoConfigError
from ..models.pattern_predictor import PatternPredictor

PREDICTORS_FILE = "lemo_predictors.safetensors"
CONFIG_FILE = "lemo_config.json"
# Config fields that fine-tuning for a longer context changes and that a PEFT adapter does not carry.
CONTEXT_FIELDS = ("rope_parameters", "max_position_embeddings")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # mkstemp makes files private; results are as readable as their folder
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(values: Any, path: str | Path) -> None:
    """Writes `values` as indented JSON, atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def predictor_layers(model: nn.Module) -> list[Any]:
    """The decoder layers that carry a pattern predictor, first to last, wrapped by PEFT or not.

    Raises:
        LemoError: If there is none.
    """
    # By what the layers have, not by class: a model that came as remote code has classes of its own.
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "lemo_predictor", None), nn.Module)]
    if not layers:
        raise LemoError(
            f"the model has no pattern predictors; {type(model).__name__}; load it with AutoLemoModelForCausalLM.from_pretrained"
        )
    return sorted(layers, key=lambda layer: layer.layer_idx)


def lemo_block(model: nn.Module) -> LemoConfig:
    """The model's `LemoConfig`, which all its layers share.

    Raises:
        LemoError: If the model's config has no `lemo` block.
    """
    block = getattr(getattr(model, "config", None), "lemo", None)
    if block is None:
        raise LemoError(
            f"the model's config has no lemo block; {type(model).__name__}; load it with AutoLemoModelForCausalLM.from_pretrained"
        )
    return block


def predictor_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every predictor parameter of `model` under its name in `lemo_predictors.safetensors`, float32 on the CPU."""
    return {
        f"layers.{index}.{name}": value.detach().to("cpu", torch.float32).contiguous()
        for index, layer in enumerate(predictor_layers(model))
        for name, value in layer.lemo_predictor.state_dict().items()
    }


def context_config(model: nn.Module) -> dict[str, Any]:
    """The model's values of the config fields that a longer context changes, as plain JSON types."""
    config: Any = model.config
    values = config.to_dict()
    return {name: values[name] for name in CONTEXT_FIELDS if values.get(name) is not None}


def save_lemo_files(model: nn.Module, folder: str | Path) -> None:
    """Writes `lemo_predictors.safetensors` and `lemo_config.json` into `folder`, beside the adapter.

    Args:
        model: A LeMo model, wrapped by PEFT or not.
        folder: Created if it does not exist.

    Raises:
        LemoError: If `model` is no LeMo model.
    """
    block = lemo_block(model)
    tensors = predictor_tensors(model)
    sizes = [layer.lemo_predictor.sizes for layer in predictor_layers(model)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"lemo": {**block.to_dict(), "predictor_sizes": sizes}, "base_config": context_config(model)}
    with atomic_path(folder / PREDICTORS_FILE) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    write_json(values, folder / CONFIG_FILE)


def read_lemo_config(folder: str | Path) -> tuple[LemoConfig, dict[str, Any]]:
    """The `lemo` block and the `base_config` of `folder`'s `lemo_config.json`.

    Raises:
        LemoError: If the file is missing or is not what `save_lemo_files` writes.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LemoError(f"{CONFIG_FILE} is missing; {str(folder)!r}; give the folder of a LeMo run's adapter") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LemoError(f"{CONFIG_FILE} is not JSON ({error}); {str(path)!r}; restore it from the run, or train again") from error
    if not isinstance(values, dict) or not isinstance(values.get("lemo"), dict):
        raise LemoError(f"{CONFIG_FILE} has no lemo block; {str(path)!r}; restore it from the run, or train again")
    base_config = values.get("base_config", {})
    if not isinstance(base_config, dict) or not set(base_config) <= set(CONTEXT_FIELDS):
        # Nothing else may be set through this file: a config from outside must not reach arbitrary fields.
        raise LemoError(f"base_config may hold {', '.join(CONTEXT_FIELDS)} only; {str(path)!r}; restore the file from the run")
    return LemoConfig.from_dict(values["lemo"]), base_config


def load_lemo_files(model: nn.Module, folder: str | Path, settings: bool = True) -> None:
    """Puts the predictors of `folder` into `model`, in place. Nothing is changed unless everything fits.

    Args:
        model: A LeMo model, wrapped by PEFT or not.
        folder: Where `save_lemo_files` wrote.
        settings: Also take the saved `lemo` block as the model's; `False` takes predictors and thresholds only, and leaves
            the model's own keep ratio, selection and so on.

    Raises:
        LemoError: If a file is missing, corrupt or does not fit the model. Shapes are compared before anything is allocated.
    """
    block = lemo_block(model)
    layers = predictor_layers(model)
    saved, _ = read_lemo_config(folder)
    path = Path(folder) / PREDICTORS_FILE
    config: Any = model.config
    hidden_size = int(config.hidden_size)
    sizes = saved.predictor_sizes or [[saved.predictor_rank] * 4] * len(layers)
    if len(sizes) != len(layers):
        raise _misfit(path, f"they are for {len(sizes)} layers, the model has {len(layers)}")
    expected: dict[str, tuple[int, int]] = {}
    for index, four in enumerate(sizes):
        expected |= _predictor_shapes(index, four, hidden_size, saved.predictor_features, path)
    tensors = _read_tensors(path, expected)

    predictors = []
    try:
        for index in range(len(layers)):
            predictor = PatternPredictor.from_config(saved, hidden_size, index)
            prefix = f"layers.{index}."
            predictor.load_state_dict({name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)})
            predictors.append(predictor)
        names = saved.to_dict() if settings else ("thresholds", "predictor_sizes", "predictor_rank", "predictor_features")
        changes = {name: getattr(saved, name) for name in names}
        trial = LemoConfig.from_dict({**block.to_dict(), **changes})
        trial.validate_for(len(layers))
    except LemoConfigError as error:
        raise LemoError(str(error)) from error
    for layer, predictor in zip(layers, predictors, strict=True):
        device = next(layer.lemo_predictor.parameters()).device
        layer.lemo_predictor = predictor.to(device)
    block.update(**changes)


def _predictor_shapes(index: int, sizes: list[int], hidden_size: int, features: int, path: Path) -> dict[str, tuple[int, int]]:
    if len(sizes) != 4 or not all(isinstance(size, int) and 0 < size <= hidden_size for size in sizes):
        raise _misfit(path, f"layer {index} has widths {sizes}, the model's hidden_size is {hidden_size}")
    shapes = {}
    for name, (first, second) in (("query", sizes[:2]), ("key", sizes[2:])):
        widths = (hidden_size, first, second, features)
        for matrix, shape in enumerate(itertools.pairwise(widths)):
            shapes[f"layers.{index}.{name}.matrices.{matrix}"] = shape
    return shapes


def _read_tensors(path: Path, expected: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    if not path.is_file():
        raise LemoError(
            f"predictors are missing; {str(path)!r}; give the folder of a LeMo run, or train without it to make new ones"
        )
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            for name in sorted(expected.keys() | found):
                if name not in found:
                    raise _misfit(path, f"{name} is missing")
                if name not in expected:
                    raise _misfit(path, f"{name} belongs to no layer of the model")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise _misfit(path, f"{name} has shape {shape}, the model needs {expected[name]}")
            return {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise LemoError(
            f"predictor file is corrupt or truncated ({reason}); {str(path)!r}; copy it again, or train without it to make new ones"
        ) from error


def _misfit(path: Path, fact: str) -> LemoError:
    return LemoError(
        f"predictors do not fit the model: {fact}; {str(path)!r}; use those of a run on this model, or train new ones"
    )
