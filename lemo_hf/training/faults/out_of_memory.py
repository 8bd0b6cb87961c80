"""What a run says when memory runs out: where it was, how large the batch was, and what to change.

Everything is read off the traceback when it has happened; nothing is recorded while nothing fails. In backward most operators run
without a Python frame of their layer: there the gradients that have arrived say how far it came.
"""

import shlex
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]
from torch import Tensor
from transformers import TrainingArguments

from ...errors import LemoRunError
from ..lemo_run import LemoRun

# Functions, and files without ending, that say what a frame is part of; a later frame is the more precise one.
_PARTS = {
    "training_step": "forward",
    "backward": "backward",
    "segmented_loss": "loss",
    "evaluation_loop": "evaluation",
    "prediction_loop": "evaluation",
    "recall_probe": "recall probe",
    "_refit": "refit of the predictors",
    "_save_checkpoint": "saving",
}
# Parts that run within others and do not change what these are.
_OUTERMOST = {"evaluation", "recall probe", "refit of the predictors", "saving", "optimizer step"}
_DENSE = {"evaluation", "recall probe", "refit of the predictors"}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the host's memory."""
    if isinstance(error, torch.OutOfMemoryError) or str(error).startswith("No executable batch size found"):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def out_of_memory(error: BaseException, run: LemoRun, args: TrainingArguments) -> LemoRunError:
    """The error to raise from `error`. Tensors of the frames that it went through are let go.

    Args:
        error: What PyTorch raised.
        run: The run.
        args: The trainer's arguments.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    part = _part_of(frames)
    layer = _layer_of(frames, run)
    if layer is None and part == "backward":
        layer = _layer_in_backward(run.backbone)
    where = f"{run.phase} phase" + (f", {part}" if part else "") + (f", layer {layer}" if layer is not None else "")
    shape = _batch_shape(frames)
    reason = " ".join(str(error).split()).split(". ")
    message = (
        f"out of memory in the {where}; {_batch_text(shape)}, {_kept_text(run, part, layer)} ({'. '.join(reason[:2])[:160]}); "
        f"{_fix(run, args, part)}; {_estimate_command(run, args, shape)} says what fits"
    )
    traceback.clear_frames(error.__traceback__)
    return LemoRunError(message)


def _part_of(frames: list[FrameType]) -> str | None:
    part = None
    for frame in frames:
        path = Path(frame.f_code.co_filename)
        found = _PARTS.get(frame.f_code.co_name) or _PARTS.get(path.stem)
        if path.parts[-3:-1] == ("torch", "optim"):
            found = "optimizer step"
        if found and part not in _OUTERMOST and not (found == "loss" and part == "backward"):
            part = found
    return part


def _layer_of(frames: list[FrameType], run: LemoRun) -> int | None:
    places = {id(layer): place for place, layer in enumerate(run.backbone.layers)}
    found = None
    for frame in frames:
        for name in ("self", "module", "split"):
            value = frame.f_locals.get(name)
            for each in (value, getattr(value, "layer", None)):
                found = places.get(id(each), found) if each is not None else found
    return found


def _layer_in_backward(backbone: Any) -> int | None:
    """The layer above which all gradients have arrived: each arrival in this pass has left its tensor at a higher version."""
    versions = [
        max((weight.grad._version + 1 for weight in layer.parameters() if weight.grad is not None), default=0)
        for layer in backbone.layers
        if any(weight.requires_grad for weight in layer.parameters())
    ]
    if len(versions) != len(backbone.layers):
        return None
    last, first = versions[-1], versions[0]
    if last == first:
        # None has arrived, or all have.
        return len(versions) - 1 if last == 0 else None
    return max(place for place, version in enumerate(versions) if version != last)


def _batch_shape(frames: list[FrameType]) -> tuple[int, int] | None:
    shape = None
    for frame in frames:
        for name in ("inputs", "batch", "kwargs"):
            batch = frame.f_locals.get(name)
            tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if isinstance(tokens, Tensor) and tokens.dim() == 2:
                shape = (tokens.shape[0], tokens.shape[1])
    return shape


def _batch_text(shape: tuple[int, int] | None) -> str:
    return f"{shape[0]} x {shape[1]:,} tokens" if shape else "batch not known"


def _kept_text(run: LemoRun, part: str | None, layer: int | None) -> str:
    lemo = run.lemo
    if not lemo.enabled or part in _DENSE or run.phase in ("predictor", "dense"):
        return "every token kept"
    known = run.backbone.lemo_kept_shares
    if layer is not None and layer < len(known):
        return f"kept share {known[layer]:.2f}"
    return f"kept share {sum(known) / len(known):.2f}" if known else f"keep_ratio {lemo.keep_ratio}"


def _fix(run: LemoRun, args: TrainingArguments, part: str | None) -> str:
    lemo = run.lemo
    if part == "evaluation":
        return "evaluation is dense: lower per_device_eval_batch_size, or evaluate shorter samples"
    if part == "optimizer step":
        return 'adapt fewer layers, lower lora_r, or set optim="adamw_8bit"'
    if part in _DENSE or run.phase in ("predictor", "calibrate"):
        return "this forward is dense or nearly so: use shorter samples, or raise block_size"
    fixes = []
    if args.train_batch_size > 1:
        fixes.append(f"set per_device_train_batch_size=1 and raise gradient_accumulation_steps by {args.train_batch_size}")
    if part == "loss":
        fixes.append(f"lower segment_size (now {lemo.segment_size})")
    if lemo.checkpoint != "kept_rows":
        fixes.append('set checkpoint="kept_rows"')
    ratios = lemo.keep_ratio if isinstance(lemo.keep_ratio, list) else [lemo.keep_ratio]
    fixes.append(f"lower keep_ratio to {sum(ratios) / len(ratios) / 2:.2g}")
    return ", or ".join([*fixes[:2], "shorten the samples"])


def _estimate_command(run: LemoRun, args: TrainingArguments, shape: tuple[int, int] | None) -> str:
    config = run.backbone.config
    name = getattr(config, "_name_or_path", "") or "<model>"
    command = ["lemo", "estimate", "--model", name, "--seq-len", str(shape[1] if shape else "<tokens>")]
    command += ["--form", run.lemo.attention_forward, "--checkpoint", "kept_rows", "--keep", "auto"]
    if args.device.type == "cuda":
        command += ["--gpu-memory", f"{torch.cuda.get_device_properties(args.device).total_memory / 2**30:.0f}GiB"]
    return f"`{shlex.join(command)}`".replace("'<model>'", "<model>").replace("'<tokens>'", "<tokens>")
