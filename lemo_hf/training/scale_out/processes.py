"""The processes of a run (DDP, FSDP2, ZeRO): what they tell each other, and what must be the same on all of them.

Selection differs by process and step, so every exchange here has a size that no token count enters, and every process makes the
same exchanges in the same order, whatever its documents are. What decides something (recall, thresholds, whether to stop) is
exchanged first and decided afterwards: then all decide alike.

Exchanged, besides what the engine does with gradients: in the predictor phase one sum per layer for its statistics and one per
layer and optimizer step for its gradients (both of the predictor's size at most); the losses of the profile set; recall; the
metrics of logged steps; whether gradients are finite, one number a step.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from ...errors import LemoError
from ...models.lemo_config import shown

T = TypeVar("T")


class Processes:
    """The processes that train together; one alone exchanges nothing.

    Args:
        device: Where exchanged tensors live: the device that the model computes on.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        together = dist.is_available() and dist.is_initialized()
        self.count: int = dist.get_world_size() if together else 1
        self.rank: int = dist.get_rank() if together else 0

    def __bool__(self) -> bool:
        """Whether there is anyone to exchange with."""
        return self.count > 1

    def turn(self, done: int, total: int) -> tuple[int, int, bool]:
        """What this process reads of a round in which each process takes one of the documents from `done` on.

        Returns:
            The document, how many documents the round reads, and whether this process' one is among them: in the last round
            there may be fewer documents than processes; the others then read along, since no forward may be left out.
        """
        together = min(self.count, total - done)
        return done + min(self.rank, together - 1), together, self.rank < together

    def sum(self, tensors: list[Tensor]) -> None:
        """Sums tensors of equal shapes over the processes, in place, in one exchange; all get the same bits."""
        if not self:
            return
        flat = torch.cat(
            [tensor.detach().to(self.device, torch.promote_types(tensor.dtype, torch.float32)).flatten() for tensor in tensors]
        )
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def copy_from(self, source: int, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of the process `source`."""
        for tensor in tensors if self else ():
            value = tensor.detach().to(self.device).contiguous()
            dist.broadcast(value, source)
            tensor.detach().copy_(value)

    def gather(self, value: T) -> list[T]:
        """One Python value of each process, in order of rank; meant for little: it is sent as bytes."""
        if not self:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def means(self, values: list[float]) -> list[float]:
        """Mean of each number over the processes that have it; NaN stands for having none."""
        if not self:
            return values
        known = [0.0 if math.isnan(value) else 1.0 for value in values]
        sums = torch.tensor(
            [*(value if has else 0.0 for value, has in zip(values, known, strict=True)), *known], dtype=torch.float64
        )
        self.sum([sums])
        totals, counts = sums.view(2, -1).tolist()
        return [total / count if count else math.nan for total, count in zip(totals, counts, strict=True)]

    def all(self, holds: bool) -> bool:
        """Whether it holds on every process."""
        if not self:
            return holds
        failed = torch.tensor([0.0 if holds else 1.0])
        self.sum([failed])
        return failed.item() == 0

    def require_same(self, values: dict[str, Any], fix: str) -> None:
        """Compares named values, plain types each.

        Raises:
            LemoError: On every process alike, if they differ; names the first such value and two of its variants.
        """
        gathered = self.gather(values)
        for name in dict.fromkeys(name for one in gathered for name in one):
            for rank, others in enumerate(gathered):
                mine, theirs = gathered[0].get(name), others.get(name)
                if theirs != mine:
                    raise LemoError(
                        f"processes have different {name}; {_shown(mine)} on rank 0, {_shown(theirs)} on rank {rank}; {fix}"
                    )

    def require_same_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Holds tensors against those of rank 0, bit for bit, and takes on the latter.

        Raises:
            LemoError: On every process alike, if they differ anywhere.
        """
        if not self:
            return
        before = [tensor.detach().clone() for tensor in tensors.values()]
        self.copy_from(0, tensors.values())
        unequal = [name for (name, now), was in zip(tensors.items(), before, strict=True) if not torch.equal(now, was)]
        for rank, names in enumerate(self.gather(unequal)):
            if names:
                raise LemoError(
                    f"predictors differ among processes; {names[0]} on rank {rank} is not that of rank 0; "
                    "see that all run the same versions on the same kind of device, and start again"
                )


def _shown(value: Any) -> str:
    return shown(value) if not isinstance(value, dict) else shown(dict(list(value.items())[:4]))


def within_forward(model: nn.Module, call: Callable[[], T]) -> T:
    """Runs `call`, which calls parts of `model` by themselves, so that they find their weights.

    FSDP2 gathers a layer's weights as the layer is called, but those that belong to no layer (the last norm) as the whole model
    is: so `call` runs as the model's own forward does. Other models have all their weights: it is just called.

    Args:
        model: The whole model, as it is trained.
        call: What to do; without backward.
    """
    if not isinstance(model, FSDPModule):
        return call()
    outcome: list[T] = []
    root: Any = model
    # The engine wraps methods by their names, as Trainer has it do with `generate`.
    root.lemo_within_forward = lambda: outcome.append(call())
    register_fsdp_forward_method(root, "lemo_within_forward")
    try:
        root.lemo_within_forward()
    finally:
        del root.lemo_within_forward
    return outcome[0]


# Arguments that say where a process runs or what it shows, not what it trains.
_OF_ONE_PROCESS = (
    *("local_rank", "disable_tqdm", "report_to", "run_name", "logging_dir", "log_level", "log_level_replica", "log_on_each_node"),
    # Where a node keeps its copy of the base model.
    *("_name_or_path", "base_model_name_or_path"),
    *("hub_token", "push_to_hub_token", "deepspeed", "debug", "dataloader_num_workers", "dataloader_pin_memory"),
)


def settings_of(model: Any, lemo: dict[str, Any], arguments: Iterable[Any]) -> dict[str, Any]:
    """What every process of a run must have alike, by name.

    Args:
        model: The model before an engine wraps it.
        lemo: Its `lemo` block.
        arguments: Training arguments: the trainer's, and those of the phases where they stand apart.
    """
    found: dict[str, Any] = {"model": type(model).__name__, **{f"lemo.{name}": value for name, value in lemo.items()}}
    for part in arguments:
        values = part.to_dict()
        found |= {name: _plain(value) for name, value in values.items() if name not in _OF_ONE_PROCESS}
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None:
        values = adapter.to_dict()
        found |= {f"adapter.{name}": _plain(value) for name, value in values.items() if name not in _OF_ONE_PROCESS}
    config = getattr(model, "config", None)
    if config is not None:
        values = config.to_dict()
        values.pop("lemo", None)  # as it is now, not as it was loaded
        found |= {f"model.{name}": _plain(value) for name, value in values.items() if name not in _OF_ONE_PROCESS}
    found["model.parameters"] = sum(weight.numel() for name, weight in model.named_parameters() if "lemo_predictor" not in name)
    found["model.trained"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return found


def _plain(value: Any) -> Any:
    # An object's own words may hold its address, which is another in every process.
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "value", None) if isinstance(getattr(value, "value", None), str) else type(value).__name__
