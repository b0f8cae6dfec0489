"""Whose weights a Megatron checkpoint's folder holds: a whole model's, or an adapter's. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import load_conversion

PEFT_CONFIG = "adapter_config.json"
"""What PEFT describes an adapter in."""
PEFT_WEIGHTS = "adapter_model.safetensors"
"""What PEFT keeps an adapter's matrices in."""
ADAPTER_FILE = "adapter.json"
"""What a folder has besides if it holds an adapter alone; `hf.adapter` reads it whole."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether a Megatron checkpoint's folder holds an adapter alone."""
    return (folder / ADAPTER_FILE).is_file()


def read_adapter_file(folder: Path) -> dict[str, Any]:
    """adapter.json of a folder.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / ADAPTER_FILE
    digests.check_file(path)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: does not parse ({error}); copy the adapter again.") from error
    return content


def weights_digest(folder: Path) -> str:
    """Identity of a checkpoint's weights: what `mpo convert` computed, or that of the files of a run's step, which carries the
    conversion record of the model it began with; to an adapter its base model belongs."""
    adapter = read_adapter_file(folder) if is_adapter_folder(folder) else None
    if adapter is None and not (folder / digests.STATE).is_file():
        return load_conversion(folder).digest
    weights = sorted([name, digest] for name, (_, digest) in digests.require_list(folder).items() if name.startswith("megatron/"))
    whole = weights if adapter is None else [weights, adapter]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def base_digest(folder: Path) -> str:
    """Identity of the base model's weights: of an adapter's base, or of a whole model, beside which adapters can be trained."""
    return str(read_adapter_file(folder).get("base_digest")) if is_adapter_folder(folder) else weights_digest(folder)


def adapter_rank(folder: Path) -> int:
    """The rank that adapter_config.json of PEFT's folder names.

    Raises:
        ConfigError: it is damaged.
    """
    path = folder / PEFT_CONFIG
    digests.check_file(path)
    try:
        return int(json.loads(path.read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: names no rank ({error!r}); copy the adapter again.") from error
