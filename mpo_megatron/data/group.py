"""The record that all stages exchange, a *group*: one prompt, K responses, K rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mpo_megatron.data.arrays import Bools, Float64, Int8, Int32

RewardKind = Literal["scores", "ranks", "labels"]
Message = dict[str, Any]
"""One chat message: {"role": …, "content": …}, and further fields for the template: tool_calls, reasoning_content, …"""
Answer = str | tuple[Message, ...]
"""A response: the model's own output as text, or messages that the chat template renders: one assistant message, or with tools
several, the first and the last being the assistant's."""


class PromptDigests(NamedTuple):
    """A rendered prompt, as digests."""

    tokenizer: str
    """Of the tokenizer, without its chat template."""
    messages: str
    """Of the messages, the system prompt included, and the tools."""
    ids: str
    """Of the token ids."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """One prompt with K responses, as text."""

    group_id: str
    prompt: tuple[Message, ...]
    """Chat messages; the last one is not the assistant's."""
    responses: tuple[Answer, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """Tools that the prompt offers, as JSON schemas."""
    rewards: tuple[float, ...] | None = None
    """K rewards, higher is better; None if the data only has labels."""
    labels: tuple[int, ...] | None = None
    """K labels, 1 chosen and 0 rejected; None if the data has none."""
    where: str = ""
    """Source of the group: `file:line`, lines counted from 1."""
    source: int = 0
    """Index of its input, counted from 0."""
    dropped: tuple[str, ...] = ()
    """For each unusable response, the field and the reason."""
    drawn: tuple[tuple[int, ...] | None, ...] = ()
    """For each response its sampled token ids, including the end token, where known; empty if known for none."""
    sampled_prompt: PromptDigests | None = None
    """The prompt that the responses were sampled with, if known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedGroup:
    """One prompt with K responses, as token ids."""

    group_id: str
    prompt_tokens: Int32
    """[P]: everything the model sees before it answers, template included."""
    response_tokens: tuple[Int32, ...]
    """K arrays [R_k]: what the model would generate, including the end token (unless the response was truncated)."""
    scored: tuple[Bools, ...] | None = None
    """K masks [R_k], False for tokens that the model did not generate, such as tool results. None: all are scored."""
    rewards: Float64 | None = None
    """[K], higher is better."""
    labels: Int8 | None = None
    """[K], 1 chosen and 0 rejected."""
    prompt_text: str = ""
    """The rendered prompt, for reports."""
    response_texts: tuple[str, ...] = ()
    """The K responses as text, with messages rendered by the template; for reports."""
    where: str = ""
    """Source of the group: `file:line`."""

    @property
    def num_responses(self) -> int:
        """K: number of responses."""
        return len(self.response_tokens)
