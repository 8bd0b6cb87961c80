"""What a finished run says of itself in the model card, where no recipe tells more."""

import statistics
from typing import Any

from ..evaluation.layer_scores import backbone_inputs, documents_of
from ..hub.lemo_files import context_config
from ..hub.model_card import RunResults, values_by_layer
from .lemo_run import LemoRun


def results_of(run: LemoRun, model: Any, dataset: Any, history: list[dict[str, Any]], steps: int) -> RunResults:
    """The results that the trainer knows.

    Args:
        run: The run; training has begun.
        model: The model wrapped by PEFT.
        dataset: The training set.
        history: The trainer's log.
        steps: Optimizer steps done.
    """
    layers = len(run.backbone.layers)
    device = next(run.backbone.parameters()).device
    probes = [documents_of(backbone_inputs(batch, device), run.lemo.block_size) for batch in run.documents.probes()]
    size = f"{len(dataset)} samples" if hasattr(dataset, "__len__") else "a stream of samples"
    return RunResults(
        base_model=getattr(model.get_base_model().config, "_name_or_path", "") or "unnamed",
        data=f"a training set of the user's own: {size}",
        seq_len=max((length for documents in probes for length in documents.lengths), default=0),
        lemo=run.lemo.to_dict(),
        base_config=context_config(model),
        steps=steps,
        train_seconds=next((logs["train_runtime"] for logs in reversed(history) if "train_runtime" in logs), None),
        kept_share=values_by_layer(history, "kept_share", layers, statistics.fmean),
        recall=values_by_layer(history, "recall", layers, lambda found: found[-1]),
        recall_chance=next((logs["recall_of_chance"] for logs in reversed(history) if "recall_of_chance" in logs), None),
    )
