"""`--help`: the most used options, then the names of all others; `--help-all` explains every option."""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser

from mpo_megatron.config.names import options_of
from mpo_megatron.config.values import field_types, section_of

SHORT, ALL = ("--help", "-h"), "--help-all"

_LARGEST_WIDTH = 110
"""Maximum width of a help text."""

_DEFAULT_SHOWN = 24
"""Maximum characters of a default; longer ones appear only in `--help-all`."""


def format_help(kind: type[Any], parser: ArgumentParser, launcher: Mapping[str, str]) -> str:
    """The text of `--help`: all options of a small command; otherwise its `MAIN_OPTIONS`, and the names of the others.

    Args:
        parser: parser of `kind`, with the help of each option
        launcher: option → help of options that are parsed before `kind`
    """
    main: tuple[str, ...] = getattr(kind, "MAIN_OPTIONS", ())
    if not main:
        return format_all(parser, launcher)
    options, texts, required = options_of(kind), _texts(kind), required_options(kind)
    stages = getattr(kind, "STAGE_TYPES", {})
    lines = [f"usage: {usage(kind, parser.prog)}", "", description(kind), ""]
    for name in main:
        lines += _entry(f"--{name}", _first_sentence(texts[name]), "required" if name in required else _default(kind, name))
    for name, text in launcher.items():
        lines += _entry(name, text, "")
    lines += ["", f"More options; `{parser.prog} {ALL}` explains each:", ""]
    groups: dict[str, list[str]] = {}
    for name, expected in options.items():
        if section_of(expected) is None and name not in main and name not in stages:
            groups.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    for section, names in groups.items():
        title = f"{_first_sentence(section_of(options[section]).__doc__ or '')}: " if section else ""
        lines += _entry(f"--{section}.…" if section else "--…", title + ", ".join(names), "")
    for name in stages:
        lines += _entry(f"--{name}.…", f"options of `mpo {name}`", "")
    lines += ["", f"--config FILE reads options from YAML. {parser.prog} … --print_config writes them all, with their defaults."]
    return "\n".join(lines) + "\n"


def format_all(parser: ArgumentParser, launcher: Mapping[str, str]) -> str:
    """The text of `--help-all`: every option with its type and default."""
    if launcher:
        group = parser.add_argument_group("Ranks on this machine")
        for name, text in launcher.items():
            group.add_argument(name, type=int, metavar="N", help=text)
    return str(parser.format_help())


def usage(kind: type[Any], program: str) -> str:
    """The command with its required options."""
    required = " ".join(f"--{name} {name.rpartition('.')[2].upper()}" for name in required_options(kind))
    return f"{program} {required} [--option value …]".replace("  ", " ")


def description(kind: type[Any]) -> str:
    """The command's purpose: the docstring of its options, without the command's name."""
    text = re.sub(r"^`[^`]+`: ", "", " ".join((kind.__doc__ or "").split()))
    return text[:1].upper() + text[1:]


def required_options(kind: type[Any]) -> list[str]:
    """Names of the options without a default, including those in sections."""
    names = []
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            section = section_of(options_of(kind)[field.name])
            inner = required_options(section) if section else []
            names += [f"{field.name}.{name}" for name in inner] or [field.name]
    return names


def _texts(kind: type[Any]) -> dict[str, str]:
    """Name → help of every option, including those in sections that may be null."""
    parser = ArgumentParser()
    parser.add_class_arguments(kind, as_positional=False)
    texts = {action.dest: action.help or "" for action in parser._actions}  # argparse has no public list of them
    for name, expected in field_types(kind).items():
        section = section_of(expected)
        if section is not None and section is not expected:
            texts.update({f"{name}.{inner}": text for inner, text in _texts(section).items()})
    return texts


def _default(kind: type[Any], name: str) -> str:
    """The default of an option, if useful."""
    first, _, rest = name.partition(".")
    if rest:
        section = section_of(options_of(kind)[first])
        return _default(section, rest) if section else ""
    default = next(field.default for field in dataclasses.fields(kind) if field.name == first)
    shown = {True: "true", False: "false"}.get(default, default) if isinstance(default, bool) else default
    silent = shown in (None, "", dataclasses.MISSING) or len(str(shown)) > _DEFAULT_SHOWN
    return "" if silent else f"default {shown}"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z`])|; ", " ".join(text.split()), maxsplit=1)[0].rstrip(".")


def _entry(name: str, text: str, note: str) -> list[str]:
    """Lines of one option: its name, then the wrapped text."""
    width = min(shutil.get_terminal_size().columns, _LARGEST_WIDTH)
    body = textwrap.wrap(f"{text} ({note})" if note else text, max(width - 30, 40)) or [""]
    first = f"  {name:<27} {body[0]}" if len(name) <= 27 else f"  {name}\n{'':30}{body[0]}"
    return [first, *(f"{'':30}{line}" for line in body[1:])]
