"""Sampling tokens: the distribution is the model's, and each response has its own source of randomness."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines import Prompt, Sampling, response_seed
from mpo_megatron.rollout.engines import sampling as drawing
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.engines.sampling import choose_tokens, draw_tokens, draw_uniforms, filter_logits

SETTINGS = [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 4, 1.0), (1.3, 0, 0.7), (0.8, 6, 0.5), (1.0, 1, 1.0), (1.0, 0, 1e-6)]


def exact_distribution(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """By definition, token by token."""
    weights = np.exp(logits / temperature - (logits / temperature).max())
    order = sorted(range(len(weights)), key=lambda token: -weights[token])
    kept = order[:top_k] if top_k else order
    total, mass, chosen = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        chosen.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    result = np.zeros(len(weights))
    result[chosen] = weights[chosen] / weights[chosen].sum()
    return result


def check_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Each count within five standard deviations of its expectation; nothing where the probability is nil.

    Tokens expected less than 20 times form one class: a count that small is far from normally distributed.
    """
    number = counts.sum()
    assert not counts[probabilities == 0].any()
    rare = number * probabilities < 20
    counts = np.append(counts[~rare], counts[rare].sum())
    probabilities = np.append(probabilities[~rare], probabilities[rare].sum())
    deviation = np.sqrt(number * probabilities * (1 - probabilities).clip(0))
    assert (np.abs(counts - number * probabilities) <= 5 * deviation + 1e-3).all()


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS)
def test_frequencies_are_those_of_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(11, generator=torch.Generator().manual_seed(3)) * 2
    uniforms = draw_uniforms(range(40), 1000).flatten()
    tokens = choose_tokens(logits.expand(len(uniforms), -1), uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = exact_distribution(logits.double().numpy(), temperature, top_k, top_p)
    check_frequencies(np.bincount(tokens.numpy(), minlength=11), expected)


@pytest.mark.parametrize("temperature, top_k, top_p", SETTINGS[:5])
def test_same_tokens_stay_as_in_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 3
    theirs = TemperatureLogitsWarper(temperature)(torch.zeros(6, 1), logits)
    theirs = TopKLogitsWarper(top_k)(torch.zeros(6, 1), theirs) if top_k else theirs
    theirs = TopPLogitsWarper(top_p)(torch.zeros(6, 1), theirs) if top_p < 1 else theirs
    ours = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-6, atol=1e-9)


def test_ends_of_the_interval() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).expand(2, -1)
    tokens = draw_tokens(logits, torch.tensor([0.0, 1.0], dtype=torch.float64))  # 1.0: a possible result of rounding
    assert tokens.tolist() == [1, 3]


def test_rows_drawn_in_chunks_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniforms = torch.randn(7, 50), torch.rand(7, dtype=torch.float64)
    whole = choose_tokens(logits, uniforms, temperature=0.7, top_p=0.9)
    monkeypatch.setattr(drawing, "CHUNK_ELEMENTS", 101)
    assert torch.equal(choose_tokens(logits, uniforms, temperature=0.7, top_p=0.9), whole)


def test_seeds_differ_and_stay() -> None:
    seeds = {
        response_seed(seed, group, index, attempt)
        for seed in (0, 1)
        for group in "ab"
        for index in range(9)
        for attempt in (0, 1)
    }
    assert len(seeds) == 72
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert response_seed(1, "a", 2) == response_seed(1, "a", 2, 0)


# ---------------------------------------------------------------------------------------------- the embedded engine


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> EmbeddedEngine:
    return EmbeddedEngine.load(model_folder, load_tokenizer(model_folder), TransformersConfig(device="cpu"))


def some_prompts(number: int = 5) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(group_id=f"g{index}", token_ids=tuple(rng.integers(0, 250, 1 + 7 * index).tolist()), messages=())
        for index in range(number)
    ]


def test_greedy_equals_generate(engine: EmbeddedEngine, model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    sampling = Sampling(num_responses=2, temperature=0.0, max_tokens=20, stop_token_ids=(256, 17))
    answers = {item.group_id: item.responses for item in engine.generate(some_prompts(), sampling)}
    for prompt in some_prompts():
        ids = torch.tensor([prompt.token_ids])
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": [256, 17], "pad_token_id": 257}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected = expected[0, ids.shape[1] :].tolist()
        assert [list(response.token_ids) for response in answers[prompt.group_id]] == [expected, expected]
        assert answers[prompt.group_id][0].num_tokens == len(expected)
        ended = expected[-1] in (256, 17)
        assert answers[prompt.group_id][0].finish_reason == ("stop" if ended else "length")


def test_company_does_not_matter(engine: EmbeddedEngine) -> None:
    sampling = Sampling(num_responses=3, max_tokens=16, top_p=0.95, stop_token_ids=(256,))
    prompts = some_prompts()
    try:
        results = []
        for size, chosen in ((32, prompts), (1, prompts), (4, prompts[::-1]), (32, prompts[3:])):
            engine.batch_size = size
            results.append({item.group_id: item.responses for item in engine.generate(chosen, sampling)})
    finally:
        engine.batch_size = 32
    assert results[0] == results[1] == results[2]
    assert results[3] == {key: value for key, value in results[0].items() if key in ("g3", "g4")}
    assert len({response.token_ids for responses in results[0].values() for response in responses}) == 15


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 3, 1.0), (1.2, 0, 0.3)])
def test_engine_draws_from_the_model(
    engine: EmbeddedEngine, model_folder: Path, temperature: float, top_k: int, top_p: float
) -> None:
    """Two tokens deep, against probabilities that the model gives without cache, padding or batch."""
    number = 3000
    prompt = some_prompts(3)[2]
    sampling = Sampling(num_responses=number, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=2)
    engine.batch_size = number
    [answer] = engine.generate([prompt], sampling)
    engine.batch_size = 32
    drawn = Counter(response.token_ids for response in answer.responses)

    def distribution(ids: tuple[int, ...]) -> np.ndarray:
        with torch.inference_mode():
            logits = engine.model(torch.tensor([ids])).logits[0, -1, : engine.tokenizer.vocab_size]
        return exact_distribution(logits.double().numpy(), temperature, top_k, top_p)

    first = distribution(prompt.token_ids)
    firsts = np.zeros(len(first))
    for (token, _), count in drawn.items():
        firsts[token] += count
    check_frequencies(firsts, first)
    common = int(firsts.argmax())
    seconds = np.zeros(len(first))
    for (token, second), count in drawn.items():
        seconds[second] += count if token == common else 0
    check_frequencies(seconds, distribution((*prompt.token_ids, common)))


def test_stop_texts_are_cut_off(engine: EmbeddedEngine) -> None:
    whole = Sampling(num_responses=1, temperature=0.0, max_tokens=20)
    [full] = engine.generate(some_prompts(2)[1:], whole)
    words = engine.tokenizer.decode(full.responses[0].token_ids, skip_special=True)
    middle = words[6:8]
    [cut] = engine.generate(some_prompts(2)[1:], Sampling(num_responses=1, temperature=0.0, max_tokens=20, stop=("☃", middle)))
    assert cut.responses[0].text == words[: words.index(middle)]
    assert cut.responses[0].finish_reason == "stop"
    assert cut.responses[0].num_tokens < 20


def test_probability_of_a_seed_is_uniform() -> None:
    """Numbers of different seeds are independent enough: mean 1/2, no correlation between neighbours."""
    numbers = draw_uniforms([response_seed(0, "group", index) for index in range(4000)], 2).numpy()
    assert abs(numbers[:, 0].mean() - 0.5) < 5 / math.sqrt(12 * 4000)
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 5 / math.sqrt(4000)
