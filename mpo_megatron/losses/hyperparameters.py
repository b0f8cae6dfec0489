"""Checks that every hyper-parameter dataclass runs in `__post_init__`, and their wording: value; rule; fix."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_types(params: Any) -> None:
    """Raise `ValueError` unless every field of the dataclass `params` has its declared type (a float may be an int)."""
    hints = get_type_hints(type(params))
    for field in dataclasses.fields(params):
        check_type(field.name, getattr(params, field.name), hints[field.name], field.default)


def check_type(name: str, value: Any, hint: Any, default: Any) -> None:
    """Raise `ValueError` unless `value` is of type `hint`: bool, int, float or Literal."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        require(known, f"{name} = {value!r}; it must be one of {', '.join(map(str, choices))}; try {default}.")
    elif hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(
            is_number and math.isfinite(value),
            f"{name} = {value!r}; it must be a finite number; try {default}.",
        )
    else:
        require(type(value) is hint, f"{name} = {value!r}; it must be of type {hint.__name__}; try {default}.")


def check_positive(params: Any, *names: str) -> None:
    """Raise `ValueError` unless each named field is > 0."""
    for name in names:
        value = getattr(params, name)
        require(value > 0, f"{name} = {value}; it must be positive; try {get_default(params, name)}.")


def check_non_negative(params: Any, *names: str) -> None:
    """Raise `ValueError` unless each named field is ≥ 0."""
    for name in names:
        value = getattr(params, name)
        require(value >= 0, f"{name} = {value}; it must not be negative; try {get_default(params, name)}.")


def check_label_smoothing(params: Any) -> None:
    """Raise `ValueError` unless 0 ≤ label_smoothing < 0.5."""
    value = params.label_smoothing
    require(
        0 <= value < 0.5,
        f"label_smoothing = {value}; it must be in [0, 0.5); try {get_default(params, 'label_smoothing')}.",
    )


def check_unused(params: Any, condition: str, *names: str) -> None:
    """Raise `ValueError` if a named field, which has an effect only under `condition`, was changed from its default."""
    for name in names:
        value, default = getattr(params, name), get_default(params, name)
        require(
            value == default,
            f"{name} = {value}; it has an effect only with {condition}; set that, or leave {name} out.",
        )


def get_default(params: Any, name: str) -> Any:
    """The declared default of a field."""
    return type(params).__dataclass_fields__[name].default
