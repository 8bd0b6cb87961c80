"""Whose bytes and whose FLOPs: the running module, and amounts that can be summed by module, layer and part.

A *part* is what a transformer layer is made of in this package's tables: norm, q,k,v, attention, o_proj, mlp; around the
layers embedding, norm and loss; and what LeMo adds, predictor and selection. `residual` is the layer itself: residual adds and
the movement of kept rows. `other` is a module that fits none of them.
"""

import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")

# First match wins; names of Llama, Mistral and OPT.
_PART_OF_SUBMODULE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"lemo_predictor", "predictor"),
        (r"(^|\.)(q_proj|k_proj|v_proj|qkv_proj)(\.|$)", "q,k,v"),
        (r"(^|\.)(o_proj|out_proj)(\.|$)", "o_proj"),
        (r"norm", "norm"),
        (r"(^|\.)(mlp|fc1|fc2|activation_fn)(\.|$)", "mlp"),
        (r"attn|attention", "attention"),
        (r"^$", "residual"),
    )
)

# LeMo's layers call functions on rows where a stock layer calls modules: (file stem, function) -> part; `None` is any function.
_PART_OF_CODE: dict[tuple[str, str | None], str] = {
    ("row_operations", "rms_norm"): "norm",
    ("row_operations", "gated_activation"): "mlp",
    ("rotary_decoder", "gated_feed_forward"): "mlp",
    ("document_attention", None): "attention",
    ("kept_key_attention", None): "attention",
    ("nearby_attention", None): "attention",
    ("block_pair_attention", None): "attention",
    ("two_dimensional_sparsity", "choose_pairs"): "selection",
    ("two_dimensional_sparsity", "_limits"): "selection",
    ("two_dimensional_sparsity", None): "attention",
    ("segmented_loss", None): "loss",
    ("pattern_predictor", None): "predictor",
    ("token_informativeness", None): "selection",
    ("token_elimination", "choose_blocks"): "selection",
    # Baselines that do likewise.
    ("artifact_lemo", "pruned_feed_forward"): "mlp",
    ("tokentune", "attend_all"): "attention",
}


class Owner(NamedTuple):
    """Who a saved tensor or an operation belongs to.

    Args:
        module: Path of the innermost running module within the measured model; empty for the model itself.
        layer: Index of the decoder layer, or `None` outside the layers.
        part: See the module docstring.
    """

    module: str
    layer: int | None
    part: str


class Breakdown:
    """Amounts (bytes or FLOPs) by named fields.

    Args:
        fields: Names of the fields of each entry.
        amounts: Entry -> amount.
    """

    def __init__(self, fields: tuple[str, ...], amounts: Mapping[tuple[Any, ...], int]) -> None:
        self.fields = fields
        self._amounts = dict(amounts)

    @property
    def total(self) -> int:
        """The sum of all amounts."""
        return sum(self._amounts.values())

    def by(self, *fields: str) -> dict[Any, int]:
        """Sums by one field (plain keys) or several (tuples), the largest first.

        Raises:
            ValueError: If a field does not exist.
        """
        unknown = set(fields) - set(self.fields)
        if unknown or not fields:
            raise ValueError(f"no such field of the breakdown; {sorted(unknown)}; choose among {list(self.fields)}")
        places = [self.fields.index(field) for field in fields]
        sums: Counter[Any] = Counter()
        for entry, amount in self._amounts.items():
            sums[entry[places[0]] if len(places) == 1 else tuple(entry[place] for place in places)] += amount
        return dict(sums.most_common())


class RunningModules:
    """Context manager that knows which module of a model is running, also where a checkpoint runs it again in backward.

    Args:
        model: The model; modules outside it do not count.
        on_change: Called with no arguments before a module starts and after it ends.
    """

    def __init__(self, model: nn.Module, on_change: Callable[[], None] | None = None) -> None:
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._owners = {path: Owner(path, *_layer_and_part(path, module)) for path, module in model.named_modules()}
        self._on_change = on_change
        self._stack: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "RunningModules":
        # always_call: checkpointing ends a recomputation early by an exception, and the stack must not keep the modules.
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.clear()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            self._stack.append(path)
            self._changed()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if id(module) in self._paths and self._stack:
            self._stack.pop()
            self._changed()

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()

    @property
    def innermost(self) -> Owner | None:
        """The innermost running module, or `None` outside the model."""
        return self._owners[self._stack[-1]] if self._stack else None

    def owner(self) -> Owner:
        """Who runs now: the innermost module, its part refined by the function that runs where a layer calls functions."""
        return _refined(self.innermost or Owner("", None, "other"))


class RunningOwners:
    """Context manager that also knows whose operation the backward pass runs: that of the module that ran it forward.

    Backward must run in the thread of the forward (it does on the CPU, and on a GPU with
    `torch.autograd.set_multithreading_enabled(False)`).

    Args:
        model: See [`RunningModules`].
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = RunningModules(model, on_change=self._mark)
        # Autograd numbers its nodes as they are made, so the numbers at which modules begin and end tell a node's module.
        self._marks: list[int] = []
        self._owner_from: list[Owner] = []

    def __enter__(self) -> "RunningOwners":
        self._marks.clear()
        self._owner_from.clear()
        self._modules.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._modules.__exit__(*exception)

    def owner(self) -> Owner:
        """Who runs now."""
        # A module that runs within backward is being recomputed: it is the owner itself.
        if torch._C._current_autograd_node() is None or self._modules.innermost is not None:
            return self._modules.owner()
        return _refined(self._owner_of_running_node())

    def _mark(self) -> None:
        owner = self._modules.innermost or self._owner_of_running_node()
        self._marks.append(torch._C._autograd._get_sequence_nr())
        self._owner_from.append(owner)

    def _owner_of_running_node(self) -> Owner:
        node = torch._C._current_autograd_node()
        place = bisect_right(self._marks, node._sequence_nr()) - 1 if node is not None else -1
        return self._owner_from[place] if place >= 0 else Owner("", None, "other")


def _layer_and_part(path: str, module: nn.Module) -> tuple[int | None, str]:
    layer = _LAYER.search(path)
    if layer is not None:
        submodule = path[layer.end() :]
        return int(layer.group(1)), _first_match(submodule)
    if "lm_head" in path or any(name.endswith("lm_head") for name, _ in module.named_modules()):
        return None, "loss"
    if "embed" in path:
        return None, "embedding"
    return None, "norm" if "norm" in path else "other"


def _first_match(submodule: str) -> str:
    return next((part for pattern, part in _PART_OF_SUBMODULE if pattern.search(submodule)), "other")


def _refined(owner: Owner) -> Owner:
    """The owner, its part that of the function that runs, if that is known and the module says little."""
    part = _part_of_running_code() if owner.part in ("residual", "loss", "other") else None
    return owner if part is None else owner._replace(part=part)


def _part_of_running_code() -> str | None:
    for frame in _frames():
        code = frame.f_code
        stem = PurePath(code.co_filename).stem
        part = _PART_OF_CODE.get((stem, code.co_name)) or _PART_OF_CODE.get((stem, None))
        if part is not None:
            return part
        if code.co_name == "apply_rotary_pos_emb":
            return "attention"
    return None


def _frames() -> Iterable[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def storage_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The identity of a plain tensor's storage while it lives, and its bytes. Views share it; fake tensors have one each."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
