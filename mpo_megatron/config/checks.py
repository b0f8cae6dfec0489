"""The configuration error, and checks that several commands share."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, the rule and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


@contextlib.contextmanager
def within(section: str) -> Iterator[None]:
    """Put the section's name before the option that a `ConfigError` raised in this context names."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from error


def check_seed(seed: int) -> None:
    """Raise `ConfigError` unless NumPy and PyTorch accept this seed."""
    require(0 <= seed < 2**63, f"seed = {seed}; it must be 0 or more, and below 2^63.")


_FIXED_VARIABLES = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length"),
    )
)
"""Arguments of `apply_chat_template` that the rows or the command itself set."""


def check_template_options(
    variables: Mapping[str, Any], *, prompt_format: str = "auto", system_prompt: str | None = None
) -> None:
    """Raise `ConfigError` if `chat_template_kwargs` replaces what each row, or the command itself, gives the template, or if
    options for the template come with prompts that it is not applied to."""
    for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", variables)):
        require(
            prompt_format != "templated" or not value,
            f"{name} = {value} with prompt_format = templated: prompts are used unchanged; remove one of them.",
        )
    for name in sorted(_FIXED_VARIABLES & variables.keys()):
        raise ConfigError(
            f"chat_template_kwargs: {name} is no variable of the template: the rows or the command itself set it; remove it."
        )


def check_function(name: str, function: str) -> None:
    """Raise `ConfigError` unless `function` has the form of a user function's name."""
    require(
        re.fullmatch(r".+:[A-Za-z_]\w*", function) is not None,
        f"{name} = {function}; write package.module:function or path/to/file.py:function.",
    )


NAME_ROOM, PATH_ROOM = 32, 512
"""Bytes by which names of temporary files beside an output, and paths of files in it, are longer than its own."""


def check_length(path: Path, name: str) -> Path:
    """Raise `ConfigError` if a new output's name or path is longer than its file system allows; return the nearest existing
    parent."""
    whole = path.absolute()
    parent = whole
    while not os.path.exists(parent):  # Path.exists raises for a path that is too long
        parent = parent.parent
    *others, last = (len(os.fsencode(part)) for part in whole.relative_to(parent).parts or ("",))
    most = os.pathconf(parent, "PC_NAME_MAX")
    longest = max([*others, last + NAME_ROOM if last else 0])
    require(
        longest <= most or most <= 0,  # some file systems in user space know no limit
        f"{name} = {str(path)[:60]}…: a name in it is too long: {longest} bytes with the endings of temporary files, but names "
        f"in {parent} have at most {most}; choose a shorter one.",
    )
    size, most = len(os.fsencode(whole)) + PATH_ROOM, os.pathconf(parent, "PC_PATH_MAX")
    require(
        not last or size <= most or most <= 0,
        f"{name} = {str(path)[:60]}…: the path is too long: {size} bytes with files in it, but paths have at most {most}; choose "
        "a shorter one.",
    )
    return parent


def check_writable(folder: Path, name: str) -> None:
    """Raise `ConfigError` if `folder` (or its nearest existing parent) cannot be written to, or has too long a name."""
    parent = check_length(folder, name)
    require(parent.is_dir(), f"{name} = {folder}; {parent} is a file, not a folder; choose another path.")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(f"{name} = {folder}; cannot write in {parent} ({error.strerror}); choose another path.") from error


def check_checkpoint(folder: Path, name: str) -> None:
    """Raise `ConfigError` unless `folder` holds a Megatron or Hugging Face checkpoint; for a run's folder, suggest its newest
    step."""
    require(
        folder.is_dir(),
        f"{name} = {folder}; no such folder; name a Hugging Face folder, or write one with `mpo convert`, which also "
        "takes a name on the hub.",
    )
    if (folder / "megatron").is_dir() or is_hugging_face(folder):
        return
    steps = [path for parent in (folder, folder / "checkpoints") for path in parent.glob("step_*") if not path.suffix]
    # A run's newest step changes while it trains, but a resumed run must start from the same checkpoint.
    complete = [path for path in steps if (path / "megatron" / "metadata.json").is_file()]
    if complete:
        newest = max(complete, key=lambda path: path.name)
        raise ConfigError(f"{name} = {folder} is the folder of a run; name one of its checkpoints; the newest is {newest}.")
    require(
        not steps and not (folder / "checkpoints").is_dir(),
        f"{name} = {folder} is the folder of a run without a complete checkpoint; resume that run, or name another model.",
    )
    raise ConfigError(
        f"{name} = {folder} is neither a Hugging Face folder (no config.json) nor a Megatron checkpoint (no megatron/); name one."
    )


def is_hub_name(path: str) -> bool:
    """Whether a path does not exist on disk and has the form of a name on the Hugging Face hub: owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face checkpoint, and not one of our checkpoints or runs."""
    return (folder / "config.json").is_file() and not any((folder / name).is_dir() for name in ("megatron", "checkpoints"))


def find_change(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two nested values differ: its dotted name, and both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            changed = find_change(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if changed is not None:
                return changed
        return None
    return None if before == now else (name, before, now)
