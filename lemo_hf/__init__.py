"""LeMo: long-context LoRA fine-tuning that leaves uninformative tokens out of each layer's computation.

Public names load on first use. Importing the package registers the LeMo models with `AutoConfig` and
`AutoModelForCausalLM`, and needs only torch, transformers, peft, accelerate and safetensors.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .supported_versions import check_versions, declared_requirements

# Before anything of transformers or torch is imported: an older one would fail with an error about some name of its own.
check_versions(declared_requirements())

# PEFT imports bitsandbytes where it is installed, which on some CPUs warns of an operator for inference that training never calls.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())

from .registry import register  # noqa: E402

if TYPE_CHECKING:
    from .models.configuration_lemo_llama import LemoLlamaConfig
    from .models.configuration_lemo_mistral import LemoMistralConfig
    from .models.configuration_lemo_opt import LemoOPTConfig
    from .models.configuration_lemo_qwen2 import LemoQwen2Config
    from .models.configuration_lemo_qwen3 import LemoQwen3Config
    from .models.lemo_config import LemoConfig
    from .models.modeling_lemo_llama import LemoLlamaForCausalLM
    from .models.modeling_lemo_mistral import LemoMistralForCausalLM
    from .models.modeling_lemo_opt import LemoOPTForCausalLM
    from .models.modeling_lemo_qwen2 import LemoQwen2ForCausalLM
    from .models.modeling_lemo_qwen3 import LemoQwen3ForCausalLM
    from .registry import AutoLemoModelForCausalLM
    from .training.arguments import LemoTrainingArguments
    from .training.callbacks import lemo_callbacks
    from .training.faults.whole_checkpoints import last_whole_checkpoint
    from .training.sft_trainer import LemoSFTConfig, LemoSFTTrainer
    from .training.trainer import LemoTrainer

__version__ = "0.1.0.dev0"

__all__ = [
    "AutoLemoModelForCausalLM",
    "LemoConfig",
    "LemoLlamaConfig",
    "LemoLlamaForCausalLM",
    "LemoMistralConfig",
    "LemoMistralForCausalLM",
    "LemoOPTConfig",
    "LemoOPTForCausalLM",
    "LemoQwen2Config",
    "LemoQwen2ForCausalLM",
    "LemoQwen3Config",
    "LemoQwen3ForCausalLM",
    "LemoSFTConfig",
    "LemoSFTTrainer",
    "LemoTrainer",
    "LemoTrainingArguments",
    "last_whole_checkpoint",
    "lemo_callbacks",
]

# Public name -> the module that defines it: the training half pulls in transformers' Trainer, which takes seconds.
_HOME = {
    "AutoLemoModelForCausalLM": ".registry",
    "LemoConfig": ".models.lemo_config",
    "LemoLlamaConfig": ".models.configuration_lemo_llama",
    "LemoLlamaForCausalLM": ".models.modeling_lemo_llama",
    "LemoMistralConfig": ".models.configuration_lemo_mistral",
    "LemoMistralForCausalLM": ".models.modeling_lemo_mistral",
    "LemoOPTConfig": ".models.configuration_lemo_opt",
    "LemoOPTForCausalLM": ".models.modeling_lemo_opt",
    "LemoQwen2Config": ".models.configuration_lemo_qwen2",
    "LemoQwen2ForCausalLM": ".models.modeling_lemo_qwen2",
    "LemoQwen3Config": ".models.configuration_lemo_qwen3",
    "LemoQwen3ForCausalLM": ".models.modeling_lemo_qwen3",
    "LemoSFTConfig": ".training.sft_trainer",
    "LemoSFTTrainer": ".training.sft_trainer",
    "LemoTrainer": ".training.trainer",
    "LemoTrainingArguments": ".training.arguments",
    "last_whole_checkpoint": ".training.faults.whole_checkpoints",
    "lemo_callbacks": ".training.callbacks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


register()
