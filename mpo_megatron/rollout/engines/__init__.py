"""What generates: a small interface, and the one place that knows which engines there are.

    engine.generate(prompts, sampling)  →  Generation, one per prompt, in any order, as soon as it is done

`transformers` is embedded, `vllm` is the offline engine, `openai` any server that speaks that protocol. Each draws response k
of a group from a seed of its own, so that neither a restart nor another number of shards changes what is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from mpo_megatron.data.group import Message
from mpo_megatron.rollout.client import UnusableAnswerError

FinishReason = Literal["stop", "length", "repetition"]
"""Why a response ends: by itself, at the token limit, or because the engine saw it repeat itself."""
_FINISH_REASONS: dict[Any, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",  # text-generation-inference
    "stop_sequence": "stop",
    "length": "length",
    "repetition": "repetition",
}
_UNFINISHED = {"abort": "aborted", "error": "failed", "content_filter": "filtered", "tool_calls": "tool_call"}
"""Finish reason of an engine → the name under which an unusable response is counted."""


def read_finish_reason(value: Any) -> FinishReason:
    """Why a response ends, from an engine's word for it.

    Raises:
        UnusableAnswerError: the response was aborted, filtered, or ended for an unknown reason.
    """
    key = value if isinstance(value, str) else None
    if key not in _FINISH_REASONS:
        label = _UNFINISHED.get(str(key), "unknown_finish")
        raise UnusableAnswerError(label, f"finish_reason = {str(value)[:40]!r}")
    return _FINISH_REASONS[key]


def response_seed(seed: int, group_id: str, index: int, attempt: int = 0) -> int:
    """Seed in [0, 2³¹) of response `index` of a group; `attempt` counts how often it was drawn again."""
    key = f"{seed}\0{group_id}\0{index}\0{attempt}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn: logits / temperature, then the `top_k` likeliest, then the fewest that hold `top_p`."""

    num_responses: int
    """K."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    max_tokens: int = 1024
    """Longest response, its end token included."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; they, and what follows, are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; not part of its text."""
    seed: int = 1234
    logps: bool = False
    """Whether to ask for each response's log-probability under the engine's own weights, where the engine says it."""
    temperatures: tuple[float, ...] = ()
    """If there are any, response k is drawn at temperature k mod their number; engines are asked for one at a time."""

    def temperature_of(self, index: int) -> float:
        """The temperature that response `index` of a group is drawn at."""
        return self.temperatures[index % len(self.temperatures)] if self.temperatures else self.temperature

    def at(self, temperature: float) -> Sampling:
        """The same at one temperature."""
        return replace(self, temperature=temperature, temperatures=())


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to answer."""

    group_id: str
    token_ids: tuple[int, ...]
    """[P] the rendered prompt, as `mpo prepare` would store it."""
    messages: tuple[Message, ...]
    """The same conversation, for engines that render it themselves."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools it offers."""
    seeds: tuple[int, ...] = ()
    """Seeds of the responses wanted; without any, those of responses 0 … K − 1."""

    def response_seeds(self, sampling: Sampling) -> tuple[int, ...]:
        """Seeds of all responses wanted, in their order."""
        indices = range(sampling.num_responses)
        return self.seeds or tuple(response_seed(sampling.seed, self.group_id, index) for index in indices)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    """Tokens generated, the end token included."""
    seed: int
    token_ids: tuple[int, ...] = ()
    """[R] the tokens generated, the end token included; empty if the engine does not tell."""
    cut: bool = False
    """Whether a stop text was found in it: the text ends before it, and the tokens do not."""
    logp: float | None = None
    """Its log-probability at temperature 1 under the engine's own weights, in nats, if it was asked for."""

    def as_line(self) -> dict[str, Any]:
        """What a group line holds of it; the tokens only if they are those of the text."""
        line: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "num_tokens": self.num_tokens,
            "seed": self.seed,
        }
        line |= {} if self.logp is None else {"engine_logp": self.logp}
        return line | {"token_ids": list(self.token_ids)} if self.token_ids and not self.cut else line


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A draw that gave no response."""

    seed: int
    label: str
    """The name it is counted under, for example `filtered`."""
    reason: str
    again: bool = True
    """Whether another seed may give one."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Everything an engine has for one prompt."""

    group_id: str
    responses: tuple[Response, ...] = field(default=())
    """In the order of the prompt's seeds: those that arrived."""
    misses: tuple[Miss, ...] = ()
    """Draws that gave no response, each for a reason of its own."""
    error: str | None = None
    """Why draws have neither: no answer came, and the same draw may give one later."""


class Engine(Protocol):
    """Something that answers prompts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt; yield each answer once it is complete, in any order."""

    def close(self) -> None:
        """Free devices and connections."""
