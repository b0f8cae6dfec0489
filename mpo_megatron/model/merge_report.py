"""Effect of rounding merged weights on log-probs: the same tokens under exact sums and under rounded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from mpo_megatron.config import ConfigError, require
from mpo_megatron.data.tokenizer import load_tokenizer

MOST_TOKENS = 1024
"""Number of tokens of the text; more would take longer and show the same."""

NamedTensors = Callable[[], Iterator[tuple[str, Tensor]]]
"""Yields a model's weights with their Hugging Face names, in order."""


def read_tokens(path: Path, tokenizer: Path) -> list[int]:
    """The first tokens of a text file.

    Raises:
        ConfigError: it cannot be read, or holds fewer than two tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"compare_text = {path}; it cannot be read ({error}); name a text file.") from error
    tokens = list(load_tokenizer(tokenizer).encode(text))[:MOST_TOKENS]
    require(len(tokens) >= 2, f"compare_text = {path}; it holds {len(tokens)} tokens; at least two are needed.")
    return tokens


def describe_change(config: PretrainedConfig, tokens: list[int], exact: NamedTensors, rounded: NamedTensors) -> str:
    """Mean and largest change of a token's log-prob, as text; memory holds one model at a time, in float32."""
    before, after = (_logps(config, tokens, weights) for weights in (exact, rounded))
    change = (after - before).abs()
    return (
        f"merged: log-probs of {len(change)} tokens change by {change.mean():.2e} nats on average, {change.max():.2e} at most, "
        "by rounding the merged weights"
    )


@torch.no_grad()
def _logps(config: PretrainedConfig, tokens: list[int], weights: NamedTensors) -> Tensor:
    """Log-probs [T − 1] of the tokens after the first, computed in float32."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    state = {name: weight.float() for name, weight in weights()}
    model = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    row = torch.tensor([tokens])
    logps: Tensor = model(row).logits[0, :-1].float().log_softmax(dim=-1)
    return logps.gather(1, row[0, 1:, None]).squeeze(1)
