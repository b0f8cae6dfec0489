"""Whether the engine that answers can load what a training writes: asked before the training starts."""

from __future__ import annotations

from pathlib import Path

from mpo_megatron.config import ConfigError, GenerateConfig, LoraConfig, require
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import choose_adapter, vllm_refuses
from mpo_megatron.hf.adapter import read_adapter
from mpo_megatron.hf.identity import is_adapter_folder
from mpo_megatron.model.convert_folder import find_megatron_checkpoint


def check_trained_policy(generate: GenerateConfig, lora: LoraConfig, family: Family, model: Path) -> None:
    """Check that the engine can load the policy of a training from `model`: all weights, or an adapter.

    Args:
        family: the model in the folder `model`
    Raises:
        ConfigError: the engine cannot, or the model lacks a target.
    """
    start = find_megatron_checkpoint(model) or model
    continued = is_adapter_folder(start)
    adapter = read_adapter(start).adapter if continued else choose_adapter(family, lora)
    require(
        generate.engine != "openai" or (generate.load_weights if adapter is None else generate.load_adapter),
        "generate.engine = openai; a server keeps its weights, but a trained policy has others; let it load them: adapters "
        "(train.lora.rank) with generate.load_adapter = true, whole models with generate.load_weights = true; or set "
        "generate.engine to vllm or transformers.",
    )
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
