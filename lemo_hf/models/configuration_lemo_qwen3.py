"""Configuration of a Qwen3 with LeMo."""

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .lemo_model_config import LemoModelConfig


@strict
class LemoQwen3Config(LemoModelConfig, Qwen3Config):
    """A `Qwen3Config` with a `lemo` block."""

    model_type = "lemo_qwen3"
