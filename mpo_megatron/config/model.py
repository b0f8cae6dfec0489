"""Options of a run's model: its checkpoint, and how its layers compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpo_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, and how its layers compute."""

    checkpoint: str
    """Megatron checkpoint folder written by `mpo convert`."""
    reference: str | None = None
    """Checkpoint of the reference policy π_ref; by default the one training starts from."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; optimizer states and master weights are float32 in both."""
    fp8: Literal["none", "current", "blockwise", "mxfp8"] = "none"
    """Recipe for FP8 matrix products in the layers (Transformer Engine, bf16 elsewhere); docs/fp8.md says which is for what."""
    fp8_bf16_layers: int = 0
    """Number of first layers, and of last layers, that stay in bf16 with FP8."""
    fp8_params: bool = False
    """Keep the layers' weights in FP8 and gather them so from the distributed optimizer, instead of in bf16."""
    backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer implementation; `auto` takes Transformer Engine when it is installed and a GPU is there."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Attention kernel: `sdpa` is exact and runs anywhere; `flex` and `varlen` (flash attention) need a GPU; `auto` chooses."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass: nothing, the attention core, or every layer."""
    resident_offload: bool = False
    """Keep the weights of a reference model that runs beside the policy (token-wise KL) in host memory while it does not run."""
    logprob_chunk: int = 1024
    """Response tokens whose vocabulary logits exist at one time."""

    def __post_init__(self) -> None:
        require(self.logprob_chunk >= 1, f"model.logprob_chunk = {self.logprob_chunk}; it must be at least 1.")
        require(self.fp8_bf16_layers >= 0, f"model.fp8_bf16_layers = {self.fp8_bf16_layers}; it must be 0 or more.")
        require(
            not (self.resident_offload and self.fp8_params),
            "model.resident_offload = true with model.fp8_params = true: only bf16 and fp32 weights are moved; set one to false.",
        )
        if self.fp8 == "none":
            require(not self.fp8_bf16_layers, f"model.fp8_bf16_layers = {self.fp8_bf16_layers} without FP8; set model.fp8, too.")
            require(not self.fp8_params, "model.fp8_params = true without FP8; set model.fp8, too.")
            return
        require(
            self.precision == "bf16",
            f"model.fp8 = {self.fp8} with model.precision = {self.precision}; what is not FP8 is bf16; set precision to bf16.",
        )
        require(
            self.backend != "local",
            f"model.fp8 = {self.fp8} with model.backend = local; FP8 is Transformer Engine's; set model.backend to auto.",
        )
        require(
            not self.fp8_params or self.fp8 in ("current", "blockwise"),
            f"model.fp8_params = true with model.fp8 = {self.fp8}, which needs gradient buffers shared with gathered weights; "
            "set model.fp8 to current or blockwise.",
        )
