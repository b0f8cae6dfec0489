"""Scaled rotary embeddings, also of a part of each head: log-probs and gradients of `transformers`' own classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConfigError, ModelConfig, ParallelConfig
from mpo_megatron.families import Family, read_family
from mpo_megatron.model.attention import row_layout
from mpo_megatron.model.live_weights import held_boxes, place_in
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.weight_map import build_weight_map
from tests.tiny import CONFIGS, HYBRID

VOCAB, PADDED = 61, 64
PROMPT, RESPONSES = 21, (30, 9)
"""Tokens; the longest sequence is three times as long as the one of which the frequencies are scaled."""
ORIGINAL = {"original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn, its own attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, **ORIGINAL},
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False, **ORIGINAL},
}
SHARES: dict[str, float] = {"llama": 1.0, "qwen3_next": 0.25, "qwen3_5_text": 0.25, "qwen3_5_moe_text": 0.5}
"""Model type → part of each head that is rotated."""
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"vocab_size": VOCAB, "max_position_embeddings": 64, "tie_word_embeddings": False},
}
HYBRID_SIZES: dict[str, Any] = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 4},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}


def build_config(model_type: str, rope: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": SHARES[model_type], **rope}}
    if model_type in HYBRID:
        changes |= HYBRID_SIZES
    changes |= EXPERTS if model_type in ("qwen3_next", "qwen3_5_moe_text") else {}
    if model_type != "qwen3_5_moe_text":
        changes["intermediate_size"] = 48
    return CONFIGS[model_type](**SIZES, **changes)


@torch.no_grad()
def copy_weights(theirs: Any, part: Any, family: Family, ranks: Ranks) -> None:
    weights = {name: weight.detach() for name, weight in theirs.named_parameters()}
    for name in [name for name in weights if ".experts.gate_up_proj" in name or ".experts.down_proj" in name]:
        stacked, (prefix, kind) = weights.pop(name), name.rsplit(".", 1)
        for expert, matrix in enumerate(stacked):
            kinds = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
            for each, rows in zip(kinds, matrix.chunk(len(kinds)), strict=True):
                weights[f"{prefix}.{expert}.{each}.weight"] = rows
    held = held_boxes([part], ranks, adapters=False)
    for item in build_weight_map(family, PADDED):
        for box, data in held.items():
            if box.key == item.key and (place := place_in(box, item)) is not None:
                whole = torch.zeros(item.shape)
                for placement in item.placements:
                    for run in placement.runs:
                        rows = weights[placement.name][run.hf_row : run.hf_row + run.num_rows]
                        whole[run.megatron_row : run.megatron_row + run.num_rows] = rows
                data.view(whole[place].shape).copy_(whole[place])


def compute_theirs(model: Any, prompt: Tensor, responses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs of all responses' tokens, and the embedding's gradient of their sum."""
    found = []
    for response in responses:
        logits = model(torch.cat((prompt, response))[None]).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    logps = torch.cat(found)
    return logps.detach(), torch.autograd.grad(logps.sum(), model.model.embed_tokens.weight)[0]


def compute_ours(part: Any, prompt: Tensor, responses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same in one row in which both responses share the prompt."""
    segments, positions, sources, start = [(0, len(prompt), 0, 0)], [torch.arange(len(prompt))], [], len(prompt)
    for response in responses:
        end = start + len(response)
        segments.append((start, end, 0, len(prompt)))
        positions.append(torch.arange(len(prompt), len(prompt) + len(response)))
        sources += [len(prompt) - 1, *range(start, end - 1)]
        start = end
    tokens = torch.cat((prompt, *responses))
    layout, predicting = row_layout(segments), torch.tensor(sources).numpy()
    logps = part(tokens[None], torch.cat(positions)[None], layout, predicting, torch.cat(responses))
    (gradient,) = torch.autograd.grad(logps.sum(), part.embedding.word_embeddings.weight)
    return logps.detach(), gradient[:VOCAB]


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("model_type", SHARES)
def test_log_probs_and_gradients(model_type: str, scaled: str, ranks: Ranks) -> None:
    config = build_config(model_type, SCALED[scaled])
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        parameter.data -= 3.0 * name.endswith("A_log")  # decays that do not erase the state at once
    family = read_family(config)
    assert family.rotary_channels == 16 * SHARES[model_type]
    (part,) = build_policy(family, ModelConfig(checkpoint="", precision="fp32"), ParallelConfig(), ranks, PADDED)
    copy_weights(theirs, part, family, ranks)
    prompt, *responses = (torch.randint(VOCAB, (length,)) for length in (PROMPT, *RESPONSES))
    expected, gradient = compute_theirs(theirs, prompt, responses)
    found, own = compute_ours(part, prompt, responses)
    # 2⁻²⁴ of values near 1, through a few hundred products and two layers
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (own - gradient).abs().max() < 1e-5 * gradient.abs().max()
    plain = AutoModelForCausalLM.from_config(build_config(model_type, {"rope_type": "default"}), dtype=torch.float32).eval()
    plain.load_state_dict(theirs.state_dict())
    changed = (compute_theirs(plain, prompt, responses)[0] - expected).abs().max()
    assert (changed > 1e-3) == (scaled != "dynamic")  # which changes nothing up to max_position_embeddings


@pytest.mark.parametrize("model_type", SHARES)
@pytest.mark.parametrize("kind", ["longrope", "proportional"])
def test_other_kinds_are_refused(kind: str, model_type: str) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = build_config(model_type, {"rope_type": "default"})
    config.rope_parameters |= {"rope_type": kind, "factor": 4.0, **factors, **ORIGINAL}
    with pytest.raises(ConfigError, match=f"rope_type = '{kind}' is not supported; supported are default, linear"):
        read_family(config)
