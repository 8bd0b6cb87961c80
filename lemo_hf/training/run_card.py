"""What a finished run says of itself in the model card, where no recipe tells more."""

import statistics
from typing import Any

import torch

from ..evaluation.layer_scores import backbone_inputs, documents_of
from ..hub.card_metadata import public_name
from ..hub.lemo_files import context_config
from ..hub.model_card import RunResults, values_by_layer
from .lemo_run import LemoRun
from .phases.phase_documents import is_stream


def results_of(run: LemoRun, model: Any, dataset: Any, history: list[dict[str, Any]], steps: int) -> RunResults:
    """The results that the trainer knows.

    Args:
        run: The run; training has begun.
        model: The model, wrapped by PEFT or not.
        dataset: The training set.
        history: The trainer's log.
        steps: Optimizer steps done.
    """
    layers = len(run.backbone.layers)
    device = next(run.backbone.parameters()).device
    probes = [documents_of(backbone_inputs(batch, device), run.lemo.block_size) for batch in run.documents.probes()]
    size = "a stream of samples" if is_stream(dataset) else f"{len(dataset)} samples"
    adapter = adapter_in_words(model)
    base = model.get_base_model() if adapter else model
    saved = [logs["saved_bytes"] for logs in history if "saved_bytes" in logs]
    return RunResults(
        base_model=public_name(getattr(base.config, "_name_or_path", "")) or "unnamed",
        data=f"a training set of the user's own: {size}",
        seq_len=max((length for documents in probes for length in documents.lengths), default=0),
        lemo=run.lemo.to_dict(),
        base_config=context_config(model),
        adapter=adapter,
        precision=precision_in_words(model, run.args),
        steps=steps,
        train_seconds=_last(history, "train_runtime"),
        batch=run.args.per_device_train_batch_size,
        saved_bytes=statistics.fmean(saved) if saved else None,
        kept_share=values_by_layer(history, "kept_share", layers, statistics.fmean),
        recall=values_by_layer(history, "recall", layers, lambda found: found[-1]),
        recall_chance=_last(history, "recall_of_chance"),
        recall_positions=_last(history, "recall_of_positions"),
    )


def _last(history: list[dict[str, Any]], name: str) -> float | None:
    return next((logs[name] for logs in reversed(history) if name in logs), None)


def adapter_in_words(model: Any) -> str:
    """Method, rank and place of a model's adapter ("LoRA r=8, alpha=16 on q_proj, v_proj"); empty if it has none."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is None:
        return ""
    method = str(adapter.peft_type.value)
    words = {"LORA": "LoRA", "ADALORA": "AdaLoRA"}.get(method, method)
    rank, alpha = getattr(adapter, "r", None), getattr(adapter, "lora_alpha", None)
    words += f" r={rank}" if isinstance(rank, int) else ""
    words += f", alpha={alpha}" if alpha is not None else ""
    targets = getattr(adapter, "target_modules", None)
    # PEFT turns "all-linear" and patterns into a set of names, in no order.
    names = targets if isinstance(targets, str) else ", ".join(sorted(targets or []))
    return f"{words} on {names}" if names else words


def precision_in_words(model: Any, args: Any) -> str:
    """Float types of frozen and trained weights, and autocast.

    Args:
        model: The model.
        args: The training arguments.
    """
    frozen: set[torch.dtype] = set()
    trained: set[torch.dtype] = set()
    for name, weight in model.named_parameters():
        if "lemo_predictor" not in name:
            (trained if weight.requires_grad else frozen).add(weight.dtype)
    autocast = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "no autocast"
    parts = [f"{_dtypes(frozen)} base" if frozen else "", f"{_dtypes(trained)} {'adapters' if frozen else 'weights'}", autocast]
    return ", ".join(part for part in parts if part)


def _dtypes(found: set[torch.dtype]) -> str:
    names = {str(dtype).removeprefix("torch.") if dtype.is_floating_point else "quantised" for dtype in found}
    return " and ".join(sorted(names))
