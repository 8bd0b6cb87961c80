"""Peak memory, FLOPs and time of a training step, the longest sequence that fits, and the kept share that makes one fit.

From a model's config alone: step_trace.py runs the real code with one layer of each kind on fake tensors of the real length, and
the whole model's step is laid together from its stretches. With R the parameters and optimizer state, f_l the bytes that layer l's
forward leaves behind, g_l those that its backward takes away, and the stretch peaks above their beginnings F_l, H, B_l:

    peak = R + max( f_0 + ... + f_{l-1} + F_l,   f_0 + ... + f_{L-1} + H,   f_0 + ... + f_{L-1} + h - (g_{L-1} + ... + g_{l+1}) + B_l )

over all layers l, every term by part. AdamW holds two numbers per adapter weight in the adapter's type. What the trace does not
see is added as a stated assumption: the allocator's rounding and fragmentation, and the CUDA context.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedConfig

from ...errors import LemoError
from ...models.lemo_config import LemoConfig
from .cards import FULL, GIB, Card, seconds
from .model_shapes import checked_config, read_model_config
from .offload import OffloadEstimate, off_device, plan_offload, stall_seconds
from .offload_plan import OffloadPlan
from .operator_cost import OperatorCost
from .step_model import StepSettings
from .step_trace import Parts, StepTrace, trace_step

# Assumed, for want of measurements: of what is not resident, and per process.
ALLOCATOR_SLACK = 0.05
CUDA_CONTEXT = int(0.6 * GIB)
FIXED_PARTS = ("weights", "adapter", "predictors", "optimizer", "gradients", "inputs", "loss", "workspace")
# The longest sequence is sought in this step, in tokens, and up to this length; a length is traced up to the last of these: the
# segmented loss makes a trace longer with every segment.
LENGTH_STEP = 256
LENGTH_LIMIT = 2**24
TRIED_LENGTH = 2**17


@dataclass(frozen=True)
class LayerCost:
    """What one layer adds to a step.

    Args:
        memory: Bytes that its forward leaves for its backward.
        flops: FLOPs, forward and backward.
    """

    memory: int
    flops: int


@dataclass(frozen=True)
class Estimate:
    """What a training step needs.

    Args:
        model: Name of the model.
        layers: Its layers.
        settings: The step.
        parts: Bytes by part at the highest moment; parts beside `FIXED_PARTS` are activations saved for backward.
        moment: When that is, in words.
        on_gpu: Whether the allocator's slack and the CUDA context are added.
        flops: FLOPs of a step by stretch: "layers forward", "head and loss", "layers backward".
        card: The card that times are for, if one is given.
        memory: Bytes that a step may take, if a limit is given.
        seconds: Expected time of a step on the card, with assumed efficiencies.
        seconds_at_least: The same with every operator at the card's peak.
        notes: What the reader should know, one sentence each.
        offload: What lies in host memory, if anything does.
    """

    model: str
    layers: int
    settings: StepSettings
    parts: dict[str, int]
    moment: str
    on_gpu: bool
    flops: dict[str, int]
    card: Card | None = None
    memory: int | None = None
    seconds: float | None = None
    seconds_at_least: float | None = None
    notes: list[str] = field(default_factory=list)
    offload: OffloadEstimate | None = None

    @property
    def live_bytes(self) -> int:
        """Bytes of tensors alive at the highest moment."""
        return sum(self.parts.values())

    @property
    def activations(self) -> dict[str, int]:
        """Bytes saved for backward at that moment, by the part of the layer that made them."""
        return {part: size for part, size in self.parts.items() if part not in FIXED_PARTS}

    @property
    def slack_bytes(self) -> int:
        """Assumed bytes of the allocator's rounding and fragmentation; 0 on a CPU."""
        return _slack(self.parts, self.on_gpu)

    @property
    def context_bytes(self) -> int:
        """Assumed bytes of the CUDA context; 0 on a CPU."""
        return CUDA_CONTEXT if self.on_gpu else 0

    @property
    def total_bytes(self) -> int:
        """What the step needs: live tensors, slack and context."""
        return self.live_bytes + self.slack_bytes + self.context_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the memory given; `None` without a limit."""
        return None if self.memory is None else self.total_bytes <= self.memory


class Estimator:
    """Estimates steps of one model; steps that were traced once are remembered.

    ```python
    estimator = Estimator("Llama-3-8B", card=find_card("H100"))
    estimate = estimator.estimate(StepSettings(65536, lemo=LemoConfig(keep_ratio=0.5, checkpoint="kept_rows")))
    estimate.total_bytes, estimate.parts, estimate.seconds
    estimator.longest(estimate.settings)         # tokens
    estimator.kept_share(estimate.settings)      # the largest that fits
    ```

    Args:
        model: A built-in shape's name, a config.json, a folder with one, a Hub id, or a config.
        card: For times; its memory is the limit unless `memory` is given.
        memory: Bytes that a step may take.
        on_gpu: Whether the step runs on CUDA: its flash backward's workspace, slack and context count.

    Raises:
        LemoError: If no estimate can be made of the model.
    """

    def __init__(
        self, model: str | Path | PreTrainedConfig, card: Card | None = None, memory: int | None = None, on_gpu: bool = True
    ) -> None:
        if isinstance(model, PreTrainedConfig):
            self.config, self.model = checked_config(model, model.model_type), model.name_or_path or model.model_type
        else:
            self.config, self.model = read_model_config(model), str(model)
        self.card = card
        self.memory = memory if memory is not None or card is None else card.memory
        self.on_gpu = on_gpu
        self._traces: dict[str, StepTrace] = {}

    def estimate(self, settings: StepSettings) -> Estimate:
        """What one step needs.

        Raises:
            LemoError: If the method does not exist for the architecture, or a target of the adapters does not.
        """
        trace = self._trace(settings)
        offload = plan_offload(trace, settings.lemo_config, self.card)
        plan = None if offload is None else offload.plan
        parts, moment = max(_moments(trace, plan), key=lambda moment: moment[0].total())
        estimate = Estimate(
            model=self.model,
            layers=self.config.num_hidden_layers,
            settings=settings,
            parts={part: size for part, size in parts.most_common() if size > 0},
            moment=moment,
            on_gpu=self.on_gpu,
            flops={
                name: int(flops) for name, flops in _by_stretch(trace, lambda costs: sum(cost.flops for cost in costs)).items()
            },
            card=self.card,
            memory=self.memory,
            notes=self._notes(settings),
            offload=offload,
        )
        if (card := self.card) is None:
            return estimate
        expected = sum(_by_stretch(trace, lambda costs: seconds(costs, card)).values())
        at_least = sum(_by_stretch(trace, lambda costs: seconds(costs, card, FULL)).values())
        if offload is not None:
            expected += offload.timeline.stall_seconds
            at_least += stall_seconds(trace, offload.plan, card, FULL)
        return replace(estimate, seconds=expected, seconds_at_least=at_least)

    def layer_costs(self, settings: StepSettings) -> list[LayerCost]:
        """What each layer adds to a step's activations and FLOPs."""
        trace = self._trace(settings)

        def cost(place: int) -> LayerCost:
            forward, backward = trace.stretches["forward", place], trace.stretches["backward", place]
            flops = sum(cost.flops for stretch in (forward, backward) for cost in stretch.costs)
            return LayerCost(forward.after.total() - forward.before.total(), int(flops))

        return [cost(place) for place in trace.place_of_layer]

    def longest(self, settings: StepSettings) -> int:
        """The longest sequence that fits the memory, in tokens, a multiple of `LENGTH_STEP`; 0 if none does.

        Up to `TRIED_LENGTH` the answer and the next length are tried; a longer one is on the line through that length and its half.

        Args:
            settings: The step; its own length does not matter.

        Raises:
            LemoError: If no limit is given.
        """
        limit, top = self._limit(), TRIED_LENGTH // LENGTH_STEP
        whole = self._needed(settings, TRIED_LENGTH)
        if whole > limit:
            return LENGTH_STEP * _largest(lambda step: self._needed(settings, step * LENGTH_STEP), limit, (top // 8, top), top)
        slope = (whole - self._needed(settings, TRIED_LENGTH // 2)) / (top - top // 2)
        return LENGTH_STEP * min(top + int((limit - whole) / slope), LENGTH_LIMIT // LENGTH_STEP)

    def kept_share(self, settings: StepSettings) -> float:
        """The largest kept share, in hundredths, with which the step fits; every layer that is not dense gets it.

        Args:
            settings: The step, with `method="lemo"`.

        Raises:
            LemoError: If no kept share fits; it says how much memory the smallest needs. If no limit is given.
        """
        limit = self._limit()

        def needed(hundredths: int) -> int:
            return self.estimate(self._keeping(settings, hundredths / 100)).total_bytes

        found = _largest(needed, limit, (25, 75), 100)
        if not found:
            rows = settings.lemo is not None and settings.lemo.checkpoint == "kept_rows"
            other = "use a shorter sequence or a larger card" if rows else "use --checkpoint kept_rows, or a shorter sequence"
            raise LemoError(
                f"no kept share fits {settings.seq_len} tokens into {limit / GIB:.1f} GiB; the smallest, 0.01, needs "
                f"{needed(1) / GIB:.1f} GiB; {other}"
            )
        return found / 100

    def curve(self, settings: StepSettings, lengths: tuple[int, int, int]) -> Callable[[int], float]:
        """Bytes needed by length, from three traced lengths.

        Every tensor's size is a polynomial in tokens, of degree 2 for masks and block scores and 1 for all others, so each moment
        of the step is one, and the need is the largest of them. Exact where within each stretch of the step the same moment is the
        highest at all lengths concerned, and kept blocks come out whole.

        Args:
            settings: The step; its own length does not matter.
            lengths: Three different lengths, in tokens.

        Raises:
            LemoError: If the step offloads: what is moved is no polynomial.
        """
        if settings.lemo_config is not None and settings.lemo_config.offload != "none":
            raise LemoError(
                f"memory by length is drawn without offload only; offload={settings.lemo_config.offload!r}; leave --plot or --offload out"
            )
        needs: list[list[int]] = []
        for length in lengths:
            moments = _moments(self._trace(replace(settings, seq_len=length)))
            context = CUDA_CONTEXT if self.on_gpu else 0
            needs.append([parts.total() + _slack(parts, self.on_gpu) + context for parts, _ in moments])

        def at(tokens: int) -> float:
            # Lagrange's form of the polynomial through three points; the weights are those of all moments.
            weights = [
                math.prod((tokens - other) / (length - other) for other in lengths if other != length) for length in lengths
            ]
            return max(sum(weight * need for weight, need in zip(weights, of_moment)) for of_moment in zip(*needs))

        return at

    def _needed(self, settings: StepSettings, seq_len: int) -> int:
        return self.estimate(replace(settings, seq_len=seq_len)).total_bytes

    def _keeping(self, settings: StepSettings, share: float) -> StepSettings:
        return replace(settings, lemo=replace(settings.lemo or LemoConfig(), keep_ratio=share))

    def _limit(self) -> int:
        if self.memory is None:
            raise LemoError("nothing to fit into; neither a card nor an amount of memory is given; add --gpu or --gpu-memory")
        return self.memory

    def _trace(self, settings: StepSettings) -> StepTrace:
        if settings.lemo_config is not None:  # where saved bytes lie changes nothing of the trace
            settings = replace(settings, lemo=replace(settings.lemo_config, offload="none", offload_budget=None))
        key = repr(settings)
        if key not in self._traces:
            self._traces[key] = trace_step(self.config, settings, self.on_gpu)
        return self._traces[key]

    def _notes(self, settings: StepSettings) -> list[str]:
        notes = []
        context = getattr(self.config, "max_position_embeddings", None)
        if context and settings.seq_len > context:
            notes.append(f"{settings.seq_len} tokens are more than the model's context of {context}: extend it before you train")
        if settings.lemo_config is not None and settings.lemo_config.selection == "threshold":
            notes.append("thresholds keep what the text asks for; estimated as if every layer kept keep_ratio of its blocks")
        if settings.method.startswith("liger"):
            notes.append("Liger is computed from what its functions allocate and save, not run")
        notes.append("dense perplexity is not estimated; docs/quality.md has what was measured of it")
        return notes


def _slack(parts: Mapping[str, int], on_gpu: bool) -> int:
    resident = sum(parts.get(part, 0) for part in ("weights", "adapter", "predictors", "optimizer"))
    return int(ALLOCATOR_SLACK * (sum(parts.values()) - resident)) if on_gpu else 0


def _moments(trace: StepTrace, plan: OffloadPlan | None = None) -> list[tuple[Parts, str]]:
    """Bytes by part at the highest moment of every stretch of the whole model's step, and what runs then.

    Args:
        trace: The step.
        plan: What the layers offload.
    """
    stretches, places = trace.stretches, trace.place_of_layer
    resident = trace.resident[-1].copy()
    for place in places:
        resident.update(trace.resident[place])
    resident["optimizer"] = 2 * resident["adapter"]  # AdamW's moments
    last = len(places) - 1
    gone = off_device(trace, plan or OffloadPlan([0] * len(places), 1))
    none: Parts = Counter()
    walk = [("start", 0, "the embedding", none)]
    walk += [
        ("forward", place, f"the forward of layer {layer} of 0 to {last}", gone[layer]) for layer, place in enumerate(places)
    ]
    walk += [("head", 0, "the loss", gone[-1])]
    walk += [
        ("backward", places[layer], f"the backward of layer {layer} of 0 to {last}", gone[layer]) for layer in range(last, -1, -1)
    ]
    now = _sum(resident, stretches["start", 0].before, Counter())
    found = []
    for name, place, words, away in walk:
        stretch = stretches[name, place]
        found.append((_sum(_sum(now, none, away), stretch.peak, stretch.before), words))
        now = _sum(now, stretch.after, stretch.before)
    return found


def _sum(first: Parts, second: Parts, without: Parts) -> Parts:
    result = first.copy()
    result.update(second)
    result.subtract(without)
    return result


def _by_stretch(trace: StepTrace, measure: Callable[[list[OperatorCost]], float]) -> dict[str, float]:
    """`measure` of each stretch's costs, summed over the whole model."""
    found: dict[str, float] = {}
    times = Counter(trace.place_of_layer)
    words = {"forward": "layers forward", "backward": "layers backward"}
    for (name, place), stretch in trace.stretches.items():
        word = words.get(name, "head and loss")
        amount = measure(stretch.costs) * (times[place] if name in words else 1)
        found[word] = found.get(word, 0) + amount
    return found


def _largest(needed: Callable[[int], int], limit: int, guesses: tuple[int, int], top: int) -> int:
    """The largest whole number from 1 to `top` that needs at most `limit`; 0 if none does. `needed` does not fall.

    It grows nearly evenly, so secants find it: the number found was tried, and so was the next.
    """
    tried = {number: needed(number) for number in guesses}
    while True:
        low = max((number for number, need in tried.items() if need <= limit), default=0)
        high = min((number for number, need in tried.items() if need > limit), default=top + 1)
        if high - low <= 1:
            return low
        first, second = sorted(tried, key=lambda number: abs(tried[number] - limit))[:2]
        slope = (tried[first] - tried[second]) / (first - second)
        guess = first + math.floor((limit - tried[first]) / slope) if slope > 0 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        tried[guess] = needed(guess)
