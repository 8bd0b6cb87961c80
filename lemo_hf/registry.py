"""Stock model types and their LeMo classes; registration with AutoConfig and AutoModelForCausalLM; loading stock checkpoints."""

from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .errors import LemoError
from .models.lemo_config import LemoConfig

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

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def register() -> None:
    """Makes AutoConfig and AutoModelForCausalLM know the LeMo model types; importing lemo_hf calls it."""
    for config_class, model_class in ARCHITECTURES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")


def lemo_config_from(config: PreTrainedConfig, lemo: LemoConfig | None = None) -> PreTrainedConfig:
    """The LeMo config of a stock one, with the same values and a `lemo` block.

    Args:
        config: A stock config, or a LeMo config, whose block then is kept unless `lemo` is given.
        lemo: The block.

    Raises:
        LemoError: If the architecture has no LeMo classes.
    """
    by_lemo_type = {pair[0].model_type: pair for pair in ARCHITECTURES.values()}
    known = ARCHITECTURES.get(config.model_type) or by_lemo_type.get(config.model_type)
    if known is None:
        raise LemoError(
            f"no LeMo classes for model type {config.model_type!r}; supported: {', '.join(sorted(ARCHITECTURES))}; "
            "choose a model of one of these types"
        )
    values = config.to_dict()
    values.pop("model_type", None)
    values["architectures"] = [known[1].__name__]
    if lemo is not None:
        values["lemo"] = lemo
    # The attention implementation is not among a config's written values.
    return known[0].from_dict(values, attn_implementation=config._attn_implementation)


class AutoLemoModelForCausalLM:
    """Loads a stock or a LeMo checkpoint as a model that LeMo can train."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, lemo: LemoConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Loads weights under their stock names into the LeMo class of the checkpoint's architecture.

        Args:
            pretrained_model_name_or_path: A Hub id or a folder, of a stock or of a LeMo model.
            lemo: How to eliminate tokens; the checkpoint's own block, or the defaults, if not given.
            **kwargs: As for `AutoModelForCausalLM.from_pretrained` (dtype, device_map, quantization_config, ...). Config fields
                such as `rope_parameters` are taken too.

        Returns:
            The model, in evaluation mode. Its evaluation and generation are the stock model's, bit for bit.

        Raises:
            LemoError: If the architecture is not supported.
        """
        config = kwargs.pop("config", None)
        if config is None:
            # The config's loading consumes its fields from kwargs; what tells the Hub where to look serves the weights too.
            where: dict[str, Any] = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
            config, rest = AutoConfig.from_pretrained(pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs)
            kwargs = {**rest, **where}
        config = lemo_config_from(config, lemo)
        return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, config=config, **kwargs)
