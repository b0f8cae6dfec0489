"""Engines that generate: a small interface, and the one place that lists the engines.

     engine.generate(prompts, sampling)  →  one Generation per prompt, in any order, as soon as it is complete

`transformers` runs embedded in this process, `vllm` is vLLM's offline engine, `openai` is any server with that protocol. Each
response of a group has its own seed, so a restart or another number of shards sends the same requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from mpo_megatron.data.group import Message
from mpo_megatron.rollout.http_responses import UnusableAnswerError

FinishReason = Literal["stop", "length", "repetition"]
"""Why a response ended: an end token, the token limit, or the engine detected repetition."""
_FINISH_REASONS: dict[Any, FinishReason] = {
    "stop": "stop",
    "eos_token": "stop",  # text-generation-inference
    "stop_sequence": "stop",
    "length": "length",
    "repetition": "repetition",
}
_UNFINISHED = {"abort": "aborted", "error": "failed", "content_filter": "filtered", "tool_calls": "tool_call"}
"""Finish reason of an engine → label under which an unusable response is counted."""


def read_finish_reason(value: Any) -> FinishReason:
    """Convert an engine's finish reason.

    Raises:
        UnusableAnswerError: the response was aborted, filtered, or ended for an unknown reason.
    """
    key = value if isinstance(value, str) else None
    if key not in _FINISH_REASONS:
        label = _UNFINISHED.get(str(key), "unknown_finish")
        raise UnusableAnswerError(label, f"finish_reason = {str(value)[:40]!r}")
    return _FINISH_REASONS[key]


def response_seed(seed: int, group_id: str, index: int, attempt: int = 0) -> int:
    """Seed in [0, 2³¹) of response `index` of a group; `attempt` counts its redraws."""
    key = f"{seed}\0{group_id}\0{index}\0{attempt}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn: logits / temperature, then the `top_k` likeliest tokens, then the fewest that reach `top_p`."""

    num_responses: int
    """K."""
    temperature: float = 1.0
    """0 selects the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    max_tokens: int = 1024
    """Maximum tokens of a response, including its end token."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; the response excludes them and all text after them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response; excluded from its text."""
    seed: int = 1234
    logps: bool = False
    """Whether to request each response's log-prob under the engine's own weights, where the engine reports it."""
    temperatures: tuple[float, ...] = ()
    """If set, response k is drawn at temperature k mod their number; engines receive one temperature at a time."""

    def temperature_of(self, index: int) -> float:
        """The temperature for response `index` of a group."""
        return self.temperatures[index % len(self.temperatures)] if self.temperatures else self.temperature

    def at(self, temperature: float) -> Sampling:
        """A copy with one temperature."""
        return replace(self, temperature=temperature, temperatures=())


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to answer."""

    group_id: str
    token_ids: tuple[int, ...]
    """[P] the rendered prompt, as `mpo prepare` stores it."""
    messages: tuple[Message, ...]
    """The same conversation, for engines that render it themselves."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the conversation offers."""
    seeds: tuple[int, ...] = ()
    """Seeds of the requested responses; if empty, those of responses 0 … K − 1."""

    def response_seeds(self, sampling: Sampling) -> tuple[int, ...]:
        """Seeds of all requested responses, in order."""
        indices = range(sampling.num_responses)
        return self.seeds or tuple(response_seed(sampling.seed, self.group_id, index) for index in indices)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    """Generated tokens, including the end token."""
    seed: int
    token_ids: tuple[int, ...] = ()
    """[R] generated token ids, including the end token; empty if the engine does not report them."""
    cut: bool = False
    """Whether it contains a stop text: the text ends before it, the tokens do not."""
    logp: float | None = None
    """Log-prob at temperature 1 under the engine's own weights, in nats, if requested."""
    model: str = ""
    """The model that answered, if a server says that it is another than the requested one."""

    def as_line(self) -> dict[str, Any]:
        """The fields of this response in a group line; token ids only if they decode to the text."""
        line: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "num_tokens": self.num_tokens,
            "seed": self.seed,
        }
        line |= {"model": self.model} if self.model else {}
        line |= {} if self.logp is None else {"engine_logp": self.logp}
        return line | {"token_ids": list(self.token_ids)} if self.token_ids and not self.cut else line


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A draw without a response."""

    seed: int
    label: str
    """The label it is counted under, for example `filtered`."""
    reason: str
    again: bool = True
    """Whether a retry with another seed may succeed."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Everything an engine returned for one prompt."""

    group_id: str
    responses: tuple[Response, ...] = field(default=())
    """Responses that arrived, in the order of the prompt's seeds."""
    misses: tuple[Miss, ...] = ()
    """Draws without a response, each with its own reason."""
    error: str | None = None
    """Why draws have neither response nor miss: no answer came, and a retry of the same draw may succeed."""


class Engine(Protocol):
    """An object that answers prompts."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt; yield each answer once complete, in any order."""

    def close(self) -> None:
        """Free devices and connections."""
