"""Triton kernels of LeMo: moving kept rows, and the operators around them, without permuted copies of the residual stream.

Public functions are imported at their first use, so that importing the package costs nothing where no kernel runs; without
triton the import fails with an ImportError, which callers take as "use the reference". Every function has its plain PyTorch
reference in lemo_hf/models, under the same concept's name.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

if find_spec("triton") is None:
    raise ImportError("lemo_kernels needs triton; none is installed; pip install triton, or use the PyTorch reference")

__version__ = "0.1.0"

# Raised when a function's arguments or meaning change: code that travels without this package compares it.
INTERFACE = 1

# Public name -> the module that holds it.
_HOMES = {
    "take_rows": "token_movement",
    "merge_rows": "token_movement",
    "lay_out_rows": "token_movement",
    "replace_rows": "token_movement",
    "scatter_add_rows": "token_movement",
    "row_slots": "token_movement",
    "gather_norm": "row_norm",
    "add_norm": "row_norm",
    "rest_norm": "row_norm",
    "output_determines_input": "row_norm",
    "apply_rotary": "rotary",
    "gated_activation": "gated_mlp",
    "block_features": "pattern_predictor",
    "attend": "document_attention",
    "attend_backward": "document_attention",
    "with_kept_row_gradient": "document_attention",
    "attend_nearby": "nearby_attention",
    "attend_kept_keys": "kept_key_attention",
    "rest_query_gradient": "kept_key_attention",
    "block_scores": "token_informativeness",
    "informativeness_by_document": "token_informativeness",
    "cross_entropy_in_place": "segmented_loss",
}

__all__ = ["INTERFACE", "probe", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def probe(name: str, device: Any, dtype: Any, *sizes: int | str) -> None:
    """Compiles and runs what a public function launches, forward and backward, once, on a few rows; draws no random numbers.

    Args:
        name: The public function.
        device, dtype: Of its rows.
        sizes: What its kernels are compiled for, as the `probe` of its module says.

    Raises:
        Exception: Whatever the compiler or the driver raises if they cannot.
    """
    from .host import real_and_differentiable, require_interpreter, wait_for

    require_interpreter(device)
    with real_and_differentiable():
        import_module(f".{_HOMES[name]}", __name__).probe(device, dtype, *sizes)
    wait_for(device)  # a fault shows here, under the kernel's name, and not somewhere later


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
