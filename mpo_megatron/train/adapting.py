"""Adapters in a run: which one it trains, on which base weights, and how both are loaded.

If `model.checkpoint` is a whole model, it is the base of a new adapter. If it is an adapter, saved by a run or imported by
`mpo convert`, training continues with it on its own base model.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from mpo_megatron.config import ConfigError, TrainConfig, require
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import OUTPUT_LAYER, Adapter, choose_adapter, splits_tied
from mpo_megatron.hf.adapter import AdapterRecord, find_base, read_adapter
from mpo_megatron.hf.identity import is_adapter_folder, weights_digest
from mpo_megatron.model.adapter_weights import initialize_adapters
from mpo_megatron.model.adapters import clear_adapters
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.setup import Setup


def choose_shape(config: TrainConfig, family: Family) -> Adapter | None:
    """The adapter that the run trains; None if it trains all weights.

    Raises:
        ConfigError: the options do not fit the adapter in `model.checkpoint`, or the whole model there.
    """
    folder, wanted = Path(config.model.checkpoint), choose_adapter(family, config.lora)
    if not is_adapter_folder(folder):
        require(
            config.lora.base is None,
            f"lora.base = {config.lora.base}, but model.checkpoint = {folder} is a whole model, not an adapter; remove it.",
        )
        require(
            wanted is not None or config.lora.quantize in (None, "none"),
            f"lora.quantize = {config.lora.quantize}, but all weights are trained, and only frozen weights can have 4 bits; "
            "set lora.rank.",
        )
        return wanted
    saved = read_adapter(folder).adapter
    # Not part of the adapter itself: an adapter trained on full-precision weights may continue on 4-bit weights.
    adapter = dataclasses.replace(saved, quantize=config.lora.quantize or saved.quantize)
    if wanted is not None:
        wanted = dataclasses.replace(wanted, quantize=adapter.quantize)
        check_shape(wanted, adapter, f"model.checkpoint = {folder}", "remove lora.* to continue with it")
    return adapter


def find_record(config: TrainConfig, adapter: Adapter) -> AdapterRecord:
    """The run's adapter with the folder and the identity of its base model.

    Args:
        adapter: from `choose_shape`
    Raises:
        ConfigError: the base model is missing, or another one.
    """
    folder = Path(config.model.checkpoint)
    if not is_adapter_folder(folder):
        return AdapterRecord(adapter=adapter, base=os.path.abspath(folder), base_digest=weights_digest(folder))
    saved = dataclasses.replace(read_adapter(folder), adapter=adapter)
    return dataclasses.replace(saved, base=os.path.abspath(find_base(folder, saved, config.lora.base, "lora.base")))


def check_output_layer(config: TrainConfig, family: Family, adapter: Adapter) -> None:
    """Check that the run supports an adapter of the output layer, if it has one.

    Raises:
        ConfigError: names the option, the reason and the fix.
    """
    require(
        adapter.target_modules != (OUTPUT_LAYER,) or config.parallel.pipeline == 1,
        f"lora.target_modules = {OUTPUT_LAYER} with parallel.pipeline = {config.parallel.pipeline}: only the last stage would "
        "train; add other layers, or set parallel.pipeline = 1.",
    )
    require(
        not splits_tied(family, adapter) or config.online.kl_weight == 0,
        f"lora.target_modules names {OUTPUT_LAYER}, which is tied to the embedding, with online.kl_weight: engines hold one "
        f"weight for both; remove {OUTPUT_LAYER}.",
    )


def check_shape(wanted: Adapter, found: Adapter, what: str, fix: str) -> None:
    """Refuse an adapter of another shape.

    Raises:
        ConfigError: names the first field that differs.
    """
    for item in dataclasses.fields(Adapter):
        ours, theirs = getattr(wanted, item.name), getattr(found, item.name)
        require(ours == theirs, f"{what} holds an adapter with {item.name} = {theirs}, but lora.{item.name} = {ours}; {fix}.")


def load_model(parts: list[torch.nn.Module], folder: str | Path, record: AdapterRecord | None, ranks: Ranks) -> None:
    """Load a folder's weights: a whole model, with zero adapters, or an adapter with its base model.

    Raises:
        ConfigError: files are missing or damaged, or belong to another model, or to an adapter of another shape.
    """
    folder = Path(folder)
    if not is_adapter_folder(folder):
        checkpoint.load_weights(parts, folder, ranks)
        clear_adapters(parts)
        return
    if record is None:
        raise ConfigError(
            f"{folder} holds an adapter alone, but the other model is a whole one; merge it: mpo convert --merge true "
            f"--input {folder} --output …, and convert the output."
        )
    saved = read_adapter(folder)
    found = dataclasses.replace(saved.adapter, quantize=record.adapter.quantize)  # both use the same base weights
    check_shape(record.adapter, found, str(folder), "policy and reference need adapters of the same shape")
    checkpoint.load_weights(parts, find_base(folder, saved, record.base, "lora.base"), ranks)
    checkpoint.load_adapter(parts, folder, ranks)


def start_adapters(parts: list[torch.nn.Module], setup: Setup, ranks: Ranks) -> None:
    """Initialise a new adapter; a loaded one stays unchanged."""
    if setup.record is not None and not is_adapter_folder(setup.model_folder):
        initialize_adapters(parts, setup.family, setup.record.adapter, ranks, setup.config.seed)
