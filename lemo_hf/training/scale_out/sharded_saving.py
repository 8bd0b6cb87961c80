"""Saving and resuming under FSDP2, where each process holds a part of every weight and of the optimizer.

A checkpoint is the one that a single process writes: whole adapter (or weights), whole optimizer in the order of its parameters.
So a run goes on with any number of processes, sharded, replicated or alone. The engine's own formats (`pytorch_model_fsdp`) are
read by FSDP only, and an adapter saved shard by shard has lost all shards but one.

Memory: rank 0 holds what it writes, on the CPU. Frozen weights of the layers, nearly all of a model with an adapter, are never
gathered.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import LemoError
from ...hub.lemo_files import opened_tensors, read_json

if TYPE_CHECKING:  # a mixin calls the methods of the trainer that it is put before
    _Trainer = Trainer
else:
    _Trainer = object


class ShardedSavingMixin(_Trainer):
    """Has a trainer (to stand before it in the bases) save whole checkpoints of a model that FSDP2 shards, and read them back."""

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    @property
    def _scheduler(self) -> Any:
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`."""
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        sharded: Any = self.model
        weights = whole_weights(sharded, self.args.should_save)
        if self.args.should_save:
            # FSDP2 has made the model's class another one, whose source is no model's: code and auto_map are those of its own.
            self.model = sharded if isinstance(sharded, PeftModel) else _unsharded_twin(sharded)
            try:
                self._save(output_dir, state_dict=weights)
            finally:
                self.model = sharded
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self._scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(model, FSDPModule):
            sharded: Any = model
            load_whole_weights(sharded, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_sharded:
            model: Any = self.model
            load_whole_weights(model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._is_sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = Path(checkpoint) / OPTIMIZER_NAME, Path(checkpoint) / SCHEDULER_NAME
        if optimizer.is_file() and scheduler.is_file():  # neither is there with save_only_model
            load_whole_optimizer_state(self.optimizer, torch.load(optimizer, map_location="cpu", weights_only=True))
            self._scheduler.load_state_dict(torch.load(scheduler, weights_only=True))


def _unsharded_twin(model: Any) -> nn.Module:
    """A model of the class and config of a sharded one, without weights: to be saved with some given ones."""
    kind: Any = next(base for base in type(model).__mro__[1:] if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        twin: nn.Module = kind(model.config)
    twin.generation_config = model.generation_config
    return twin


def _whole(value: Any) -> Any:
    """A sharded tensor put together; every process has to ask. Anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    return value.full_tensor()


def _part_of(whole: Tensor, like: DTensor) -> Tensor:
    """The part of a whole tensor that this process holds, cut as `like` is; nothing is exchanged."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def whole_weights(model: nn.Module, keeps: bool) -> dict[str, Tensor]:
    """The weights of a sharded model under their names, on the CPU; every process has to call it.

    With an adapter the frozen weights of the layers are left out: they are the base model's.

    Args:
        model: The sharded model.
        keeps: Whether this process wants them; the others help, and get an empty mapping.
    """
    left_out = _tied(model)
    if isinstance(model, PeftModel):
        prefix = getattr(model.base_model, "prefix", "lora_")
        left_out |= {
            name
            for name, weight in model.named_parameters()
            if not weight.requires_grad and ".layers." in name and prefix not in name
        }
    found = {}
    for name, value in model.state_dict().items():
        if name not in left_out:
            whole = _whole(value)
            if keeps:
                found[name] = whole.cpu() if isinstance(whole, Tensor) else whole
    return found


def load_whole_weights(model: nn.Module, folder: Path) -> None:
    """Gives a sharded model the adapter, or without one the weights, that lie whole in `folder`.

    Raises:
        LemoError: If a file or a weight is missing, or has another shape.
    """
    has_adapter = isinstance(model, PeftModel)
    # Renamed by PEFT, not copied: they share memory with the model's.
    own = get_peft_model_state_dict(model, save_embedding_layers=False) if has_adapter else model.state_dict()
    missing = set(own)
    for name, whole in _stored(folder, ADAPTER_WEIGHTS if has_adapter else SAFE_WEIGHTS_NAME):
        target = own.get(name)
        if target is None:
            continue  # embeddings of the base that PEFT saves along
        if target.shape != whole.shape:
            raise LemoError(
                f"checkpoint does not fit the model; {name} is {list(whole.shape)} in {str(folder)!r}, {list(target.shape)} here; "
                "resume with the run's own model and adapter settings"
            )
        with torch.no_grad():
            target.copy_(_part_of(whole, target) if isinstance(target, DTensor) else whole)
        missing.discard(name)
    if lacking := sorted(missing - _tied(model)):
        raise LemoError(
            f"checkpoint lacks weights of the model; {len(lacking)}, {lacking[0]} among them, in {str(folder)!r}; "
            "resume with the run's own model and adapter settings"
        )


def _tied(model: Any) -> set[str]:
    """Names of weights that are others' too, which stand in no file."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def _stored(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    names = [name]
    if not (folder / name).is_file() and (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        names = sorted(set(read_json(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values()))
    for each in names:
        with opened_tensors(folder / each) as stored:
            for key in stored.keys():  # noqa: SIM118 (no mapping)
                yield key, stored.get_tensor(key)


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's `state_dict` as one process alone has it, on the CPU; every process has to call it."""
    state = optimizer.state_dict()
    whole = {}
    for number, values in state["state"].items():
        gathered = {name: _whole(value) for name, value in values.items()}
        whole[number] = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in gathered.items()}
    return {**state, "state": whole}


def load_whole_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Gives an optimizer of sharded parameters what [`whole_optimizer_state`], or an optimizer of whole ones, had.

    Raises:
        LemoError: If it belongs to other parameters.
    """
    parameters = [weight for group in optimizer.param_groups for weight in group["params"]]
    stored = [number for group in state["param_groups"] for number in group["params"]]
    if len(stored) != len(parameters):
        raise LemoError(
            f"optimizer of the checkpoint has {len(stored)} parameters, this run's has {len(parameters)}; "
            "resume with the run's own model and adapter settings"
        )
    cut = {}
    for number, weight in zip(stored, parameters, strict=True):
        values = state["state"].get(number, {})
        cut[number] = {
            name: _part_of(value, weight)
            if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape
            else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({**state, "state": cut})
