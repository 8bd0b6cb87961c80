"""Configuration of an OPT with LeMo."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import OPTConfig

from .lemo_config import LemoConfigError
from .lemo_model_config import LemoModelConfig


@strict
class LemoOPTConfig(LemoModelConfig, OPTConfig):
    """An `OPTConfig` with a `lemo` block.

    Raises:
        LemoConfigError: If the layers normalise after their sublayers, as those of the 350m do: every row then passes two norms
            that save it and change its gradient, so no row can be left out.
    """

    model_type = "lemo_opt"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.do_layer_norm_before:
            raise LemoConfigError(
                "LeMo needs layers that normalise before their sublayers; got do_layer_norm_before=False, as OPT-350m has it; "
                "choose another size of OPT"
            )
