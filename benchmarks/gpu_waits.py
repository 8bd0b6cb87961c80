"""Whether a layer waits for the device, for benchmarks/gpu_suite.py: never in ratio and sampled mode, once a layer with thresholds.

`torch.cuda.set_sync_debug_mode` is asked, which knows every copy and read that makes the host wait. A run before tries the kernels and
makes what a batch makes once (tests/test_selection_on_device.py counts the same operators on the CPU).
"""

import traceback
import warnings
from collections.abc import Callable
from typing import Any, get_args

import torch
from agreement import PartFailure
from gpu_checks import Scale, moved, small_config, small_model

from lemo_hf import LemoConfig
from lemo_hf.models.documents import find_documents
from lemo_hf.models.lemo_config import AttentionForward
from lemo_hf.models.pattern_predictor import PredictorParameters
from lemo_hf.models.sparse_batch import SparseBatch
from lemo_hf.models.sparse_decoder import sparse_backbone

# Documents of one sample: long, short, and one of a single block.
LENGTHS, TINY_LENGTHS = (1000, 300, 60), (40, 17, 5)
# What torch says of a wait in its mode "warn".
_WAITED = "called a synchronizing CUDA operation"


def run_waits(scale: Scale) -> dict[str, Any]:
    """Waits of a layer's forward and backward, every form, selection and checkpointing; a packed batch."""
    rows: list[dict[str, Any]] = []
    for form in get_args(AttentionForward):
        for selection in ("ratio", "sampled", "threshold"):
            for checkpoint in ("none", "kept_rows"):
                allowed = int(selection == "threshold")
                row: dict[str, Any] = {"form": form, "selection": selection, "checkpoint": checkpoint, "allowed": allowed}
                run = layer_run(scale, form, selection, checkpoint)
                run()
                rows.append(row | waits_of(run, scale.device, "warn" if allowed else "error"))
    bad = [row for row in rows if row["waits"] > row["allowed"]]
    if bad:
        raise PartFailure(f"a layer waits for the device more often than it may; {bad}", {"rows": rows})
    return {"rows": rows}


def layer_run(scale: Scale, form: str, selection: str, checkpoint: str) -> Callable[[], None]:
    """One layer's forward and backward over a packed batch; it chooses anew each time.

    Args:
        scale: Real sizes, or tiny ones.
        form, selection, checkpoint: As `LemoConfig` has them.
    """
    layers = small_config("llama", scale.tiny).num_hidden_layers
    lemo = LemoConfig(
        attention_forward=form,  # type: ignore[arg-type]
        selection=selection,  # type: ignore[arg-type]
        checkpoint=checkpoint,  # type: ignore[arg-type]
        sampling_temperature=1.0,  # a draw that reads scores
        keep_ratio=0.5,
        thresholds=[0.0] * layers if selection == "threshold" else None,
        nearby_tokens=7 if form == "kept_keys" else None,
        block_size=8,
        segment_size=64,
    )
    model = moved(small_model("llama", lemo, scale.tiny), scale.device, scale.dtypes[-1])
    for module in model.modules():
        if isinstance(module, PredictorParameters):
            module.reset_parameters()
    backbone = sparse_backbone(model)
    lengths = TINY_LENGTHS if scale.tiny else LENGTHS
    places = torch.cat([torch.arange(length) for length in lengths])[None].to(scale.device)
    documents = find_documents(1, sum(lengths), lemo.block_size, scale.device, position_ids=places)
    generator = torch.Generator(scale.device).manual_seed(0)
    shape = 1, sum(lengths), backbone.config.hidden_size
    hidden = torch.randn(shape, generator=generator, device=scale.device).to(scale.dtypes[-1]).requires_grad_()
    rotary = backbone.rotary_emb(hidden, position_ids=places)
    upstream = torch.randn(shape, generator=generator, device=scale.device).to(scale.dtypes[-1])

    def run() -> None:
        batch = SparseBatch(documents, backbone.config.lemo, layers, 0)
        backbone.layers[0].sparse_forward(hidden, rotary, batch).backward(upstream)
        hidden.grad = None

    return run


def waits_of(run: Callable[[], None], device: torch.device, mode: str) -> dict[str, Any]:
    """How often a run waits for the device, and where.

    Args:
        run: What is run once.
        device: On the CPU nothing waits.
        mode: `"warn"` counts; with `"error"` a run ends at its first wait, and where that is can be told even in a backward pass.
    """
    if device.type != "cuda":
        run()
        return {"waits": 0, "where": []}
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run()
        except RuntimeError as error:
            if _WAITED not in str(error):
                raise
            return {"waits": 1, "where": ["".join(traceback.format_exception(error))[-2000:]]}
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if _WAITED in str(warning.message)]
    return {"waits": len(found), "where": [f"{one.filename}:{one.lineno}" for one in found]}
