"""Which options of a run go together: the table in the user guide, and the one line that refuses a pair before the first step.

A pair stands here if the two cannot do what they promise together, or would do it wrongly without a word. What is not here works,
and tests/test_memory_features.py compares its gradients. Engines that spread a run over devices are in parallel_options.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import LemoError
from ..models.lemo_config import LemoConfig
from ..models.sparse_decoder import sparse_backbone
from .arguments import LemoTrainingArguments
from .lemo_callback import LemoCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What a run was asked for.

    Args:
        args: The trainer's arguments.
        own: LeMo's; the same object under `LemoTrainer`.
        model: The model, wrapped by PEFT or not.
    """

    args: TrainingArguments
    own: LemoTrainingArguments
    model: Any

    @property
    def lemo(self) -> LemoConfig:
        """The model's lemo block."""
        block: LemoConfig = sparse_backbone(self.model).config.lemo
        return block

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """The arguments of stock activation checkpointing; `None` if it is off."""
        # Older releases of transformers know the second name only.
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if getattr(self.args, name, None):
                return dict(getattr(self.args, f"{name}_kwargs", None) or {})
        layers = sparse_backbone(self.model).layers
        return {} if any(getattr(layer, "gradient_checkpointing", False) for layer in layers) else None

    @property
    def is_compiled(self) -> bool:
        """Whether the trainer compiles the model, or it came compiled."""
        return bool(self.args.torch_compile) or hasattr(self.model, "_orig_mod")

    @property
    def adapters(self) -> list[Any]:
        """PEFT's config of every adapter."""
        return list((getattr(self.model, "peft_config", None) or {}).values())

    @property
    def runs_on_cpu(self) -> bool:
        """Whether there is no accelerator to train on."""
        return self.args.device.type == "cpu"


@dataclass(frozen=True)
class Pair:
    """Two options that do not go together.

    Args:
        first, second: The options, as a user writes them.
        why: What is wrong with both.
        fix: What to set instead.
        found: The values that a run gives them, or `None` where it does not ask for both.
        is_refused: `False` for a pair that trains right and gains less than it promises, which is said once.
    """

    first: str
    second: str
    why: str
    fix: str
    found: Callable[[Options], str | None]
    is_refused: bool = True

    def line(self, values: str) -> str:
        """The pair in one line: fact, value, fix."""
        together = "do not go together" if self.is_refused else "gain little together"
        return f"{self.first} and {self.second} {together}: {self.why}; {values}; {self.fix}"


def _stock_and_kept_rows(options: Options) -> str | None:
    kwargs = options.checkpointing
    if kwargs is None or not options.lemo.enabled or options.lemo.checkpoint != "kept_rows":
        return None
    return f"activation_checkpointing=True{f' with {kwargs}' if kwargs else ''}, checkpoint='kept_rows'"


def _compiled_selection(options: Options) -> str | None:
    lemo = options.lemo
    changes = lemo.enabled and lemo.selection != "ratio"
    return f"torch_compile=True, selection={lemo.selection!r}" if options.is_compiled and changes else None


def _compiled_kept_rows(options: Options) -> str | None:
    lemo = options.lemo
    again = lemo.enabled and lemo.checkpoint == "kept_rows" and (lemo.attention_forward != "sparse" or lemo.nearby)
    if not options.is_compiled or not again:
        return None
    modules = sparse_backbone(options.model).layers.modules()
    share = max((module.p for module in modules if isinstance(module, nn.Dropout)), default=0.0)
    return f"torch_compile=True, checkpoint='kept_rows', dropout {share:g}" if share else None


def _compiled_checkpointing(options: Options) -> str | None:
    both = options.is_compiled and options.checkpointing is not None and options.lemo.enabled
    return "torch_compile=True, activation_checkpointing=True" if both else None


def _offload(options: Options) -> str | None:
    lemo = options.lemo
    return f"offload={lemo.offload!r}" if lemo.enabled and lemo.offload != "none" else None


def _compiled_offload(options: Options) -> str | None:
    return f"torch_compile=True, {offload}" if options.is_compiled and (offload := _offload(options)) else None


def _two_offloads(options: Options) -> str | None:
    offload = _offload(options)
    if offload is None:
        return None
    if (options.checkpointing or {}).get("offload"):
        return f"{offload}, activation_checkpointing_kwargs={{'offload': True}}"
    return f"{offload}, activation_offloading=True" if getattr(options.args, "activation_offloading", False) else None


def _checkpoints_offload_from_cpu(options: Options) -> str | None:
    offloads = options.runs_on_cpu and (options.checkpointing or {}).get("offload")
    return "activation_checkpointing_kwargs={'offload': True} on cpu" if offloads else None


def _offload_from_cpu(options: Options) -> str | None:
    return f"{offload} on cpu" if options.runs_on_cpu and (offload := _offload(options)) else None


def _liger(options: Options) -> str | None:
    model_type = sparse_backbone(options.model).config.model_type
    return f"use_liger_kernel=True, model type {model_type!r}" if getattr(options.args, "use_liger_kernel", False) else None


def _label_smoothing(options: Options) -> str | None:
    factor = getattr(options.args, "label_smoothing_factor", 0.0)
    shifts_itself = hasattr(options.args, "loss_type")  # trl's SFTTrainer, whose value is right
    return f"label_smoothing_factor={factor}" if factor and not shifts_itself else None


def _prefixes(options: Options) -> str | None:
    for config in options.adapters:
        kind = getattr(config.peft_type, "value", config.peft_type)
        if options.lemo.enabled and kind in ("PREFIX_TUNING", "CARTRIDGE", "ADAPTION_PROMPT"):
            return f"peft_type={kind}"
    return None


def _dora_on_8bit(options: Options) -> str | None:
    has_8bit = any(type(module).__name__ == "Linear8bitLt" and _stands_on_cpu(module) for module in options.model.modules())
    return "use_dora=True, load_in_8bit=True on cpu" if has_8bit and _any(options.adapters, "use_dora") else None


def _stands_on_cpu(module: nn.Module) -> bool:
    return all(weight.device.type == "cpu" for weight in module.parameters())


def _any(configs: list[Any], name: str) -> bool:
    return any(getattr(config, name, False) for config in configs)


def _dropout_in_attention(options: Options) -> str | None:
    config = sparse_backbone(options.model).config
    for name in ("attention_dropout", "layerdrop"):
        value = getattr(config, name, 0.0)
        if options.lemo.enabled and value:
            return f"{name}={value} in the model's config"
    return None


def _checkpointing_of_trl(options: Options) -> str | None:
    is_default = hasattr(options.args, "loss_type") and not hasattr(options.args, "eval_sparse")  # SFTConfig, not LemoSFTConfig
    both = is_default and options.lemo.enabled and options.checkpointing is not None
    return "gradient_checkpointing=True" if both else None


PAIRS = (
    Pair(
        "activation_checkpointing=True",
        'checkpoint="kept_rows"',
        "both run a layer again, and the first stores every row of its input",
        "leave activation_checkpointing (gradient_checkpointing) out: kept rows store less; trl's SFTConfig and PEFT's prepare_model_for_kbit_training turn it on",
        _stock_and_kept_rows,
    ),
    Pair(
        "torch_compile=True",
        'selection="sampled" or "threshold"',
        "each step is another program and would be compiled anew",
        "set selection='ratio', or leave torch_compile out",
        _compiled_selection,
    ),
    Pair(
        "torch_compile=True",
        '`checkpoint="kept_rows"` with dropout in adapters (sparse form without `nearby_tokens` apart)',
        "what is dropped must be the same in both runs, which breaks the graph in every layer",
        "set lora_dropout=0.0, or leave one of them out",
        _compiled_kept_rows,
        is_refused=False,
    ),
    Pair(
        "torch_compile=True",
        "activation_checkpointing=True",
        "a layer notes its selection for the second run, which breaks its graph",
        "leave one of them out",
        _compiled_checkpointing,
        is_refused=False,
    ),
    Pair(
        "torch_compile=True",
        'offload="sensitive" or "uniform"',
        "what a compiled layer saves is not seen",
        "leave one of them out",
        _compiled_offload,
    ),
    Pair(
        'offload="sensitive" or "uniform"',
        "another offload (`activation_checkpointing_kwargs={'offload': True}`, trl's `activation_offloading`)",
        "they would copy the same tensors",
        "leave one of them out",
        _two_offloads,
    ),
    Pair(
        "offload of checkpoints",
        "training on a CPU",
        "they are in host memory already",
        "leave it out",
        _checkpoints_offload_from_cpu,
    ),
    Pair(
        'offload="sensitive" or "uniform"',
        "training on a CPU",
        "what is saved is copied to other host memory and back, as tests have it",
        "set offload='none'",
        _offload_from_cpu,
        is_refused=False,
    ),
    Pair(
        "use_liger_kernel=True",
        "a LeMo model",
        "Liger knows models by their type and would change nothing",
        "leave it out: norms, rotary positions, the MLP's activation and the loss have kernels here",
        _liger,
    ),
    Pair(
        "label_smoothing_factor",
        "a LeMo model",
        "Trainer shifts the labels of the classes it knows by name only (trl's SFTTrainer shifts them itself)",
        "set label_smoothing_factor=0",
        _label_smoothing,
    ),
    Pair(
        "prefix tuning, cartridges, adaption prompts (PEFT)",
        "LeMo's attention",
        "they add keys that belong to no token",
        "use LoRA, or train with enabled=False",
        _prefixes,
    ),
    Pair(
        "use_dora=True",
        "an 8-bit base on a CPU",
        "PEFT loses the weights' scales there",
        "set load_in_4bit=True, or leave use_dora out",
        _dora_on_8bit,
    ),
    Pair(
        "attention dropout, LayerDrop",
        "LeMo's attention",
        "attention weights are never formed, and every layer chooses",
        "set attention_dropout and layerdrop to 0.0 in the model's config",
        _dropout_in_attention,
    ),
    Pair(
        "trl's default, `gradient_checkpointing=True`",
        "a LeMo model",
        "whole-layer checkpointing stores every row of a layer, so LeMo saves time and hardly memory",
        "set gradient_checkpointing=False, as LemoSFTConfig does, and checkpoint='kept_rows' if memory is short",
        _checkpointing_of_trl,
        is_refused=False,
    ),
)


def require_compatible(args: TrainingArguments, own: LemoTrainingArguments, model: Any) -> list[str]:
    """Refuses options that do not go together.

    Args:
        args: The trainer's arguments.
        own: LeMo's.
        model: The model.

    Returns:
        A line for each pair that works and gains little.

    Raises:
        LemoError: One line that names both options, their values and what to set instead.
    """
    options, lines = Options(args, own, model), []
    for pair in PAIRS:
        values = pair.found(options)
        if values is not None and pair.is_refused:
            raise LemoError(pair.line(values))
        if values is not None:
            lines.append(pair.line(values))
    return lines


def as_markdown() -> str:
    """The table of the user guide."""
    rows = [
        f"| {_code(pair.first)} | {_code(pair.second)} | {'refused' if pair.is_refused else 'works, said'}: {pair.why}; {pair.fix} |"
        for pair in PAIRS
    ]
    return "\n".join(["| option | with | what happens |", "| --- | --- | --- |", *rows])


def _code(option: str) -> str:
    return f"`{option}`" if "=" in option and " " not in option.split("=")[0] and "`" not in option else option


def keep_trainable(model: nn.Module) -> None:
    """Has bitsandbytes' 4-bit matrices on a CPU keep the layout that gradients pass through.

    Where a CPU multiplies bfloat16 (AVX512), the first forward in evaluation mode lays them out anew, in place and for good, for an
    operator without a backward: an evaluation or a recall probe would end all gradients below the last layer without a word.
    Seen with bitsandbytes 0.50; the switch is each module's own attribute, and it is not set back: a run may be continued.

    Args:
        model: Any model.

    Raises:
        LemoError: If that has happened already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise LemoError(
                f"4-bit weights were laid out for inference by an evaluation on the CPU, no gradient passes them; {name}; "
                "load the model anew and make the trainer before evaluating"
            )
        module.support_avx512bf16_for_cpu = False


class CompatibleOptions(LemoCallback):
    """Looks at a run's options as a trainer has been made, and again, since they may have changed, as training begins."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if kwargs.get("model") is not None:  # otherwise `model_init` makes it later
            require_compatible(args, self.run.args, kwargs["model"])
            keep_trainable(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for line in require_compatible(args, self.run.args, kwargs["model"]):
            logger.warning("%s", line)
        keep_trainable(kwargs["model"])
        super().on_train_begin(args, state, control, **kwargs)
