"""Every family generates like `transformers`: greedily, token by token, in batches of prompts of all lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from tests.distributed.parity_cases import MODELS
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
    """The likeliest tokens, each computed from scratch: no cache, no batch, no padding."""
    row = prompt
    for _ in range(number):
        token = model(input_ids=row[None], use_cache=False).logits[0, -1, :vocabulary].argmax()
        row = torch.cat((row, token[None]))
    return tuple(row[len(prompt) :].tolist())


def test_a_model_may_call_its_cache_by_the_old_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path, num_hidden_layers=1, hidden_size=32)
    tokenizer, given = load_tokenizer(folder), list[Any]()

    class Older(torch.nn.Module):
        """Calls models in the style of transformers before 5.24."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = AutoModelForCausalLM.from_pretrained(folder)
            self.config, self.device = self.inner.config, self.inner.device

        def forward(self, *, past_key_values: Any, **options: Any) -> Any:
            given.append(past_key_values)
            return self.inner(cache=past_key_values, **options)

    prompt = Prompt(group_id="a", token_ids=(1, 2, 3), messages=())
    sampling = Sampling(num_responses=1, temperature=0.0, max_tokens=4)
    engines = (EmbeddedEngine(model, tokenizer, batch_size=4) for model in (Older(), Older().inner))
    older, newer = (next(iter(engine.generate([prompt], sampling))).responses[0].token_ids for engine in engines)
    assert older == newer
    assert len(given) == 4
