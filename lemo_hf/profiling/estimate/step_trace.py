"""One training step of the real code with a few layers, cut into stretches: what the estimate of a whole model is made from.

A decoder's layers of one kind are copies: each adds as many bytes in the forward, needs as many at its own peak, and takes as many
away in the backward. So a step with one layer of each kind (the first apart: below it nothing needs a gradient) tells the step of
the whole model. Its stretches are

    start | layers forward, first to last | head: final norm, logits, loss, and their backward | layers backward, last to first | end

and of each are kept: bytes by part before, after and at its highest moment, and the costs of its operators. On fake tensors a step
of 64K tokens costs what one of 64 costs, so lengths are the real ones and nothing about them is extrapolated.

Parts: weights, adapter, predictors (parameters); inputs; gradients (of adapters); loss (logits and all that lives within the head
stretch only, its saved gradient too); workspace (what dies in the stretch of a layer that made it, and gradients on their way
down); and what a layer leaves for its backward, by the module that made it: norm, q,k,v, attention, o_proj, mlp, residual, ...
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from ..live_bytes import Allocation, LiveBytes
from .fake_model import fake_model
from .kernel_shapes import kernels_on_shapes
from .operator_cost import OperatorCost, flash_workspace, operator_cost
from .step_model import LAYER, StepSettings, build_model, forward_loss, layer_kinds, resident_part

Parts = Counter[str]  # bytes by part
_RESIDENT = ("weights", "adapter", "predictors")


@dataclass
class Stretch:
    """A stretch of a step: bytes alive by part, parameters left out, and the costs of its operators."""

    before: Parts = field(default_factory=Counter)
    after: Parts = field(default_factory=Counter)
    peak: Parts = field(default_factory=Counter)
    costs: list[OperatorCost] = field(default_factory=list)


@dataclass
class StepTrace:
    """A traced step.

    Args:
        stretches: By `(name, place)`: ("start", 0), ("forward", place), ("head", 0), ("backward", place), ("end", 0), where
            place is that of the layer in the traced model.
        resident: Bytes of parameters and buffers by place, -1 for those outside the layers.
        place_of_layer: By layer of the whole model the traced layer that stands for it.
        peak_bytes: The traced model's own peak.
    """

    stretches: dict[tuple[str, int], Stretch]
    resident: dict[int, Parts]
    place_of_layer: list[int]
    peak_bytes: int


def trace_step(config: PreTrainedConfig, settings: StepSettings, on_gpu: bool) -> StepTrace:
    """Traces a step on fake tensors with one layer of each kind.

    Args:
        config: The whole model's config.
        settings: The step.
        on_gpu: Whether the step is a GPU's: CUDA's flash backward is counted with its workspace, and kernels as such.

    Raises:
        LemoError: See [`build_model`].
    """
    kinds = layer_kinds(config, settings)
    first_of_kind = {kind: kinds.index(kind) for kind in kinds}
    layers = sorted(first_of_kind.values())
    mode = EveryTokenHasALabel(settings.batch_size)
    model = fake_model(lambda: build_model(config, settings, layers), mode)
    with mode, kernels_on_shapes(on_gpu):
        input_ids = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.long)
        trace = record_step(model, input_ids, settings, on_gpu)
    trace.place_of_layer = [layers.index(first_of_kind[kind]) for kind in kinds]
    return trace


class EveryTokenHasALabel(FakeTensorMode):
    """Fake tensors have no values to look for labels in: all tokens have a next one but each sample's last."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._without = batch_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((args[0].numel() - self._without, args[0].dim()), dtype=torch.long)
        return super().__torch_dispatch__(func, types, args, kwargs)


def record_step(model: nn.Module, input_ids: Tensor, settings: StepSettings, on_gpu: bool = False) -> StepTrace:
    """Runs one training step, forward and backward, and cuts it into stretches; real tensors or fake ones.

    Args:
        model: With adapters, in training mode; its gradients are not set.
        input_ids: `(batch, seq_len)`.
        settings: The step.
        on_gpu: See [`trace_step`].
    """
    cuts: list[tuple[int, str, int]] = []
    costs: list[tuple[int, OperatorCost]] = []

    def cut(name: str, place: int = 0) -> None:
        cuts.append((live.time, name, place))

    def on_operator(*call: Any) -> None:
        cost = operator_cost(*call)
        if cost is not None:
            costs.append((live.time, cost))

    live = LiveBytes(model, on_operator, flash_workspace if on_gpu else None)
    resident: dict[int, Parts] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        layer = LAYER.search(name)
        live.label([tensor], resident_part(name))
        resident.setdefault(int(layer.group(1)) if layer else -1, Counter())[resident_part(name)] += (
            tensor.untyped_storage().nbytes()
        )
    handles = _cut_at_layers(model, cut)
    with live:
        live.label([input_ids], "inputs")
        cut("start")
        loss = forward_loss(model, input_ids, settings)
        loss.backward()
        cut("end")
        live.label([weight.grad for weight in model.parameters() if weight.grad is not None], "gradients")
        del loss
    for handle in handles:
        handle.remove()
    return StepTrace(_stretches(live, cuts, costs), resident, list(range(max(resident) + 1)), live.peak_bytes)


def _cut_at_layers(model: nn.Module, cut: Callable[[str, int], None]) -> list[Any]:
    """Cuts where a layer's forward begins, where the first module after the layers begins, and where a layer's backward begins."""
    layers = {name: int(match.group(1)) for name, _ in model.named_modules() if (match := LAYER.search(name))}
    whole = {name: place for name, place in layers.items() if name.endswith(f".{place}") and name.count(".layers.") == 1}
    last = max(whole.values())
    passed: set[int] = set()

    def forward_begins(place: int) -> Callable[..., None]:
        return lambda module, inputs: cut("forward", place)

    def forward_ends(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            passed.add(place)
            hidden = output[0] if isinstance(output, tuple) else output
            # Its gradient is whole when all above it is done.
            hidden.register_hook(lambda grad: cut("backward", place))

        return hook

    def head_begins(module: nn.Module, inputs: Any) -> None:
        # Not at the last layer's end: the model's loop still holds the layer's input there, as it does not between layers.
        if last in passed:
            passed.clear()
            cut("head", 0)

    handles: list[Any] = []
    for name, module in model.named_modules():
        if name in whole:
            handles.append(module.register_forward_pre_hook(forward_begins(whole[name])))
            handles.append(module.register_forward_hook(forward_ends(whole[name])))
        elif name not in layers:
            handles.append(module.register_forward_pre_hook(head_begins))
    return handles


def _stretches(
    live: LiveBytes, cuts: list[tuple[int, str, int]], costs: list[tuple[int, OperatorCost]]
) -> dict[tuple[str, int], Stretch]:
    times = [time for time, _, _ in cuts]
    names = [(name, place) for _, name, place in cuts]
    found = {name: Stretch() for name in names}
    changes = []
    for one in live.allocations:
        part = _part(one, times, names)
        if part not in _RESIDENT:
            changes.append((one.born, one.size, part))
            if one.died is not None:
                changes.append((one.died, -one.size, part))
    changes.sort()
    now: Parts = Counter()
    total = highest = 0
    at = -1  # place of the present stretch in `cuts`
    for time, change, part in [*changes, (live.time + 1, 0, "inputs")]:
        while at + 1 < len(times) and times[at + 1] < time:
            if at >= 0:
                found[names[at]].after = now.copy()
            at += 1
            found[names[at]].before, found[names[at]].peak, highest = now.copy(), now.copy(), total
        now[part] += change
        total += change
        if at >= 0 and total > highest:
            found[names[at]].peak, highest = now.copy(), total
    found[names[at]].after = now.copy()
    for time, cost in costs:
        found[names[bisect_right(times, time) - 1]].costs.append(cost)
    return found


def _part(one: Allocation, times: list[int], names: list[tuple[str, int]]) -> str:
    if one.label:
        return one.label
    place = max(0, bisect_right(times, one.born - 1) - 1)
    within = one.died is not None and place + 1 < len(times) and one.died <= times[place + 1]
    if names[place][0] == "head":
        if one.in_backward:
            return "loss" if within else "workspace"
        return "norm" if one.owner.part == "norm" else "loss"
    return "workspace" if one.in_backward or within else one.owner.part
