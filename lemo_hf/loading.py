"""From a name to a model: base models with their context extended, and whatever a run saved; errors are one line."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils.hub import cached_file

from .errors import LemoError
from .hub.lemo_files import CONFIG_FILE, PREDICTORS_FILE, load_lemo_files, read_lemo_files
from .models.lemo_config import LemoConfigError
from .recipe import ModelFields
from .registry import AutoLemoModelForCausalLM, lemo_config_from

_ASSETS = Path(__file__).with_name("assets")


def model_location(name: str) -> str:
    """Where `from_pretrained` finds `name`: a folder or Hub id as it is, an embedded model in the package.

    A folder that is gone but is called like an embedded model means that one: adapters record the folder of their base.

    Raises:
        LemoError: If `name` can only be a folder, and there is none.
    """
    if Path(name).exists():
        return name
    embedded = _ASSETS / Path(name).name
    if embedded.is_dir() and name.count("/") != 1:
        return str(embedded)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise LemoError(f"model folder does not exist; {name!r}; give a folder that holds a model, or a Hub id")
    return name


@contextmanager
def without_peft_deprecation() -> Iterator[None]:
    """Keeps one warning from users that they can do nothing about: PEFT 0.21 reads an attribute that transformers 5.23 renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


@contextmanager
def one_line_errors(fact: str, name: str) -> Iterator[None]:
    """Turns what `from_pretrained` raises for bad files or names into a `LemoError` of one line."""
    try:
        yield
    except (LemoError, LemoConfigError):
        raise
    except (OSError, ValueError, SafetensorError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LemoError(f"{fact} ({reason}); {name!r}; check the name or path, and that its files are whole") from error


def extended_config(model: ModelFields, seq_len: int) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The base model's config, and the fields to load it with so that it takes samples of `seq_len` tokens.

    Raises:
        LemoError: If the model cannot be found, its architecture is not supported, or its context is too short for
            `seq_len` and the recipe does not extend it.
    """
    with one_line_errors("base model cannot be loaded", model.model):
        config = AutoConfig.from_pretrained(model_location(model.model), revision=model.revision)
        lemo_config_from(config)
    context = config.max_position_embeddings
    if model.rope_type == "checkpoint" and model.rope_theta is None:
        if model.rope_factor is not None:
            raise LemoError(f"rope_factor needs a rope_type; rope_factor={model.rope_factor}; add rope_type: linear or yarn")
        if seq_len > context:
            raise LemoError(
                f"seq_len {seq_len} is longer than the model's context of {context}; {model.model!r}; "
                "extend it with rope_type: linear or yarn, or lower seq_len"
            )
        return config, {}
    rope = dict(config.rope_parameters)
    if model.rope_theta is not None:
        rope["rope_theta"] = model.rope_theta
    if model.rope_type != "checkpoint":
        if rope["rope_type"] != "default":
            raise LemoError(
                f"the model's positions are scaled already (rope_type {rope['rope_type']!r}); {model.model!r}; "
                "set rope_theta instead, or start from its unscaled base"
            )
        rope |= {"rope_type": model.rope_type, "factor": float(model.rope_factor or max(1.0, seq_len / context))}
        if model.rope_type == "yarn":
            rope["original_max_position_embeddings"] = context
    return config, {"rope_parameters": rope, "max_position_embeddings": max(seq_len, context)}


def load_tokenizer(model: ModelFields) -> Any:
    """The base model's tokenizer."""
    with one_line_errors("tokenizer cannot be loaded", model.model):
        return AutoTokenizer.from_pretrained(model_location(model.model), revision=model.revision)


def load_saved_model(name: str, sparse: bool = False) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer.

    On an accelerator the weights keep the checkpoint's dtype. On a CPU they are float32, where 16 bits are slow, and a base
    saved in bfloat16 that a run trained in float32 would be measured as another model than the run's.

    Args:
        name: Folder or Hub id of a model or of a PEFT adapter, or the name of an embedded model.
        sparse: The sparse forward will run too, so LeMo's settings and predictors are needed.

    Raises:
        LemoError: If it cannot be found, is damaged, or carries no LeMo though `sparse` asks for it.
    """
    with one_line_errors("model cannot be loaded", name):
        location = model_location(name)
        adapter = _file(location, "adapter_config.json")
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        dtype = torch.float32 if device is None else "auto"
        model = _load_adapter(location, adapter, sparse, dtype) if adapter else _load_whole(location, sparse, dtype)
        source = location if _file(location, "tokenizer_config.json") else model.config.name_or_path
        return model.to(device or "cpu").eval(), AutoTokenizer.from_pretrained(source)


def _file(location: str, name: str) -> str | None:
    # Of a folder or of a Hub repository; None where it has no such file.
    found: str | None = cached_file(
        location, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return found


def _load_adapter(location: str, adapter_config: str, sparse: bool, dtype: torch.dtype | str) -> Any:
    from peft import PeftConfig, PeftModel

    base = model_location(PeftConfig.from_pretrained(str(Path(adapter_config).parent)).base_model_name_or_path)
    found = _file(location, CONFIG_FILE)
    if found is None and sparse:
        raise LemoError(f"the sparse forward needs LeMo's files; {location!r} has no {CONFIG_FILE}; leave out --sparse")
    block, base_config = read_lemo_files(Path(found).parent) if found else (None, {})
    if sparse and found:
        _file(location, PREDICTORS_FILE)  # a Hub repository's lands in the same folder
        model: Any = AutoLemoModelForCausalLM.from_pretrained(base, lemo=block, dtype=dtype, **base_config)
        load_lemo_files(model, Path(found).parent)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **base_config)
    with without_peft_deprecation():
        return PeftModel.from_pretrained(model, location)


def _load_whole(location: str, sparse: bool, dtype: torch.dtype | str) -> Any:
    if sparse and getattr(AutoConfig.from_pretrained(location), "lemo", None) is None:
        raise LemoError(
            f"the sparse forward needs a LeMo model; {location!r} is a stock one; leave out --sparse or name an adapter"
        )
    return AutoModelForCausalLM.from_pretrained(location, dtype=dtype)
