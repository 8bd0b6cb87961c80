"""What a `LemoConfig` may hold: every field by itself, fields together, and a block for a model. Errors are one line each."""

import dataclasses
import re
import reprlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin

if TYPE_CHECKING:
    from .lemo_config import LemoConfig

SCHEMA_VERSION = 2

_NUMBER = re.compile(r"[0-9.]+")
_MEMORY = re.compile(r"[0-9]{1,9}(\.[0-9]{1,3})? ?[KMGT]i?B", re.IGNORECASE)

# Sizes that a tensor's index can hold; what is larger is no size but a mistake.
_LARGEST_SIZE = 2**31 - 1


class LemoConfigError(ValueError):
    """A `LemoConfig` that cannot be honoured: one line with the fact, the value and the fix."""


def check_values(config: "LemoConfig") -> None:
    """Raises `LemoConfigError` if a field is outside its domain, or does not go with another one."""
    version = config.schema_version
    if _is_whole(version) and version > SCHEMA_VERSION:
        raise LemoConfigError(
            f"the lemo block has schema_version {shown(version)}, this lemo_hf reads up to {SCHEMA_VERSION}; upgrade lemo_hf"
        )
    _check_choices(config)
    for name, domain in _DOMAINS.items():
        value = getattr(config, name)
        if not (value is None and domain.may_be_none) and not domain.holds(value):
            raise LemoConfigError(f"{name} {domain.fact}; got {shown(value)}; {domain.fix}")
    _check_together(config)


def check_for_model(config: "LemoConfig", num_layers: int) -> None:
    """Raises `LemoConfigError` if a field names other layers than a model of `num_layers` has."""
    for name in ("keep_ratio", "thresholds", "predictor_sizes", "attention_pattern"):
        value = getattr(config, name)
        if isinstance(value, list) and len(value) != num_layers:
            raise LemoConfigError(f"{name} lists {len(value)} layers, the model has {num_layers}; give one value per layer")
    if len(config.dense_layers) > num_layers:
        raise LemoConfigError(
            f"dense_layers lists {len(config.dense_layers)} layers, the model has {num_layers}; name each layer once"
        )
    for layer in config.dense_layers:
        if not -num_layers <= layer < num_layers:
            raise LemoConfigError(
                f"dense_layers names layer {shown(layer)}, the model has {num_layers}; use 0 to {num_layers - 1}, or negative from the end"
            )


def check_widths(config: "LemoConfig", hidden_size: int) -> None:
    """Raises `LemoConfigError` if a predictor would be wider than a model of width `hidden_size`."""
    for name in ("predictor_rank", "predictor_features"):
        if getattr(config, name) > hidden_size:
            raise LemoConfigError(
                f"{name} is {getattr(config, name)}, the model's hidden_size is {hidden_size}; set it to {hidden_size} or less"
            )
    for layer, widths in enumerate(config.predictor_sizes or []):
        if max(widths) > hidden_size:
            raise LemoConfigError(
                f"predictor_sizes of layer {layer} must be {'four widths' if len(widths) == 4 else 'one width'} between 1 and hidden_size {hidden_size}; "
                f"got {shown(widths)}; use those of a run on this model, or train new predictors"
            )


def shown(value: Any) -> str:
    """A value for a message, which stays one readable line whatever a file holds: long lists, deep nesting, huge numbers."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"a number of {value.bit_length()} bits"
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_REPR.maxlist, _REPR.maxlevel = 4, 3


def _check_choices(config: "LemoConfig") -> None:
    # A field whose type is a Literal holds one of its values; where the type says so, a list of them.
    for item in dataclasses.fields(config):
        literals = [part for part in (item.type, *get_args(item.type)) if get_origin(part) is Literal]
        if not literals:
            continue
        value, allowed, or_list = getattr(config, item.name), get_args(literals[0]), literals[0] is not item.type
        values = value if or_list and isinstance(value, list) else [value]
        if not values or not all(isinstance(each, str) and each in allowed for each in values):
            lists, by_layer = (", or a list of these", ", or one per layer") if or_list else ("", "")
            raise LemoConfigError(
                f"{item.name} must be one of {', '.join(allowed)}{lists}; got {shown(value)}; choose one of these{by_layer}"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # Comparing, not converting: NaN, the infinities and whole numbers that no float holds are all refused.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_memory(value: Any) -> bool:
    return isinstance(value, str) and _MEMORY.fullmatch(value) is not None


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_one_even_width(sizes: Any) -> bool:
    return _is_list(sizes, _is_whole) and len(sizes) == 1 and sizes[0] >= 2 and sizes[0] % 2 == 0


def _is_four_widths(sizes: Any) -> bool:
    return _is_list(sizes, _is_whole) and len(sizes) == 4 and min(sizes) >= 1


class _Domain(NamedTuple):
    """The values that a field takes, and what is said of any other, behind the field's name and before and after the value."""

    fact: str
    holds: Callable[[Any], bool]
    fix: str
    may_be_none: bool = False


def _whole_from(least: int, fix: str = "", may_be_none: bool = False) -> _Domain:
    return _Domain(
        f"must be a whole number from {least} to {_LARGEST_SIZE}",
        lambda value: _is_whole(value) and least <= value <= _LARGEST_SIZE,
        fix or f"set it to {least} or more",
        may_be_none,
    )


# By field, in the order in which they are looked at. Fields that hold one of a few words are known by their type.
_DOMAINS = {
    "schema_version": _Domain(
        f"must be a whole number from 1 to {SCHEMA_VERSION}",
        lambda value: _is_whole(value) and value >= 1,
        "leave it out",
    ),
    "block_size": _whole_from(1),
    "segment_size": _whole_from(1),
    "predictor_rank": _whole_from(1),
    "predictor_features": _whole_from(1),
    "nearby_tokens": _whole_from(0, may_be_none=True),
    "enabled": _Domain("must be true or false", lambda value: isinstance(value, bool), "false trains the stock model"),
    "seed": _Domain(
        "must be a whole number of 64 bits",
        lambda value: _is_whole(value) and -(2**63) <= value < 2**63,
        "0 is as good as any",
    ),
    "keep_ratio": _Domain(
        "is the share of blocks kept and must be in (0, 1]",
        lambda value: _is_share(value) or (_is_list(value, _is_share) and value != []),
        "0.5 keeps half of them",
    ),
    "mlp_keep_ratio": _Domain(
        "is a share of blocks and must be in (0, 1], or null", _is_share, "null keeps keep_ratio's blocks", may_be_none=True
    ),
    "group_size": _whole_from(2, "leave it out for a quarter of each document", may_be_none=True),
    "pattern_share": _Domain(
        "is the share of kept blocks that a block sees and must be in (0, 1]", _is_share, "0.25 sees a quarter of them"
    ),
    "memory_budget": _Domain("must be an amount of memory", _is_memory, "write it as '40GiB' or '40GB'", may_be_none=True),
    "offload_budget": _Domain(
        "must be an amount of memory above 0, or 'all'",
        lambda value: value == "all" or (_is_memory(value) and float(_NUMBER.findall(value)[0]) > 0),
        "write it as '40GiB' or '40GB'",
        may_be_none=True,
    ),
    "sampling_temperature": _Domain(
        "must be a number above 0, or null for the uniform draw",
        lambda value: _is_number(value) and value > 0,
        "1.0 draws by informativeness",
        may_be_none=True,
    ),
    "thresholds": _Domain(
        "must list one finite number per layer",
        lambda value: _is_list(value, _is_number),
        "calibration finds them",
        may_be_none=True,
    ),
    "dense_layers": _Domain(
        "must list layer numbers", lambda value: _is_list(value, _is_whole), "[0, -1] names the first and last"
    ),
}


def _check_together(config: "LemoConfig") -> None:
    mean = config.block_reduction == "mean"
    if config.attention_forward == "kept_keys" and config.nearby == 0:
        raise LemoConfigError(
            f"a token sees itself at least; got nearby_tokens={shown(config.nearby_tokens)} with attention_forward='kept_keys'; "
            "set it to 1 or more, or leave it out"
        )
    if config.attention_forward != "sparse" and config.attention_pattern != "full" and set(config.attention_pattern) != {"full"}:
        raise LemoConfigError(
            "a pattern is for attention among kept tokens, and in the other forms dropped tokens attend too; "
            f"got attention_pattern={shown(config.attention_pattern)} with attention_forward={config.attention_forward!r}; "
            "set attention_forward='sparse', or attention_pattern='full'"
        )
    if config.offload_budget is not None and config.offload == "none":
        raise LemoConfigError(
            f"offload_budget says how much is offloaded, and nothing is; got {shown(config.offload_budget)} with offload='none'; "
            "set offload='sensitive', or leave offload_budget out"
        )
    if config.sampling_temperature is not None and config.selection == "sampled" and mean:
        raise LemoConfigError(
            "drawing by informativeness needs numbers of at least 0, and a mean of signed scores may be negative; "
            f"got sampling_temperature={shown(config.sampling_temperature)} with block_reduction='mean'; leave one of them out"
        )
    if mean and config.predictor_features % 2:
        raise LemoConfigError(
            f"predictor_features come in pairs with block_reduction='mean'; got {shown(config.predictor_features)}; set an even number"
        )
    sizes = config.predictor_sizes
    if sizes is not None and not _is_list(sizes, _is_one_even_width if mean else _is_four_widths):
        raise LemoConfigError(
            f"predictor_sizes must list {'one even width' if mean else 'four widths'} per layer; got {shown(sizes)}; pruning writes them"
        )
