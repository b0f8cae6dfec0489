"""adapter.json of a Megatron checkpoint folder with an adapter alone, and its base model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from mpo_megatron.config import require
from mpo_megatron.families.adapters import Adapter, vllm_refuses_peft
from mpo_megatron.files.objects import build_record
from mpo_megatron.hf.identity import (
    ADAPTER_FILE,
    COPY,
    PEFT_CONFIG,
    adapter_settings,
    is_adapter_folder,
    read_adapter_file,
    weights_digest,
)


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """An adapter's shape, and the identity of its base weights."""

    adapter: Adapter
    base: str
    """Folder of the base model at the time of writing."""
    base_digest: str
    """Identity of the base model's weights (`weights_digest`)."""

    def to_bytes(self) -> bytes:
        """Content of adapter.json."""
        return json.dumps(dataclasses.asdict(self), indent=2).encode() + b"\n"


def read_adapter(folder: Path) -> AdapterRecord:
    """adapter.json of a folder.

    Raises:
        ConfigError: it is damaged, or not in this version's format.
    """
    content, path = read_adapter_file(folder), folder / ADAPTER_FILE
    adapter = build_record(Adapter, content.get("adapter"), path, COPY)
    require(adapter.rank >= 1 and adapter.alpha > 0, f"{path}: rank = {adapter.rank}, alpha = {adapter.alpha}; {COPY}.")
    require(bool(adapter.target_modules), f"{path}: target_modules names no layer; {COPY}.")
    return build_record(AdapterRecord, {**content, "adapter": adapter}, path, COPY)


def find_base(folder: Path, record: AdapterRecord, other: str | None, option: str) -> Path:
    """The folder of an adapter's base model, whose weights must be those used in training.

    Args:
        other: current folder of the base model; None: the recorded one
        option: name of the option for `other`, for messages
    Raises:
        ConfigError: the base model is missing, or has other weights.
    """
    base = Path(other or record.base)
    require(
        (base / "megatron").is_dir() and not is_adapter_folder(base),
        f"{folder} is an adapter of {record.base}; there is no Megatron checkpoint of a whole model in {base}; name its folder "
        f"with {option}.",
    )
    found = weights_digest(base)
    require(
        found == record.base_digest,
        f"{folder} is an adapter of {record.base}, whose weights have the digest {record.base_digest[:12]}; {base} holds other "
        f"weights (digest {found[:12]}); set {option} to the folder of the right weights.",
    )
    return base


def require_loads_in_vllm(folder: Path) -> None:
    """Refuse a PEFT folder of an adapter that is not plain LoRA, from adapter_config.json.

    Raises:
        ConfigError: names the field that vLLM cannot load; or the file is damaged.
    """
    refused = vllm_refuses_peft(adapter_settings(folder))
    require(
        refused is None,
        f"{folder / PEFT_CONFIG}: {refused}, which vLLM cannot load; merge the adapter in peft (merge_and_unload), and name the "
        "merged model.",
    )
