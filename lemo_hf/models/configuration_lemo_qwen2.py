"""Configuration of a Qwen2 with LeMo."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from .lemo_model_config import LemoModelConfig


@strict
class LemoQwen2Config(LemoModelConfig, Qwen2Config):
    """A `Qwen2Config` with a `lemo` block."""

    model_type = "lemo_qwen2"
