"""Tiny models, tokenizers and groups, built on the spot; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.data.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


CONFIGS: dict[str, Any] = {
    config.model_type: config
    for config in (
        *(Qwen2Config, Qwen3Config, Qwen2MoeConfig, Qwen3MoeConfig, LlamaConfig, MistralConfig, MixtralConfig),
        *(Gemma2Config, Gemma3TextConfig, Olmo2Config, Olmo3Config, Qwen3NextConfig, Qwen3_5TextConfig, Qwen3_5MoeTextConfig),
    )
}


HYBRID = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Model types with Gated DeltaNet layers."""


def save_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with a ChatML template to `folder`; its number of entries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return len(fast)


def save_model(folder: Path, *, model_type: str = "qwen3", tied: bool = False, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint in Hugging Face format, tokenizer included, to `folder`."""
    vocab_size = save_tokenizer(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size + 5,  # more embeddings than tokens, as in the published checkpoints
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        **changes,
    }
    if model_type.startswith(("qwen3", "gemma")):
        sizes["head_dim"] = 32
    if model_type.startswith(("gemma", "olmo")):  # transformers gives a padding token's embedding no gradient
        sizes = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None} | sizes
    if model_type.startswith("gemma"):
        sizes = {"query_pre_attn_scalar": 24} | sizes
    if model_type == "mixtral":
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2} | sizes
    if model_type in HYBRID:  # the first three layers are Gated DeltaNets, the fourth has attention
        net = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8}
        sizes = net | sizes
        sizes = {"shared_expert_intermediate_size": 80} | sizes if model_type != "qwen3_5_text" else sizes
    if model_type == "qwen3_5_moe_text":
        del sizes["intermediate_size"]
    if model_type.endswith("_moe") or (model_type in HYBRID and model_type != "qwen3_5_text"):
        sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48} | sizes
    if model_type == "qwen2_moe":
        sizes = {"shared_expert_intermediate_size": 80} | sizes
    config = CONFIGS[model_type](**sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros, ones and the symmetric start
            parameter += 0.05 * torch.randn_like(parameter)
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # chosen for decays that erase most states after one token
                parameter -= 3
    model.save_pretrained(folder)
    return folder


def random_groups(
    num_groups: int,
    *,
    seed: int = 0,
    vocab_size: int = 250,
    max_responses: int = 6,
    prompt_tokens: tuple[int, int] = (1, 29),
    response_tokens: tuple[int, int] = (1, 20),
    tied_share: float = 0.2,
) -> list[TokenizedGroup]:
    """Groups of random tokens with 2 … max_responses responses, lengths between the given limits, some with all rewards equal."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(num_groups):
        size = int(rng.integers(2, max_responses + 1))
        lengths = rng.integers(*response_tokens, size, endpoint=True)
        rewards = np.ones(size) if rng.random() < tied_share else rng.normal(size=size)
        groups.append(
            TokenizedGroup(
                group_id=f"group-{index}",
                prompt_tokens=rng.integers(0, vocab_size, int(rng.integers(*prompt_tokens, endpoint=True))).astype(np.int32),
                response_tokens=tuple(rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths),
                rewards=rewards,
            )
        )
    return groups


def save_groups(folder: Path, groups: list[TokenizedGroup], model: Path) -> PreparedGroups:
    """Write groups as `mpo prepare` would with the tokenizer of the checkpoint `model`."""
    tokenizer = load_tokenizer(model)
    write_groups(
        folder,
        groups,
        tokenizer_digest=tokenizer.digest(),
        vocab_size=tokenizer.vocab_size,
        end_token_ids=[],
        reward_kind="scores",
    )
    return load_groups(folder)
