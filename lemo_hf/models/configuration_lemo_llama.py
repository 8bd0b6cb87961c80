"""Configuration of a Llama with LeMo."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .lemo_model_config import LemoModelConfig


@strict
class LemoLlamaConfig(LemoModelConfig, LlamaConfig):
    """A `LlamaConfig` with a `lemo` block."""

    model_type = "lemo_llama"
