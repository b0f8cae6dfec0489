"""What an inference engine beside the training needs: the GPUs it can be spread over, and memory, estimated from the model.

While it samples, an engine holds its share of the weights, the keys and values of all sequences it works on, and what its
kernels work in. While it sleeps, only CUDA's context and captured graphs stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpo_megatron.config import LiveVllmConfig, ParallelConfig, require
from mpo_megatron.families import Family

GIB = 2**30
ASLEEP_BYTES = round(1.5 * GIB)
"""A sleeping engine's CUDA context, communicators and captured graphs."""
BATCH_TOKENS = 8192
"""Tokens of prompts that vLLM computes in one step, its default for throughput; what kernels work in follows them."""
LOGIT_ROWS = 1024
"""Sequences whose float32 logits exist at one time, its default limit on recent GPUs."""
ONLINE_QUANTIZATION = (
    *("fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "mxfp4"),
    *("int8_per_channel_weight_only", "nvfp4_per_token", "experts_int8", "online"),
)
"""Methods by which vLLM 0.33 quantises a checkpoint's bf16 weights while it loads them, and so at every update again."""
WIDE_CACHE = (None, "auto", "float16", "bfloat16")
"""Types of cached keys and values that are no quantisation."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on each of an engine's GPUs."""

    weights: int
    cache: int
    """Keys and values of all sequences that are sampled at a time."""
    sequence_cache: int
    """Those of one sequence, without which it cannot sample at all."""
    working: int
    asleep: int = ASLEEP_BYTES

    @property
    def awake(self) -> int:
        """What it needs while it samples."""
        return self.asleep + self.weights + self.cache + self.working

    @property
    def least(self) -> int:
        """What it cannot do with less than: its sequences then wait for each other."""
        return self.awake - self.cache + self.sequence_cache


def engine_memory(
    family: Family, engine: LiveVllmConfig, *, parameters: int, dtype_bytes: int, sequences: int, tokens: int
) -> EngineMemory:
    """What an engine needs on each of its GPUs.

    Args:
        parameters: of the whole model
        dtype_bytes: of an element of weights and cache; a quantised engine needs less, but not while it takes new weights
        sequences: sampled at a time
        tokens: of the longest of them, its prompt included
    """
    split = min(engine.tensor_parallel, family.num_key_value_heads)  # beyond that, heads are copied
    per_token = 2 * family.num_key_value_heads * family.head_dim * dtype_bytes // split
    layers = -(-family.num_hidden_layers // engine.pipeline_parallel)
    sequence = per_token * layers * tokens
    width = max(family.intermediate_size, family.experts.channels * family.experts.per_token if family.experts else 0)
    return EngineMemory(
        weights=parameters * dtype_bytes // (engine.tensor_parallel * engine.pipeline_parallel),
        cache=sequence * sequences,
        sequence_cache=sequence,
        working=BATCH_TOKENS * (2 * family.hidden_size + 3 * width // engine.tensor_parallel) * dtype_bytes
        + min(sequences, LOGIT_ROWS) * family.vocab_size * 4 * 2,  # logits, and their probabilities
    )


def choose_memory_fraction(need: EngineMemory, *, free: int, total: int) -> float:
    """Share of a GPU's memory that the engine takes: what it needs, or what is free if that is less but enough.

    Raises:
        ConfigError: too little is free for even one sequence at a time.
    """
    require(
        need.least <= free,
        f"online.engine = vllm needs {need.least / GIB:.1f} GiB of the GPU for one sequence at a time (weights "
        f"{need.weights / GIB:.1f}), and {free / GIB:.1f} of {total / GIB:.1f} GiB are free beside the training; spread it with "
        "online.vllm.tensor_parallel, spread the training (mpo plan), or set online.engine to transformers.",
    )
    return min(need.awake, free) / total


def requantises(method: str | None) -> bool:
    """Whether vLLM quantises weights by this method as they come, again at every update; None is no quantisation."""
    return method is None or method in ONLINE_QUANTIZATION


def validate_quantization(method: str | None, where: str) -> None:
    """Check that an engine quantised by this method takes the policy's weights.

    Args:
        where: the field that says so
    Raises:
        ConfigError: naming the methods that do.
    """
    choices = ", ".join(ONLINE_QUANTIZATION)
    if method == "fp8":
        reason = "in vLLM 0.33 it only reads checkpoints that are FP8 already; fp8_per_tensor is what it was for others"
    elif method == "torchao":
        reason = "its layers are quantised again only if all weights arrive in one call, and they travel in parts"
    else:
        reason = "it reads weights that are quantised already, and the policy's are not"
    require(requantises(method), f"{where} = {method}; {reason}: choose one of {choices}, or leave it out.")


def quantized_sampling(options: Mapping[str, Any]) -> str | None:
    """The option of vLLM's that makes its policy another than the trained one, with its value; None if none does."""
    for name, plain in (("quantization", (None,)), ("quantization_config", (None,)), ("kv_cache_dtype", WIDE_CACHE)):
        if options.get(name) not in plain:
            return f"{name} = {options[name]}"
    return None


def validate_engine_layout(engine: LiveVllmConfig, parallel: ParallelConfig, family: Family) -> None:
    """Check that an engine fits the model, and on shared GPUs the ranks of one model replica's first pipeline stage.

    Raises:
        ConfigError: naming the field and the values that do.
    """
    validate_quantization(engine.options.get("quantization"), "online.vllm.options.quantization")
    gpus, there = engine.tensor_parallel * engine.pipeline_parallel, parallel.tensor * parallel.context
    require(
        engine.gpus == "own" or gpus <= there,
        f"online.vllm.tensor_parallel × pipeline_parallel = {gpus} GPUs, but each replica's engine runs on those of its first "
        f"pipeline stage, parallel.tensor × parallel.context = {there}; lower the former, raise parallel.tensor, or set "
        "online.vllm.gpus = own.",
    )
    heads = family.num_attention_heads
    require(
        heads % engine.tensor_parallel == 0,
        f"online.vllm.tensor_parallel = {engine.tensor_parallel} does not divide num_attention_heads = {heads}; choose one of "
        f"{', '.join(str(size) for size in range(1, heads + 1) if heads % size == 0)}.",
    )
    require(
        engine.pipeline_parallel <= family.num_hidden_layers,
        f"online.vllm.pipeline_parallel = {engine.pipeline_parallel}; the model has {family.num_hidden_layers} layers: choose at "
        "most so many.",
    )
