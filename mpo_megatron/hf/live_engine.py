"""Requirements of an inference engine beside training: GPUs that it can be spread over, and its memory, estimated from the model.

While sampling, an engine holds its share of the weights, the keys and values of all sequences in progress, and its kernels'
workspace. While sleeping, it holds only CUDA's context and captured graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpo_megatron.config import LiveVllmConfig, ParallelConfig, require
from mpo_megatron.families import Family

GIB = 2**30
ASLEEP_BYTES = round(1.5 * GIB)
"""Bytes of a sleeping engine's CUDA context, communicators and captured graphs."""
BATCH_TOKENS = 8192
"""Prompt tokens that vLLM computes per step, its default for throughput; determines the kernels' workspace."""
LOGIT_ROWS = 1024
"""Sequences whose float32 logits exist at the same time, its default limit on recent GPUs."""
ONLINE_QUANTIZATION = (
    *("fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "mxfp4"),
    *("int8_per_channel_weight_only", "nvfp4_per_token", "experts_int8", "online"),
)
"""Methods with which vLLM 0.33 quantises a checkpoint's bf16 weights while loading, and again at every update."""
WIDE_CACHE = (None, "auto", "float16", "bfloat16")
"""Dtypes of the KV cache without quantisation."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on each of an engine's GPUs."""

    weights: int
    cache: int
    """Keys and values of all sequences sampled concurrently."""
    sequence_cache: int
    """Those of one sequence, the minimum for sampling."""
    working: int
    asleep: int = ASLEEP_BYTES

    @property
    def awake(self) -> int:
        """Bytes in use while sampling."""
        return self.asleep + self.weights + self.cache + self.working

    @property
    def least(self) -> int:
        """Minimum bytes while sampling: sequences then wait for each other."""
        return self.awake - self.cache + self.sequence_cache


def engine_memory(
    family: Family, engine: LiveVllmConfig, *, parameters: int, dtype_bytes: int, sequences: int, tokens: int
) -> EngineMemory:
    """An engine's memory on each of its GPUs.

    Args:
        parameters: number of parameters of the whole model
        dtype_bytes: bytes per element of weights and cache; a quantised engine needs less, but not during an update
        sequences: number sampled concurrently
        tokens: of the longest sequence, including its prompt
    """
    split = min(engine.tensor_parallel, family.num_key_value_heads)  # beyond that, heads are replicated
    per_token = 2 * family.num_key_value_heads * family.head_dim * dtype_bytes // split
    attentions, states = (-(-number // engine.pipeline_parallel) for number in (family.num_attentions, family.num_states))
    sequence = per_token * attentions * tokens + _state_bytes(family, dtype_bytes) // engine.tensor_parallel * states
    width = max(family.intermediate_size, family.experts.channels * family.experts.per_token if family.experts else 0)
    return EngineMemory(
        weights=parameters * dtype_bytes // (engine.tensor_parallel * engine.pipeline_parallel),
        cache=sequence * sequences,
        sequence_cache=sequence,
        working=BATCH_TOKENS * (2 * family.hidden_size + 3 * width // engine.tensor_parallel) * dtype_bytes
        + min(sequences, LOGIT_ROWS) * family.vocab_size * 4 * 2,  # logits, and their probabilities
    )


def _state_bytes(family: Family, dtype_bytes: int) -> int:
    """Bytes of a sequence in a Gated DeltaNet: its state, in float32, and the convolution's last inputs."""
    net = family.delta_net
    return 0 if net is None else net.state * 4 + (net.taps - 1) * net.convolved * dtype_bytes


def choose_memory_fraction(need: EngineMemory, *, free: int, total: int) -> float:
    """Share of a GPU's memory for the engine: what it needs, or what is free if that is less but sufficient.

    Raises:
        ConfigError: too little is free for even one sequence at a time.
    """
    require(
        need.least <= free,
        f"online.engine = vllm needs {need.least / GIB:.1f} GiB of the GPU for one sequence at a time (weights "
        f"{need.weights / GIB:.1f}), but only {free / GIB:.1f} of {total / GIB:.1f} GiB are free beside the training; spread it "
        "with online.vllm.tensor_parallel, spread the training (mpo plan), or set online.engine to transformers.",
    )
    return min(need.awake, free) / total


def requantises(method: str | None) -> bool:
    """Whether vLLM quantises weights with this method while loading, and again at every update; None means no quantisation."""
    return method is None or method in ONLINE_QUANTIZATION


def validate_quantization(method: str | None, where: str) -> None:
    """Check that an engine with this quantisation can receive the policy's weights.

    Args:
        where: the field, for messages
    Raises:
        ConfigError: names the methods that can.
    """
    choices = ", ".join(ONLINE_QUANTIZATION)
    if method == "fp8":
        reason = "in vLLM 0.33 it reads only FP8 checkpoints; fp8_per_tensor quantises others"
    elif method == "torchao":
        reason = "it quantises layers again only if all weights arrive in one call, but updates arrive in parts"
    else:
        reason = "it reads only quantised weights, but the policy's are not quantised"
    require(requantises(method), f"{where} = {method}; {reason}: choose one of {choices}, or remove it.")


def quantized_sampling(options: Mapping[str, Any]) -> str | None:
    """vLLM's option, with its value, that makes samples differ from the trained policy; None if none does."""
    for name, plain in (("quantization", (None,)), ("quantization_config", (None,)), ("kv_cache_dtype", WIDE_CACHE)):
        if options.get(name) not in plain:
            return f"{name} = {options[name]}"
    return None


def validate_engine_layout(engine: LiveVllmConfig, parallel: ParallelConfig, family: Family) -> None:
    """Check that an engine fits the model and, on shared GPUs, the ranks of one replica's first pipeline stage.

    Raises:
        ConfigError: names the field and valid values.
    """
    validate_quantization(engine.options.get("quantization"), "online.vllm.options.quantization")
    gpus, there = engine.tensor_parallel * engine.pipeline_parallel, parallel.tensor * parallel.context
    require(
        engine.gpus == "own" or gpus <= there,
        f"online.vllm.tensor_parallel × pipeline_parallel = {gpus} GPUs, but each replica's engine runs on the GPUs of its first "
        f"pipeline stage, parallel.tensor × parallel.context = {there}; lower the former, raise parallel.tensor, or set "
        "online.vllm.gpus = own.",
    )
    heads = family.num_attention_heads
    require(
        heads % engine.tensor_parallel == 0,
        f"online.vllm.tensor_parallel = {engine.tensor_parallel} does not divide num_attention_heads = {heads}; choose one of "
        f"{', '.join(str(size) for size in range(1, heads + 1) if heads % size == 0)}.",
    )
    keys = heads if family.delta_net is None else family.delta_net.key_heads
    require(
        keys % engine.tensor_parallel == 0,
        f"online.vllm.tensor_parallel = {engine.tensor_parallel} does not divide linear_num_key_heads = {keys}; choose one of "
        f"{', '.join(str(size) for size in range(1, keys + 1) if keys % size == 0)}.",
    )
    require(
        engine.pipeline_parallel <= family.num_hidden_layers,
        f"online.vllm.pipeline_parallel = {engine.pipeline_parallel}; the model has {family.num_hidden_layers} layers: choose at "
        "most that many.",
    )
