"""Resolve an option such as `model.checkpoint` to a Megatron checkpoint folder: the one place that decides.

A Megatron folder is used directly. A Hugging Face folder is converted once, into `<run>/converted/<its name>-<its digest>`. A
resumed run finds the same folder again; another model or tokenizer under the same path gets another folder.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from mpo_megatron.config import ConfigError, ModelConfig, check_checkpoint, is_hugging_face, require
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.data.tokenizer import count_tokens
from mpo_megatron.files.lock import hold
from mpo_megatron.hf.conversion import VOCAB_MULTIPLE
from mpo_megatron.hf.fingerprint import folder_digest
from mpo_megatron.model.convert_folder import side_files

NAME_BYTES = 200
"""Bytes of a Hugging Face folder's name in that of its conversion; most file systems allow 255 bytes a name."""
CONVERTED = "converted"
"""Folder of a run that holds the Megatron form of the Hugging Face folders in its configuration."""


def with_megatron_checkpoints(model: ModelConfig, run: Path, prefix: str = "") -> ModelConfig:
    """The same model options, with checkpoint and reference as Megatron checkpoint folders.

    Args:
        run: the run's folder
        prefix: prefix of the options' names in messages
    Raises:
        ConfigError: a Hugging Face folder that cannot be converted.
    """
    checkpoint = megatron_checkpoint(model.checkpoint, run, f"{prefix}model.checkpoint")
    reference = model.reference
    if reference not in (None, ADAPTER_OFF):
        reference = megatron_checkpoint(reference, run, f"{prefix}model.reference")
    return dataclasses.replace(model, checkpoint=checkpoint, reference=reference)


def megatron_checkpoint(path: str, run: Path, name: str) -> str:
    """The Megatron checkpoint folder for `path`; the first process converts a Hugging Face folder, the others wait.

    Args:
        run: the run's folder, which holds the conversion
        name: the option's name, for messages
    Raises:
        ConfigError: there is no checkpoint, or it cannot be converted, for example because the disk is too small.
    """
    folder = Path(path)
    check_checkpoint(folder, name)
    if not is_hugging_face(folder):
        return path
    require(
        not run.resolve().is_relative_to(folder.resolve()),
        f"output = {run} is inside {name} = {folder}, a Hugging Face folder; choose a folder beside it.",
    )
    digest = folder_digest(folder, side_files(folder))
    beginning = os.fsencode(folder.resolve().name)[:NAME_BYTES]  # with the digest, the name may be too long for the disk
    target = run / CONVERTED / f"{beginning.decode(errors='ignore')}-{digest[:12]}"
    if not target.is_dir():
        from mpo_megatron.model.convert_import import import_from_hf  # imports Megatron: seconds

        with hold(target.with_name(f".{target.name}.lock"), target, wait_seconds=math.inf):
            if not target.is_dir():
                print(f"{name} = {folder} is a Hugging Face folder: converting it, once, to {target}", flush=True)
                try:
                    count_tokens(folder)  # the conversion would only warn, and the run need a tokenizer that loads
                    import_from_hf(folder, target, vocab_multiple=VOCAB_MULTIPLE)
                except ConfigError as error:
                    raise ConfigError(f"{name} = {folder}, a Hugging Face folder, cannot be converted: {error}") from error
    elif "RANK" not in os.environ:  # print once, not on every rank
        print(f"{name} = {folder} is a Hugging Face folder: using its conversion {target}", flush=True)
    return str(target)
