"""Options of sampling from the policy while it trains (`online` of `mpo train`)."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mpo_megatron.config.checks import ConfigError, find_change, require
from mpo_megatron.config.generate import EndpointConfig, validate_endpoint
from mpo_megatron.config.values import Section

LIVE_ENGINE_OPTIONS = (
    *("model", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization"),
    *("load_format", "enable_sleep_mode", "weight_transfer_config", "distributed_executor_backend"),
)
"""Arguments of vLLM's `EngineArgs` that the run sets."""


@dataclass(frozen=True, kw_only=True)
class LiveVllmConfig(Section, prefix="online.vllm."):
    """A vLLM engine started by the run."""

    gpus: Literal["shared", "own"] = "shared"
    """`shared`: on the GPUs of each model replica's first ranks, sleeping while they train; `own`: on GPUs without a rank."""
    memory_fraction: float | None = None
    """Share of a GPU's memory used while sampling; by default, what weights, KV cache and kernels need, or 0.9 of its own
    GPUs."""
    tensor_parallel: int = 1
    """Number of GPUs that share each layer."""
    pipeline_parallel: int = 1
    """Number of GPUs (or groups of them) among which layers are divided."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, for example `quantization: fp8_per_tensor`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.memory_fraction is None or 0 < self.memory_fraction < 1,
            f"online.vllm.memory_fraction = {self.memory_fraction}; it must be above 0 and below 1.",
        )
        for name in ("tensor_parallel", "pipeline_parallel"):
            require(getattr(self, name) >= 1, f"online.vllm.{name} = {getattr(self, name)}; it must be at least 1.")
        for name in LIVE_ENGINE_OPTIONS:
            require(name not in self.options, f"online.vllm.options.{name} is set by mpo train itself; remove it.")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(Section, prefix="online."):
    """SPO's regulariser: β · token-wise KL(π ‖ π_ref) on samples from the policy during training (SPO, Eq. 15)."""

    kl_weight: float = 0.0
    """β, added to any loss; 0 disables sampling. The paper tries 0.01 and 0.1."""
    every: int = 8
    """T: sample again after this many steps, and reuse the samples until then."""
    num_samples: int = 32
    """Samples per batch, for prompts of the last T steps."""
    max_tokens: int = 512
    """Maximum tokens of a sample, including its end token."""
    temperature: float = 1.0
    """Sampling temperature; only 1 samples the policy's own distribution."""
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """Engine for sampling from the live weights: the embedded model, a vLLM that the run starts, or a vLLM server
    (`endpoint`)."""
    vllm: LiveVllmConfig = field(default_factory=LiveVllmConfig)
    """Options of `engine: vllm`."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Options of `engine: server`."""
    weights_address: str | None = None
    """Address at which the server reaches the run's first rank, which sends weights: `host` or `host:port`; by default, this
    machine's address on the route to the server."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.kl_weight < math.inf,
            f"online.kl_weight = {self.kl_weight}; it must be 0 (off) or positive, and finite.",
        )
        for name in ("every", "num_samples", "max_tokens"):
            require(getattr(self, name) >= 1, f"online.{name} = {getattr(self, name)}; it must be at least 1.")
        require(self.temperature > 0, f"online.temperature = {self.temperature}; it must be positive.")
        if self.engine != "vllm" and (changed := find_change(asdict(LiveVllmConfig()), asdict(self.vllm))):
            raise ConfigError(
                f"online.vllm.{changed[0]} is set, but online.engine = {self.engine}; set online.engine = vllm, or remove it."
            )
        if self.engine == "server":
            self._check_server()
            return
        changed = find_change(asdict(EndpointConfig()), asdict(self.endpoint))
        unused = [f"endpoint.{changed[0]}"] if changed else ["weights_address"] * (self.weights_address is not None)
        require(
            not unused,
            f"online.{''.join(unused)} is set, but online.engine = {self.engine}; set online.engine = server, or remove it.",
        )

    def _check_server(self) -> None:
        validate_endpoint(self.endpoint, "online.endpoint")
        require(
            self.endpoint.api == "tokens",
            f"online.endpoint.api = {self.endpoint.api}; samples must continue the exact tokens of the data: set it to tokens.",
        )
        require(
            self.endpoint.server in ("auto", "vllm"),
            f"online.endpoint.server = {self.endpoint.server}; only vLLM can receive live weights: set it to auto or vllm, or "
            "set online.engine to vllm or transformers.",
        )
        address = re.fullmatch(r"[^\s:/]+(?::(\d{1,5}))?", "any" if self.weights_address is None else self.weights_address)
        require(
            address is not None and 0 < int(address[1] or 1) < 2**16,
            f"online.weights_address = {self.weights_address}; write a name or address, or host:port with a port up to 65535.",
        )
