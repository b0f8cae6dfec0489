"""JSON objects in files, and the dataclasses that they hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_origin

from mpo_megatron.config import ConfigError, require
from mpo_megatron.config.values import check_value, field_types


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file holds something else; ends with the remedy.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=read_pairs)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 raises a ValueError too
        raise ConfigError(f"{path}: does not parse ({error}); {remedy}.") from error
    require(isinstance(content, dict), f"{path}: holds a {type(content).__name__}, not an object; {remedy}.")
    return dict(content)


class RepeatedNameError(ValueError):
    """An object gives two values for one name."""


def read_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these fields, for `json.loads`; Python itself would take the last of two with one name.

    Raises:
        RepeatedNameError: a name is given twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedNameError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return content


def build_record[Record](kind: type[Record], content: Any, path: Path, remedy: str, *, measured: Collection[str] = ()) -> Record:
    """The dataclass whose fields a file holds; a list becomes a tuple where the field is one.

    Args:
        measured: fields with lists or objects of measured numbers, which may be NaN, infinite and of any size
    Raises:
        ConfigError: a field is missing, unknown, or of another type; ends with the remedy.
    """
    require(isinstance(content, Mapping), f"{path}: holds a {type(content).__name__}, not an object; {remedy}.")
    types = field_types(kind)
    required = {field.name for field in dataclasses.fields(kind) if _is_required(field)}  # type: ignore[arg-type]
    for problem, names in (("is missing", required - {*content}), ("is unknown", {*content} - {*types})):
        require(not names, f"{path}: field {min(names, default='')} {problem}; {remedy}.")
    values = {}
    for name, value in content.items():
        if name in measured:
            require(_holds_numbers(types[name], value), f"{path}: {name} holds something else than numbers; {remedy}.")
            values[name] = value
            continue
        is_tuple = types[name] == tuple[str, ...]
        try:
            check_value(list[str] if is_tuple else types[name], value, name)
        except ConfigError as error:
            raise ConfigError(f"{path}: {str(error).rstrip('.')}; {remedy}.") from error
        values[name] = tuple(value) if is_tuple else value
    return kind(**values)


def _holds_numbers(expected: Any, value: Any) -> bool:
    if not isinstance(value, get_origin(expected)):
        return False
    return all(type(number) in (int, float) for number in (value.values() if isinstance(value, dict) else value))


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
