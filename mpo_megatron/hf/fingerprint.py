"""Fingerprints of checkpoints, without reading all of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mpo_megatron.hf.identity import ADAPTER_FILE, PEFT_CONFIG

_BLOCK, _NUM_BLOCKS = 2**16, 64
"""Blocks of a weight file that enter its digest, evenly spread."""


def model_digest(checkpoint: Path) -> str:
    """A fingerprint of a checkpoint's weights and config: names, sizes and evenly spread blocks of every weight file.

    Reads only some bytes, so that a 30 GB model takes no minutes; two checkpoints of one training differ in almost every byte.
    """
    digest = hashlib.sha256()
    is_megatron = (checkpoint / "megatron").is_dir()
    weights = checkpoint / "megatron" if is_megatron else checkpoint
    for path in sorted([*weights.glob("*.safetensors"), *weights.glob("*.bin"), *weights.glob("*.distcp")]):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in sorted({max(0, size - _BLOCK) * index // (_NUM_BLOCKS - 1) for index in range(_NUM_BLOCKS)}):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    for config in (
        (checkpoint / "hf" if is_megatron else checkpoint) / "config.json",
        checkpoint / PEFT_CONFIG,
        checkpoint / ADAPTER_FILE,
    ):
        digest.update(config.read_bytes() if config.is_file() else b"")
    return digest.hexdigest()


def folder_digest(checkpoint: Path, side_files: list[Path]) -> str:
    """A fingerprint of a Hugging Face folder: the model's, and every byte of the files beside its weights."""
    digest = hashlib.sha256(model_digest(checkpoint).encode())
    for path in side_files:
        digest.update(f"\0{path.relative_to(checkpoint)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
