"""From YAML files and command lines to the dataclasses of this folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from mpo_megatron.config.checks import ConfigError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")


def build_parser(kind: type[Any], program: str) -> ArgumentParser:
    """A parser for one root dataclass: `--config FILE`, `--field.subfield value`, `--print_config`, `--help`."""
    parser = ArgumentParser(prog=program, description=kind.__doc__, exit_on_error=True)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(kind, as_positional=False)
    return parser


def instantiate(parser: ArgumentParser, kind: type[C], namespace: Namespace) -> C:
    """The dataclass that a parsed namespace describes; nested dataclasses are built by the parser."""
    built = parser.instantiate(namespace)
    return kind(**{item.name: built[item.name] for item in dataclasses.fields(kind)})  # type: ignore[arg-type]


def parse(kind: type[C], arguments: Sequence[str] | None = None, program: str = "mpo") -> C:
    """Parse command-line arguments (default: sys.argv) into `kind`.

    Raises:
        ConfigError: a value breaks a rule. An unknown option or a missing required one ends the program with usage.
    """
    parser = build_parser(kind, program)
    return instantiate(parser, kind, parser.parse_args(arguments))


def load_yaml(kind: type[C], path: str | Path) -> C:
    """The configuration saved in a YAML file, checked like one from the command line.

    Raises:
        ConfigError: the file is missing, has an unknown key, or a value breaks a rule.
    """
    parser = build_parser(kind, "mpo")
    parser.exit_on_error = False
    try:
        return instantiate(parser, kind, parser.parse_path(str(path)))
    except (ArgumentError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(kind: type[C], options: Mapping[str, Any], where: str) -> C:
    """The configuration that nested plain dictionaries describe, checked like one from the command line.

    Args:
        where: what the options are a part of, for messages
    Raises:
        ConfigError: an unknown key, a missing one, or a value that breaks a rule.
    """
    parser = build_parser(kind, "mpo")
    parser.exit_on_error = False
    try:
        return instantiate(parser, kind, parser.parse_object(dict(options)))
    except (ArgumentError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dictionaries."""
    return dataclasses.asdict(config)
