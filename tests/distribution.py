"""The distribution of a response's first token, and how well samples fit it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines import Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.engines.sampling import filter_logits


def exact_distribution(model: Path, prompt: str, sampling: Sampling) -> dict[str, float]:
    """With text: the probability of the first token, computed from the model's logits."""
    chat = Chat(load_tokenizer(model))
    engine = EmbeddedEngine.load(model, chat.tokenizer, TransformersConfig(device="cpu"))
    ids = torch.tensor([chat.prompt([{"role": "user", "content": prompt}])[1].tolist()])
    with torch.inference_mode():
        logits = engine.model(ids).logits[:, -1, : chat.tokenizer.vocab_size]
    kept = filter_logits(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    found: dict[str, float] = {}
    for token, probability in enumerate(kept.double().softmax(dim=-1)[0].tolist()):
        if probability > 0:
            text = chat.tokenizer.decode([token], skip_special=True)
            found[text] = found.get(text, 0.0) + probability
    return found


def p_value(counts: Counter[str], expected: dict[str, float]) -> float:
    """Significance of Pearson's chi-square test; texts expected fewer than five times form one class."""
    total = sum(counts.values())
    if set(counts) - set(expected):
        return 0.0
    common = [text for text, probability in expected.items() if probability * total >= 5]
    pairs = [(counts[text], expected[text] * total) for text in common]
    pairs.append((total - sum(seen for seen, _ in pairs), total - sum(mean for _, mean in pairs)))
    pairs = [(seen, mean) for seen, mean in pairs if mean > 1e-9 * total]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in pairs)
    return float(torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2), torch.tensor(statistic / 2)))
