"""What a configuration is refused with, and checks that more than one command needs."""

from __future__ import annotations

import tempfile
from pathlib import Path


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, the rule and the fix."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_writable(folder: Path, name: str) -> None:
    """Raise `ConfigError` if `folder` (or its nearest existing parent) cannot be written to."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    require(parent.is_dir(), f"{name} = {folder}; {parent} is a file, not a folder; choose another path.")
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ConfigError(f"{name} = {folder}; cannot write in {parent} ({error.strerror}); choose another path.") from error
