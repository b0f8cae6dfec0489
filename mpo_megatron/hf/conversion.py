"""conversion.json of a Megatron checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mpo_megatron.config import ConfigError, require
from mpo_megatron.files.digests import check_file
from mpo_megatron.files.objects import build_record, read_object


class CheckpointError(ConfigError):
    """A checkpoint cannot be converted; the message names the file and the tensor."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """conversion.json: source and format of the converted weights."""

    architecture: str
    """`architectures[0]` of the Hugging Face config."""
    vocab_size: int
    """Rows of the Hugging Face embedding."""
    padded_vocab_size: int
    """Rows of the Megatron embedding; rows from `vocab_size` on are zero padding."""
    dtype: str
    """Dtype of most weights, by its torch name: bfloat16, float16 or float32."""
    digest: str
    """SHA-256 of the Hugging Face weights' names, dtypes, shapes and bytes."""
    tied_output_stored: bool = False
    """Whether the source stored a copy of its tied embedding as lm_head.weight; export then writes it again."""
    others: str | None = None
    """Folder with the source's weights outside the language model; None if there were none, or they were dropped."""
    others_digest: str | None = None
    """SHA-256 of these weights, computed as `digest`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages used for the conversion."""


def load_conversion(folder: str | Path) -> Conversion:
    """Read conversion.json of a Megatron checkpoint folder.

    Raises:
        ConfigError: it is missing, damaged, or not in this version's format.
    """
    path = Path(folder) / "conversion.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; it is part of a Megatron checkpoint folder: convert or copy it again.")
    check_file(path)
    remedy = "convert or copy it again"
    found = build_record(Conversion, read_object(path, remedy), path, remedy)
    require(
        0 < found.vocab_size <= found.padded_vocab_size,
        f"{path}: vocab_size = {found.vocab_size}, padded_vocab_size = {found.padded_vocab_size}; {remedy}.",
    )
    return found


VOCAB_MULTIPLE = 128
"""Default multiple to which the vocabulary is padded."""


def padded_vocab_size(vocab_size: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """`vocab_size` rounded up to a multiple of `multiple`, so that tensor-parallel ranks can shard it."""
    return -(-vocab_size // multiple) * multiple
