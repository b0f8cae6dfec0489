"""Options of `mpo convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpo_megatron.config.checks import check_writable, is_hub_name, require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Section):
    """`mpo convert`: convert a Hugging Face checkpoint to a Megatron one, or back; the input determines the direction. LoRA
    adapters are converted from and to PEFT folders."""

    input: str
    """Input: a Hugging Face folder (config.json + safetensors), a model's name on the hub, or a Megatron checkpoint (from convert
    or train)."""
    output: str
    """Output folder; it must be missing or empty."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; by default main."""
    resize_vocabulary: bool = False
    """If the tokenizer has more tokens than the embedding has rows, add rows to it and to the output layer, each the mean of the
    others, and raise vocab_size in config.json."""
    others: Literal["keep", "drop"] = "keep"
    """Weights outside the language model (a vision tower, layers for multi-token prediction): `keep` them unchanged for export,
    or `drop` them, which turns a multimodal checkpoint into its text model's."""
    vocab_multiple: int = 128
    """Pad the Megatron vocabulary to a multiple of this; any tensor-parallel size that divides it can load the checkpoint."""
    max_shard_gib: float = 4.0
    """Largest safetensors file to write, in GiB, unless one tensor alone is larger."""
    base: str | None = None
    """Megatron checkpoint of an adapter's base model; by default, its folder when the adapter was trained."""
    merge: bool = False
    """Merge the adapter into its base model, and write a Hugging Face checkpoint instead of the adapter."""
    compare_text: str | None = None
    """Text file on which `merge` reports how rounding the merged weights changes log-probs; needs memory for a float32 model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.vocab_multiple >= 1, f"vocab_multiple = {self.vocab_multiple}; it must be at least 1; try 128.")
        require(
            self.compare_text is None or self.merge,
            f"compare_text = {self.compare_text} without merge; set merge to true, or remove it.",
        )
        require(self.max_shard_gib > 0, f"max_shard_gib = {self.max_shard_gib}; it must be positive; try 4.")


def validate_convert(config: ConvertConfig) -> None:
    """Check that the input exists, and that the output can be written.

    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    source, output = Path(config.input), Path(config.output)
    if not is_hub_name(config.input):
        require(source.exists(), f"input = {source}; no such folder, and not a hub name such as Qwen/Qwen3-14B.")
        require(source.is_dir(), f"input = {source}; it is a file; name the checkpoint's folder.")
        require(
            config.revision is None,
            f"revision = {config.revision}, but input = {source} is a folder; only models on the hub have revisions: remove it.",
        )
    require(
        not output.exists() or (output.is_dir() and not any(output.iterdir())),
        f"output = {output} is not empty; choose a new folder, or remove it.",
    )
    require(
        not output.resolve().is_relative_to(source.resolve()),
        f"output = {output} is inside input = {source}; choose a folder beside it.",
    )
    check_writable(output, "output")
