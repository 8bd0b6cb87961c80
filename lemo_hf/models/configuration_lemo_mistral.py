"""Configuration of a Mistral with LeMo."""

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

from .lemo_model_config import LemoModelConfig


@strict
class LemoMistralConfig(LemoModelConfig, MistralConfig):
    """A `MistralConfig` with a `lemo` block."""

    model_type = "lemo_mistral"
