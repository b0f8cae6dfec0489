"""Every family answers as `transformers` does: greedily, token by token, in batches of prompts of all lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from tests.distributed.parity import MODELS
from tests.tiny import save_model

PROMPT_TOKENS = (1, 3, 9, 14)
"""The windows of `MODELS` have 5 to 7 tokens."""


@pytest.mark.parametrize("model", [name for name in MODELS if "-deep" not in name])
def test_greedy_answers(model: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, seed=3, **MODELS[model])
    tokenizer = load_tokenizer(folder)
    drawn = torch.Generator().manual_seed(0)
    ids = [torch.randint(tokenizer.vocab_size, (length,), generator=drawn) for length in PROMPT_TOKENS]
    prompts = [
        Prompt(group_id=str(length), token_ids=tuple(row.tolist()), messages=())
        for length, row in zip(PROMPT_TOKENS, ids, strict=True)
    ]
    engine = EmbeddedEngine.load(folder, tokenizer, TransformersConfig(device="cpu", dtype="float32"))
    sampling = Sampling(num_responses=2, temperature=0.0, max_tokens=12)
    ours = {
        answer.group_id: [response.token_ids for response in answer.responses] for answer in engine.generate(prompts, sampling)
    }
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for prompt, row in zip(prompts, ids, strict=True):
        expected = greedy(reference, row, tokenizer.vocab_size, 12)
        assert ours[prompt.group_id] == [expected, expected], prompt.group_id


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: torch.Tensor, vocabulary: int, number: int) -> tuple[int, ...]:
    """The likeliest tokens, everything computed anew for each: no cache, no batch, no padding."""
    row = prompt
    for _ in range(number):
        token = model(input_ids=row[None], use_cache=False).logits[0, -1, :vocabulary].argmax()
        row = torch.cat((row, token[None]))
    return tuple(row[len(prompt) :].tolist())
