"""Options of `mpo convert`."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """`mpo convert`: a Hugging Face checkpoint to a Megatron one, or back; the direction follows from the input."""

    input: str
    """Folder to read: a Hugging Face checkpoint (config.json + safetensors), or a Megatron one (convert's or train's output)."""
    output: str
    """Folder to write; it must not exist yet, or be empty."""
    vocab_multiple: int = 128
    """The Megatron checkpoint's vocabulary is padded to a multiple of this; any tensor-parallel size dividing it can load it."""
    max_shard_gib: float = 4.0
    """Largest safetensors file written on the way out, in GiB; also about the peak memory of the conversion."""

    def __post_init__(self) -> None:
        require(self.vocab_multiple >= 1, f"vocab_multiple = {self.vocab_multiple}; it must be at least 1; try 128.")
        require(self.max_shard_gib > 0, f"max_shard_gib = {self.max_shard_gib}; it must be positive; try 4.")
