"""Stock model types and their LeMo classes; registration with AutoConfig and AutoModelForCausalLM; loading stock checkpoints."""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import constants
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .errors import LemoError
from .hub.lemo_files import with_found
from .hub.weight_files import check_stored_predictors, find_file, require_safe_weights
from .models.lemo_config import LemoConfig, LemoConfigError, shown

logger = logging.getLogger(__name__)

# Stock model_type -> how its classes are called. A new architecture is one line here: `models/configuration_lemo_<type>.py` and
# `models/modeling_lemo_<type>.py` hold its `Lemo<name>Config` and `Lemo<name>ForCausalLM`.
_CLASS_NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "opt": "OPT",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}


def _classes(stock_type: str, name: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    configuration, modeling = (
        import_module(f".models.{stem}_lemo_{stock_type}", __package__) for stem in ("configuration", "modeling")
    )
    return getattr(configuration, f"Lemo{name}Config"), getattr(modeling, f"Lemo{name}ForCausalLM")


# stock model_type -> (LeMo config class, LeMo model class).
ARCHITECTURES = {stock_type: _classes(stock_type, name) for stock_type, name in _CLASS_NAMES.items()}

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def register() -> None:
    """Makes AutoConfig, AutoModelForCausalLM and PEFT know the LeMo model types; importing lemo_hf calls it."""
    for config_class, model_class in ARCHITECTURES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
    _register_with_peft()


def _register_with_peft() -> None:
    # PEFT keeps one table per tuner from model type to default target modules; ours get the stock types' entries.
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            for stock_type, (config_class, _) in ARCHITECTURES.items():
                if stock_type in table:
                    table.setdefault(config_class.model_type, table[stock_type])


def lemo_config_from(config: PreTrainedConfig, lemo: LemoConfig | None = None) -> PreTrainedConfig:
    """The LeMo config of a stock one, with the same values and a `lemo` block.

    Args:
        config: A stock config, or a LeMo config, whose block then is kept unless `lemo` is given.
        lemo: The block.

    Raises:
        LemoError: If the architecture has no LeMo classes.
    """
    known = _classes_for(config.model_type, getattr(config, "attn_logit_softcapping", None))
    values = config.to_dict()
    values.pop("model_type", None)
    if values.pop("auto_map", None) and config.model_type in ARCHITECTURES:
        # Saving names the LeMo classes; what else stood there may be anybody's code and must not travel on.
        logger.warning(
            "model names code of its own (auto_map); %r; LeMo trains the stock %s: see that both compute the same",
            *(config.name_or_path, config.model_type),
        )
    values["architectures"] = [known[1].__name__]
    if lemo is not None:
        values["lemo"] = lemo
    # The attention implementation is not among a config's written values.
    return known[0].from_dict(values, attn_implementation=config._attn_implementation)


def _classes_for(model_type: Any, softcap: float | None) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    by_lemo_type = {pair[0].model_type: pair for pair in ARCHITECTURES.values()}
    known = ARCHITECTURES.get(model_type) or by_lemo_type.get(model_type) if isinstance(model_type, str) else None
    if known is None:
        capped = f" (its attention is softcapped at {softcap}, which LeMo's attention does not compute)" if softcap else ""
        raise LemoError(
            f"no LeMo classes for model type {shown(model_type)}{capped}; supported: {', '.join(sorted(ARCHITECTURES))}; "
            "choose a model of one of these types"
        )
    return known


def read_config(location: str, **kwargs: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config of a model that LeMo can train, and the arguments that are none of its fields; no code of a repository is run.

    Args:
        location: Folder or Hub id.
        **kwargs: As for `AutoConfig.from_pretrained`.

    Raises:
        LemoError: If the architecture has no LeMo classes, or the file is no config.
    """
    where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    try:
        # First as it is: upstream's own error for a type that it does not know advises to run the repository's code.
        values, _ = PreTrainedConfig.get_config_dict(location, **where)
        if not values:
            raise LemoError(f"no model is there; {location!r} has no config.json; name the folder or Hub id of a model")
        _classes_for(values.get("model_type"), values.get("attn_logit_softcapping"))
        config, rest = AutoConfig.from_pretrained(location, return_unused_kwargs=True, trust_remote_code=False, **kwargs)
    except (LemoError, LemoConfigError, OSError):
        raise
    except Exception as error:  # of any kind: upstream reads the values without looking at them first
        reason = " ".join(str(error).split())[:300]
        raise LemoError(f"config.json is damaged ({type(error).__name__}: {reason}); {location!r}; copy it again") from error
    return config, rest


class AutoLemoModelForCausalLM:
    """Loads a stock or a LeMo checkpoint as a model that LeMo can train."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, lemo: LemoConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Loads weights under their stock names into the LeMo class of the checkpoint's architecture.

        Args:
            pretrained_model_name_or_path: A Hub id or a folder, of a stock model, of a LeMo model, or of an adapter that a LeMo
                run saved: its base is loaded then with the adapter, the predictors and the positions of that run.
            lemo: How to eliminate tokens; the checkpoint's own block, or the defaults, if not given. A LeMo model or adapter keeps
                its predictors' sizes whatever is given here, and its thresholds where none are given.
            **kwargs: As for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, ...). Config fields
                such as `rope_parameters` are taken too. For an adapter also `is_trainable` (default `False`), as for `PeftModel`.
                `trust_remote_code` has no effect: only code of this package runs.

        Returns:
            The model, in evaluation mode; a `PeftModel` for an adapter. Its evaluation and generation are the stock model's, bit
            for bit.

        Raises:
            LemoError: If the architecture is not supported, an adapter's folder is not whole, weights are a pickle or damaged, or
                stored predictors do not fit the block.
        """
        from .loading import load_adapter  # which imports this module

        location = str(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)  # the classes are this package's: a repository's own code is never run
        if kwargs.pop("use_safetensors", True) is False:
            raise LemoError(f"pickled weights are not read; use_safetensors=False for {location!r}; leave it out")
        config = kwargs.pop("config", None)
        where: dict[str, Any] = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if config is None:
            if find_file(location, ADAPTER_CONFIG, **where):
                return load_adapter(location, lemo, **kwargs)
            # The config's loading consumes its fields from kwargs; what tells the Hub where to look serves the weights too.
            # A float type is the weights': "auto" is none that a config could hold.
            kept = where | {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            config, rest = read_config(location, **kwargs)
            kwargs = {**rest, **kept}
        is_lemo = config.model_type not in ARCHITECTURES
        if is_lemo and lemo is not None:
            lemo = with_found(lemo, config.lemo, location)
        config = lemo_config_from(config, lemo)
        if "gguf_file" not in kwargs:
            names = require_safe_weights(location, config, **where, variant=kwargs.get("variant"))
            if is_lemo:
                check_stored_predictors(location, config, names, config.lemo, **where, variant=kwargs.get("variant"))
            kwargs["use_safetensors"] = True
        return AutoModelForCausalLM.from_pretrained(location, config=config, trust_remote_code=False, **kwargs)
