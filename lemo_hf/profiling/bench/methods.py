"""The methods that `lemo bench` compares: one table, one row a method.

All train LoRA adapters on attention's projections. `adapters` is their float type: "float32" is what PEFT makes of them by default,
"base" the base model's own. A kept share follows the name: `lemo-exact@0.3`, `random-ltd@0.3`; 0.5 without one. Rows that keep a
share keep it of blocks of 64 tokens.
"""

import difflib
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from ...errors import LemoError
from ...models.lemo_config import LemoConfig, LemoConfigError
from ..baselines.baseline import Baseline
from ..estimate.step_model import StepSettings

_EXACT = {"attention_forward": "exact", "selection": "sampled"}
# The first layer dense: so its dense perplexity is measured (quickstart).
_SPARSE = {"attention_forward": "sparse", "selection": "ratio", "dense_layers": [0]}
_ROWS = {"checkpoint": "kept_rows"}
# Dropped tokens of the sparse form see those just before them.
_NEARBY = {"nearby_tokens": 128, "block_reduction": "mean", "predictor_features": 40}
# Every token sees the kept ones and those nearby; as the quickstart and the quality bench train it.
_KEYS = {"attention_forward": "kept_keys", "selection": "ratio", "block_reduction": "mean", "predictor_features": 40}
# A quarter of what attention among kept tokens computes, either way.
_GROUPS = {"attention_pattern": "shifted_groups"}
_BLOCKS = {"attention_pattern": "block_sparse", "pattern_share": 0.25}


@dataclass(frozen=True)
class BenchMethod:
    """A row of the table.

    Args:
        name: What the command line calls it.
        words: What tables call it; a kept share is added.
        step: `StepSettings.method`.
        adapters: "float32" or "base".
        lemo: Fields of LeMo's config beside the kept share.
        baseline: Name of a baseline in place of LeMo.
        offload: Whether saved activations go to pinned host memory on a side stream by trl's activation offloading; LeMo's own is in
            `lemo`.
    """

    name: str
    words: str
    step: str = "stock"
    adapters: str = "base"
    lemo: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    offload: bool = False

    @property
    def offloads(self) -> bool:
        """Whether saved activations go to host memory, by trl's offload or ours."""
        return self.offload or "offload" in self.lemo

    @property
    def has_share(self) -> bool:
        """Whether a kept share belongs to it."""
        return self.step == "lemo" or self.baseline in ("random-ltd", "tokentune")


METHODS = {
    row.name: row
    for row in (
        # What a user would do without us.
        BenchMethod("stock", "stock LoRA, PEFT's default adapters", adapters="float32"),
        BenchMethod("stock-bf16", "stock LoRA"),
        BenchMethod("checkpointing", "+ checkpointing", "checkpointing"),
        BenchMethod("liger", "+ Liger", "liger"),
        BenchMethod("liger-checkpointing", "+ Liger + checkpointing", "liger+checkpointing"),
        BenchMethod("liger-checkpointing-offload", "+ Liger + checkpointing + offload", "liger+checkpointing", offload=True),
        # What others have published.
        BenchMethod("longlora", "LongLoRA (S2-Attn)", baseline="longlora"),
        BenchMethod("longlora-float32", "LongLoRA, PEFT's default adapters", adapters="float32", baseline="longlora"),
        # As its logs have it; its stock LoRA is the first row.
        BenchMethod("lemo-artifact", "LeMo, paper's artifact", adapters="float32", baseline="lemo-artifact"),
        BenchMethod("random-ltd", "random block dropping (random-LTD)", baseline="random-ltd"),
        BenchMethod("tokentune", "random tokens' gradients (TokenTune)", baseline="tokentune"),
        # Ours.
        BenchMethod("lemo-exact", "LeMo exact", "lemo", lemo=_EXACT),
        BenchMethod("lemo-exact-float32", "LeMo exact, PEFT's default adapters", "lemo", "float32", _EXACT),
        BenchMethod("lemo-exact-rows", "LeMo exact, kept-row checkpointing", "lemo", lemo=_EXACT | _ROWS),
        BenchMethod("lemo-exact-offload", "LeMo exact, offload", "lemo", lemo=_EXACT, offload=True),
        BenchMethod("lemo-exact-uniform-offload", "LeMo exact, uniform offload", "lemo", lemo=_EXACT | {"offload": "uniform"}),
        BenchMethod(
            "lemo-exact-sensitive-offload", "LeMo exact, sensitive offload", "lemo", lemo=_EXACT | {"offload": "sensitive"}
        ),
        BenchMethod("lemo-keys", "LeMo kept keys", "lemo", lemo=_KEYS),
        BenchMethod("lemo-keys-float32", "LeMo kept keys, PEFT's default adapters", "lemo", "float32", _KEYS),
        BenchMethod("lemo-keys-rows", "LeMo kept keys, kept-row checkpointing", "lemo", lemo=_KEYS | _ROWS),
        BenchMethod("lemo-sparse", "LeMo sparse", "lemo", lemo=_SPARSE),
        BenchMethod("lemo-sparse-float32", "LeMo sparse, PEFT's default adapters", "lemo", "float32", _SPARSE),
        BenchMethod("lemo-sparse-rows", "LeMo sparse, kept-row checkpointing", "lemo", lemo=_SPARSE | _ROWS),
        BenchMethod("lemo-sparse-nearby", "LeMo sparse, dropped tokens see 128", "lemo", lemo=_SPARSE | _NEARBY),
        BenchMethod(
            "lemo-sparse-nearby-float32",
            "LeMo sparse, dropped tokens see 128, PEFT's default adapters",
            "lemo",
            "float32",
            _SPARSE | _NEARBY,
        ),
        BenchMethod(
            "lemo-sparse-nearby-rows",
            "LeMo sparse, dropped tokens see 128, kept-row checkpointing",
            "lemo",
            lemo=_SPARSE | _NEARBY | _ROWS,
        ),
        BenchMethod("lemo-sparse-groups", "LeMo sparse, shifted groups", "lemo", lemo=_SPARSE | _GROUPS),
        BenchMethod(
            "lemo-sparse-groups-rows",
            "LeMo sparse, shifted groups, kept-row checkpointing",
            "lemo",
            lemo=_SPARSE | _GROUPS | _ROWS,
        ),
        BenchMethod("lemo-sparse-blocks", "LeMo sparse, block-sparse", "lemo", lemo=_SPARSE | _BLOCKS),
        BenchMethod(
            "lemo-sparse-blocks-rows", "LeMo sparse, block-sparse, kept-row checkpointing", "lemo", lemo=_SPARSE | _BLOCKS | _ROWS
        ),
        BenchMethod(
            "lemo-sparse-nearby-groups-rows",
            "LeMo sparse, dropped tokens see 128, shifted groups, kept-row checkpointing",
            "lemo",
            lemo=_SPARSE | _NEARBY | _GROUPS | _ROWS,
        ),
        BenchMethod(
            "lemo-sparse-nearby-blocks-rows",
            "LeMo sparse, dropped tokens see 128, block-sparse, kept-row checkpointing",
            "lemo",
            lemo=_SPARSE | _NEARBY | _BLOCKS | _ROWS,
        ),
        BenchMethod("lemo-sparse-offload", "LeMo sparse, offload", "lemo", lemo=_SPARSE, offload=True),
        BenchMethod("lemo-sparse-uniform-offload", "LeMo sparse, uniform offload", "lemo", lemo=_SPARSE | {"offload": "uniform"}),
        BenchMethod(
            "lemo-sparse-sensitive-offload", "LeMo sparse, sensitive offload", "lemo", lemo=_SPARSE | {"offload": "sensitive"}
        ),
    )
}


@dataclass(frozen=True)
class ChosenMethod:
    """A method with its kept share.

    Args:
        method: The row of the table.
        keep: Kept share in (0, 1]; `None` where it keeps every token or its own profile.
    """

    method: BenchMethod
    keep: float | None

    @property
    def name(self) -> str:
        """As the command line writes it."""
        return self.method.name if self.keep is None else f"{self.method.name}@{self.keep:g}"

    @property
    def words(self) -> str:
        """As tables write it."""
        return self.method.words if self.keep is None else f"{self.method.words}, {self.keep:g} kept"

    def settings(self, seq_len: int, dtype: str, batch_size: int = 1) -> StepSettings:
        """Its training step.

        Args:
            seq_len: Tokens of a sample.
            dtype: Float type of the base model.
            batch_size: Samples.
        """
        method, share = self.method, 0.5 if self.keep is None else self.keep
        return StepSettings(
            seq_len,
            method.step,
            LemoConfig(**method.lemo, keep_ratio=share) if method.step == "lemo" else None,
            batch_size,
            dtype=dtype,
            adapter_dtype=dtype if method.adapters == "base" else method.adapters,
            baseline=Baseline(method.baseline, share) if method.baseline else None,
        )

    def obstacle(self, device: torch.device, architecture: str) -> str | None:
        """Why it cannot run here; `None` if it can.

        Args:
            device: Where it would run.
            architecture: Stock `model_type` of the model.
        """
        liger, cuda = self.method.step.startswith("liger"), device.type == "cuda"
        if liger and architecture == "opt":
            return "Liger has no functions for OPT"
        if (liger or self.method.offload) and not cuda:
            return f"{'Liger needs' if liger else 'offload needs'} a CUDA device"
        if liger and find_spec("liger_kernel") is None:
            return "liger_kernel is not installed"
        if self.method.offload and find_spec("trl") is None:
            return "trl, whose activation offloading it uses, is not installed"
        return None


def choose_methods(names: str) -> list[ChosenMethod]:
    """The methods of a comma-separated list such as "stock,lemo-exact@0.3", or all of the table for "all".

    Raises:
        LemoError: If one is unknown, named twice, or has a share that it cannot have.
    """
    if names.strip() == "all":
        return [_chosen(name) for name in METHODS]
    found = [_chosen(name.strip()) for name in names.split(",") if name.strip()]
    if not found:
        raise LemoError(f"no method is named; {names!r}; choose among {', '.join(METHODS)}, or all")
    for place, chosen in enumerate(found):
        if chosen in found[:place]:
            raise LemoError(f"a method is named twice; {chosen.name!r}; name it once")
    return found


def _chosen(text: str) -> ChosenMethod:
    name, given, share = text.partition("@")
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(METHODS)}"
        raise LemoError(f"no such method; {name!r}; {hint}")
    method = METHODS[name]
    if not given:
        return ChosenMethod(method, 0.5 if method.has_share else None)
    if not method.has_share:
        raise LemoError(f"{name} has no kept share; {text!r}; write {name}")
    try:
        keep = float(share)
        LemoConfig(keep_ratio=keep)
    except (ValueError, LemoConfigError):
        raise LemoError(f"a kept share must be a number in (0, 1]; {text!r}; write {name}@0.5") from None
    return ChosenMethod(method, keep)
