"""Configuration of a Llama with LeMo: the stock fields plus the `lemo` block."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .lemo_config import LemoConfig


@strict
class LemoLlamaConfig(LlamaConfig):
    """A `LlamaConfig` with a `lemo` block.

    Args:
        lemo: A `LemoConfig`, or the mapping that config.json holds. The attribute is always a `LemoConfig`, shared by all
            layers: changing it (`config.lemo.update(keep_ratio=0.3)`) takes effect at the next step.
    """

    model_type = "lemo_llama"

    # Any, since what comes in (a mapping, nothing) is not what stays; LemoConfig.from_dict checks it.
    lemo: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.lemo = LemoConfig.from_dict(self.lemo)
        super().__post_init__(**kwargs)
        self.lemo.validate_for(self.num_hidden_layers)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # A stock Llama's config is one of ours with the default block; named so, it is read without a warning about its type.
        config_dict, unused = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == LlamaConfig.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, unused

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(output.get("lemo"), LemoConfig):
            output["lemo"] = output["lemo"].to_dict()
        return output
