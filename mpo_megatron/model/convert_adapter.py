"""Convert adapters: PEFT folders to Megatron checkpoints of an adapter alone, and back.

A Megatron checkpoint folder with an adapter alone also has adapter.json (`hf.adapter`); its hf/ and conversion.json are the
base model's. Adapters are small, so memory holds their whole matrices, but never the base model's weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.config import ConfigError, require
from mpo_megatron.config.values import check_value
from mpo_megatron.families import Family, load_family
from mpo_megatron.families.adapters import (
    ADAPTER,
    OUTPUT_LAYER,
    PEFT_KEEPS_BASE,
    PEFT_PREFIX,
    Adapter,
    adaptable_modules,
    leaf,
    peft_misses_experts,
    vllm_refuses,
)
from mpo_megatron.families.rules import TEXT_MODEL, output_rule
from mpo_megatron.files import digests
from mpo_megatron.files.objects import read_object
from mpo_megatron.hf.adapter import AdapterRecord, read_adapter
from mpo_megatron.hf.conversion import CheckpointError, load_conversion
from mpo_megatron.hf.identity import ADAPTER_FILE, PEFT_CONFIG, PEFT_WEIGHTS, weights_digest
from mpo_megatron.model.convert_folder import copy_side_files, staged
from mpo_megatron.model.convert_torch_dist import CheckpointReader, StoredChunk, write_checkpoint
from mpo_megatron.model.odd_values import OddValues
from mpo_megatron.model.resizing import warn_of_tokenizer
from mpo_megatron.model.safetensors_io import DTYPE_NAMES, RowReader, StoredTensor, read_header, write_tensors
from mpo_megatron.model.weight_map import Slice, build_adapter_map
from mpo_megatron.terminal.visible import visible

OUTPUT_COPY = f"{PEFT_PREFIX}{OUTPUT_LAYER}.base_layer.weight"
"""Copy of the output layer's base weight, which PEFT saves beside its adapter."""
ROWS_AT_ONCE = 4096
"""Rows of it compared at a time."""

ORIGINAL = "peft"
"""Folder that keeps the original adapter_config.json of a converted adapter."""

READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights"})
"""Fields of adapter_config.json that determine the adapter's computation, and that are supported."""
HARMLESS = frozenset(
    {
        *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
        *("lora_dropout", "ensure_weight_tying", "qalora_group_size", "megatron_core", "layers_pattern", "exclude_modules"),
    }
)
"""Fields without effect on a trained adapter's outputs without dropout; the weights' names determine the rest."""


# --------------------------------------------------------------------------------------------------- reading


def read_peft(source: Path, family: Family) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter's shape, and its matrices by their names in the PEFT folder.

    Raises:
        CheckpointError: the adapter is not plain LoRA, has weights for layers that cannot have an adapter, or is damaged.
    """
    settings = _read_settings(source / PEFT_CONFIG)
    require(
        (source / PEFT_WEIGHTS).is_file(),
        f"{source} has no {PEFT_WEIGHTS}; adapters saved as pickles (.bin) are not read: load and save it with peft once.",
    )
    stored = read_header(source / PEFT_WEIGHTS)
    stored.pop(OUTPUT_COPY, None)
    known = adaptable_modules(family)
    named = {leaf(name.rpartition(".lora_")[0] + ".weight") for name in stored if ".lora_" in name}
    rank = settings["r"]
    adapter = Adapter(
        rank=rank,
        alpha=float(settings["lora_alpha"]),
        rslora=bool(settings.get("use_rslora", False)),
        target_modules=tuple(name for name in known if name in named),
    )
    _check_names(stored, build_adapter_map(family, adapter, family.vocab_size), source / PEFT_WEIGHTS, known)
    with RowReader() as reader:
        matrices = {}
        for name, tensor in stored.items():
            matrices[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            reader.read(tensor, 0, matrices[name])
    return adapter, matrices


def check_output_copy(source: Path, base: Path, read: Callable[[int, int], Tensor] | None = None) -> None:
    """Check that the output layer's base weight in a PEFT folder, if it has one, is that of the base model.

    Args:
        base: the base model's Megatron checkpoint, or with `read` its Hugging Face folder
        read: returns so many rows of its output layer, from a first one; by default, from the checkpoint
    Raises:
        CheckpointError: it has other values, as after a change of the vocabulary.
    """
    copy = read_header(source / PEFT_WEIGHTS).get(OUTPUT_COPY)
    if copy is None:
        return
    family = load_family(base if read else base / "hf")
    if read is None:
        checkpoint = CheckpointReader(base / "megatron")
        embedding = family.rules[0]
        key = embedding.megatron if family.tie_word_embeddings else output_rule(embedding).megatron

        def read(first: int, rows: int) -> Tensor:
            return checkpoint.read(key, [first, 0], [rows, family.hidden_size])

    same = copy.shape == (family.vocab_size, family.hidden_size)
    with RowReader() as reader:
        for first in range(0, family.vocab_size, ROWS_AT_ONCE) if same else ():
            own = torch.empty((min(ROWS_AT_ONCE, family.vocab_size - first), family.hidden_size), dtype=copy.dtype)
            reader.read(copy, first, own)
            same = same and torch.equal(read(first, len(own)).to(copy.dtype), own)
    require(
        same,
        f"{source}: {OUTPUT_COPY} is {list(copy.shape)}, and not the output layer's weight in {base}; the adapter was trained on "
        "a model with another vocabulary or other weights: save that model, convert it, and name it with base.",
    )


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_object(path, "copy or download it again")
    try:
        kind, rank, alpha = settings["peft_type"], settings["r"], settings["lora_alpha"]
    except KeyError as error:
        raise CheckpointError(
            f"{path}: not the configuration of a LoRA adapter ({error!r}); copy or download it again."
        ) from error
    require(kind == "LORA", f"{path}: peft_type = {kind}; only LORA is read.")
    for name, expected in (("r", int), ("lora_alpha", float), ("use_rslora", bool)):
        try:
            check_value(expected, settings.get(name, False), name)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
    require(rank >= 1 and alpha > 0, f"{path}: r = {rank}, lora_alpha = {alpha}; both must be positive.")
    start = settings.get("init_lora_weights")
    require(
        start in PEFT_KEEPS_BASE,
        f"{path}: init_lora_weights = {start}, with which PEFT changes the base weights, too; save the adapter with peft's "
        "path_initial_model_for_weight_conversion, which makes it an adapter of the original weights.",
    )
    for name, value in settings.items():
        if name not in READ | HARMLESS and value and (name, value) != ("bias", "none"):
            raise CheckpointError(
                f"{path}: {name} = {value}, which is not supported; train the adapter without it, or merge it in peft "
                "(merge_and_unload) and convert the merged model."
            )
    return settings


def _check_names(stored: dict[str, StoredTensor], slices: list[Slice], path: Path, known: dict[str, str]) -> None:
    expected = {placement.name: placement.shape for item in slices for placement in item.placements}
    unknown = [name for name in stored if name not in expected]
    if unknown or not expected:
        raise CheckpointError(
            f"{path}: {len(unknown)} of {len(stored)} weights belong to no layer of the base model that can have an adapter: "
            f"{', '.join(unknown[:3])}; those are {', '.join(known)}, in all layers. {_explain(unknown, expected)}"
        )
    missing = [name for name in expected if name not in stored]
    require(
        not missing,
        f"{path}: {len(missing)} of {len(expected)} weights are missing ({', '.join(missing[:3])}); all layers must have the "
        "same adapters, A and B.",
    )
    for name, shape in expected.items():
        require(
            stored[name].shape == shape,
            f"{path}: {name} is {list(stored[name].shape)}, but {list(shape)} according to the base model's config.json and "
            f"{PEFT_CONFIG}. Is it an adapter of this model?",
        )


def _explain(unknown: list[str], expected: Collection[str]) -> str:
    """Why weights may have other names than the base model's layers, and what to do."""
    if set(unknown) <= {name.replace(TEXT_MODEL, "model.", 1) for name in expected}:
        return "The adapter was trained on the text model alone: convert the base model with --others drop, and name that one."
    if {name.replace(TEXT_MODEL, "model.", 1) for name in unknown} <= set(expected):
        return "The adapter was trained on the multimodal model: convert that one with --others keep, and name it."
    return "Is it an adapter of this model?"


def read_matrices(source: Path) -> tuple[AdapterRecord, dict[str, Tensor]]:
    """An adapter and its matrices, by their PEFT names, from a Megatron checkpoint folder.

    Raises:
        ConfigError: a file is missing or damaged, or a matrix has another shape.
    """
    digests.require_list(source)
    digests.check_folder(source, weights=False)
    record = read_adapter(source)
    checkpoint = CheckpointReader(source / "megatron")
    slices = build_adapter_map(load_family(source / "hf"), record.adapter, load_conversion(source).padded_vocab_size)
    keys, metadata = {item.key for item in slices}, source / "megatron" / ".metadata"
    unknown = [key for key in checkpoint.tensors if ADAPTER in key and not key.startswith("optimizer.") and key not in keys]
    require(
        not unknown,
        f"{metadata}: holds {', '.join(unknown[:1])}, which adapter.json does not name; copy it again.",
    )
    matrices = {}
    for item in slices:
        entry = checkpoint.tensors.get(item.key)
        require(entry is not None, f"{metadata}: the adapter's weight {item.key} is missing; copy the checkpoint again.")
        assert entry is not None
        require(
            tuple(entry.size) == item.global_shape and entry.properties.dtype in DTYPE_NAMES,
            f"{metadata}: {item.key} is {list(entry.size)}, {entry.properties.dtype}; but {list(item.global_shape)} "
            "according to adapter.json; copy the checkpoint again.",
        )
        (placement,) = item.placements
        offsets, sizes = [*item.index, *(0 for _ in item.shape)], [*(1 for _ in item.index), *item.shape]
        matrices[placement.name] = placement.gather(checkpoint.read(item.key, offsets, sizes).reshape(item.shape))
    return record, matrices


# --------------------------------------------------------------------------------------------------- writing


def export_adapter(source: Path, output: Path, base_name: str | None = None) -> None:
    """Write a PEFT folder of the adapter in a Megatron checkpoint folder.

    Args:
        base_name: name of the base model in adapter_config.json; by default, its folder here
    Raises:
        ConfigError: a file is missing or damaged.
    """
    record, matrices = read_matrices(source)
    family = load_family(source / "hf")
    if peft_misses_experts(family, record.adapter):
        print(
            "WARNING: with transformers 5, PEFT loads adapters of this model's experts wrongly, without an error; to use it "
            "there, merge the adapter (merge: true), or train with lora.target_modules = attention.",
            file=sys.stderr,
        )
    refusal = vllm_refuses(family, record.adapter.rank, record.adapter.target_modules)
    if refusal is not None:
        text = f"WARNING: {refusal.reason}: vLLM cannot load it; merge the adapter (merge: true) to serve it there."
        print(visible(text), file=sys.stderr)
    _warn_of_odd(matrices, source)
    warn_of_tokenizer(source / "hf", family)
    with staged(output, _num_bytes(matrices.values())) as folder:
        write_tensors(folder / PEFT_WEIGHTS, matrices)
        original = source / ORIGINAL / PEFT_CONFIG
        if original.is_file():
            _check_original(original, record.adapter)
            (folder / PEFT_CONFIG).write_bytes(original.read_bytes())
        else:
            settings = peft_settings(record.adapter, base_name or record.base)
            (folder / PEFT_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        copy_side_files(source / "hf", folder)
        (folder / "config.json").unlink()  # with it, the folder would look like a whole model
        digests.write_list(folder)


def _check_original(path: Path, adapter: Adapter) -> None:
    """Check that the original adapter_config.json describes the adapter; otherwise PEFT would compute something else.

    Raises:
        ConfigError: it does not.
    """
    settings = _read_settings(path)
    found = settings["r"], settings["lora_alpha"], settings.get("use_rslora", False)
    expected = adapter.rank, adapter.alpha, adapter.rslora
    require(
        found == expected,
        f"{path}: r, lora_alpha and use_rslora are {found}, but {expected} according to {ADAPTER_FILE}; copy the folder again.",
    )


def peft_settings(adapter: Adapter, base_name: str) -> dict[str, Any]:
    """adapter_config.json in the form that PEFT and vLLM read."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "use_rslora": adapter.rslora,
        "target_modules": list(adapter.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def import_adapter(source: Path, output: Path, base: Path) -> None:
    """Write a Megatron checkpoint folder from the adapter in the PEFT folder `source`, whose base model is in `base`.

    Raises:
        ConfigError: the adapter does not fit the base model, or a file is damaged.
    """
    family = load_family(base / "hf")
    adapter, matrices = read_peft(source, family)
    check_output_copy(source, base)
    _check_dtypes(matrices, source)
    _warn_of_odd(matrices, source)
    warn_of_tokenizer(base / "hf", family)
    record = AdapterRecord(adapter=adapter, base=str(base.absolute()), base_digest=weights_digest(base))
    homes = {}
    for item in build_adapter_map(family, adapter, load_conversion(base).padded_vocab_size):
        (placement,) = item.placements
        sizes = (*(1 for _ in item.index), *item.shape)
        offsets = (*item.index, *(0 for _ in item.shape))
        dtype = matrices[placement.name].dtype
        homes[StoredChunk(item.key, dtype, item.global_shape, offsets, sizes)] = (placement, item.shape)

    def resolve(chunk: StoredChunk) -> Tensor:
        placement, shape = homes[chunk]
        return placement.scatter(matrices[placement.name], shape).reshape(chunk.sizes)

    with staged(output, _num_bytes(matrices.values())) as folder:
        write_checkpoint(folder / "megatron", list(homes), [], resolve)
        copy_side_files(base / "hf", folder / "hf")
        (folder / "conversion.json").write_bytes((base / "conversion.json").read_bytes())
        (folder / ADAPTER_FILE).write_bytes(record.to_bytes())
        (folder / ORIGINAL).mkdir()
        (folder / ORIGINAL / PEFT_CONFIG).write_bytes((source / PEFT_CONFIG).read_bytes())
        digests.write_list(folder)


def _check_dtypes(matrices: dict[str, Tensor], source: Path) -> None:
    dtypes = {DTYPE_NAMES[matrix.dtype] for matrix in matrices.values()}
    require(len(dtypes) == 1, f"{source}: its weights are {' and '.join(sorted(dtypes))}; save the adapter with one dtype.")


def _warn_of_odd(matrices: Mapping[str, Tensor], source: Path) -> None:
    odd = OddValues()
    for name, matrix in matrices.items():
        odd.count(name, matrix)
    odd.warn(source)


def _num_bytes(matrices: Iterable[Tensor]) -> int:
    return sum(matrix.numel() * matrix.dtype.itemsize for matrix in matrices)


def require_base(base: str | None, source: Path) -> Path:
    """The Megatron checkpoint of an adapter's base model; a PEFT folder gives only its name.

    Raises:
        ConfigError: `base` is missing, or not a Megatron checkpoint.
    """
    if base is None:
        raise ConfigError(f"input = {source} is a PEFT adapter; set base to its base model's Megatron checkpoint.")
    require((Path(base) / "megatron").is_dir(), f"base = {base}; there is no Megatron checkpoint; convert the base model first.")
    return Path(base)
