"""Checks of option names: whether one exists, which was meant, and whether a YAML file gives each once and well typed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from mpo_megatron.config.checks import ConfigError, require
from mpo_megatron.config.sealed import check_seal
from mpo_megatron.config.values import NUMBER, WHOLE, check_written, field_types, section_of, show
from mpo_megatron.terminal.visible import visible

MAX_NODES, MAX_DEPTH = 100_000, 30
"""Values of a YAML file, and how deep they may be nested: far beyond any configuration."""

MAX_DIGITS = 400
"""Characters of a number; Python refuses to read some thousands."""


def options_of(kind: type[Any]) -> dict[str, Any]:
    """Name → type of every option of a configuration, sections and what is in them: `model`, `model.checkpoint`, …"""
    options = {}
    for name, expected in field_types(kind).items():
        options[name] = expected
        section = section_of(expected)
        if section is not None:
            options.update({f"{name}.{inner}": kind_of_inner for inner, kind_of_inner in options_of(section).items()})
    return options


def unknown_option(kind: type[Any], name: str, prefix: str = "") -> str:
    """A message that no option has this name, with the likely one, or all of them.

    Args:
        prefix: put before names in the message
    """
    section, _, last = name.rpartition(".")
    options = options_of(kind)
    inner = section_of(options.get(section))
    if inner is not None:
        return unknown_option(inner, last, f"{prefix}{section}.")
    same = [option for option in options if option.rpartition(".")[2] == last]
    begun = [option for option in options if option.startswith(name) and option.count(".") == name.count(".")]
    near = same or begun or difflib.get_close_matches(name, options, n=2, cutoff=0.7)
    if near:
        return f"there is no such option; did you mean {' or '.join(prefix + option for option in near[:2])}?"
    names = [option for option in options if "." not in option]
    return f"there is no such option; there are {', '.join(prefix + option for option in names)}."


def read_file(kind: type[Any], path: str | Path) -> dict[str, Any]:
    """The options in a YAML file: of this configuration, each once, with values of their types.

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
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}; fix the line.") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: it is nested without end; fix it.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); fix it, or copy it again.") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no options; write one a line, as `name: value`.")
    options: dict[str, Any] = _Values().read(root, str(path))
    check_options(kind, options, str(path))
    return options


class _Mapping(dict[str, Any]):
    """A mapping of a YAML file, with the line of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


def read_text(text: str, where: str) -> Any:
    """The value that a text spells in YAML, with the numbers of a YAML file; the text itself if it is no YAML.

    Raises:
        ConfigError: a number is written as it must not be.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return text
    return None if node is None else _Values().read(node, where)


class _Values:
    """Values of a YAML file's nodes. A number that YAML 1.1 reads as another than it looks like is refused."""

    def __init__(self) -> None:
        self.count = 0

    def read(self, node: yaml.Node, where: str, name: str = "", depth: int = 0) -> Any:
        """The value of a node.

        Raises:
            ConfigError: with the line.
        """
        self.count += 1
        place = f"{where}:{node.start_mark.line + 1}"
        if self.count > MAX_NODES or depth > MAX_DEPTH:  # a few lines of aliases stand for billions of values
            raise ConfigError(f"{place}: {name} holds too much, or itself; write its values out.")
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, where, name, depth + 1) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return _read_scalar(node, place, name)
        values = _Mapping()
        for key, value in node.value:
            own = str(key.value)
            inner = f"{name}.{own}" if name else own
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    for other, item in self.read(merged, where, name, depth + 1).items():
                        values.setdefault(other, item)
                continue
            if own in values.lines:
                line = f"{where}:{key.start_mark.line + 1}"
                raise ConfigError(f"{line}: {inner} is given twice; merge both.")
            values[own] = self.read(value, where, inner, depth + 1)
            values.lines[own] = key.start_mark.line + 1
        return values


def _read_scalar(node: yaml.Node, place: str, name: str) -> Any:
    text, kind = str(node.value), node.tag.rpartition(":")[2]
    if kind == "str" and getattr(node, "style", None) is None and NUMBER.fullmatch(text):
        kind = "float"  # 1e-6, which only YAML 1.2 takes for a number
    if kind in ("str", "null", "bool"):
        return {"str": text, "null": None, "bool": text.lower() in ("true", "yes", "on")}[kind]
    if kind not in ("int", "float"):
        raise ConfigError(f"{place}: {name} = {show(text)}; YAML takes it for something else ({kind}); put it in quotes.")
    if len(text) > MAX_DIGITS or (WHOLE if kind == "int" else NUMBER).fullmatch(text) is None:
        raise ConfigError(
            f"{place}: {name} = {show(text)}; it must be a number, and finite: digits, with a point or an exponent; a text that "
            "looks so goes into quotes."
        )
    return int(text) if kind == "int" else float(text)


def check_options(kind: type[Any] | None, options: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Check names and values in a mapping of options.

    Args:
        kind: what has these options; None if they are free
        where: what holds them, for messages
    Raises:
        ConfigError: an unknown name, a value of another type, or a section without options.
    """
    known = options_of(kind) if kind else {}
    places = {name: f"{where}:{line}" for name, line in options.lines.items()} if isinstance(options, _Mapping) else {}
    for name in map(str, options):
        if kind and name not in known:
            place = places.get(name, where)
            raise ConfigError(f"{place}: {prefix}{visible(name)}: {visible(unknown_option(kind, name, prefix))}")
    for name, value in options.items():
        place = places.get(name, where)
        expected = known.get(name)
        inner = section_of(expected)
        if inner is not None and isinstance(value, Mapping):
            check_options(inner, value, where, f"{prefix}{name}.")
        elif inner is not None and not (value is None and NoneType in get_args(expected)):
            raise ConfigError(f"{place}: {prefix}{name} is a section; give options under it, or take it out.")
        elif inner is None and kind:
            try:
                check_written(expected, value, f"{prefix}{name}")
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
