"""Whether the engine that answers can load the adapter that a training writes: asked before the training starts."""

from __future__ import annotations

from pathlib import Path

from mpo_megatron.config import ConfigError, GenerateConfig, LoraConfig
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import choose_adapter, vllm_refuses
from mpo_megatron.hf.adapter import read_adapter
from mpo_megatron.hf.identity import is_adapter_folder


def check_trained_adapter(generate: GenerateConfig, lora: LoraConfig, family: Family, model: Path) -> None:
    """Check that the engine can load the adapter of a training from `model`, if it trains one.

    Args:
        family: the model in the folder `model`
    Raises:
        ConfigError: the engine cannot, or the model lacks a target.
    """
    continued = is_adapter_folder(model)
    adapter = read_adapter(model).adapter if continued else choose_adapter(family, lora)
    if adapter is None or generate.engine != "vllm":
        return
    refusal = vllm_refuses(family, adapter.rank, adapter.target_modules)
    if refusal is None:
        return
    where = f"model = {model}" if continued else f"train.lora.{refusal.option} = {getattr(lora, refusal.option)}"
    raise ConfigError(
        f"{where} with generate.engine = vllm: {refusal.reason}, which vLLM cannot load; set generate.engine = transformers, or "
        f"{'start from another model' if continued else f'change train.lora.{refusal.option}'}."
    )
