"""`lemo estimate`: from the command line's words to a report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import LemoError
from ...hub.lemo_files import write_json
from ...models.lemo_config import LemoConfig
from .cards import find_card, read_bytes
from .estimator import Estimator
from .step_model import METHODS, StepSettings
from .tables import comparison, document, estimate_methods, look_out, table


def run_estimate(
    model: str,
    method: str,
    lemo: dict[str, Any],
    step: dict[str, Any],
    gpu: str | None,
    gpu_memory: str | None,
    json_path: Path | None,
    plot_path: Path | None,
) -> str:
    """What `lemo estimate` prints; writes the files it is asked for.

    Args:
        model: See [`read_model_config`].
        method: One of `METHODS`, or "all".
        lemo: Fields of `LemoConfig`; `keep_ratio` as text, a number or "auto".
        step: Fields of [`StepSettings`] beside method and lemo.
        gpu: Name of a card.
        gpu_memory: Memory to fit; the card's own if not given.
        json_path, plot_path: Files to write.

    Raises:
        LemoError: If an argument cannot be honoured.
    """
    if method not in (*METHODS, "all"):
        raise LemoError(f"no such method; {method!r}; choose one of {', '.join(METHODS)}, or all")
    estimator = Estimator(model, find_card(gpu) if gpu else None, read_bytes(gpu_memory) if gpu_memory else None)
    automatic = lemo["keep_ratio"] == "auto"
    config = LemoConfig(**lemo | {"keep_ratio": 1.0 if automatic else _share(lemo["keep_ratio"])})
    settings = StepSettings(**step, method="lemo" if method == "all" else method, lemo=config)
    if automatic:
        settings = replace(settings, lemo=replace(config, keep_ratio=estimator.kept_share(replace(settings, method="lemo"))))
    estimate = estimator.estimate(settings)
    outlook = look_out(estimator, estimate) if estimator.memory is not None else None
    others = estimate_methods(estimator, settings) if method == "all" else []
    lines = [table(estimate, outlook)]
    if others:
        lines += ["", comparison(others)]
    if json_path is not None:
        write_json(json_path, document(estimate, outlook, others))
        lines.append(f"wrote {json_path}")
    if plot_path is not None:
        from .plot import plot_memory

        lines.append(f"wrote {plot_memory(estimator, settings, plot_path, max(8, settings.seq_len))}")
    return "\n".join(lines)


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LemoError(f"not a kept share; {text!r}; give a number in (0, 1], or auto") from None
