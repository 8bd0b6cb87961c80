"""The `lemo` block of config.json: which tokens a layer computes on, how it chooses them, and what it keeps for backward."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from .lemo_config_checks import SCHEMA_VERSION, LemoConfigError, check_for_model, check_values, check_widths, shown

SelectionMode = Literal["sampled", "ratio", "threshold"]
AttentionForward = Literal["exact", "sparse", "kept_keys"]
ScoreSource = Literal["predicted", "true"]
BlockReduction = Literal["max", "mean"]
Draws = Literal["shared", "by_layer"]
Checkpoint = Literal["none", "kept_rows"]
Offload = Literal["none", "uniform", "sensitive"]
AttentionPatternName = Literal["full", "shifted_groups", "block_sparse"]

__all__ = ["SCHEMA_VERSION", "LemoConfig", "LemoConfigError", "shown"]


@dataclass
class LemoConfig:
    """How a LeMo model eliminates tokens during training (LeMo paper, sections 4 and 5).

    Evaluation and generation never look at it: they are the stock model.

    Args:
        enabled: `False` makes training the stock model's too.
        block_size: Tokens per block; blocks are chosen as a whole (paper: 64).
        keep_ratio: Share of a document's blocks that a layer keeps, in (0, 1]; one number, or one per layer.
        mlp_keep_ratio: Share of a document's blocks whose MLP a layer keeps, in (0, 1]: the best or first drawn of those that it
            keeps, at most all of them; `None` keeps them all. With `keep_ratio=1.0` attention keeps every token.
        memory_budget: Memory that a training step may take, such as `"40GiB"`: as training begins, `keep_ratio` becomes the largest
            share, one for all layers, with which it is expected to fit.
        selection: `"sampled"` draws the blocks anew at each step, `"ratio"` keeps the most informative ones,
            `"threshold"` keeps those with informativeness of at least the layer's threshold (paper, Algorithm 1).
        thresholds: One informativeness threshold per layer, for `selection="threshold"`; calibration fills it in.
        sampling_temperature: For `"sampled"`: blocks are drawn with probability proportional to
            informativeness ** (1 / temperature). `None` is the infinite temperature, the uniform draw, which needs no scores.
        draws: For `"sampled"`: with `"shared"` random numbers all layers of a step draw the same blocks (those with a smaller
            `keep_ratio` some of these), so a kept token's gradient passes the branches of every layer, attention to other
            blocks apart; with a temperature layers weigh them by their own scores. `"by_layer"` draws each layer's own, and
            what comes down from the layers above is then missing a part of them at every token.
        score_source: `"predicted"` scores come from the pattern predictors, `"true"` ones from the layer's own queries
            and keys (quadratic in tokens: for experiments and tests).
        block_reduction: Score of two blocks: `"max"` over their token pairs of the positive scores' mean over heads (the paper's), or
            `"mean"` of the signed scores (ours), which small predictors foretell far better and which need no quadratic pass.
        attention_forward: `"exact"` keeps the dense forward pass and restricts the gradient to kept tokens; `"sparse"`
            (the paper's form) lets kept tokens attend to kept tokens only; with `"kept_keys"` (ours) every token attends to the kept ones
            before it and to the `nearby_tokens` latest, and the gradient is restricted to kept tokens. Restricted means: dropped
            keys and values get no gradient, kept queries get theirs through every key that they see.
        nearby_tokens: Latest tokens of its document, itself included, that a token sees though they are not kept, without gradient
            for these. For `attention_forward="kept_keys"` those that every token sees (`None`: 256), for `"sparse"` those that a
            dropped token sees, and it alone (`None` or 0: its attention is left out, the paper's form), for `"exact"` those that
            add to the gradient of a kept token's query (`None`: all earlier ones, as they do to the forward pass; 0: none, which saves
            their keys and values, and compute, at a worse gradient).
        attention_pattern: Which kept tokens a kept token attends to, for `attention_forward="sparse"`; one value, or one per layer.
            `"full"`: all earlier ones of its document. `"shifted_groups"`: those of its group, groups of half of the heads shifted
            by half a group (LongLoRA). `"block_sparse"`: those of the blocks that score highest against its own. Layers in
            `dense_layers` attend to all.
        group_size: For `"shifted_groups"`: kept tokens of a group; `None` for a quarter of each document's.
        pattern_share: For `"block_sparse"`: share of the earlier kept blocks that a block sees, in (0, 1].
        checkpoint: `"kept_rows"` stores a layer's kept residual rows and recomputes the rest of them in backward. Except for
            `attention_forward="sparse"` their attention output and the dropped rows' keys and values are stored too.
        offload: `"sensitive"` holds saved activations in pinned host memory until their backward, of each layer as many bytes as
            its neighbour's computation hides, which follows kept shares; `"uniform"` the same bytes of each, for comparison.
        offload_budget: Bytes that all layers together move, such as `"40GiB"`, or `"all"`; by default what hides.
        dense_layers: Layers that keep every token; negative numbers count from the last layer.
        segment_size: Tokens whose logits exist at one time in the training loss.
        predictor_rank: Width of a predictor's hidden layers before elastic pruning.
        predictor_features: Length p of a block's query and key features.
        predictor_sizes: Per layer the sizes that pruning left: `[query h1, query h2, key h1, key h2]`, or `[p]` with
            `block_reduction="mean"`, whose predictors have no hidden layers.
        seed: Seed of the `"sampled"` draws.
        schema_version: Version of this block's layout.

    Raises:
        LemoConfigError: If a value is outside its domain.
    """

    enabled: bool = True
    block_size: int = 64
    keep_ratio: float | list[float] = 0.5
    mlp_keep_ratio: float | None = None
    memory_budget: str | None = None
    selection: SelectionMode = "sampled"
    thresholds: list[float] | None = None
    sampling_temperature: float | None = None
    draws: Draws = "shared"
    score_source: ScoreSource = "predicted"
    block_reduction: BlockReduction = "max"
    attention_forward: AttentionForward = "exact"
    nearby_tokens: int | None = None
    attention_pattern: AttentionPatternName | list[AttentionPatternName] = "full"
    group_size: int | None = None
    pattern_share: float = 0.25
    checkpoint: Checkpoint = "none"
    offload: Offload = "none"
    offload_budget: str | None = None
    dense_layers: list[int] = field(default_factory=list)
    segment_size: int = 1024
    predictor_rank: int = 32
    predictor_features: int = 32
    predictor_sizes: list[list[int]] | None = None
    seed: int = 0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises `LemoConfigError` if a field is outside its domain."""
        check_values(self)

    def validate_for(self, num_layers: int, hidden_size: int | None = None) -> None:
        """Raises `LemoConfigError` if a field does not fit a model.

        Args:
            num_layers: Its layers.
            hidden_size: Its width, where it is known.
        """
        check_for_model(self, num_layers)
        if hidden_size is not None:
            self.validate_widths(hidden_size)

    def validate_widths(self, hidden_size: int) -> None:
        """Raises `LemoConfigError` if a predictor would be wider than the model.

        So a block cannot ask for more memory than the model's own matrices take.
        """
        check_widths(self, hidden_size)

    def ratio_of(self, layer: int) -> float:
        """Share of blocks that `layer` keeps, in (0, 1]."""
        return self.keep_ratio[layer] if isinstance(self.keep_ratio, list) else self.keep_ratio

    def mlp_ratio_of(self, layer: int) -> float:
        """Share of blocks that the MLP of `layer` keeps, in (0, 1]; at most the layer's own."""
        return min(self.ratio_of(layer), self.mlp_keep_ratio or 1.0)

    @property
    def nearby(self) -> int | None:
        """`nearby_tokens`, or what it is for the form where it is not set; `None` for all earlier tokens."""
        if self.nearby_tokens is not None:
            return self.nearby_tokens
        return {"exact": None, "kept_keys": 256, "sparse": 0}[self.attention_forward]

    def is_dense(self, layer: int, num_layers: int) -> bool:
        """Whether `layer` keeps every token, in attention and MLP, whatever its scores are."""
        return self.is_named_dense(layer, num_layers) or (self.selection != "threshold" and self.mlp_ratio_of(layer) == 1)

    def is_named_dense(self, layer: int, num_layers: int) -> bool:
        """Whether `dense_layers` names `layer`."""
        return layer in self.dense_layers or layer - num_layers in self.dense_layers

    def pattern_of(self, layer: int, num_layers: int) -> AttentionPatternName:
        """How the kept tokens of `layer` attend to each other; layers in `dense_layers` are the stock model's."""
        if self.is_named_dense(layer, num_layers):
            return "full"
        names = self._patterns()
        return names[layer] if isinstance(self.attention_pattern, list) else names[0]

    def _patterns(self) -> list[AttentionPatternName]:
        return self.attention_pattern if isinstance(self.attention_pattern, list) else [self.attention_pattern]

    @property
    def needs_scores(self) -> bool:
        """Whether choosing blocks reads their informativeness; the uniform draw does not."""
        return self.selection != "sampled" or self.sampling_temperature is not None

    @property
    def needs_predictors(self) -> bool:
        """Whether the pattern predictors take part in training steps."""
        return (self.needs_scores or "block_sparse" in self._patterns()) and self.score_source == "predicted"

    def update(self, **changes: Any) -> None:
        """Sets fields in place, all of them or, when a value is refused, none."""
        self._refuse_unknown(changes)
        updated = dataclasses.replace(self, **changes)
        for name in changes:
            setattr(self, name, getattr(updated, name))

    def to_dict(self) -> dict[str, Any]:
        """The block as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: "dict[str, Any] | LemoConfig | None") -> "LemoConfig":
        """Reads the block back; unknown names are refused with the nearest known one."""
        if values is None:
            return cls()
        if isinstance(values, cls):
            return values
        # Remote code has its own copy of this class: a block of the package's is known by what it can, not by its class.
        if hasattr(values, "to_dict"):
            values = values.to_dict()
        if not isinstance(values, dict):
            raise LemoConfigError(f"the lemo block must be a mapping; got {type(values).__name__}; see LemoConfig for its fields")
        version = values.get("schema_version", SCHEMA_VERSION)
        # A newer schema is named as such before its new fields are called unknown.
        if isinstance(version, int) and version <= SCHEMA_VERSION:
            cls._refuse_unknown(values)
        if version == 1:
            values = {**values, "schema_version": SCHEMA_VERSION}
            # The exact form had no nearby tokens then, and said so by a 0, which now leaves dropped keys out of the gradient.
            if values.get("attention_forward", "exact") == "exact" and values.get("nearby_tokens") == 0:
                values["nearby_tokens"] = None
        return cls(**{name: value for name, value in values.items() if name in _field_names(cls)})

    @classmethod
    def _refuse_unknown(cls, values: dict[str, Any]) -> None:
        known = _field_names(cls)
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(str(name)[:80], known, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields: {', '.join(sorted(known))}"
                raise LemoConfigError(f"the lemo block has no field {shown(name)}; {hint}")


def _field_names(cls: type[LemoConfig]) -> set[str]:
    return {item.name for item in dataclasses.fields(cls)}
