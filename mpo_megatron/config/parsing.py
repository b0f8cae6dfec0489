"""Parse YAML files and command lines into the dataclasses of this folder."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from mpo_megatron.config import help as help_pages
from mpo_megatron.config.checks import ConfigError, require
from mpo_megatron.config.names import check_options, options_of, read_file, read_text, unknown_option
from mpo_megatron.config.values import check_written, collection_of, convert, describe_type, field_types, is_single, section_of

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class MissingError(ConfigError):
    """Options without a default are not given."""


def build_parser(kind: type[Any], program: str) -> ArgumentParser:
    """A parser for one root dataclass: `--config FILE`, `--field.subfield value`, `--print_config`."""
    parser = ArgumentParser(
        prog=program,
        usage=help_pages.usage(kind, program),
        description=help_pages.description(kind),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(kind, as_positional=False)
    return parser


def instantiate[C](kind: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    """Build the dataclass for checked values, including its sections.

    Args:
        prefix: prefix of names in messages
    Raises:
        ConfigError: an option without a default is missing, or a value breaks a rule.
    """
    required = [field.name for field in dataclasses.fields(kind) if _is_required(field)]  # type: ignore[arg-type]
    missing = [f"{prefix}{name}" for name in required if name not in values]
    if missing:
        raise MissingError(f"{_required(missing)}; set {'it' if len(missing) == 1 else 'them'}.")
    fields = {}
    for name, expected in field_types(kind).items():
        if name in values:
            section, value = section_of(expected), values[name]
            if section is None or value is None:
                fields[name] = convert(expected, value)
            else:
                fields[name] = instantiate(section, value, f"{prefix}{name}.")
    return kind(**fields)


def _required(names: Sequence[str]) -> str:
    """The start of a message that these options are missing."""
    return f"{', '.join(names)}: required, but not given"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def parse[C](
    kind: type[C],
    arguments: Sequence[str] | None = None,
    program: str = "mpo",
    launcher: Mapping[str, str] = MappingProxyType({}),
) -> C:
    """Parse command-line arguments (default: sys.argv) into `kind`. Help and `--print_config` print and exit.

    Args:
        launcher: option → help of options that were parsed before, for the help text
    Raises:
        ConfigError: an option is unknown or missing, has another type, or breaks a rule.
    """
    parser = build_parser(kind, program)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if help_pages.ALL in arguments:
        print(help_pages.format_all(parser, launcher), end="")
        raise SystemExit(0)
    if not set(help_pages.SHORT).isdisjoint(arguments):
        print(help_pages.format_help(kind, parser, launcher), end="")
        raise SystemExit(0)
    arguments, of_stages = take_stage_options(kind, arguments)
    arguments = join_lists(kind, fill_flags(kind, arguments))
    for option, following in itertools.pairwise([*arguments, ""]):
        name, _, value = option.partition("=")
        if name == "--config" and (value or following):
            read_file(kind, value or following)
        elif option.startswith("--") and ("=" in option or (following and not following.startswith("--"))):
            _check_argument(kind, name.removeprefix("--"), value if "=" in option else following)
    try:
        values = parser.parse_args(arguments).as_dict()
        set_stage_options(kind, values, of_stages)
        return instantiate(kind, values)
    except ArgumentError as error:
        raise ConfigError(explain(kind, str(error), program, option_prefix="--")) from error


def fill_flags(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """The arguments, with `--plan` written as `--plan=true`: a boolean option needs no value to be true."""
    flags = {f"--{name}" for name, expected in options_of(kind).items() if expected is bool}
    pairs = itertools.pairwise([*arguments, "--"])
    return [f"{option}=true" if option in flags and following.startswith("--") else option for option, following in pairs]


def take_stage_options(kind: type[Any], arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split off the options of stages: `--train.loss.params.beta 0.1` becomes {"train.loss.params.beta": ["0.1"]}.

    Raises:
        ConfigError: an option without a value.
    """
    free = {name for name, expected in field_types(kind).items() if expected == dict[str, Any]}
    others: list[str] = []
    taken: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not _is_value(argument):
            is_taken = "." in name and name.partition(".")[0] in free
            current = taken.setdefault(name, []) if is_taken else None
            if current is None:
                others.append(argument)
            else:
                current.extend([value] if equals else [])
        elif current is not None:
            current.append(argument)
        else:
            others.append(argument)
    for name, values in taken.items():
        require(bool(values), f"--{name}: a value is missing; write --name value.")
    return others, taken


def set_stage_options(kind: type[Any], values: dict[str, Any], taken: Mapping[str, Sequence[str]]) -> None:
    """Put the options of stages into the nested values.

    Raises:
        ConfigError: one names a section, or is inside something that is not a section.
    """
    for name, texts in taken.items():
        stage, _, option = name.partition(".")
        command = getattr(kind, "STAGE_TYPES", {}).get(stage)
        expected = options_of(command).get(option) if command else None
        if expected is not None and collection_of(expected) is not None:
            joined = _join(f"--{name}", expected, texts)
            read = [joined if joined in texts and _reads_as_text(joined) else read_text(joined, f"--{name}")]
        elif expected is not None and is_single(expected):
            read = list(texts)
        else:
            read = [read_text(text, f"--{name}") for text in texts]
        section: Any = values
        *parents, last = name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            require(isinstance(section, dict), f"--{name}: {parent} holds no options.")
        section[last] = read[0] if len(read) == 1 else read


def join_lists(kind: type[Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with `--list a b`, `--list a --list b` and `--mapping x=1 y=2` each joined into one value for the parser.

    Raises:
        ConfigError: a part of a mapping is not of the form name=value.
    """
    types = {f"--{name}": expected for name, expected in options_of(kind).items()}
    values: dict[str, list[str]] = {}
    joined: list[str] = []
    current: str | None = None
    for argument, following in itertools.pairwise([*arguments, "--end"]):  # the end is no value
        option, equals, value = argument.partition("=")
        if collection_of(types.get(option)) is not None:
            current = option
            if option not in values or not (
                equals or _is_value(following)
            ):  # without a value, the parser reports what is missing
                joined.append(option)
            values.setdefault(option, []).extend([value] if equals else [])
        elif current is not None and _is_value(argument):
            values[current].append(argument)
        else:
            current = None
            joined.append(argument)
    for option, given in values.items():
        if given:
            joined.insert(joined.index(option) + 1, _join(option, types[option], given))
    return joined


def _is_value(argument: str) -> bool:
    """Whether an argument is not an option: a text, a negative number, `-`, `---`, or `- and words`."""
    return re.match(r"--?[A-Za-z_][^\s=]*(=|$)", argument) is None


def _join(option: str, expected: Any, given: Sequence[str]) -> str:
    """The values of a list or a mapping, as one argument."""
    kind = collection_of(expected)
    names = get_args(kind and next(item for item in (expected, *get_args(expected)) if get_origin(item) is kind))
    is_whole = given[0].lstrip().startswith("[" if kind is list else "{")
    if len(given) == 1 and (is_whole or (get_origin(expected) is not kind and _reads_as_text(given[0]))):
        return given[0]
    if kind is list:
        return json.dumps([part if names == (str,) else read_text(part, option) for part in given])
    for part in given:
        require("=" in part, f"{option} {part}: write name=value, or several: {option} a=1 b=2.")
    pairs = [part.split("=", 1) for part in given]
    return json.dumps({name: value if names == (str, str) else read_text(value, f"{option} {name}") for name, value in pairs})


def _reads_as_text(text: str) -> bool:
    """Whether the parser keeps this value of a text or a list as text; it takes `-` for a list of null."""
    try:
        return not text.startswith("-") and not isinstance(yaml.safe_load(text), list | dict | datetime.date)
    except (yaml.YAMLError, RecursionError):
        return True
    except ValueError:  # looks like a date or a number, but is none: 2024-31-12, 0x_
        return False


def _check_argument(kind: type[Any], name: str, text: str) -> None:
    """Check the value of an option on the command line.

    Raises:
        ConfigError: it is not a valid value of the option's type.
    """
    options = options_of(kind)
    if name.partition(".")[0] not in options:
        return  # the parser lists the existing options
    expected = options.get(name)
    if name in options and is_single(expected):
        check_written(expected, text, name)
        return
    value = read_text(text, f"--{name}")  # a list or a mapping in one text, or an entry of a mapping
    section = section_of(expected)
    if section is not None and isinstance(value, Mapping):
        check_options(section, value, f"--{name}")
    elif section is None and name in options and isinstance(value, list | Mapping):
        check_written(expected, value, name)


def load_yaml[C](kind: type[C], path: str | Path) -> C:
    """The configuration saved in a YAML file, checked like one from the command line.

    Raises:
        ConfigError: the file is missing, has an unknown key, or a value breaks a rule.
    """
    try:
        return instantiate(kind, read_file(kind, path))
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from error


def from_dict[C](kind: type[C], options: Mapping[str, Any], where: str) -> C:
    """The configuration described by nested dictionaries, checked like one from the command line.

    Args:
        where: source of the options, for messages
    Raises:
        ConfigError: an unknown key, a missing one, or a value that breaks a rule.
    """
    check_options(kind, options, where)
    try:
        return instantiate(kind, options)
    except ConfigError as error:
        raise ConfigError(f"{where}{': ' if isinstance(error, MissingError) else '.'}{error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain dictionaries."""
    return dataclasses.asdict(config)


def explain(kind: type[Any], message: str, program: str = "mpo", option_prefix: str = "") -> str:
    """A parser's message as one sentence: the option, its value, and the rule.

    Args:
        program: the command, for a pointer to its help
        option_prefix: prefix of the option's name where the user wrote it
    """
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        if not match[1].startswith("-"):
            return f"{match[1]}: write options as --name value."
        name = match[1].partition("=")[0]
        return f"{name}: {unknown_option(kind, name.lstrip('-'), option_prefix)}"
    if match := re.match(r"the following arguments are required: (.+)", message):
        names = [option_prefix + name for name in match[1].split(", ")]
        return f"{_required(names)}; `{program} --help` explains {'it' if len(names) == 1 else 'them'}."
    key, value = re.match(r'Parser key "([^"]+)"', message), re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    if key and (section_of(options_of(kind).get(key[1])) is not None or "Unable to load config" in message):
        name = key[1]
        inner = next((option for option in options_of(kind) if option.startswith(f"{name}.")), f"{name}.…")
        return f"{option_prefix}{name} is a section; give its options individually, such as {option_prefix}{inner}."
    if key and value and key[1] in options_of(kind):
        return f"{key[1]} = {value[1]}; it must be {describe_type(options_of(kind)[key[1]])}."
    return re.sub(r'Parser key "([^"]+)":', r"\1:", " ".join(message.split()))
