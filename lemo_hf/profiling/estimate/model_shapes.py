"""Configs to estimate and to benchmark with: shapes of well-known models by name, local config files, Hub ids.

A shape is what the public config.json of the model says and what memory and FLOPs depend on. Nothing else is needed: no weights.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from ...errors import LemoError
from ...registry import ARCHITECTURES

_LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_LLAMA_3_8B = _LLAMA_2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
_OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}

# name -> the fields of config.json that decide memory and FLOPs. Llama-3.1-8B has the longer context only.
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": _LLAMA_3_8B,
    "Llama-3.1-8B": _LLAMA_3_8B | {"max_position_embeddings": 131072},
    "Llama-2-7B": _LLAMA_2_7B,
    "Mistral-7B": _LLAMA_3_8B
    | {"model_type": "mistral", "vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None, "head_dim": 128},
    "OPT-6.7B": _OPT | {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "word_embed_proj_dim": 4096},
    "OPT-1.3B": _OPT | {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "word_embed_proj_dim": 2048},
    "OPT-2.7B": _OPT | {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "word_embed_proj_dim": 2560},
    "OPT-125M": _OPT
    | {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768},
    "Qwen3-8B": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
}

# Sizes that every config has, and beside them those of a type that its config class would fill with a default model's. What a class
# derives from other fields (Llama's key heads, from its heads) may be left out.
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_GIVEN = (*_SIZES, "max_position_embeddings")
_GIVEN_OF_TYPE = {
    "llama": ("intermediate_size",),
    "mistral": ("intermediate_size", "num_key_value_heads"),
    "opt": ("ffn_dim",),
    "qwen2": ("intermediate_size", "num_key_value_heads"),
    "qwen3": ("intermediate_size", "num_key_value_heads", "head_dim"),
}

# What config classes raise for values they cannot take.
_BAD_VALUES = (ValueError, TypeError, KeyError, StrictDataclassError)


def shape_config(name: str) -> PreTrainedConfig:
    """The config of a built-in shape.

    Args:
        name: A name in `SHAPES`, in any case.

    Raises:
        LemoError: If there is no such shape.
    """
    by_lower = {known.lower(): values for known, values in SHAPES.items()}
    if name.lower() not in by_lower:
        raise LemoError(f"no built-in shape of this name; {name!r}; choose one of {', '.join(SHAPES)}")
    return _from_values(by_lower[name.lower()], name)


def read_model_config(model: str | Path) -> PreTrainedConfig:
    """The config that a user means: a built-in shape's name, a config.json, a folder with one, or a Hub id.

    Args:
        model: One of these; what lies on disk goes before the Hub.

    Raises:
        LemoError: If nothing is found, or what is found lacks a field, or is of an unsupported type.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise LemoError(f"folder holds no config.json; {str(model)!r}; give a model's folder, a config file or a Hub id")
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise LemoError(f"config is not JSON; {str(path)!r}; {_short(error)}") from None
        if not isinstance(values, dict):
            raise LemoError(f"config is not a JSON object; {str(path)!r}; give a model's config.json")
        return _from_values(values, str(path))
    if str(model).lower() in {name.lower() for name in SHAPES}:
        return shape_config(str(model))
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(model))
    except (OSError, *_BAD_VALUES) as error:
        raise LemoError(
            f"no config found for the model; {str(model)!r} ({_short(error)}); give a config.json, a folder, a Hub id that can be "
            f"reached, or one of {', '.join(SHAPES)}"
        ) from None
    return _from_values(values, str(model))


def checked_config(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """`config`, if an estimate can be made of it.

    Raises:
        LemoError: If it is of an unsupported type or lacks a size.
    """
    _refuse_unknown_type(config.model_type, name)
    for field in _SIZES:
        size = getattr(config, field, None)
        if not isinstance(size, int) or size < 1:
            raise LemoError(f"config lacks {field}; {name!r} has {size!r}; write the model's {field} into its config.json")
    return config


def stock_type(config: PreTrainedConfig) -> str:
    """The stock `model_type` of a stock or LeMo config."""
    return _stock_type(config.model_type)


def _stock_type(model_type: str) -> str:
    by_lemo_type = {pair[0].model_type: stock for stock, pair in ARCHITECTURES.items()}
    return by_lemo_type.get(model_type, model_type)


def _refuse_unknown_type(model_type: str, name: str) -> None:
    if _stock_type(model_type) not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise LemoError(f"no estimate for model type {model_type!r}; {name!r}; choose a model of one of the types {known}")


def _from_values(values: dict[str, Any], name: str) -> PreTrainedConfig:
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise LemoError(f"config lacks model_type; {name!r}; write the model's model_type into its config.json")
    # Before fields are: other types call them by other names.
    _refuse_unknown_type(model_type, name)
    # A config class fills what is missing with a default model's sizes, which would be another model's memory.
    for field in (*_GIVEN, *_GIVEN_OF_TYPE[_stock_type(model_type)]):
        if field not in values:
            raise LemoError(f"config lacks {field}; {name!r}; write the model's {field} into its config.json")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except _BAD_VALUES as error:
        raise LemoError(f"config cannot be read; {name!r} ({_short(error)}); correct its config.json") from None
    return checked_config(config, name)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "..."
