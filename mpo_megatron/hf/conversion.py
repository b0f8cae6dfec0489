"""conversion.json of a Megatron checkpoint's folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mpo_megatron.config import ConfigError
from mpo_megatron.files.digests import check_file


class CheckpointError(ConfigError):
    """A checkpoint that cannot be converted; the message names the file and the tensor."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """conversion.json: what was converted."""

    architecture: str
    """`architectures[0]` of the Hugging Face config."""
    vocab_size: int
    """Rows of the Hugging Face embedding."""
    padded_vocab_size: int
    """Rows of the Megatron embedding; those from `vocab_size` on are zero padding."""
    dtype: str
    """The dtype that most weights have, as torch names it: bfloat16, float16 or float32."""
    digest: str
    """SHA-256 of the Hugging Face weights' names, dtypes, shapes and bytes."""
    tied_output_stored: bool = False
    """Whether the source held a copy of its tied embedding as lm_head.weight; export then writes it again."""
    others: str | None = None
    """Folder with the source's weights that are not the language model's; None if there were none, or if they were dropped."""
    others_digest: str | None = None
    """SHA-256 of theirs, as `digest`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that converted."""


def load_conversion(folder: str | Path) -> Conversion:
    """Read conversion.json of a Megatron checkpoint folder.

    Raises:
        ConfigError: it is missing, damaged, or not what this version writes.
    """
    path = Path(folder) / "conversion.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; it is part of a Megatron checkpoint folder: convert or copy it again.")
    check_file(path)
    try:
        return Conversion(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: does not parse ({error}); convert or copy it again.") from error


VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this by default."""


def padded_vocab_size(vocab_size: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """`vocab_size` rounded up to a multiple of `multiple`, so that tensor-parallel ranks can share it out."""
    return -(-vocab_size // multiple) * multiple
