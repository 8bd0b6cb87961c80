"""What a run writes beside its adapter: `lemo_predictors.safetensors` and the lemo block, `lemo_config.json`.

The sizes that pruning left stand in the block, so a block and its predictors are written and read together.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import LemoError
from ..models.lemo_config import LemoConfig, LemoConfigError
from ..models.pattern_predictor import PatternPredictor

PREDICTORS_FILE = "lemo_predictors.safetensors"
CONFIG_FILE = "lemo_config.json"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        LemoError: If the file is missing, corrupt or truncated.
    """
    if not path.is_file():
        raise LemoError(f"file does not exist; {str(path)!r}; name a folder that a LeMo run saved")
    try:
        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            return {name: stored.get_tensor(name) for name in names}, dict(stored.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise LemoError(
            f"file is corrupt or truncated ({' '.join(str(error).split())}); {str(path)!r}, {path.stat().st_size} bytes; copy it again, or train anew"
        ) from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping.

    Raises:
        LemoError: If the file is missing or no JSON mapping.
    """
    if not path.is_file():
        raise LemoError(f"file does not exist; {str(path)!r}; name a folder that a LeMo run saved")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LemoError(f"file is not JSON ({error}); {str(path)!r}; copy it again, or train anew") from error
    if not isinstance(values, dict):
        raise LemoError(f"file holds no JSON mapping; {str(path)!r}; copy it again, or train anew")
    return values


def predictor_tensors(backbone: Any) -> dict[str, Tensor]:
    """All predictor matrices by name, `layers.<layer>.<query|key>.matrices.<i>`."""
    return {
        f"layers.{index}.{name}": weight
        for index, layer in enumerate(backbone.layers)
        for name, weight in layer.lemo_predictor.named_parameters()
    }


def read_lemo_config(folder: str | Path) -> LemoConfig:
    """The lemo block in `folder`.

    Raises:
        LemoError: If it is missing, unreadable or not valid.
    """
    values = read_json(Path(folder) / CONFIG_FILE)
    # Beside the block's own fields a saved run notes how its base model is to be loaded (`hub.export`).
    values.pop("base_config", None)
    try:
        return LemoConfig.from_dict(values)
    except LemoConfigError as error:
        raise LemoError(str(error)) from error


def load_predictors(backbone: Any, folder: str | Path) -> None:
    """Loads the predictors in `folder` into a model, which takes on their sizes.

    Args:
        backbone: A model with `SparseBackbone` among its bases; on an error it is unchanged.
        folder: A folder that `hub.export.save_lemo_files` wrote.

    Raises:
        LemoError: If a file is missing or damaged, or the predictors do not fit the model.
    """
    tensors, _ = read_tensors(Path(folder) / PREDICTORS_FILE)
    set_predictors(backbone, tensors, read_lemo_config(folder), str(Path(folder) / PREDICTORS_FILE))


def set_predictors(backbone: Any, tensors: dict[str, Tensor], stored: LemoConfig, source: str) -> None:
    """Gives a model the predictors in `tensors`, made under the block `stored`; `source` names them in errors.

    Raises:
        LemoError: If the predictors do not fit the model; it is unchanged then.
    """
    lemo, hidden, layers = backbone.config.lemo, backbone.config.hidden_size, len(backbone.layers)
    found = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    if found != layers:
        raise LemoError(
            f"predictors do not fit the model: they have {found} layers, the model {layers}; {source}; train predictors for this model"
        )
    if stored.block_size != lemo.block_size:
        raise LemoError(
            f"predictors do not fit the model: they pool blocks of {stored.block_size}, the model has block_size={lemo.block_size}; {source}; "
            "set the same block_size, or train predictors for this one"
        )
    rank = stored.predictor_rank
    sizes = stored.predictor_sizes or [[rank] * 4] * layers
    try:
        stored.validate_for(layers)
        made = [PatternPredictor(hidden, sizes[index], stored.predictor_features) for index in range(layers)]
        for index, predictor in enumerate(made):
            prefix = f"layers.{index}."
            matrices = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            predictor.load_state_dict(matrices)
    except (RuntimeError, LemoConfigError) as error:
        reason = " ".join(str(error).split())
        raise LemoError(
            f"predictors do not fit the model with hidden_size {hidden}: {reason}; {source}; train predictors for this model"
        ) from error
    for layer, predictor in zip(backbone.layers, made, strict=True):
        device = next(layer.lemo_predictor.parameters()).device
        layer.lemo_predictor = predictor.to(device).requires_grad_(False).train(layer.training)
    lemo.update(predictor_sizes=stored.predictor_sizes, predictor_rank=rank, predictor_features=stored.predictor_features)


def record_predictor_sizes(backbone: Any) -> None:
    """Writes the present sizes into the lemo block, so that loading builds the right shapes."""
    backbone.config.lemo.update(predictor_sizes=[layer.lemo_predictor.sizes for layer in backbone.layers])


def parameter_share(backbone: Any) -> float:
    """Predictor parameters over the other parameters of the layers, in [0, 1]; adapters are counted with neither."""
    predictors = sum(weight.numel() for weight in predictor_tensors(backbone).values())
    others = sum(
        weight.numel()
        for name, weight in backbone.layers.named_parameters()
        if ".lemo_predictor." not in name and ".lora_" not in name
    )
    return predictors / others
