"""Configurations saved as YAML, with a digest in a leading comment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
import yaml

from mpo_megatron.config.checks import require

MARK = "# xxh3: "
"""Prefix of the first line."""


def seal_yaml(options: Mapping[str, Any]) -> bytes:
    """The options as YAML with a digest for `check_seal`."""
    text = yaml.safe_dump(dict(options), sort_keys=False)
    return f"{MARK}{_digest(text)}\n{text}".encode()


def check_seal(path: Path, text: str) -> None:
    """Refuse a saved configuration that has changed; one without a digest was written by hand, and passes.

    Raises:
        ConfigError: it is damaged or changed.
    """
    first, _, body = text.partition("\n")
    require(
        not first.startswith(MARK) or first.removeprefix(MARK) == _digest(body),
        f"{path}: damaged or changed: the digest in its first line does not match; if you changed it yourself, remove that line.",
    )


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
