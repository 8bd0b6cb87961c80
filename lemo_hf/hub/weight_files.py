"""Which files the weights of a checkpoint are read from: safetensors of its own folder, and never a pickle.

A pickle runs code as it is read. `transformers` falls back to one where a folder has nothing else, and also where config.json or
the index of a sharded checkpoint names one; both are looked at here before anything is loaded.
"""

import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from transformers.utils.hub import cached_file

from ..errors import LemoError
from ..models.lemo_config import LemoConfig, shown
from .lemo_files import opened_tensors, read_json, require_shapes

logger = logging.getLogger(__name__)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_PICKLE = "adapter_model.bin"
_CONVERT = "if you trust it, save it as safetensors first: stock from_pretrained, then save_pretrained (docs/untrusted_files.md)"
_PREDICTOR = re.compile(r"(?:.*\.)?(layers\.\d+)\.lemo_predictor\.(.+)")
# What `cached_file` takes of the arguments of `from_pretrained`. Not force_download: the weights would be fetched twice.
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def find_file(location: str, name: str, **where: Any) -> str | None:
    """Path of a file of a folder or of a Hub repository; `None` where it has no such file.

    Args:
        location: Folder or Hub id.
        name: The file.
        **where: As for `from_pretrained`: revision, token, cache_dir and the like; others are passed over.
    """
    found: str | None = cached_file(
        location,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **{argument: where[argument] for argument in _WHERE if where.get(argument) is not None},
    )
    return found


def require_safe_weights(location: str, config: Any, **where: Any) -> set[str]:
    """Refuses a checkpoint whose weights are a pickle, lie outside its folder or are damaged.

    Args:
        location: Folder or Hub id.
        config: Its config, which may name the weights' file.
        **where: As for `from_pretrained`, `variant` included.

    Returns:
        The names of its tensors.

    Raises:
        LemoError: In these cases, and where there are no weights. Only headers are read.
    """
    explicit = getattr(config, "transformers_weights", None)
    if explicit is not None and not _is_own(explicit, ".safetensors", ".safetensors.index.json"):
        raise LemoError(
            f"transformers_weights may name a safetensors file of the checkpoint's own folder only; got {shown(explicit)}; "
            f"take that line out of the config.json of {location!r}"
        )
    # An adapter beside a model's config is loaded onto the model.
    if find_file(location, ADAPTER_CONFIG, **where) and not find_file(location, ADAPTER_WEIGHTS, **where):
        raise LemoError(f"adapter's weights are missing or a pickle; {location!r} has no {ADAPTER_WEIGHTS}; {_CONVERT}")
    variant = where.get("variant")
    names = [explicit] if explicit else [_with_variant(name, variant) for name in (_WEIGHTS, _INDEX)]
    for name in names:
        found = find_file(location, name, **where)
        if found is not None:
            return _names_in_index(Path(found), location) if name.endswith(".json") else _names_in(Path(found))
    if Path(location).is_dir():
        for name in _PICKLES:
            if find_file(location, _with_variant(name, variant), **where):
                raise LemoError(f"weights are a pickle; {location!r} has {name} and no {names[0]}; {_CONVERT}")
        raise LemoError(f"folder has no weights; {location!r} has no {names[0]}; copy them there, or name another folder")
    # Asking for the pickle would fetch it. Nor is the Hub asked to convert it, which would hand a token to a service.
    raise LemoError(f"no safetensors weights are found; {location!r} has none, or the Hub cannot be reached; {_CONVERT}")


def require_adapter_rank(weights: Path, config: Any) -> None:
    """Refuses an adapter whose config claims a rank that none of its weights has: PEFT allocates by the config before it compares.

    Args:
        weights: Its safetensors file.
        config: Its `PeftConfig`.

    Raises:
        LemoError: If it does, or the file is damaged.
    """
    with opened_tensors(weights) as stored:
        largest = max((size for name in stored.keys() for size in stored.get_slice(name).get_shape()), default=0)  # noqa: SIM118
    pattern = getattr(config, "rank_pattern", None)
    claimed = [getattr(config, "r", 0), *(pattern.values() if isinstance(pattern, dict) else [])]
    for rank in claimed:
        if rank is not None and (not isinstance(rank, int) or rank > largest):
            raise LemoError(
                f"adapter's rank is {shown(rank)}, its weights have no dimension above {largest}; {str(weights)!r}; copy it from its run"
            )


def refuse_pickled_weights(folder: str) -> None:
    """Refuses a training checkpoint whose model or adapter can only be read from a pickle.

    Raises:
        LemoError: If it is one.
    """
    for pickle, safe in (*zip(_PICKLES, (_WEIGHTS, _INDEX), strict=True), (_ADAPTER_PICKLE, ADAPTER_WEIGHTS)):
        if (Path(folder) / pickle).is_file() and not (Path(folder) / safe).is_file():
            raise LemoError(f"weights are a pickle; {folder!r} has {pickle} and no {safe}; {_CONVERT}")


def check_stored_predictors(location: str, config: Any, names: set[str], block: LemoConfig, **where: Any) -> None:
    """Holds the predictors among a LeMo checkpoint's weights against the block that they are to serve.

    Args:
        location: Folder or Hub id of a LeMo checkpoint.
        config: The model's config, with its layers and width.
        names: Its tensors' names, from [`require_safe_weights`].
        block: The block that the model will have.
        **where: As for `from_pretrained`.

    Raises:
        LemoError: If stored predictors have other shapes. Missing ones draw a warning: they are initialised, and can be trained.
    """
    layers = range(config.num_hidden_layers)
    held = {match[1] for name in names if (match := _PREDICTOR.fullmatch(name))}
    missing = [layer for layer in layers if f"layers.{layer}" not in held]
    if missing and block.needs_predictors:
        logger.warning(
            "checkpoint has no predictors for %d of %d layers; %r; selection=%r reads them: train them with LemoTrainer's predictor "
            "phase, or load a run's with lemo_hf.hub.lemo_files.load_lemo_files",
            *(len(missing), len(layers), location, block.selection),
        )
    found = find_file(location, _with_variant(_WEIGHTS, where.get("variant")), **where)
    if found is None or missing:
        return
    with opened_tensors(Path(found)) as stored:
        shapes = {
            f"{match[1]}.{match[2]}": tuple(stored.get_slice(name).get_shape())
            for name in names
            if (match := _PREDICTOR.fullmatch(name))
        }
    require_shapes(shapes, block, config.num_hidden_layers, config.hidden_size, location)


def _with_variant(name: str, variant: str | None) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}.{variant}{dot}{suffix}" if variant else name


def _is_own(name: Any, *suffixes: str) -> bool:
    # A path below the folder itself: no other drive, no parent.
    return (
        isinstance(name, str)
        and name.endswith(suffixes)
        and "\\" not in name
        and ":" not in name
        and not PurePosixPath(name).is_absolute()
        and ".." not in PurePosixPath(name).parts
    )


def _names_in(path: Path) -> set[str]:
    with opened_tensors(path) as stored:
        return set(stored.keys())


def _names_in_index(path: Path, location: str) -> set[str]:
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise LemoError(f"index of the weights has no weight_map; {str(path)!r}; copy it again")
    for shard in sorted(set(map(str, shards.values()))):
        if not _is_own(shard, ".safetensors"):
            raise LemoError(
                f"index of the weights may name safetensors files of its own folder only; got {shown(shard)} in {str(path)!r}; {_CONVERT}"
            )
        if Path(location).is_dir():
            _names_in(path.parent / shard)  # whole, or an error that names it
    return set(shards)
