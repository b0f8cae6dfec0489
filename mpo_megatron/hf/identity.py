"""Identity of the weights in a Megatron checkpoint folder: a whole model's, or an adapter's. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError
from mpo_megatron.files import digests
from mpo_megatron.files.objects import read_object
from mpo_megatron.hf.conversion import load_conversion

PEFT_CONFIG = "adapter_config.json"
"""PEFT's file that describes an adapter."""
PEFT_WEIGHTS = "adapter_model.safetensors"
"""PEFT's file of an adapter's matrices."""
COPY = "copy the adapter again"
"""The remedy for a damaged file of an adapter."""
ADAPTER_FILE = "adapter.json"
"""Additional file of a folder with an adapter alone; `hf.adapter` parses it."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether a Megatron checkpoint folder holds an adapter alone."""
    return (folder / ADAPTER_FILE).is_file()


def read_adapter_file(folder: Path) -> dict[str, Any]:
    """adapter.json of a folder.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / ADAPTER_FILE
    digests.check_file(path)
    return read_object(path, COPY)


def weights_digest(folder: Path) -> str:
    """Identity of a checkpoint's weights. For a conversion: its own digest. For a run's checkpoint: the digest of the step's
    files, because its conversion record describes the initial model. An adapter's identity includes its base model."""
    adapter = read_adapter_file(folder) if is_adapter_folder(folder) else None
    if adapter is None and not (folder / digests.STATE).is_file():
        return load_conversion(folder).digest
    weights = sorted([name, digest] for name, (_, digest) in digests.require_list(folder).items() if name.startswith("megatron/"))
    whole = weights if adapter is None else [weights, adapter]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def base_digest(folder: Path) -> str:
    """Identity of the base model's weights: those of an adapter's base, or of a whole model that adapters can be trained on."""
    return str(read_adapter_file(folder).get("base_digest")) if is_adapter_folder(folder) else weights_digest(folder)


def adapter_rank(folder: Path) -> int:
    """The rank in adapter_config.json of a PEFT folder.

    Raises:
        ConfigError: it is damaged.
    """
    return _read_peft_field(folder, "r", int)


def adapter_targets(folder: Path) -> frozenset[str]:
    """The target modules in adapter_config.json of a PEFT folder; a pattern as it is.

    Raises:
        ConfigError: it is damaged.
    """
    return _read_peft_field(folder, "target_modules", lambda value: frozenset([value] if isinstance(value, str) else value))


def adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = folder / PEFT_CONFIG
    digests.check_file(path)
    try:
        return read_object(path, COPY)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {COPY}.") from error


def _read_peft_field[Field](folder: Path, name: str, read: Callable[[Any], Field]) -> Field:
    settings = adapter_settings(folder)
    try:
        return read(settings[name])
    except (OverflowError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / PEFT_CONFIG}: field {name} is missing or damaged ({error!r}); {COPY}.") from error
