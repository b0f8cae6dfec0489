"""Check option names: whether they exist, with suggestions, and whether a YAML file gives each once with the right type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from mpo_megatron.config.checks import ConfigError, require
from mpo_megatron.config.other_names import counterparts, why_absent
from mpo_megatron.config.sealed import check_seal
from mpo_megatron.config.values import NUMBER, WHOLE, check_written, collection_of, field_types, section_of, show
from mpo_megatron.terminal.visible import visible

MAX_NODES, MAX_DEPTH = 100_000, 30
"""Maximum number of values in a YAML file, and their nesting depth: far beyond any configuration."""

MAX_DIGITS = 400
"""Maximum characters of a number; Python refuses several thousand."""


def options_of(kind: type[Any]) -> dict[str, Any]:
    """Name → type of every option of a configuration, including sections and their options: `model`, `model.checkpoint`, …"""
    options = {}
    for name, expected in field_types(kind).items():
        options[name] = expected
        section = section_of(expected)
        if section is not None:
            options.update({f"{name}.{inner}": kind_of_inner for inner, kind_of_inner in options_of(section).items()})
    return options


def unknown_option(kind: type[Any], name: str, prefix: str = "", root: type[Any] | None = None) -> str:
    """A message that no option has this name, with a suggestion, or all names.

    Args:
        prefix: prefix of names in the message
        root: the command's configuration, if `kind` is one of its sections
    """
    section, _, last = name.rpartition(".")
    options, root = options_of(kind), root or kind
    inner = section_of(options.get(section))
    if inner is not None:
        return unknown_option(inner, last, f"{prefix}{section}.", root)
    if near := [f"{prefix}{option}" for option in options if option.rpartition(".")[2] == last]:
        return _suggest(near)
    dashes = "--" if prefix.startswith("--") else ""
    if theirs := _of_other_trainers(root, last, dashes):
        return theirs
    begun = [option for option in options if option.startswith(name) and option.count(".") == name.count(".")]
    near = begun or difflib.get_close_matches(name, options, n=2, cutoff=0.7) or _alike(last, options)
    if near:
        return _suggest([f"{prefix}{option}" for option in near])
    names = [option for option in options if "." not in option]
    return f"there is no such option; there are {', '.join(prefix + option for option in names)}."


def _suggest(names: Sequence[str]) -> str:
    return f"there is no such option; did you mean {' or '.join(names[:2])}?"


def _of_other_trainers(root: type[Any], name: str, dashes: str) -> str | None:
    """The message about another trainer's name for an option; None if no trainer is known to use it."""
    if reason := why_absent(name):
        return f"there is no such option: {reason}."
    ours = [option.partition(":") for option in counterparts(name)]
    options, stages = options_of(root), getattr(root, "STAGE_TYPES", {})
    own = [option for _, _, option in ours if option in options or collection_of(options.get(option.rpartition(".")[0])) is dict]
    own = own or [f"{command}.{option}" for command, _, option in ours if command in stages]
    if own:
        return _suggest([f"{dashes}{option}" for option in own])
    by_command: dict[str, list[str]] = {}
    for command, _, option in ours:
        by_command.setdefault(command, []).append(f"{dashes}{option}")
    elsewhere = [f"{' and '.join(options)} of `mpo {command}`" for command, options in by_command.items()]
    return _suggest(elsewhere) if elsewhere else None


def _alike(name: str, options: Iterable[str]) -> list[str]:
    """Options of any section with a similar name."""
    by_name: dict[str, list[str]] = {}
    for option in options:
        by_name.setdefault(option.rpartition(".")[2], []).append(option)
    near = difflib.get_close_matches(name, by_name, n=2, cutoff=0.8)
    return [option for found in near for option in by_name[found]]


def read_file(kind: type[Any], path: str | Path) -> dict[str, Any]:
    """The options in a YAML file: known names, each once, with values of the right types.

    Raises:
        ConfigError: names the line.
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
        raise ConfigError(f"{path}: not valid YAML: it is nested too deeply; fix it.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}); fix it, or copy it again.") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no options; write one per line, as `name: value`.")
    options: dict[str, Any] = _Values().read(root, str(path))
    check_options(kind, options, str(path))
    return options


class _Mapping(dict[str, Any]):
    """A mapping in a YAML file, with the line of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


def read_text(text: str, where: str) -> Any:
    """The value that a text spells in YAML, with the number rules of YAML files; the text itself if it is not YAML.

    Raises:
        ConfigError: a number has an ambiguous form.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return text
    return None if node is None else _Values(in_file=False).read(node, where)


class _Values:
    """Values of a YAML file's nodes. Refuses numbers that YAML 1.1 reads differently than they look."""

    def __init__(self, *, in_file: bool = True) -> None:
        self.count = 0
        self.in_file = in_file

    def _place(self, node: yaml.Node, where: str, name: str) -> str:
        """File, line and name; for a text of the command line, its option and the name inside it."""
        return f"{where}:{node.start_mark.line + 1}: {name}" if self.in_file else f"{where} {name}".rstrip()

    def read(self, node: yaml.Node, where: str, name: str = "", depth: int = 0) -> Any:
        """The value of a node.

        Raises:
            ConfigError: names the line.
        """
        self.count += 1
        place = self._place(node, where, name)
        if self.count > MAX_NODES or depth > MAX_DEPTH:  # a few lines of aliases can expand to billions of values
            raise ConfigError(f"{place} is too large, or contains itself; write its values out.")
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, where, name, depth + 1) for item in node.value]
        if not isinstance(node, yaml.MappingNode):
            return _read_scalar(node, place)
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
                raise ConfigError(f"{self._place(key, where, inner)} is given twice; merge both.")
            values[own] = self.read(value, where, inner, depth + 1)
            values.lines[own] = key.start_mark.line + 1
        return values


def _read_scalar(node: yaml.Node, place: str) -> Any:
    text, kind = str(node.value), node.tag.rpartition(":")[2]
    if kind == "str" and getattr(node, "style", None) is None and NUMBER.fullmatch(text):
        kind = "float"  # 1e-6 is a number in YAML 1.2 only
    if kind in ("str", "null", "bool"):
        return {"str": text, "null": None, "bool": text.lower() in ("true", "yes", "on")}[kind]
    if kind not in ("int", "float"):
        raise ConfigError(f"{place} = {show(text)}; YAML reads it as another type ({kind}); put it in quotes.")
    if len(text) > MAX_DIGITS or (WHOLE if kind == "int" else NUMBER).fullmatch(text) is None:
        raise ConfigError(
            f"{place} = {show(text)}; it must be a finite number: digits, with a point or an exponent; put a text that "
            "looks like that in quotes."
        )
    return int(text) if kind == "int" else float(text)


def check_options(
    kind: type[Any] | None, options: Mapping[str, Any], where: str, prefix: str = "", root: type[Any] | None = None
) -> None:
    """Check names and values in a mapping of options.

    Args:
        kind: the configuration that has these options; None if any option is allowed
        where: source of the options, for messages
        root: the command's configuration, if `kind` is one of its sections
    Raises:
        ConfigError: an unknown name, a value of another type, or a section without options.
    """
    known = options_of(kind) if kind else {}
    places = {name: f"{where}:{line}" for name, line in options.lines.items()} if isinstance(options, _Mapping) else {}
    for name in map(str, options):
        if kind and name not in known:
            place = places.get(name, where)
            raise ConfigError(f"{place}: {prefix}{visible(name)}: {visible(unknown_option(kind, name, prefix, root))}")
    for name, value in options.items():
        place = places.get(name, where)
        expected = known.get(name)
        inner = section_of(expected)
        if inner is not None and isinstance(value, Mapping):
            check_options(inner, value, where, f"{prefix}{name}.", root or kind)
        elif inner is not None and not (value is None and NoneType in get_args(expected)):
            raise ConfigError(f"{place}: {prefix}{name} is a section; give options under it, or remove it.")
        elif inner is None and kind:
            try:
                check_written(expected, value, f"{prefix}{name}")
            except ConfigError as error:
                raise ConfigError(f"{place}: {error}") from None
