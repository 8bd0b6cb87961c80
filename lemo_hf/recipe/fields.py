"""Fields of flat recipes, read off dataclasses: names, types, defaults and descriptions, and the checking of values.

Everything comes from a dataclass's own annotations, metadata and docstring, so a field added there is known to recipes, to
`--field value` and to `--help` at once.
"""

import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import LemoError


@dataclass(frozen=True)
class RecipeField:
    """One field of a recipe.

    Args:
        name: As written in the file and after `--`.
        annotation: The resolved type.
        default: Its default; `dataclasses.MISSING` if it must be given.
        description: What it means; empty if its dataclass does not say.
        inherited: Whether it comes from a base class of the section's dataclass.
    """

    name: str
    annotation: Any
    default: Any
    description: str
    inherited: bool

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is dataclasses.MISSING

    def checked(self, value: Any, source: str) -> Any:
        """`value` if it is of the field's type.

        Raises:
            LemoError: If it is not; `source` says where the value stood.
        """
        try:
            return _fitting(value, self.annotation)
        except _Misfit:
            words = type_in_words(self.annotation)
            raise LemoError(f"{self.name} must be {words}; got {value!r} in {source}; write {self._example()}") from None

    def parsed(self, text: str) -> Any:
        """The value of `--field text`: read as YAML, as in a file; or as plain text; or as a list with commas.

        Raises:
            LemoError: If none of these is of the field's type.
        """
        for candidate in (_yaml_value(text), text, [_yaml_value(part) for part in text.split(",")]):
            try:
                return _fitting(candidate, self.annotation)
            except _Misfit:
                continue
        words = type_in_words(self.annotation)
        raise LemoError(
            f"{self.name} must be {words}; got {text!r} on the command line; write --{self._example().replace(': ', ' ')}"
        )

    def _example(self) -> str:
        default = None if self.required else self.default
        value = default if default not in (None, []) else _example_of(self.annotation)
        return f"{self.name}: {json.dumps(value, default=str).strip(chr(34))}"


def fields_of(section: type) -> dict[str, RecipeField]:
    """The fields of a dataclass by name, in its own order."""
    hints = typing.get_type_hints(section)
    described = _described_arguments(section)
    own = inspect.get_annotations(section)
    found = {}
    for item in dataclasses.fields(section):
        if item.init:
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            description = " ".join(str(described.get(item.name) or item.metadata.get("help") or "").split())
            found[item.name] = RecipeField(item.name, hints[item.name], default, description, item.name not in own)
    return found


def _described_arguments(section: type) -> dict[str, str]:
    # `name: text` entries under `Args:` of the docstring; one entry may name several fields.
    lines = inspect.cleandoc(section.__doc__ or "").splitlines()
    if "Args:" not in lines:
        return {}
    body = itertools.takewhile(lambda line: not line or line.startswith(" "), lines[lines.index("Args:") + 1 :])
    described: dict[str, str] = {}
    names: list[str] = []
    for line in textwrap.dedent("\n".join(body)).splitlines():
        entry = re.match(r"(\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)", line)
        if entry:
            names = entry[1].split(", ")
            described |= dict.fromkeys(names, entry[2])
        elif line.startswith(" "):
            described |= {name: f"{described[name]} {line.strip()}" for name in names}
    return {name: text.replace("`", "") for name, text in described.items()}


class _Misfit(Exception):
    """The value is not of the annotated type."""


def _fitting(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fitting_union(value, get_args(annotation))
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(annotation)):
            return value
    elif origin is list and isinstance(value, list):
        (inner,) = get_args(annotation)
        return [_fitting(each, inner) for each in value]
    elif (origin or annotation) is dict and isinstance(value, dict):
        return value
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        if value in [member.value for member in annotation]:
            return value
    elif isinstance(annotation, type) and type(value) is annotation:  # bool is no int here
        return value
    raise _Misfit


def _fitting_union(value: Any, members: tuple[Any, ...]) -> Any:
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        # transformers writes `IntervalStrategy | str` for "a value of IntervalStrategy": any text would be too wide.
        members = tuple(member for member in members if member is not str)
    for member in members:
        try:
            return _fitting(value, member)
        except _Misfit:
            continue
    raise _Misfit


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null", dict: "a mapping"}
_PLURALS = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts"}
_EXAMPLES: dict[Any, Any] = {bool: True, int: 1, float: 0.5, str: "name", dict: {}}


def type_in_words(annotation: Any) -> str:
    """A type as a person would say it, for messages and help."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if any(isinstance(member, type) and issubclass(member, Enum) for member in arguments):
            arguments = tuple(member for member in arguments if member is not str)
        return " or ".join(type_in_words(member) for member in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return "a list of " + _PLURALS.get(arguments[0], "lists")
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    return _WORDS.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _example_of(annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _example_of(arguments[0])
    if origin is Literal:
        return arguments[0]
    if origin is list:
        return [_example_of(arguments[0])]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return next(iter(annotation)).value
    return _EXAMPLES.get(origin or annotation)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2's core schema: `no` and `on` are text, `1e-4` is a number, `010` is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("null", r"^(?:null|~|)$", ["n", "~", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def load_yaml(text: str) -> Any:
    """One YAML document as plain values; raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)


def _yaml_value(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
