"""Options of `mpo plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Section):
    """`mpo plan`: estimate memory, communication and time of a run, and find the best layouts."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "gpus",
        "model",
        "train",
        "hardware",
        "data",
        "fp8",
        "lora_rank",
        "groups",
        "output",
    )

    gpus: int
    """Number of GPUs of the run."""
    model: str | None = None
    """A known model's name (Qwen2.5-14B, Qwen3-32B, …), or a checkpoint's folder; by default, that of `train`."""
    train: str | None = None
    """YAML file of `mpo train`: check that run. Without it, search layouts for a run with default options."""
    hardware: str = "h100"
    """a100-40, a100, h100, h200, b200 or gb200."""
    gpus_per_node: int | None = None
    """GPUs per machine, if not the hardware's 8."""
    memory_gib: float | None = None
    """Memory per GPU, if not the hardware's."""
    intra_gbps: float | None = None
    """GB/s from a GPU to the others of its machine, per direction, if not the hardware's."""
    inter_gbps: float | None = None
    """GB/s from a GPU to other machines, per direction, if not the hardware's."""
    data: str | None = None
    """Folder with prepared groups, for their lengths; by default that of `train`, if it exists and no lengths are given."""
    prompt_tokens: int = 512
    """Mean prompt length P, without data."""
    response_tokens: int = 512
    """Mean response length R, without data."""
    responses: int = 5
    """Responses K per group, without data; 1 only for losses that compare none (`sft`)."""
    spread: float = 0.5
    """Lengths are uniform in mean × (1 ± spread), without data."""
    groups: int | None = None
    """Groups of the whole run, for its duration; by default those of the data, or 60,000."""
    groups_per_step: int | None = None
    """Groups per step; by default that of `train`, or 128."""
    fp8: Literal["none", "current", "blockwise", "mxfp8"] | None = None
    """FP8 recipe to plan with, instead of that of `train`."""
    lora_rank: int | None = None
    """Plan adapters of this rank (`lora.rank`), instead of that of `train`; 0: all weights are trained."""
    lora_quantize: Literal["none", "nf4"] | None = None
    """Format of the frozen base weights (`lora.quantize`), instead of that of `train`."""
    attention: Literal["varlen", "flex"] = "varlen"
    """Attention kernel that `model.attention: auto` will choose: `varlen` with flash-attn or a recent PyTorch."""
    efficiency: float = 0.54
    """Share of the bf16 peak that matrix products and attention reach. Calibrated on published runs, like the next three."""
    fp8_efficiency: float = 0.77
    """Share of the FP8 peak that FP8 matrix products reach."""
    memory_efficiency: float = 0.38
    """Share of the device memory's bandwidth that element-wise kernels reach."""
    network_efficiency: float = 0.6
    """Share of the links' bandwidth that collectives reach."""
    latency_us: float = 20.0
    """Microseconds of a collective or message besides its bytes."""
    overhead_gib: float = 4.0
    """GiB of CUDA's context, NCCL's buffers and workspaces on each GPU."""
    usable: float = 0.95
    """Usable share of the remaining memory, before fragmentation causes out-of-memory errors."""
    suggest: int = 5
    """Number of layouts to suggest; 0 disables the search."""
    output: str | None = None
    """File for the whole plan as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gpus >= 1, f"gpus = {self.gpus}; it must be at least 1.")
        require(
            self.model is not None or self.train is not None,
            "neither model nor train is given; name a model (--model Qwen3-14B), or a run's configuration (--train FILE).",
        )
        for name in ("prompt_tokens", "response_tokens"):
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}; it must be at least 1.")
        require(self.responses >= 1, f"responses = {self.responses}; it must be at least 1.")
        require(0 <= self.spread < 1, f"spread = {self.spread}; it must be at least 0 and below 1.")
        require(self.lora_rank is None or self.lora_rank >= 0, f"lora_rank = {self.lora_rank}; it must be 0 (off) or positive.")
        for name in ("gpus_per_node", "groups", "groups_per_step"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} = {value}; it must be at least 1.")
        for name in ("memory_gib", "intra_gbps", "inter_gbps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} = {value}; it must be positive.")
        for name in ("efficiency", "fp8_efficiency", "memory_efficiency", "network_efficiency", "usable"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name} = {value}; it is a share: above 0, at most 1.")
        require(self.latency_us >= 0, f"latency_us = {self.latency_us}; it must be 0 or more.")
        require(self.overhead_gib >= 0, f"overhead_gib = {self.overhead_gib}; it must be 0 or more.")
        require(self.suggest >= 0, f"suggest = {self.suggest}; it must be 0 or more.")
