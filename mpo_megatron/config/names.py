"""Names of options: does one exist, which was meant, and does a YAML file give each once."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from mpo_megatron.config.checks import ConfigError, require
from mpo_megatron.config.sealed import check_seal

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
"""What a value of a type is called in a message."""


def options_of(kind: type[Any]) -> dict[str, Any]:
    """Name → type of every option of a configuration, sections and what is in them: `model`, `model.checkpoint`, …"""
    types = typing.get_type_hints(kind)
    options = {}
    for field in dataclasses.fields(kind):
        options[field.name] = types[field.name]
        if dataclasses.is_dataclass(types[field.name]):
            options.update({f"{field.name}.{name}": inner for name, inner in options_of(types[field.name]).items()})
    return options


def describe_type(expected: Any) -> str:
    """What a value must be, in words."""
    if get_origin(expected) is Literal:
        return f"one of {', '.join(map(str, get_args(expected)))}"
    if get_origin(expected) in (Union, UnionType):
        return ", or ".join("null" if item is NoneType else describe_type(item) for item in get_args(expected))
    if get_origin(expected) is list:
        return "a list, such as [a, b]"
    return KINDS.get(expected, "a mapping, such as {name: value}")


def collection_of(expected: Any) -> type[Any] | None:
    """list or dict, if a value of this type is one or may be one; else None."""
    kinds = [get_origin(item) for item in (expected, *(get_args(expected) if get_origin(expected) in (Union, UnionType) else ()))]
    return next((kind for kind in (list, dict) if kind in kinds), None)


def unknown_option(kind: type[Any], name: str, prefix: str = "") -> str:
    """That there is no option of this name, and which was meant, or which there are.

    Args:
        prefix: put before names in the message
    """
    section, _, last = name.rpartition(".")
    options = options_of(kind)
    if dataclasses.is_dataclass(options.get(section)):
        inner: Any = options[section]
        return unknown_option(inner, last, f"{prefix}{section}.")
    same = [option for option in options if option.rpartition(".")[2] == last]
    begun = [option for option in options if option.startswith(name) and option.count(".") == name.count(".")]
    near = same or begun or difflib.get_close_matches(name, options, n=2, cutoff=0.7)
    if near:
        return f"there is no such option; did you mean {' or '.join(prefix + option for option in near[:2])}?"
    names = [option for option in options if "." not in option]
    return f"there is no such option; there are {', '.join(prefix + option for option in names)}."


def check_file(kind: type[Any], path: str | Path) -> None:
    """Check that a YAML file holds options of this configuration, each once; values are not looked at.

    Raises:
        ConfigError: with the line.
    """
    require(Path(path).exists(), f"config = {path}; no such file.")
    require(Path(path).is_file(), f"config = {path}; not a file; name a YAML file.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        check_seal(Path(path), text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    require(isinstance(root, yaml.MappingNode), f"{path}: holds no options; write one a line, as `name: value`.")
    check_names(kind, root, str(path))


def check_names(kind: type[Any] | None, options: Any, where: str, prefix: str = "") -> None:
    """Check the names in a mapping: plain, or a node of a YAML file.

    Args:
        kind: what has these options; None if they are free, and only repeated ones are refused
        where: what holds them, for messages
    Raises:
        ConfigError: an unknown name, one that stands there twice, or a section without options.
    """
    known, seen = options_of(kind) if kind else {}, set()
    for name, value, line in _items(options):
        place = where if line is None else f"{where}:{line}"
        require(
            name not in seen, f"{place}: {prefix}{name} stands there a second time, and what came first would be lost; join them."
        )
        seen.add(name)
        if kind and name not in known:
            raise ConfigError(f"{place}: {prefix}{name}: {unknown_option(kind, name, prefix)}")
        section = known.get(name)
        if not dataclasses.is_dataclass(section):
            section = None
        if isinstance(value, Mapping | yaml.MappingNode):
            check_names(section, value, where, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif section is not None:
            raise ConfigError(f"{place}: {prefix}{name} is a section; give options under it, or take it out.")


def _items(options: Any) -> Iterator[tuple[str, Any, int | None]]:
    """(name, value, line) of a mapping's entries."""
    if isinstance(options, yaml.MappingNode):
        for key, value in options.value:
            if key.tag != "tag:yaml.org,2002:merge":
                yield str(key.value), value, key.start_mark.line + 1
    else:
        for name, value in options.items():
            yield str(name), value, None
