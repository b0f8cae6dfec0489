"""Self-checking hyper-parameters: a field's annotation is its rule. Messages give value; rule; fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

LARGEST = 1e15
"""Largest magnitude of a number; its square is far below float32's limit."""


class ValueRule(NamedTuple):
    """A rule for the values of a field, besides their type."""

    words: str
    """The rule in words, after "must"."""
    holds: Callable[[Any], bool]
    """Whether a value of the right type satisfies it."""


POSITIVE = ValueRule("be positive", lambda value: value > 0)
BELOW_HALF = ValueRule("be in [0, 0.5)", lambda value: 0 <= value < 0.5)

Positive = Annotated[float, POSITIVE]
NonNegative = Annotated[float, ValueRule("not be negative", lambda value: value >= 0)]
Count = Annotated[int, POSITIVE]
Smoothing = Annotated[float, BELOW_HALF]


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Base class of a loss's hyper-parameters. Raises `ValueError` unless every field has its declared type and satisfies its
    rules."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name), hints[field.name], field.default)


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def show(value: Any) -> str:
    """A value as quoted in messages: Python refuses to print integers of several thousand digits."""
    is_long = isinstance(value, int) and value.bit_length() > 256
    return f"a number of {value.bit_length():,} bits" if is_long else repr(value)


def check_field(name: str, value: Any, hint: Any, default: Any) -> None:
    """Raise `ValueError` unless `value` matches `hint`: bool, int, float (or an int), Literal, or one with rules."""
    if get_origin(hint) is Annotated:
        kind, *rules = get_args(hint)
        check_field(name, value, kind, default)
        for rule in rules:
            require(rule.holds(value), f"{name} = {value}; it must {rule.words}; try {default}.")
    elif get_origin(hint) is Literal:
        choices = get_args(hint)
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        require(known, f"{name} = {show(value)}; it must be one of {', '.join(map(str, choices))}; try {default}.")
    elif hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(is_number and abs(value) <= LARGEST, f"{name} = {show(value)}; it must be a finite number; try {default}.")
    else:
        require(type(value) is hint, f"{name} = {show(value)}; it must be of type {hint.__name__}; try {default}.")
        require(hint is not int or abs(value) < 2**31, f"{name} = {show(value)}; it must be below 2^31; try {default}.")


def check_unused(params: Hyperparameters, condition: str, *names: str) -> None:
    """Raise `ValueError` if a named field differs from its default although `condition`, which it needs, is not met."""
    defaults = {field.name: field.default for field in dataclasses.fields(params)}
    for name in names:
        value = getattr(params, name)
        require(
            value == defaults[name],
            f"{name} = {value}; it has an effect only with {condition}; set that, or remove {name}.",
        )
