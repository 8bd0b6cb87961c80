"""Whether a training step will fit, from the estimate of `lemo estimate`, before the first one runs; and `memory_budget`.

`LemoConfig(memory_budget="40GiB")` sets the largest kept share with which a step fits, on any device. Estimated is what the
estimator knows: LoRA on a base that is not quantised, on one device, without engines that spread or recompute it. Anything else is
passed over, or refused where a budget was asked for.
"""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from ..errors import LemoError
from ..evaluation.layer_scores import backbone_inputs, documents_of
from ..profiling.estimate.cards import GIB, read_bytes
from ..profiling.estimate.estimator import CUDA_CONTEXT, Estimator
from ..profiling.estimate.step_model import DTYPES, StepSettings

if TYPE_CHECKING:
    from .lemo_run import LemoRun

logger = logging.getLogger(__name__)

# A step whose generous bound is below this share of the memory is not estimated: it fits, and a trace takes a second.
_SURE = 0.5


def memory_warning(run: "LemoRun", args: TrainingArguments, memory: int, on_gpu: bool) -> str | None:
    """What to say of a step that is not expected to fit; `None` if it is, or cannot be estimated.

    Args:
        run: The run; training has begun.
        args: The trainer's arguments.
        memory: Bytes that the step may take.
        on_gpu: Whether slack and context of CUDA count.
    """
    try:
        settings = _settings_on_device(run, args)
        if _bound(run, settings) < _SURE * memory:
            return None
        estimator = Estimator(run.backbone.config, memory=memory, on_gpu=on_gpu)
        needed = estimator.estimate(settings).total_bytes
        if needed <= memory:
            return None
    except LemoError as error:
        logger.info("whether a step fits is not estimated: %s", error)
        return None
    try:
        fix = f"set keep_ratio={estimator.kept_share(settings):g}, the largest that fits"
    except LemoError:
        smallest = _needed_at_least(estimator, settings)
        rows = run.lemo.checkpoint == "kept_rows"
        other = "use shorter samples or smaller batches" if rows else "set checkpoint='kept_rows', or use shorter samples"
        fix = f"no kept share fits, the smallest needs {_words(smallest)}: {other}"
    return (
        f"a training step is not expected to fit the device; estimated {_words(needed)} for {settings.batch_size} x "
        f"{settings.seq_len} tokens at keep_ratio={run.lemo.keep_ratio}, there are {_words(memory)}; {fix}"
    )


def keep_within_budget(run: "LemoRun", args: TrainingArguments) -> None:
    """Sets the kept share to the largest, in hundredths, with which a step fits the lemo block's `memory_budget`.

    Args:
        run: The run; its documents are at hand.
        args: The trainer's arguments.

    Raises:
        LemoError: If no kept share fits, with the smallest memory that would; if the step cannot be estimated.
    """
    budget = str(run.lemo.memory_budget)
    if isinstance(run.lemo.keep_ratio, list):
        raise LemoError(
            f"memory_budget sets one keep_ratio for all layers; {budget!r}, keep_ratio lists {len(run.lemo.keep_ratio)}; leave one out"
        )
    try:
        settings = _settings_on_device(run, args)
    except LemoError as error:
        raise LemoError(f"memory_budget cannot be kept, {error}; leave memory_budget out and set keep_ratio") from error
    estimator = Estimator(run.backbone.config, memory=read_bytes(budget), on_gpu=args.device.type == "cuda")
    try:
        share = estimator.kept_share(settings)
    except LemoError as error:
        smallest = _needed_at_least(estimator, settings)
        rows = "" if run.lemo.checkpoint == "kept_rows" else "set checkpoint='kept_rows', "
        raise LemoError(
            f"memory_budget fits no kept share; {budget!r}, {settings.batch_size} x {settings.seq_len} tokens need "
            f"{_words(smallest)} at the smallest, 0.01; {rows}raise the budget or use shorter samples"
        ) from error
    run.lemo.update(keep_ratio=share)
    logger.info("memory_budget=%r: every layer keeps %g of the blocks (%s)", budget, share, settings.name)


def step_settings(run: "LemoRun", args: TrainingArguments) -> StepSettings:
    """The run's training step as the estimator takes it; samples are taken to be as long as the longest of the probe documents.

    Raises:
        LemoError: If the estimator does not know such a step.
    """
    _refuse_unknown(run, args)
    batches = [*run.documents.probes(), *run.documents.profile()]
    cpu = torch.device("cpu")
    found = [documents_of(backbone_inputs(batch, cpu), run.lemo.block_size) for batch in batches]
    adapters = {name: weight for name, weight in run.model.named_parameters() if ".lora_" in name}
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters}
    base: dict[torch.dtype, int] = {}
    for name, weight in run.model.named_parameters():
        if ".lora_" not in name and "lemo_predictor" not in name:
            base[weight.dtype] = base.get(weight.dtype, 0) + weight.numel()
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = max(base, key=lambda dtype: base[dtype]), next(iter(adapters.values())).dtype
    if unknown := [str(dtype) for dtype in dtypes if dtype not in names]:
        raise LemoError(f"weights are of a type that is not estimated; {unknown[0]}")
    return StepSettings(
        seq_len=max((length for documents in found for length in documents.lengths), default=1),
        lemo=run.lemo,
        batch_size=args.per_device_train_batch_size,
        lora_r=next(iter(run.model.peft_config.values())).r,
        targets=tuple(sorted(targets)),
        dtype=names[dtypes[0]],
        adapter_dtype=names[dtypes[1]],
        autocast=bool(args.bf16),
    )


def _settings_on_device(run: "LemoRun", args: TrainingArguments) -> StepSettings:
    if run.lemo.offload != "none":
        raise LemoError(
            f"what stays on the device with offload={run.lemo.offload!r} follows bandwidth and times that the first steps measure"
        )
    return step_settings(run, args)


def _refuse_unknown(run: "LemoRun", args: TrainingArguments) -> None:
    adapters = list(getattr(run.model, "peft_config", {}).values())
    switches = [args, *run.backbone.layers]
    checkpointed = any(getattr(each, f"{name}_checkpointing", False) for each in switches for name in ("activation", "gradient"))
    reasons: dict[str, Any] = {
        "all weights are trained": not adapters,
        "the adapter is not one plain LoRA": len(adapters) != 1
        or str(getattr(adapters[0].peft_type, "value", "")) != "LORA"
        or adapters[0].use_dora
        or adapters[0].modules_to_save
        or adapters[0].rank_pattern,
        "the base is quantised": getattr(run.backbone.config, "quantization_config", None) is not None,
        "the model lies on several devices": len(set(getattr(run.model, "hf_device_map", {}).values())) > 1,
        "an engine spreads the step": isinstance(run.model, FSDPModule)
        or getattr(args, "deepspeed_plugin", None) is not None
        or args.n_gpu > 1,  # not by args.fsdp: `accelerate launch` sets neither that nor args.deepspeed
        "layers are checkpointed": checkpointed,
        "the model is compiled": bool(args.torch_compile),
    }
    for reason, holds in reasons.items():
        if holds:
            raise LemoError(f"this step is not one that the estimator knows: {reason}")


def memory_of(device: torch.device) -> int:
    """Bytes of a card that this process can take: free ones, and those that it holds already."""
    free, total = torch.cuda.mem_get_info(device)
    return int(min(total, free + torch.cuda.memory_reserved(device) + CUDA_CONTEXT))


def _bound(run: "LemoRun", settings: StepSettings) -> int:
    """More bytes than a step can take: all that a dense layer saves, in float32, and whole logits with their gradient."""
    config, tokens = run.backbone.config, settings.seq_len * settings.batch_size
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", 4 * config.hidden_size)
    saved = 4 * config.num_hidden_layers * (40 * config.hidden_size + 10 * width)
    weights = sum(weight.numel() * weight.element_size() for weight in run.model.parameters())
    return weights + CUDA_CONTEXT + tokens * (saved + 16 * config.vocab_size)


def _needed_at_least(estimator: Estimator, settings: StepSettings) -> int:
    lemo = settings.lemo
    assert lemo is not None, "a LeMo step"
    return estimator.estimate(replace(settings, lemo=replace(lemo, keep_ratio=0.01))).total_bytes


def _words(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
