"""Checkpoints for generating and scoring, as Hugging Face folders; a Megatron checkpoint is exported once."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, check_writable, require
from mpo_megatron.files.digests import check_file, check_folder
from mpo_megatron.files.lock import hold
from mpo_megatron.hf.identity import PEFT_CONFIG, is_adapter_folder

EXPORT_FOLDER = "exported"
"""Folder beside a Megatron checkpoint's weights that holds its Hugging Face form."""
ALIGNED = "aligned"
"""Where `mpo align` leaves its model: its folder stands for it."""
_MAX_SHARD_BYTES = 4 * 2**30


def locate_model(path: str, name: str = "model", *, tokenizer_only: bool = False) -> Path:
    """Find the checkpoint at `path` without loading or exporting anything; `hugging_face_folder` takes the result.

    With `tokenizer_only`, any existing folder is accepted.

    Raises:
        ConfigError: there is no checkpoint.
    """
    folder = Path(path)
    if (folder / ALIGNED).is_dir():
        folder = folder / ALIGNED
    require(folder.is_dir(), f"{name} = {path}; no such folder; name the folder of a checkpoint or of a training run.")
    from mpo_megatron.model.convert_folder import find_megatron_checkpoint

    checkpoint = find_megatron_checkpoint(folder)
    if checkpoint is not None:
        return checkpoint
    require(
        tokenizer_only or is_peft(folder) or (folder / "config.json").is_file(),
        f"{name} = {path}; it is neither a Hugging Face checkpoint (no config.json), nor a Megatron checkpoint (no megatron/, no "
        "checkpoints/step_*), nor a PEFT adapter (no adapter_config.json).",
    )
    return folder


def is_peft(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter without its base model."""
    return (folder / PEFT_CONFIG).is_file() and not (folder / "config.json").is_file()


def is_adapter(checkpoint: Path) -> bool:
    """Whether a located checkpoint is an adapter, in PEFT's form or ours."""
    return is_peft(checkpoint) or is_adapter_folder(checkpoint)


def base_folder(folder: Path) -> Path:
    """The Hugging Face folder of the base model named by a PEFT adapter.

    Raises:
        ConfigError: the adapter names none, or it is not on this machine.
    """
    path = folder / PEFT_CONFIG
    check_file(path)
    try:
        name = json.loads(path.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: names no base model ({error!r}); copy the adapter again.") from error
    require(
        isinstance(name, str) and Path(name).is_dir(),
        f"{path}: base_model_name_or_path = {name}; no such folder; put the base model there, or correct the path.",
    )
    base = locate_model(name, f"{path}: base_model_name_or_path")
    require(not is_peft(base), f"{path}: base_model_name_or_path = {name}, which is an adapter too; merge that one first.")
    return hugging_face_folder(base)


def side_files(checkpoint: Path) -> Path:
    """The folder with a located checkpoint's config.json and tokenizer."""
    return checkpoint / "hf" if (checkpoint / "megatron").is_dir() else checkpoint


def hugging_face_folder(checkpoint: Path) -> Path:
    """The Hugging Face form of a located checkpoint; a Megatron checkpoint is exported into its own folder, once.

    An adapter's is a PEFT folder; it names the base model's Hugging Face folder, exported in the same way.

    Raises:
        ConfigError: the checkpoint cannot be exported, space is missing, or a file that `mpo convert` wrote is damaged.
    """
    target = checkpoint / EXPORT_FOLDER if (checkpoint / "megatron").is_dir() else checkpoint
    if target.is_dir():
        check_folder(target, weights=True)
        return target
    from mpo_megatron.hf.adapter import find_base, read_adapter
    from mpo_megatron.model.convert_adapter import export_adapter
    from mpo_megatron.model.convert_export import export_to_hf  # imports Megatron: seconds

    check_writable(checkpoint, "model")
    with hold(
        checkpoint / f".{EXPORT_FOLDER}.lock", target, wait_seconds=math.inf
    ):  # other shards wait for the first one's export
        if not target.is_dir() and is_adapter_folder(checkpoint):
            base = hugging_face_folder(find_base(checkpoint, read_adapter(checkpoint), None, "mpo convert --base"))
            export_adapter(checkpoint, target, str(base.absolute()))
        elif not target.is_dir():
            export_to_hf(checkpoint, target, max_shard_bytes=_MAX_SHARD_BYTES)
    return target


def read_model_settings(checkpoint: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json, or another JSON file, of a located checkpoint, parsed.

    Raises:
        ConfigError: it is damaged.
    """
    home = base_folder(checkpoint) if is_peft(checkpoint) and name == "config.json" else side_files(checkpoint)
    path = home / name
    check_file(path)
    try:
        settings: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); copy the checkpoint again.") from error
    return settings


def choose_dtype(dtype: str, device: str | None, settings: Mapping[str, Any]) -> str:
    """The dtype of the weights for `auto` or a dtype's name: float32 instead of 16 bits on a CPU without bfloat16 instructions.

    Args:
        device: torch's name of the device; None for several GPUs
        settings: config.json
    """
    from mpo_megatron.device import computes_bf16  # imports torch

    sections = (settings, *(part for part in settings.values() if isinstance(part, dict)))  # of a multimodal model: text_config
    half = any(part.get(name) in ("bfloat16", "float16") for part in sections for name in ("dtype", "torch_dtype"))
    if dtype != "auto" or device != "cpu" or not half or computes_bf16():
        return dtype
    print(
        "dtype = auto: float32, twice the memory of the checkpoint's 16 bits, because this processor has no instructions for "
        "bfloat16, which takes several times as long.",
        file=sys.stderr,
    )
    return "float32"


def choose_device(name: str) -> str:
    """The torch device for `auto` or a device name.

    Raises:
        ConfigError: torch does not know the device, or it does not exist here.
    """
    import torch

    if name == "auto":
        # torchrun's ranks share a stage, one GPU each
        gpu = os.environ.get("LOCAL_RANK") if "TORCHELASTIC_RUN_ID" in os.environ else None
        return ("cuda" if gpu is None else f"cuda:{gpu}") if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1).to(name)  # on a machine without a GPU `device` lets torch.empty take cuda for the CPU
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device = {name}; torch cannot use it: {str(error).splitlines()[0]}") from error
    return name
