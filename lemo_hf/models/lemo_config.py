"""The `lemo` block of config.json: which tokens a layer computes on, how it chooses them, and what it keeps for backward."""

import dataclasses
import difflib
import re
import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

SCHEMA_VERSION = 1

SelectionMode = Literal["sampled", "ratio", "threshold"]
AttentionForward = Literal["exact", "sparse"]
ScoreSource = Literal["predicted", "true"]
BlockReduction = Literal["max", "mean"]
Draws = Literal["shared", "by_layer"]
Checkpoint = Literal["none", "kept_rows"]
Offload = Literal["none", "uniform", "sensitive"]
AttentionPatternName = Literal["full", "shifted_groups", "block_sparse"]

_NUMBER = re.compile(r"[0-9.]+")
_MEMORY = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})? ?[KMGT]i?B", re.IGNORECASE)

# Sizes that a tensor's index can hold; what is larger is no size but a mistake.
_LARGEST_SIZE = 2**31 - 1


class LemoConfigError(ValueError):
    """A `LemoConfig` that cannot be honoured: one line with the fact, the value and the fix."""


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
            (the paper's form) lets kept tokens attend to kept tokens only.
        nearby_tokens: For `attention_forward="sparse"`: latest tokens of its document, itself included, that a dropped token
            attends to, without gradient (ours). 0 leaves its attention out (the paper's form).
        attention_pattern: Which kept tokens a kept token attends to, for `attention_forward="sparse"`; one value, or one per layer.
            `"full"`: all earlier ones of its document. `"shifted_groups"`: those of its group, groups of half of the heads shifted
            by half a group (LongLoRA). `"block_sparse"`: those of the blocks that score highest against its own. Layers in
            `dense_layers` attend to all.
        group_size: For `"shifted_groups"`: kept tokens of a group; `None` for a quarter of each document's.
        pattern_share: For `"block_sparse"`: share of the earlier kept blocks that a block sees, in (0, 1].
        checkpoint: `"kept_rows"` stores a layer's kept residual rows only and recomputes the rest of them in backward.
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
    nearby_tokens: int = 0
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
        if _is_whole(self.schema_version) and self.schema_version > SCHEMA_VERSION:
            raise LemoConfigError(
                f"the lemo block has schema_version {shown(self.schema_version)}, this lemo_hf reads up to {SCHEMA_VERSION}; upgrade lemo_hf"
            )
        if not _is_whole(self.schema_version) or self.schema_version < 1:
            raise LemoConfigError(
                f"schema_version must be a whole number from 1 to {SCHEMA_VERSION}; got {shown(self.schema_version)}; leave it out"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise LemoConfigError(
                    f"{name} must be one of {', '.join(allowed)}; got {shown(getattr(self, name))}; choose one of these"
                )
        for name in ("block_size", "segment_size", "predictor_rank", "predictor_features", "nearby_tokens"):
            value, least = getattr(self, name), 0 if name == "nearby_tokens" else 1
            if not _is_whole(value) or not least <= value <= _LARGEST_SIZE:
                raise LemoConfigError(
                    f"{name} must be a whole number from {least} to {_LARGEST_SIZE}; got {shown(value)}; set it to {least} or more"
                )
        if not isinstance(self.enabled, bool):
            raise LemoConfigError(f"enabled must be true or false; got {shown(self.enabled)}; false trains the stock model")
        if not _is_whole(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise LemoConfigError(f"seed must be a whole number of 64 bits; got {shown(self.seed)}; 0 is as good as any")
        ratios = self.keep_ratio if isinstance(self.keep_ratio, list) else [self.keep_ratio]
        if not ratios or not all(_is_number(ratio) and 0 < ratio <= 1 for ratio in ratios):
            raise LemoConfigError(
                f"keep_ratio is the share of blocks kept and must be in (0, 1]; got {shown(self.keep_ratio)}; 0.5 keeps half of them"
            )
        if self.nearby_tokens and self.attention_forward != "sparse":
            raise LemoConfigError(
                "the exact form's dropped tokens attend to every earlier token; "
                f"got nearby_tokens={shown(self.nearby_tokens)} with attention_forward={self.attention_forward!r}; "
                "set attention_forward='sparse', or leave nearby_tokens out"
            )
        self._validate_pattern()
        mlp = self.mlp_keep_ratio
        if mlp is not None and not (_is_number(mlp) and 0 < mlp <= 1):
            raise LemoConfigError(
                f"mlp_keep_ratio is a share of blocks and must be in (0, 1], or null; got {shown(mlp)}; null keeps keep_ratio's blocks"
            )
        budget = self.memory_budget
        if budget is not None and not (isinstance(budget, str) and _MEMORY.fullmatch(budget)):
            raise LemoConfigError(
                f"memory_budget must be an amount of memory; got {shown(budget)}; write it as '40GiB' or '40GB'"
            )
        self._validate_offload()
        temperature = self.sampling_temperature
        if temperature is not None and not (_is_number(temperature) and temperature > 0):
            raise LemoConfigError(
                f"sampling_temperature must be a number above 0, or null for the uniform draw; got {shown(temperature)}; "
                "1.0 draws by informativeness"
            )
        if temperature is not None and self.selection == "sampled" and self.block_reduction == "mean":
            raise LemoConfigError(
                "drawing by informativeness needs numbers of at least 0, and a mean of signed scores may be negative; "
                f"got sampling_temperature={shown(temperature)} with block_reduction='mean'; leave one of them out"
            )
        if self.block_reduction == "mean" and self.predictor_features % 2:
            raise LemoConfigError(
                f"predictor_features come in pairs with block_reduction='mean'; got {shown(self.predictor_features)}; set an even number"
            )
        if self.thresholds is not None and not _is_list(self.thresholds, _is_number):
            raise LemoConfigError(
                f"thresholds must list one finite number per layer; got {shown(self.thresholds)}; calibration finds them"
            )
        if not _is_list(self.dense_layers, _is_whole):
            raise LemoConfigError(
                f"dense_layers must list layer numbers; got {shown(self.dense_layers)}; [0, -1] names the first and last"
            )
        if self.predictor_sizes is not None:
            few = self.block_reduction == "mean"
            if not _is_list(self.predictor_sizes, _is_one_even_width if few else _is_four_widths):
                raise LemoConfigError(
                    f"predictor_sizes must list {'one even width' if few else 'four widths'} per layer; got {shown(self.predictor_sizes)}; "
                    "pruning writes them"
                )

    def _validate_pattern(self) -> None:
        names, allowed = self._patterns(), get_args(AttentionPatternName)
        if not names or not all(isinstance(name, str) and name in allowed for name in names):
            raise LemoConfigError(
                f"attention_pattern must be one of {', '.join(allowed)}, or a list of these; got {shown(self.attention_pattern)}; "
                "choose one of these, or one per layer"
            )
        if self.attention_forward != "sparse" and set(names) != {"full"}:
            raise LemoConfigError(
                "a pattern is for attention among kept tokens, and the exact form's forward pass is dense; "
                f"got attention_pattern={shown(self.attention_pattern)} with attention_forward={self.attention_forward!r}; "
                "set attention_forward='sparse', or attention_pattern='full'"
            )
        size = self.group_size
        if size is not None and not (_is_whole(size) and 2 <= size <= _LARGEST_SIZE):
            raise LemoConfigError(
                f"group_size must be a whole number from 2 to {_LARGEST_SIZE}; got {shown(size)}; "
                "leave it out for a quarter of each document"
            )
        if not (_is_number(self.pattern_share) and 0 < self.pattern_share <= 1):
            raise LemoConfigError(
                f"pattern_share is the share of kept blocks that a block sees and must be in (0, 1]; got {shown(self.pattern_share)}; "
                "0.25 sees a quarter of them"
            )

    def _patterns(self) -> list[AttentionPatternName]:
        return self.attention_pattern if isinstance(self.attention_pattern, list) else [self.attention_pattern]

    def _validate_offload(self) -> None:
        budget = self.offload_budget
        if budget is None:
            return
        if budget != "all" and not (
            isinstance(budget, str) and _MEMORY.fullmatch(budget) and float(_NUMBER.findall(budget)[0]) > 0
        ):
            raise LemoConfigError(
                f"offload_budget must be an amount of memory above 0, or 'all'; got {shown(budget)}; write it as '40GiB' or '40GB'"
            )
        if self.offload == "none":
            raise LemoConfigError(
                f"offload_budget says how much is offloaded, and nothing is; got {shown(budget)} with offload='none'; "
                "set offload='sensitive', or leave offload_budget out"
            )

    def validate_for(self, num_layers: int, hidden_size: int | None = None) -> None:
        """Raises `LemoConfigError` if a field does not fit a model.

        Args:
            num_layers: Its layers.
            hidden_size: Its width, where it is known.
        """
        for name in ("keep_ratio", "thresholds", "predictor_sizes", "attention_pattern"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != num_layers:
                raise LemoConfigError(f"{name} lists {len(value)} layers, the model has {num_layers}; give one value per layer")
        if len(self.dense_layers) > num_layers:
            raise LemoConfigError(
                f"dense_layers lists {len(self.dense_layers)} layers, the model has {num_layers}; name each layer once"
            )
        for layer in self.dense_layers:
            if not -num_layers <= layer < num_layers:
                raise LemoConfigError(
                    f"dense_layers names layer {shown(layer)}, the model has {num_layers}; use 0 to {num_layers - 1}, or negative from the end"
                )
        if hidden_size is not None:
            self.validate_widths(hidden_size)

    def validate_widths(self, hidden_size: int) -> None:
        """Raises `LemoConfigError` if a predictor would be wider than the model.

        So a block cannot ask for more memory than the model's own matrices take.
        """
        for name in ("predictor_rank", "predictor_features"):
            if getattr(self, name) > hidden_size:
                raise LemoConfigError(
                    f"{name} is {getattr(self, name)}, the model's hidden_size is {hidden_size}; set it to {hidden_size} or less"
                )
        for layer, widths in enumerate(self.predictor_sizes or []):
            if max(widths) > hidden_size:
                raise LemoConfigError(
                    f"predictor_sizes of layer {layer} must be {'four widths' if len(widths) == 4 else 'one width'} between 1 and hidden_size {hidden_size}; "
                    f"got {shown(widths)}; use those of a run on this model, or train new predictors"
                )

    def ratio_of(self, layer: int) -> float:
        """Share of blocks that `layer` keeps, in (0, 1]."""
        return self.keep_ratio[layer] if isinstance(self.keep_ratio, list) else self.keep_ratio

    def mlp_ratio_of(self, layer: int) -> float:
        """Share of blocks that the MLP of `layer` keeps, in (0, 1]; at most the layer's own."""
        return min(self.ratio_of(layer), self.mlp_keep_ratio or 1.0)

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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # Comparing, not converting: NaN, the infinities and whole numbers that no float holds are all refused.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_one_even_width(sizes: Any) -> bool:
    return _is_list(sizes, _is_whole) and len(sizes) == 1 and sizes[0] >= 2 and sizes[0] % 2 == 0


def _is_four_widths(sizes: Any) -> bool:
    return _is_list(sizes, _is_whole) and len(sizes) == 4 and min(sizes) >= 1


def shown(value: Any) -> str:
    """A value for a message, which stays one readable line whatever a file holds: long lists, deep nesting, huge numbers."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_REPR.maxlist, _REPR.maxlevel = 4, 3


_CHOICES: dict[str, tuple[str, ...]] = {
    "selection": get_args(SelectionMode),
    "draws": get_args(Draws),
    "score_source": get_args(ScoreSource),
    "block_reduction": get_args(BlockReduction),
    "attention_forward": get_args(AttentionForward),
    "checkpoint": get_args(Checkpoint),
    "offload": get_args(Offload),
}
