"""A baseline as a setting of a training step: its name, its kept share, and what it makes of a stock model."""

import difflib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ...errors import LemoError

# name -> words
BASELINES = {
    "longlora": "LongLoRA (S2-Attn)",
    "lemo-artifact": "LeMo (paper's artifact)",
    "random-ltd": "random-LTD",
    "tokentune": "TokenTune",
}
_WITH_SHARE = ("random-ltd", "tokentune")


@dataclass(frozen=True)
class Baseline:
    """What is put into a stock model in place of LeMo.

    Args:
        name: `"longlora"`, `"lemo-artifact"`, `"random-ltd"` or `"tokentune"`.
        keep_ratio: Share of tokens that random-LTD's layers compute on and that TokenTune's gradients pass; the artifact's is a
            profile over layers, LongLoRA keeps every token.
        block_size: Tokens that are kept or dropped together; the papers of random-LTD and TokenTune draw single tokens.

    Raises:
        LemoError: If there is no such baseline, or a number is outside its domain.
    """

    name: str
    keep_ratio: float = 0.5
    block_size: int = 64

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            near = difflib.get_close_matches(str(self.name), BASELINES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(BASELINES)}"
            raise LemoError(f"no such baseline; {self.name!r}; {hint}")
        if not 0 < self.keep_ratio <= 1:
            raise LemoError(f"a baseline's keep_ratio is a share in (0, 1]; got {self.keep_ratio}; 0.5 keeps half")
        if self.block_size < 1:
            raise LemoError(f"a baseline's block_size must be at least 1; got {self.block_size}; 64 is LeMo's")

    @property
    def words(self) -> str:
        """The baseline in words, kept share included."""
        return BASELINES[self.name] + (f" {self.keep_ratio:g}" if self.name in _WITH_SHARE else "")

    def kind_of_layer(self, layer: int, num_layers: int) -> Hashable:
        """What makes a layer differ from others: equal kinds allocate and compute alike."""
        from .artifact_lemo import kept_blocks
        from .random_ltd import is_dense

        if self.name == "random-ltd":
            return is_dense(layer, num_layers)
        return kept_blocks(layer, num_layers) if self.name == "lemo-artifact" else None

    def apply(self, model: Any, layers: list[int], num_layers: int) -> None:
        """Changes a stock causal language model, before adapters are added.

        Args:
            model: The model; only its own modules are changed, no class.
            layers: By layer of `model` its number in the whole model, where only some are built.
            num_layers: Layers of the whole model.

        Raises:
            LemoError: If the baseline does not know the architecture.
        """
        from .artifact_lemo import use_artifact_lemo
        from .longlora import use_longlora
        from .random_ltd import use_random_ltd
        from .tokentune import use_tokentune

        if self.name == "longlora":
            use_longlora(model)
        elif self.name == "random-ltd":
            use_random_ltd(model, layers, num_layers, self.keep_ratio, self.block_size)
        elif self.name == "tokentune":
            use_tokentune(model, self.keep_ratio, self.block_size)
        else:
            use_artifact_lemo(model, layers, num_layers, self.block_size)
