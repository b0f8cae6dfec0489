"""Mixture-of-experts layers of Qwen2-MoE and Qwen3-MoE: what config.json says of them."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from mpo_megatron.config import require


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model."""

    num: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token goes to."""
    channels: int
    """Intermediate size of an expert."""
    shared_channels: int | None
    """Intermediate size of the shared expert; None without one."""
    normalized: bool
    """Whether a token's probabilities are made to sum to 1 over its experts."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense MLP."""

    @property
    def everywhere(self) -> bool:
        """Whether all layers have experts. Megatron's checkpoints stack the layers' tensors if so."""
        return all(self.layers)


def read_experts(hf_config: PretrainedConfig) -> Experts | None:
    """The experts that config.json describes; None for a dense model."""
    if not hf_config.model_type.endswith("_moe"):
        return None
    dense, every = set(hf_config.mlp_only_layers or ()), hf_config.decoder_sparse_step
    return Experts(
        num=hf_config.num_experts,
        per_token=hf_config.num_experts_per_tok,
        channels=hf_config.moe_intermediate_size,
        shared_channels=hf_config.shared_expert_intermediate_size if hf_config.model_type == "qwen2_moe" else None,
        normalized=hf_config.norm_topk_prob,
        layers=tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(hf_config.num_hidden_layers)),
    )


def check_supported(hf_config: PretrainedConfig) -> None:
    """Refuse experts that would be computed differently from `transformers`.

    Raises:
        ConfigError: naming the field of config.json and the rule.
    """
    experts = read_experts(hf_config)
    if experts is None:
        return
    require(
        experts.num >= 1 and any(experts.layers),
        f"config.json: num_experts = {experts.num}, decoder_sparse_step = {hf_config.decoder_sparse_step}, mlp_only_layers = "
        f"{hf_config.mlp_only_layers}: no layer has experts; as a dense model it is {hf_config.model_type.removesuffix('_moe')}.",
    )
    require(
        1 <= experts.per_token <= experts.num,
        f"config.json: num_experts_per_tok = {experts.per_token} of num_experts = {experts.num}; is config.json damaged?",
    )
    require(
        experts.per_token > 1 or not experts.normalized,
        "config.json: num_experts_per_tok = 1 with norm_topk_prob = true: the only probability is always 1, so the router cannot "
        "learn, and Megatron-Core refuses it.",
    )
    require(
        getattr(hf_config, "qkv_bias", True),
        "config.json: qkv_bias = false is not implemented for qwen2_moe; published models have true.",
    )
