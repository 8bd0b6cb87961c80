"""What layers save for backward, held in host memory: `torch.autograd.graph.save_on_cpu` around each layer's forward.

Two things are kept from that context manager, whose copies would cost more than they free: weights, which are on the device
anyway, and a second copy of a tensor that several operators of a layer save (q, k and v their common input). Copies run on
the stream that computes, so a step takes longer by what the bus takes; of what is eliminated nothing is copied.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..profiling.activation_memory import plain_tensors
from ..profiling.breakdown import storage_of
from .lemo_callback import LemoCallback
from .lemo_run import LemoRun


class ActivationOffload:
    """Context manager under which the tensors that layers save lie in (pinned) host memory until their backward.

    Under activation checkpointing these are a layer's stored input, under kept-row checkpointing its stored kept rows.

    Args:
        layers: Modules whose forwards it acts on.
        device_type: What they run on. On the CPU nothing is copied.
    """

    def __init__(self, layers: Iterable[nn.Module], device_type: str) -> None:
        self.copied_bytes = 0  # from the beginning; never taken back
        self._layers = list(layers)
        self._stock = save_on_cpu(pin_memory=device_type != "cpu", device_type=device_type)
        self._handles: list[Any] = []
        self._hooks: saved_tensors_hooks | None = None
        # By storage and view: the tensor, which must live as long as its storage stands for it, and its copy.
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Any]] = {}

    def __enter__(self) -> "ActivationOffload":
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._begin))
            self._handles.append(layer.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, layer: nn.Module, args: Any) -> None:
        # Looked at anew in each forward: FSDP2 has just gathered them.
        residents = (*layer.parameters(), *layer.buffers())
        weights = {storage_of(part)[0] for weight in residents for part in plain_tensors(weight)}

        def pack(tensor: Tensor) -> Any:
            # Rows' numbers, which all layers share, stay too, and so does what is sharded or quantised.
            is_plain = next(plain_tensors(tensor)) is tensor
            if not (is_plain and tensor.is_floating_point()) or storage_of(tensor)[0] in weights:
                return tensor
            shape = tensor.shape
            if tensor.is_contiguous():
                tensor = tensor.detach().view(-1)  # heads and their concatenation are one tensor
            view = (storage_of(tensor)[0], tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
            if view not in self._copies:
                self._copies[view] = tensor.detach(), self._stock.pack_hook(tensor)
                self.copied_bytes += tensor.nbytes
            return self._copies[view][1], shape

        self._hooks = saved_tensors_hooks(pack, self._unpack)
        self._hooks.__enter__()

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else self._stock.unpack_hook(packed[0]).view(packed[1])

    def _end(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
        self._hooks = None
        self._copies.clear()


class SaveOnCpu(LemoCallback):
    """Offloads what the layers save while a run with `save_on_cpu=True` trains."""

    def __init__(self, run: LemoRun) -> None:
        super().__init__(run)
        self._offload: ActivationOffload | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._end()  # of a training that was cut short
        if self.run.args.save_on_cpu:
            self._offload = ActivationOffload(self.run.backbone.layers, args.device.type)
            self._offload.__enter__()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._offload is not None:
            self._offload.__exit__(None, None, None)
        self._offload = None
