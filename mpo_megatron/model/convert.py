"""`mpo convert`: convert a Hugging Face checkpoint to a Megatron one or back, a few rows at a time.

A Megatron checkpoint folder contains
    megatron/          torch_dist checkpoint: the names of Megatron-Core's GPTModel, loadable at any TP × PP
    hf/                all files of the Hugging Face folder except the weights
    conversion.json    what export and training need (`Conversion`)
    mpo_digests.json   size and digests of all these files
Everything is checked before anything is written; the output gets its name only when complete.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mpo_megatron.config import ConvertConfig, is_hub_name, require, validate_convert
from mpo_megatron.data.hub import download_model
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import Adapter, splits_tied
from mpo_megatron.families.rules import OUTPUT
from mpo_megatron.hf.adapter import find_base
from mpo_megatron.hf.identity import is_adapter_folder
from mpo_megatron.hf.quantization import require_package
from mpo_megatron.model.convert_adapter import (
    check_output_copy,
    export_adapter,
    import_adapter,
    read_matrices,
    read_peft,
    require_base,
)
from mpo_megatron.model.convert_export import export_to_hf, read_weights
from mpo_megatron.model.convert_folder import find_megatron_checkpoint
from mpo_megatron.model.convert_import import import_from_hf
from mpo_megatron.model.hf_names import is_adapter
from mpo_megatron.model.merge_report import describe_change, read_tokens
from mpo_megatron.model.merging import Rounding, merge_all, merged_config, trained_merger


def convert(config: ConvertConfig) -> None:
    """Convert `config.input` to `config.output`; the input folder's content determines the direction.

    Raises:
        ConfigError: the input cannot be converted, or the output cannot be written; no partial output remains.
    """
    validate_convert(config)
    source, output = Path(config.input), Path(config.output)
    if is_hub_name(config.input):
        source = download_model(config.input, "input", config.revision)
    megatron = find_megatron_checkpoint(source)
    if is_adapter(source) or (megatron is not None and is_adapter_folder(megatron)):
        _convert_adapter(config, megatron, output)
        return
    for name, value in (("base", config.base), ("merge", config.merge)):
        require(not value, f"{name} = {value}, but input = {source} is a whole model, not an adapter; remove it.")
    if megatron is not None:
        require(
            config.others == "keep",
            f"others = {config.others}, but input = {source} is a Megatron checkpoint; it applies to conversions to "
            "Megatron only: remove it.",
        )
        require(
            not config.resize_vocabulary,
            f"resize_vocabulary = true, but input = {source} is a Megatron checkpoint; only conversions to Megatron add rows: "
            "remove it.",
        )
        export_to_hf(megatron, output, max_shard_bytes=config.max_shard_gib * 2**30)
        return
    require(
        (source / "config.json").is_file(),
        f"input = {source} is neither a Hugging Face checkpoint (no config.json) nor a Megatron one (no megatron/, no "
        "checkpoints/step_*).",
    )
    import_from_hf(
        *(source, output),
        vocab_multiple=config.vocab_multiple,
        resize_vocabulary=config.resize_vocabulary,
        drop_others=config.others == "drop",
    )


def _convert_adapter(config: ConvertConfig, megatron: Path | None, output: Path) -> None:
    """Convert an adapter from PEFT's form to Megatron's or back, or merge it into its base model.

    Args:
        megatron: the Megatron checkpoint folder; None if the input is a PEFT folder
    """
    source = Path(config.input)
    if not config.merge:
        if megatron is None:
            import_adapter(source, output, require_base(config.base, source))
        else:
            export_adapter(megatron, output, config.base)
        return
    if megatron is None:
        base = require_base(config.base, source)
        adapter, matrices = read_peft(source, load_family(base / "hf"))
        check_output_copy(source, base)
    else:
        record, matrices = read_matrices(megatron)
        adapter, base = record.adapter, find_base(megatron, record, config.base, "base")
    family = load_family(base / "hf")
    tokens = None if config.compare_text is None else read_tokens(Path(config.compare_text), base)
    if adapter.quantize != "none":
        require_package(adapter.quantize)
        print(
            f"merged into the base weights as {adapter.quantize} rounds them: the adapter was trained on these",
            file=sys.stderr,
        )
    merge_to_hf(base, adapter, matrices, output, max_shard_bytes=config.max_shard_gib * 2**30)
    if tokens is not None:
        merge = trained_merger(family, adapter, matrices, None)

        def exact() -> Iterator[tuple[str, Tensor]]:  # float32 weights are summed in float64 and rounded to float32
            return merge_all(family, adapter, ((name, weight.float()) for name, weight in read_weights(base, family)), merge)

        def rounded() -> Iterator[tuple[str, Tensor]]:
            return merge_all(family, adapter, read_weights(base, family), merge)

        print(describe_change(merged_config(family, adapter), tokens, exact, rounded), file=sys.stderr)


def merge_to_hf(base: Path, adapter: Adapter, matrices: dict[str, Tensor], output: Path, *, max_shard_bytes: float) -> None:
    """Write the Hugging Face checkpoint `output` of a Megatron checkpoint with an adapter merged into its weights."""
    rounding, family = Rounding(), load_family(base / "hf")
    change, untie = trained_merger(family, adapter, matrices, rounding), splits_tied(family, adapter)
    export_to_hf(base, output, max_shard_bytes=max_shard_bytes, change=change, untie=untie)
    print(rounding.describe(), file=sys.stderr)
    if untie:
        print(f"the output layer has its own weights, {OUTPUT}: tie_word_embeddings = false in config.json", file=sys.stderr)
