"""An estimate as people read it: a table in GiB with what dominates and what to do, a comparison of methods, and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, get_args

from ...errors import LemoError
from ...models.lemo_config import AttentionForward, LemoConfig
from ..provenance import provenance
from .cards import ASSUMED, GIB
from .estimator import ALLOCATOR_SLACK, CUDA_CONTEXT, Estimate, Estimator
from .step_model import StepSettings

_WORDS = {
    "optimizer": "optimizer (AdamW, two moments)",
    "gradients": "gradients of adapters",
    "inputs": "token ids",
    "workspace": "workspace, gone by the end of its layer",
    "loss": "loss: logits and their gradient",
    "predictors": "predictors (float32)",
    "other": "positions, masks",
    "residual": "residual rows",
}
_ACTIVATIONS = "activations saved for backward"


@dataclass(frozen=True)
class Outlook:
    """What would fit the memory given.

    Args:
        longest: The longest sequence that fits with the settings, in tokens; 0 if none does.
        kept_share: The largest kept share that fits the length; `None` without LeMo.
        advice: What to do, one sentence.
    """

    longest: int
    kept_share: float | None
    advice: str


def look_out(estimator: Estimator, estimate: Estimate) -> Outlook:
    """Looks for what fits the memory; the estimator must have a limit."""
    assert estimate.memory is not None, "the estimator has a limit"
    settings, limit = estimate.settings, f"{estimate.memory / GIB:.1f} GiB"
    longest = estimator.longest(settings)
    lemo = settings if settings.method == "lemo" else replace(settings, method="lemo", lemo=LemoConfig(checkpoint="kept_rows"))
    share: float | None = None
    try:
        share = estimator.kept_share(lemo)
        wording = f"LeMo keeps up to {share:g} of the blocks in {limit} ({_variant(lemo)})"
    except LemoError as error:
        wording = str(error)
    if estimate.fits:
        spare = (estimate.memory - estimate.total_bytes) / GIB
        advice = f"{settings.seq_len} tokens fit with {spare:.1f} GiB to spare; {longest} would"
    else:
        advice = f"{settings.seq_len} tokens do not fit; {wording}"
        if longest:
            advice += f"; {settings.name} fits {longest} tokens"
    return Outlook(longest, share if settings.method == "lemo" else None, advice)


def _variant(settings: StepSettings) -> str:
    lemo = settings.lemo_config
    assert lemo is not None, "a LeMo step has a config"
    return f"{lemo.attention_forward}, checkpoint {lemo.checkpoint}"


def table(estimate: Estimate, outlook: Outlook | None = None) -> str:
    """The estimate as text: parts in GiB, the largest first, and what follows from them."""
    settings, live = estimate.settings, estimate.live_bytes
    activations = estimate.activations
    groups = {part: size for part, size in estimate.parts.items() if part not in activations} | {
        _ACTIVATIONS: sum(activations.values())
    }
    lines = [_heading(estimate), "", f"{'at the highest moment':44s}{'GiB':>9s}{'share':>8s}"]
    for part, size in sorted(groups.items(), key=lambda item: -item[1]):
        lines.append(_row(_WORDS.get(part, part), size, live))
        if part == _ACTIVATIONS:
            kinds = sorted(activations.items(), key=lambda item: -item[1])
            lines += [_row("  " + _WORDS.get(kind, kind), size, live) for kind, size in kinds]
    lines.append(_row("tensors alive", live))
    if estimate.on_gpu:
        lines.append(_row(f"allocator slack ({ALLOCATOR_SLACK:.0%} of what is not resident, assumed)", estimate.slack_bytes))
        lines.append(_row("CUDA context (assumed)", estimate.context_bytes))
        lines.append(_row("needed", estimate.total_bytes))
    largest = max(groups, key=lambda part: groups[part])
    lines += ["", f"highest moment: {estimate.moment}; dominated by {largest} ({groups[largest] / live:.0%})"]
    if estimate.memory is not None:
        name = f" of {estimate.card.name}" if estimate.card is not None and estimate.card.memory == estimate.memory else ""
        lines.append(f"{'fits' if estimate.fits else 'DOES NOT FIT'} into {estimate.memory / GIB:.1f} GiB{name}")
    total = sum(estimate.flops.values())
    shares = ", ".join(f"{name} {flops / total:.0%}" for name, flops in sorted(estimate.flops.items(), key=lambda item: -item[1]))
    lines.append(f"FLOPs a step: {total / 1e12:.1f} T ({shares})")
    if estimate.seconds is not None and estimate.card is not None and estimate.seconds_at_least is not None:
        tokens = settings.seq_len * settings.batch_size
        lines.append(
            f"time a step on {estimate.card.name}: {estimate.seconds:.2f} s, {tokens / estimate.seconds:.0f} tokens/s, if products reach "
            f"{ASSUMED.products:.0%}, attention {ASSUMED.attention:.0%}, movement {ASSUMED.movement:.0%} of the card's peaks "
            f"({ASSUMED.source}); at least {estimate.seconds_at_least:.2f} s"
        )
    if (offload := estimate.offload) is not None:
        moved, timeline = sum(offload.plan.moved), offload.timeline
        lines.append(
            f"offload: {moved / GIB:.1f} of {offload.saved_bytes / GIB:.1f} GiB that layers save go to host memory and back at "
            f"{offload.link.to_host / 1e9:.0f} GB/s (assumed); {timeline.overlap:.0%} of the transfers' {timeline.transfer_seconds:.2f} s "
            f"hide, {timeline.stall_seconds:.2f} s do not; host memory {moved / GIB:.1f} GiB"
        )
    if outlook is not None:
        lines.append(f"longest sequence that fits: {outlook.longest} tokens")
        if outlook.kept_share is not None:
            lines.append(f"largest kept share that fits {settings.seq_len} tokens: {outlook.kept_share:g}")
        lines.append(f"advice: {outlook.advice}")
    return "\n".join(lines + [f"note: {note}" for note in estimate.notes])


def _heading(estimate: Estimate) -> str:
    settings = estimate.settings
    targets = ", ".join(settings.targets) or "attention's projections"
    autocast = "bfloat16 autocast" if settings.autocast else "no autocast"
    return (
        f"{estimate.model}, {estimate.layers} layers: {settings.seq_len} tokens, batch {settings.batch_size}, {settings.name}\n"
        f"LoRA r={settings.lora_r} on {targets}; {settings.dtype} base, {settings.adapter_dtype} adapters, {autocast}"
    )


def _row(name: str, size: int, whole: int | None = None) -> str:
    share = f"{size / whole:8.1%}" if whole else ""
    return f"{name:44s}{size / GIB:9.2f}{share}"


def method_settings(settings: StepSettings) -> list[StepSettings]:
    """The same step by every method: stock with what a user would add, and LeMo in every form, with and without checkpointing."""
    lemo = settings.lemo or LemoConfig()
    stock = [replace(settings, method=method, lemo=None) for method in ("stock", "checkpointing", "liger", "liger+checkpointing")]
    forms = [
        replace(
            lemo,
            attention_forward=form,
            nearby_tokens=lemo.nearby_tokens if form == lemo.attention_forward else None,
            checkpoint=checkpoint,
        )
        for checkpoint in ("none", "kept_rows")
        for form in get_args(AttentionForward)
    ]
    return stock + [replace(settings, method="lemo", lemo=form) for form in forms]


def estimate_methods(estimator: Estimator, settings: StepSettings) -> list[Estimate]:
    """Estimates of [`method_settings`]; methods that do not exist for the architecture are left out."""
    found = []
    for variant in method_settings(settings):
        try:
            found.append(estimator.estimate(variant))
        except LemoError:
            if not variant.method.startswith("liger"):
                raise
    return found


def comparison(estimates: Sequence[Estimate]) -> str:
    """Methods side by side as text."""
    timed = estimates[0].seconds is not None
    lines = [f"{'method':44s}{'GiB':>9s}{'TFLOP':>9s}" + (f"{'s a step':>10s}" if timed else "") + "  highest moment"]
    for one in estimates:
        time = f"{one.seconds:10.2f}" if one.seconds is not None else ""
        moment = (
            one.moment.partition(" of ")[0]
            if "layer" not in one.moment
            else one.moment.split(" layer")[0].replace(" of", "") + " of a layer"
        )
        fits = "" if one.fits is not False else "  does not fit"
        flops = sum(one.flops.values()) / 1e12
        lines.append(f"{one.settings.name:44s}{one.total_bytes / GIB:9.2f}{flops:9.1f}{time}  {moment}{fits}")
    return "\n".join(lines)


def document(estimate: Estimate, outlook: Outlook | None = None, others: Sequence[Estimate] = ()) -> dict[str, Any]:
    """The estimate as JSON types, with where it comes from and what it assumes."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **provenance(),
        "assumptions": {
            "allocator_slack_of_not_resident": ALLOCATOR_SLACK,
            "cuda_context_bytes": CUDA_CONTEXT,
            "efficiency": asdict(ASSUMED),
        },
        "estimate": _values(estimate),
        "outlook": asdict(outlook) if outlook is not None else None,
        "methods": [_values(other) for other in others],
    }


def _values(estimate: Estimate) -> dict[str, Any]:
    sums = ("live_bytes", "slack_bytes", "context_bytes", "total_bytes", "fits")
    return asdict(estimate) | {"method": estimate.settings.name} | {name: getattr(estimate, name) for name in sums}
