"""Types and ranges of options: the one place that defines valid values.

    input values          command-line texts, nodes of a YAML file, values of a dictionary: `check_written`
    field values          `Section`, the base of every configuration, checks its fields at construction

Both refuse null, NaN, infinity, true, texts and absurd sizes where they are invalid, and name the field. Further rules for single
fields (a fraction is at most 1) are beside the fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

from mpo_megatron.config.checks import ConfigError
from mpo_megatron.config.options import Options
from mpo_megatron.terminal.visible import visible

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""Name of a type in messages."""

LARGEST_WHOLE = 2**31 - 1
"""Largest whole number, except a seed: libraries store sizes and positions in 32 bits."""

LARGEST = 1e15
"""Largest other number; products of larger ones overflow."""

LARGEST_REWARD = 1e30
"""Largest magnitude of a reward: differences, squares and their sums stay finite, also as float32."""

_LARGEST_OF = {"seed": 2**63 - 1, "epochs": 1e6, "timeout": 1e8, "max_wait": 1e8, "seconds_between_lines": 1e8}
"""Limits of numbers with their own maximum: times in seconds, about three years."""

_LARGEST_MINUTES = 1e6

WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""Accepted notations of numbers: no underscores, other bases, minutes or other scripts' digits, which Python or YAML would
accept."""

_SHOWN = 100
"""Maximum characters of a value in a message."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of every configuration: raises `ConfigError` unless every field has its declared type and range."""

    _prefix: ClassVar[str] = ""
    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Options that `--help` explains; others are only named. Empty: all are explained."""

    def __init_subclass__(cls, prefix: str = "") -> None:
        """Set the section's prefix.

        Args:
            prefix: prefix of a field's name in messages, for example `data.`
        """
        super().__init_subclass__()
        if prefix:
            cls._prefix = prefix

    def __post_init__(self) -> None:
        for name, expected in field_types(type(self)).items():
            check_value(expected, getattr(self, name), f"{self._prefix}{name}")


_types: dict[type[Any], dict[str, Any]] = {}
"""Cache of `field_types`."""


def field_types(kind: type[Any]) -> dict[str, Any]:
    """Name → type of a dataclass's fields, except those of its sections."""
    if kind not in _types:
        types = typing.get_type_hints(kind)
        _types[kind] = {field.name: types[field.name] for field in dataclasses.fields(kind)}
    return _types[kind]


def section_of(expected: Any) -> type[Any] | None:
    """The dataclass in a section's type, alone or optional; None for all other types."""
    kinds = (expected, *get_args(expected)) if get_origin(expected) in (Union, UnionType) else (expected,)
    return next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def collection_of(expected: Any) -> type[Any] | None:
    """list or dict, if a value of this type is or may be one; otherwise None."""
    kinds = [get_origin(item) for item in (expected, *(get_args(expected) if get_origin(expected) in (Union, UnionType) else ()))]
    return next((kind for kind in (list, dict) if kind in kinds), None)


def is_single(expected: Any) -> bool:
    """Whether an option of this type has a single value: a number, a text, a boolean or a choice, possibly optional."""
    kinds = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    return all(kind in (*KINDS, NoneType) or get_origin(kind) is Literal for kind in kinds)


def check_value(expected: Any, value: Any, name: str) -> None:
    """Check the value of a field.

    Raises:
        ConfigError: it has another type, or is out of range.
    """
    _check(expected, value, name, written=False)


def check_written(expected: Any, value: Any, name: str) -> None:
    """Check the value given for an option; a number may be spelled as text, as on a command line.

    Raises:
        ConfigError: it is not a valid value of the option's type.
    """
    _check(expected, value, name, written=True)


def convert(expected: Any, value: Any) -> Any:
    """Convert a value accepted by `check_written`: numbers and booleans from their texts."""
    kinds = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    if Any in kinds and isinstance(value, str):
        return value
    if str not in kinds and isinstance(value, str):
        if value == "null" and NoneType in kinds:
            return None
        if bool in kinds:
            return value.lower() in ("true", "yes", "on")
        if int in kinds:
            return int(value)
    if isinstance(value, list | Mapping):
        of = list if isinstance(value, list) else dict
        inner = next((get_args(kind)[-1] for kind in kinds if get_origin(kind) is of), Any)
        if isinstance(value, list):
            return [convert(inner, item) for item in value]
        return {name: convert(inner, item) for name, item in value.items()}
    if float in kinds and isinstance(value, str | int) and not isinstance(value, bool):
        return float(value)
    return value


def describe_type(expected: Any) -> str:
    """The rule for a value, as text."""
    if get_origin(expected) is Literal:
        return f"one of {', '.join(map(str, get_args(expected)))}"
    if get_origin(expected) in (Union, UnionType):
        return ", or ".join("null" if item is NoneType else describe_type(item) for item in get_args(expected))
    if get_origin(expected) is list:
        return "a list, such as [a, b]"
    return KINDS.get(expected, "a mapping, such as {name: value}")


def show(value: Any) -> str:
    """A value as quoted in messages: short, with control characters escaped."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print very long integers
        return f"{'-' if value < 0 else ''}10^{int(value.bit_length() * math.log10(2))} or so"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = visible(value if isinstance(value, str) else repr(value))
    except ValueError:  # a very long number somewhere inside
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _check(expected: Any, value: Any, name: str, *, written: bool) -> None:
    problem = _find_problem(expected, value, name, written)
    if problem is not None:
        raise ConfigError(f"{name} = {show(value)}; {problem}.")


def _find_problem(expected: Any, value: Any, name: str, written: bool) -> str | None:
    """The problem of a value; None if there is none."""
    wrong = f"it must be {describe_type(expected)}"
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        if value is None or (written and value == "null"):
            return None if NoneType in arguments else wrong
        problems = [_find_problem(item, value, name, written) for item in arguments if item is not NoneType]
        if None in problems:
            return None
        return problems[0] if len(problems) == 1 and not str(problems[0]).startswith("it must be ") else wrong
    if origin is Literal:
        return None if any(type(value) is type(choice) and value == choice for choice in arguments) else wrong
    if origin is list:
        if not isinstance(value, list):
            return wrong
        for item in value:
            problem = _find_problem(arguments[0], item, name, written)
            if problem is not None:
                return f"its entry {show(item)}: {problem}"
        return None
    if origin is dict or expected is Options:
        return _find_problem_in_mapping(arguments[1] if arguments else Any, value, name, written, wrong)
    if expected is Any:
        return None
    if expected is bool:
        spelled = written and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off")
        return None if isinstance(value, bool) or spelled else wrong
    if expected is int or expected is float:
        return _find_number_problem(expected, value, name, written, wrong)
    if expected is str:
        if not isinstance(value, str):
            return wrong + "; put it in quotes" if written and isinstance(value, bool | int | float) else wrong
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            return "it contains a zero byte, or bytes that are not UTF-8; remove them"
        return None
    if dataclasses.is_dataclass(expected):
        return None if isinstance(value, typing.cast(type, expected)) else wrong
    raise TypeError(f"{name}: an option of type {expected!r}, which nothing here checks")


def _find_problem_in_mapping(inner: Any, value: Any, name: str, written: bool, wrong: str) -> str | None:
    if not isinstance(value, Mapping):
        return wrong
    if not all(isinstance(key, str) for key in value):
        return "its names must be texts; put them in quotes"
    for key, item in value.items():
        problem = _find_problem(inner, item, name, written)
        if problem is not None:
            return f"of {visible(key)}, {show(item)}, {problem}"
    return None


def _find_number_problem(expected: Any, value: Any, name: str, written: bool, wrong: str) -> str | None:
    if written and isinstance(value, str):
        spelled = (WHOLE if expected is int else NUMBER).fullmatch(value)
        if spelled is None:
            return wrong
        value = float(value) if expected is float or len(value) > 30 else int(value)
    elif isinstance(value, bool) or not isinstance(value, int if expected is int else int | float):
        return wrong
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be finite"
    field = name.rpartition(".")[2]
    default = LARGEST_WHOLE if expected is int else _LARGEST_MINUTES if field.endswith("_minutes") else LARGEST
    largest = _LARGEST_OF.get(field, default)
    if abs(value) <= largest:
        return None
    shown = f"{largest:,.0f}" if expected is int else f"{largest:g}"
    return f"it must be between -{shown} and {shown}"
