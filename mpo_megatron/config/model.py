"""Options of a run's model: its checkpoint, and how its layers compute."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section

ADAPTER_OFF = "adapter_off"
"""Value of `reference` for "no checkpoint: the policy without its adapter"."""
CHUNKS = (1024, 2048, 4096, 8192)
"""Default sizes of `logprob_chunk`: each chunk reads and writes the weight's float32 gradient, so large chunks are fast."""
CHUNK_SHARE = 0.04
"""Share of a GPU's memory for a chunk's logits."""
CHUNK_BYTES = 8
"""Bytes per logit during its gradient: bf16 logits, float32 probabilities and the bf16 gradient."""
KEPT_LOGITS = 2**23
"""Logits kept for the backward pass instead of recomputed; with a small vocabulary, those of all tokens of a row."""


def kept_chunks(chunk: int, vocabulary: int) -> int:
    """Number of last chunks of a row whose logits are kept for the backward pass.

    At least one: the backward pass starts with it and needs its memory anyway.
    """
    return max(1, KEPT_LOGITS // (chunk * vocabulary))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, prefix="model."):
    """The policy, and how its layers compute."""

    checkpoint: str
    """The model to train: a folder written by `mpo convert` or a run, or a Hugging Face folder, which is converted once into
    `<output>/converted`."""
    reference: str | None = None
    """The reference policy π_ref, a folder of the same kinds; by default the initial model. `adapter_off`: the base model, which
    a run with `lora` computes in every step by switching its adapter off."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute dtype; optimizer states and master weights are float32 in both cases. `mpo align` selects fp32 on a CPU without
    instructions for bfloat16, which takes several times as long there."""
    fp8: Literal["none", "current", "blockwise", "mxfp8"] = "none"
    """Recipe for FP8 matrix products in the layers (Transformer Engine; bf16 elsewhere); docs/fp8.md helps to choose."""
    fp8_bf16_layers: int = 0
    """Number of first layers, and of last layers, that stay in bf16 with FP8."""
    fp8_params: bool = False
    """Keep the layers' weights in FP8, and gather them in FP8 from the distributed optimizer."""
    backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Layer implementation; `auto`: Transformer Engine if it is installed and there is a GPU."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Attention kernel: `sdpa` is exact and runs anywhere; `flex` and `varlen` (flash attention) need a GPU; `auto` chooses."""
    delta_rule: Literal["auto", "torch", "fla"] = "auto"
    """Kernel of Gated DeltaNet layers (Qwen3-Next, Qwen3.5, 3.6): `torch` runs anywhere; `fla` (flash-linear-attention) needs a
    GPU and bf16; `auto` uses `fla` there, and `torch` elsewhere."""
    delta_chunk: int = 64
    """Tokens that Gated DeltaNet layers compute at once, before their state moves on. Fewer keep more states in memory, more
    keep larger products; `fla` has kernels for 64 only."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass: none, `recompute_modules`, or every layer."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]] = field(
        default_factory=lambda: ["core_attn"]
    )
    """Modules recomputed with `recompute: selective`: the core of attention (and of Gated DeltaNets), norms, whole MLPs, layers
    of experts, their activation, or the shared expert."""
    offload_layers: int = 0
    """Number of first layers whose activations are offloaded to host memory until the backward pass; needs Transformer Engine and
    `parallel.pipeline` = 1."""
    resident_offload: bool = False
    """Keep the weights of a resident reference model (token-wise KL) in host memory while it does not run."""
    logprob_chunk: int | None = None
    """Response tokens whose vocabulary logits exist at the same time; by default as many as fit 4 % of a GPU's memory, 1,024 to
    8,192."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.logprob_chunk is None or self.logprob_chunk >= 1,
            f"model.logprob_chunk = {self.logprob_chunk}; it must be at least 1.",
        )
        require(
            bool(self.recompute_modules) and len(set(self.recompute_modules)) == len(self.recompute_modules),
            f"model.recompute_modules = {self.recompute_modules}; name at least one module, each only once.",
        )
        require(
            self.recompute == "selective" or self.recompute_modules == ["core_attn"],
            f"model.recompute_modules = {self.recompute_modules} with model.recompute = {self.recompute}, which ignores "
            "it; set model.recompute to selective.",
        )
        require(self.delta_chunk >= 1, f"model.delta_chunk = {self.delta_chunk}; it must be at least 1.")
        require(self.offload_layers >= 0, f"model.offload_layers = {self.offload_layers}; it must be 0 or more.")
        require(
            not self.offload_layers or self.recompute == "none",
            f"model.offload_layers = {self.offload_layers} with model.recompute = {self.recompute}: Megatron supports only one "
            "of them; set offload_layers to 0, or recompute to none.",
        )
        require(self.fp8_bf16_layers >= 0, f"model.fp8_bf16_layers = {self.fp8_bf16_layers}; it must be 0 or more.")
        require(
            not (self.resident_offload and self.fp8_params),
            "model.resident_offload = true with model.fp8_params = true: only bf16 and fp32 weights can be offloaded; "
            "set one to false.",
        )
        if self.fp8 == "none":
            require(not self.fp8_bf16_layers, f"model.fp8_bf16_layers = {self.fp8_bf16_layers} without FP8; set model.fp8 too.")
            require(not self.fp8_params, "model.fp8_params = true without FP8; set model.fp8 too.")
            return
        require(
            self.precision == "bf16",
            f"model.fp8 = {self.fp8} with model.precision = {self.precision}; everything that is not FP8 is bf16; set "
            "precision to bf16.",
        )
        require(
            self.backend != "local",
            f"model.fp8 = {self.fp8} with model.backend = local; FP8 needs Transformer Engine; set model.backend to auto.",
        )
        require(
            not self.fp8_params or self.fp8 in ("current", "blockwise"),
            f"model.fp8_params = true with model.fp8 = {self.fp8}, which needs gradient buffers shared with gathered weights; "
            "set model.fp8 to current or blockwise.",
        )

    @property
    def from_engine(self) -> bool:
        """Whether layers are Transformer Engine's; known once `backend` is resolved."""
        assert self.backend != "auto", "resolve `backend` first: model/architecture.py"
        return self.backend == "transformer_engine"

    def with_recompute(self, recompute: str) -> ModelConfig:
        """The same model with another `recompute`, without options that apply only to the current one."""
        if recompute == self.recompute:
            return self
        return replace(self, recompute=recompute, recompute_modules=["core_attn"], offload_layers=0)  # type: ignore[arg-type]

    def chunk(self, vocabulary: int, gpu_bytes: int | None) -> int:
        """`logprob_chunk`, or by default the largest of CHUNKS that fits.

        It depends on the GPU's total memory, not on the free memory, so a resumed run adds in the same order.

        Args:
            vocabulary: rows of the output weight on a rank
            gpu_bytes: memory of its GPU; None on a CPU, whose caches favour small chunks
        """
        if self.logprob_chunk is not None:
            return self.logprob_chunk
        room = 0 if gpu_bytes is None else int(CHUNK_SHARE * gpu_bytes)
        return max((size for size in CHUNKS if size * vocabulary * CHUNK_BYTES <= room), default=CHUNKS[0])
