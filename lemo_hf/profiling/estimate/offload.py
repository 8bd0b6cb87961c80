"""What an offload leaves on the device and what it costs in time, for the estimate of a step (offload_plan.py has the arithmetic)."""

import math
from collections import Counter
from dataclasses import dataclass

from ...errors import LemoError
from ...models.lemo_config import LemoConfig
from .cards import ASSUMED, Card, Efficiency, read_bytes, seconds
from .offload_plan import HostLink, LayerLoad, OffloadPlan, OffloadTimeline, plan_bytes, simulate
from .step_trace import Parts, StepTrace


@dataclass(frozen=True)
class OffloadEstimate:
    """An offload as it is expected.

    Args:
        plan: Bytes by layer, and how many layers' time a transfer has.
        saved_bytes: What all layers save.
        timeline: The step at the assumed efficiencies.
        link: Bandwidth of these.
    """

    plan: OffloadPlan
    saved_bytes: float
    timeline: OffloadTimeline
    link: HostLink


def plan_offload(trace: StepTrace, lemo: LemoConfig | None, card: Card | None) -> OffloadEstimate | None:
    """The offload of a traced step; `None` if there is none.

    Args:
        trace: The step.
        lemo: Its settings.
        card: What runs it.

    Raises:
        LemoError: If no card is given.
    """
    if lemo is None or not lemo.enabled or lemo.offload == "none":
        return None
    if card is None:
        raise LemoError(f"how much is offloaded depends on a card's times; offload={lemo.offload!r} without a card; add --gpu")
    loads, link = layer_loads(trace, card), _link(card, ASSUMED)
    budget = (
        None if lemo.offload_budget is None else math.inf if lemo.offload_budget == "all" else read_bytes(lemo.offload_budget)
    )
    plan = plan_bytes(lemo.offload, loads, link, budget)
    timeline = simulate(loads, plan.moved, link, head_seconds(trace, card), plan.window)
    return OffloadEstimate(plan, sum(load.saved_bytes for load in loads), timeline, link)


def stall_seconds(trace: StepTrace, plan: OffloadPlan, card: Card, efficiency: Efficiency) -> float:
    """Seconds that computation waits for transfers."""
    loads, head = layer_loads(trace, card, efficiency), head_seconds(trace, card, efficiency)
    return simulate(loads, plan.moved, _link(card, efficiency), head, plan.window).stall_seconds


def layer_loads(trace: StepTrace, card: Card, efficiency: Efficiency = ASSUMED) -> list[LayerLoad]:
    """Every layer's saved bytes and seconds."""
    found = []
    for place in trace.place_of_layer:
        forward, backward = (trace.stretches[name, place] for name in ("forward", "backward"))
        times = (seconds(stretch.costs, card, efficiency) for stretch in (forward, backward))
        found.append(LayerLoad(left_behind(trace, place).total(), *times))
    return found


def head_seconds(trace: StepTrace, card: Card, efficiency: Efficiency = ASSUMED) -> float:
    """Seconds from the last layer's forward to its backward."""
    return seconds(trace.stretches["head", 0].costs, card, efficiency)


def left_behind(trace: StepTrace, place: int) -> Parts:
    """What a layer's forward leaves for its backward, by part."""
    stretch = trace.stretches["forward", place]
    return stretch.after - stretch.before


def off_device(trace: StepTrace, plan: OffloadPlan) -> list[Parts]:
    """What is off the device, by part, while each layer runs, forward or backward; the last entry is while the head runs.

    A layer's bytes leave while the next ones run forward, as many as the window, and are back when the last of these begins its backward.
    """
    gone: list[Parts] = [Counter()] * (plan.window + 1)
    for place, size in zip(trace.place_of_layer, plan.moved, strict=True):
        parts = left_behind(trace, place)
        share = size / max(parts.total(), 1)
        gone.append(gone[-1] + Counter({part: int(share * amount) for part, amount in parts.items()}))
    return [*gone[: len(plan.moved)], gone[-1]]


def _link(card: Card, efficiency: Efficiency) -> HostLink:
    return HostLink(card.host_link * efficiency.transfers, card.host_link * efficiency.transfers)
