"""How many bytes each layer offloads, and what that costs: pure arithmetic, for the run that offloads and for the estimate.

Layer l saves s_l bytes, runs f_l seconds forward and g_l backward; a host link carries W bytes a second, first come, first served. A run
(training/sensitive_offload.py) gives a transfer the time of k layers, the window: what layer l moves leaves while layers l + 1 to l + k run
forward, and comes back while these run backward. So the transfers x hide if for all i <= j

    x_i + ... + x_j <= min(W_to_host (f_{i+1} + ... + f_{j+k}), W_to_device (g_{i+1} + ... + g_{j+k})),

where layers above the last take no time: nothing of the last one hides, its backward comes first. On the device are, of what layers saved,
at most  max over l of (s_0 + ... + s_l) - (x_0 + ... + x_{l-k-1}).

h, which takes of each layer in order as much as what was taken before leaves room for, has the largest sum over the first layers that
hides, whichever number of layers that is; so no x that hides has a lower peak under the same window. A wider window evens out layers
that are short of time and ones that have too much, and leaves more of them on the device: `plan_bytes` tries k up to 4.

Both modes move x_l with a given sum X. `uniform`: x_l = min(s_l, u), the same bytes for every layer, k = 1. `sensitive`: x_l = min(s_l, a h_l). Saved
bytes and times follow a layer's kept share, and so do its bytes. Stalls sum to at least (X - sum of h) / W whatever x is; with the
second rule no layer exceeds h_l before every layer is at h_l.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Most layers whose time a transfer has. Wider ones won nothing that was not lost to the peak (benchmarks/sensitive_offload.py).
WIDEST = 4
# By what share a wider one has to be better.
_CLEARLY = 0.01


@dataclass(frozen=True)
class HostLink:
    """Bytes per second between a device and pinned host memory.

    Args:
        to_host, to_device: One direction each.
    """

    to_host: float
    to_device: float


@dataclass(frozen=True)
class LayerLoad:
    """What offloading needs to know of a layer.

    Args:
        saved_bytes: What its forward leaves for its backward.
        forward_seconds, backward_seconds: Its computation alone.
    """

    saved_bytes: float
    forward_seconds: float
    backward_seconds: float


def hidden_bytes(layers: Sequence[LayerLoad], link: HostLink, window: int = 1) -> list[float]:
    """By layer the bytes whose transfers hide, of the lower layers always the most; 0 for the last.

    Args:
        layers: From the first to the last.
        link: Bandwidth.
        window: Layers whose time a transfer has.
    """
    speeds = link.to_host, link.to_device
    # Forward, and backward as seen from the end of the step, which is the same.
    times = [(layer.forward_seconds, layer.backward_seconds) for layer in layers]
    behind = [0.0, 0.0]  # seconds that the transfers of lower layers still take as this one's may begin
    found = []
    for place, layer in enumerate(layers):
        behind = [max(0.0, late - own) for late, own in zip(behind, times[place], strict=True)]
        beside = [sum(way) for way in zip((0.0, 0.0), *times[place + 1 : place + 1 + window], strict=True)]
        room = [speed * (time - late) for speed, time, late in zip(speeds, beside, behind, strict=True)]
        found.append(max(0.0, min(layer.saved_bytes, *room)))
        behind = [late + found[-1] / speed for late, speed in zip(behind, speeds, strict=True)]
    return found


def sensitive_bytes(saved: Sequence[float], hidden: Sequence[float], total: float | None = None) -> list[int]:
    """Bytes by layer, in proportion to what hides: no stall before everything that hides has been moved.

    Args:
        saved: Bytes that each layer saves.
        hidden: As [`hidden_bytes`] gives them.
        total: Their sum, met to a byte a layer as far as there is as much; `None`: all that hides.
    """
    if total is None:
        return [int(min(one, most)) for one, most in zip(saved, hidden, strict=True)]
    # Layers behind which nothing hides come last, and share alike.
    return _shared(saved, hidden, total)


def uniform_bytes(saved: Sequence[float], hidden: Sequence[float], total: float | None = None) -> list[int]:
    """The same bytes for every layer, or all that it has; arguments as in [`sensitive_bytes`].

    Without a total: the most with which no layer stalls. Layers behind which nothing hides come last here too.
    """
    if total is None:
        short = [most for one, most in zip(saved, hidden, strict=True) if 0 < most < one]
        level = min(short, default=math.inf)
        return [int(min(one, level)) if most > 0 else 0 for one, most in zip(saved, hidden, strict=True)]
    return _shared(saved, [float(most > 0) for most in hidden], total)


def _shared(saved: Sequence[float], weights: Sequence[float], total: float) -> list[int]:
    """min(saved, a * weight) with a common factor a, so that the sum is `total`; what is left over, evenly on the weightless."""
    factor = _factor(saved, weights, total)
    given = [min(one, factor * weight) if weight > 0 else 0.0 for one, weight in zip(saved, weights, strict=True)]
    rest = total - sum(given)
    without = [one if weight <= 0 else 0.0 for one, weight in zip(saved, weights, strict=True)]
    if rest > 0 and any(without):
        ones = [float(one > 0) for one in without]
        level = _factor(without, ones, rest)
        given = [amount + min(one, level) if one > 0 else amount for amount, one in zip(given, without, strict=True)]
    return [int(amount) for amount in given]


def _factor(saved: Sequence[float], weights: Sequence[float], total: float) -> float:
    """The a at which the sum of min(saved, a * weight) is `total`; infinite if there is not as much."""
    free = sum(weight for weight in weights if weight > 0)
    left = total
    # Layers are full in the order of saved / weight.
    for full_at, one, weight in sorted(
        (one / weight, one, weight) for one, weight in zip(saved, weights, strict=True) if weight > 0
    ):
        if full_at * free >= left:
            return max(left, 0.0) / free
        left -= one
        free -= weight
    return math.inf


@dataclass(frozen=True)
class OffloadPlan:
    """What each layer moves.

    Args:
        moved: Bytes by layer.
        window: Layers whose time a transfer has.
    """

    moved: list[int]
    window: int


def plan_bytes(
    mode: Literal["uniform", "sensitive"], layers: Sequence[LayerLoad], link: HostLink, total: float | None = None
) -> OffloadPlan:
    """The bytes of each layer and, in the sensitive mode, the window: that with the fewest bytes which are on the device at the peak
    or are moved beyond what hides, if they are clearly fewer than with a smaller one.

    Args:
        mode: As `LemoConfig.offload`.
        layers, link: As in [`hidden_bytes`].
        total: Sum of the bytes; `None`: all that hides; infinite: all that layers save.
    """
    saved = [layer.saved_bytes for layer in layers]
    if mode == "uniform":
        return OffloadPlan(uniform_bytes(saved, hidden_bytes(layers, link), total), 1)
    best, fewest = OffloadPlan([], 1), math.inf
    for window in range(1, WIDEST + 1):
        moved = sensitive_bytes(saved, most := hidden_bytes(layers, link, window), total)
        bytes_left = max(0.0, sum(moved) - sum(most)) + peak_on_device(saved, moved, window)
        if window == 1 or bytes_left < (1 - _CLEARLY) * fewest:
            best, fewest = OffloadPlan(moved, window), bytes_left
    return best


@dataclass(frozen=True)
class OffloadTimeline:
    """What a step with offload comes to.

    Args:
        seconds: Layers and head, stalls included.
        stall_seconds: Of these the ones in which computation waits for a transfer.
        transfer_seconds: What the transfers take, hidden or not.
        peak_bytes: The most of what layers saved that is on the device at one time.
        moved_bytes: What leaves the device, and comes back.
    """

    seconds: float
    stall_seconds: float
    transfer_seconds: float
    peak_bytes: float
    moved_bytes: float

    @property
    def overlap(self) -> float:
        """Share of the transfers' time that hides behind computation, in [0, 1]; 1 without transfers."""
        return 1 - self.stall_seconds / self.transfer_seconds if self.transfer_seconds else 1.0


def simulate(
    layers: Sequence[LayerLoad], moved: Sequence[float], link: HostLink, head_seconds: float = 0.0, window: int = 1
) -> OffloadTimeline:
    """Runs a step's events, with transfers one after the other on a stream of their own; no clock, no device.

    A layer's bytes can leave when it has ended. When `window` more have ended computation waits until they have left, and before the
    head for all. As a layer's backward begins, those of as many layers below are sent for.

    Args:
        layers: From the first to the last.
        moved: Bytes that each moves.
        link: Bandwidth.
        head_seconds: From the last layer's forward to its backward.
        window: Layers whose time a transfer has.
    """
    now = free = waited = 0.0
    gone: list[float] = []
    for place, (layer, size) in enumerate(zip(layers, moved, strict=True)):
        now += layer.forward_seconds
        before = gone[place - window] if place >= window else 0.0
        waited, now = waited + max(0.0, before - now), max(now, before)
        # The stall is that of a layer before: this one's bytes may leave once it has ended.
        free = max(free, now) + size / link.to_host
        gone.append(free)
    if gone:
        waited, now = waited + max(0.0, gone[-1] - now), max(now, gone[-1])
    now += head_seconds
    back: dict[int, float] = {}
    for place in range(len(layers) - 1, -1, -1):
        for wanted in range(place, max(place - window, 0) - 1, -1):
            if wanted not in back:
                free = max(free, now) + moved[wanted] / link.to_device
                back[wanted] = free
        waited, now = waited + max(0.0, back[place] - now), max(now, back[place])
        now += layers[place].backward_seconds
    transfers = sum(moved) / link.to_host + sum(moved) / link.to_device
    peak = peak_on_device([layer.saved_bytes for layer in layers], moved, window)
    return OffloadTimeline(now, waited, transfers, peak, sum(moved))


def peak_on_device(saved: Sequence[float], moved: Sequence[float], window: int = 1) -> float:
    """The most of what layers saved that is on the device at one time, bytes: `window` + 1 layers' transfers are under way at any."""
    return max(
        (sum(saved[: place + 1]) - sum(moved[: max(0, place - window)]) for place in range(len(saved))),
        default=0.0,
    )


def uniform_at_peak(saved: Sequence[float], hidden: Sequence[float], peak: float, window: int = 1) -> list[int]:
    """The least that uniform offload moves so that no more than `peak` bytes of what layers saved are on the device at one time.

    Everything, where even that leaves more; arguments as in [`sensitive_bytes`].
    """
    low, high = 0.0, float(sum(saved))
    while high - low > max(1.0, 1e-6 * high):
        middle = (low + high) / 2
        if peak_on_device(saved, uniform_bytes(saved, hidden, middle), window) <= peak:
            high = middle
        else:
            low = middle
    return uniform_bytes(saved, hidden, high)
