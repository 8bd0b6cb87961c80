"""Which ways of spreading a run over devices LeMo trains with, and the one line that refuses the others before the first step.

A process' documents decide how often a layer's modules are called: a layer without rest rows skips theirs. So weights may be
exchanged by whole layers only, which every forward runs all of (FSDP2), or not at all (DDP, ZeRO-1 and -2). Engines that cut a
sequence or a matrix among processes would have to cut documents, blocks and selections too.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments

from ...errors import LemoError
from ...models.sparse_decoder import sparse_backbone

_PREDICTORS = r".*lemo_predictor"
_SIZES = {
    "cp_size": "ring attention (context parallelism)",
    "sp_size": "Ulysses (sequence parallelism)",
    "tp_size": "tensor parallelism",
}
_INSTEAD = "use FSDP2 or DDP; checkpoint='kept_rows' makes room for long sequences"


def refuse_split_sequences(args: TrainingArguments, model: Any) -> None:
    """Refuses engines that cut sequences or matrices, by the arguments and the model alone: before an engine is made.

    Raises:
        LemoError: If there is one.
    """
    _refuse_sizes(getattr(args, "parallelism_config", None))
    if model is not None and (getattr(model, "tp_size", None) or 1) > 1:
        raise LemoError(f"LeMo does not train with tensor parallelism; the model has tp_size={model.tp_size}; {_INSTEAD}")
    if model is not None and getattr(model, "is_distributed_loading_by_transformers", False):
        raise LemoError(
            "LeMo does not train models that from_pretrained has sharded; got distributed_config; "
            "leave it out, and shard by `accelerate launch` or TrainingArguments(fsdp=True)"
        )


def _refuse_sizes(sizes: Any) -> None:
    for name, words in _SIZES.items():
        if (getattr(sizes, name, None) or 1) > 1:
            raise LemoError(f"LeMo does not train with {words}; {name}={getattr(sizes, name)}; {_INSTEAD}")


def prepare_engine(args: TrainingArguments, model: nn.Module, saves_whole: bool = True) -> None:
    """Looks at the engine that a trainer has set up, and prepares FSDP2 for LeMo.

    It leaves the predictors alone: they are small, stay float32, are read outside of their layer's forward, and change their
    shapes. With mixed precision it leaves the loss in float32, which accelerate has it round to 16 bits (a loss of 5 is known to
    0.03 then), and reduces gradients in float32, as DDP does.

    Args:
        args: The trainer's.
        model: The model before the engine wraps it.
        saves_whole: Whether the trainer puts shards together where it saves (`ShardedSavingMixin`); a stock one does not.

    Raises:
        LemoError: If LeMo does not train with that engine, or with that option of it.
    """
    refuse_split_sequences(args, model)
    if args.n_gpu > 1:
        raise LemoError(
            f"one process on {args.n_gpu} GPUs would train by DataParallel, which LeMo does not; n_gpu={args.n_gpu}; "
            f"start with `torchrun --nproc_per_node {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES=0"
        )
    if args.auto_find_batch_size and args.world_size > 1:
        raise LemoError(
            "a process that runs out of memory begins anew by itself, and the others wait for it; auto_find_batch_size=True, "
            f"{args.world_size} processes; leave it out and set per_device_train_batch_size"
        )
    engine: Any = AcceleratorState() if AcceleratorState._shared_state else None
    _refuse_sizes(getattr(engine, "parallelism_config", None))
    deepspeed = getattr(getattr(args, "hf_deepspeed_config", None), "config", None)
    if deepspeed is None:
        deepspeed = getattr(getattr(engine, "deepspeed_plugin", None), "deepspeed_config", None)
    if deepspeed is not None:
        refuse_deepspeed(deepspeed)
    fsdp = getattr(engine, "fsdp_plugin", None)
    if fsdp is not None:
        if not saves_whole:
            raise LemoError(
                "a stock trainer under FSDP2 saves shards, which only FSDP reads, and no whole adapter; "
                f"{args.world_size} processes; use LemoTrainer or LemoSFTTrainer, whose checkpoints are whole, or DDP"
            )
        refuse_fsdp(fsdp, args, model)
        # A model's own list also names the stock layers that its base class began with.
        fsdp.transformer_cls_names_to_wrap = [type(sparse_backbone(model).layers[0]).__name__]
        policy = fsdp.mixed_precision_policy
        if policy is not None and policy.param_dtype == policy.reduce_dtype == policy.output_dtype:  # accelerate's, from a word
            fsdp.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        theirs = fsdp.ignored_modules
        if theirs is None or isinstance(theirs, str):
            fsdp.ignored_modules = f"(?:{theirs})|{_PREDICTORS}" if theirs else _PREDICTORS
        else:
            predictors = [layer.lemo_predictor.to(args.device) for layer in sparse_backbone(model).layers]
            fsdp.ignored_modules = [*theirs, *predictors]
    elif args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise LemoError(
            f"FSDP was asked for, and accelerate did not set it up; device {args.device.type}, {args.world_size} processes; "
            "it runs on several accelerators only: leave fsdp out"
        )


def refuse_deepspeed(config: dict[str, Any]) -> None:
    """Refuses what LeMo does not train with of a DeepSpeed config; ZeRO stages 0 to 2 are let through.

    Raises:
        LemoError: If there is such a thing.
    """

    def value(*names: str) -> Any:
        found: Any = config
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    if value("zero_optimization", "stage") == 3:
        raise LemoError(
            "LeMo does not train with ZeRO-3, which exchanges weights at every call of a module, and processes call them unequally "
            "often; zero_optimization.stage=3; set it to 2, or use FSDP2, which shards by layers"
        )
    sizes = {
        "sequence_parallel_size": value("sequence_parallel_size"),
        "tensor_parallel.autotp_size": value("tensor_parallel", "autotp_size"),
        "pipeline.stages": value("pipeline", "stages"),
    }
    for name, size in sizes.items():
        if isinstance(size, int) and size > 1:
            raise LemoError(f"LeMo trains with DeepSpeed's data parallelism only; {name}={size}; leave it out")


def refuse_fsdp(fsdp: Any, args: TrainingArguments, model: nn.Module) -> None:
    """Refuses what LeMo does not train with of a `FullyShardedDataParallelPlugin`.

    Raises:
        LemoError: If there is such a thing.
    """
    if fsdp.fsdp_version != 2:
        raise LemoError(f"LeMo shards by FSDP2; fsdp_version={fsdp.fsdp_version}; set it to 2")
    if fsdp.cpu_ram_efficient_loading:
        raise LemoError(
            "FSDP2 cannot hand out the weights of rank 0 beside predictors that it leaves alone; fsdp_cpu_ram_efficient_loading=True; "
            "set it to false"
        )
    if fsdp.activation_checkpointing:
        raise LemoError(
            "LeMo's layers cannot stand within FSDP's checkpoint wrappers; fsdp activation_checkpointing=True; "
            "use LemoConfig(checkpoint='kept_rows'), or gradient_checkpointing=True"
        )
    if isinstance(fsdp.cpu_offload, CPUOffloadPolicy):
        raise LemoError(
            "FSDP's offload of weights is not tried with LeMo; fsdp_offload_params=True; set it to false: checkpoint='kept_rows' and "
            "offload='sensitive' make room among the activations"
        )
    layer = type(sparse_backbone(model).layers[0]).__name__
    names = {name for name in fsdp.transformer_cls_names_to_wrap or [] if name} or {layer}
    if names != {layer}:
        raise LemoError(
            f"FSDP2 may shard LeMo's models by whole layers only; it is to wrap {', '.join(sorted(names))}; "
            f"leave fsdp_transformer_layer_cls_to_wrap out, or name {layer}"
        )
    if getattr(fsdp, "min_num_params", None):
        raise LemoError(
            f"FSDP2 may shard LeMo's models by whole layers only; min_num_params={fsdp.min_num_params}; "
            "set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP"
        )
    if getattr(args, "torch_compile", False):
        raise LemoError("compiled layers under FSDP2 are not tried; torch_compile=True; leave it out, or train with DDP")
    optimizer = str(getattr(args.optim, "value", args.optim))
    if any(part in optimizer for part in ("8bit", "4bit")):
        raise LemoError(
            f"an optimizer of few bits keeps scales by shard, and could not be saved whole; optim={optimizer}; "
            "use adamw_torch, whose state FSDP2 shards"
        )
