"""Scorers: their base class, and the one place that lists them.

scorer.score(groups)  →  for each group, one score per response; None where there is none
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_megatron.config import to_dict
from mpo_megatron.config.score import (
    AnyScorer,
    FunctionScorer,
    JudgeScorer,
    MatchScorer,
    PairwiseScorer,
    RegexScorer,
    RewardModelScorer,
    ServedRewardModelScorer,
)
from mpo_megatron.rollout.records import Record

Scores = list[list[float | None]]
"""For each group, one score per response."""


class Scorer(abc.ABC):
    """Scores responses; higher is better."""

    def __init__(self, name: str, config: AnyScorer) -> None:
        """Store the options, and the name under which scores are stored."""
        self.name, self.config = name, config
        self.notes: dict[str, Counter[str]] = {}
        """By group id: events counted while scoring it, for example ties; the reader empties it."""

    @abc.abstractmethod
    def score(self, groups: Sequence[Record]) -> Scores:
        """Score the responses of group lines.

        Raises:
            DataError: a response cannot be scored, and the configuration makes this an error.
        """

    def note(self, group_id: str, what: str, count: int = 1) -> None:
        """Count an event of a group."""
        self.notes.setdefault(group_id, Counter())[what] += count

    def settings(self) -> Mapping[str, Any]:
        """Everything that its scores depend on."""
        return to_dict(self.config)

    def digest(self) -> str:
        """Identity of the scorer: equal digests give equal scores."""
        return hashlib.sha256(json.dumps([self.config.kind, self.settings()], sort_keys=True, default=str).encode()).hexdigest()

    def report(self) -> str | None:
        """A line about this run, for example a judge's speed; None if there is nothing to report."""
        return None

    def close(self) -> None:  # noqa: B027 - most scorers have nothing to free
        """Free devices and connections, if any."""


def build_scorer(name: str, config: AnyScorer) -> Scorer:
    """The scorer that a configuration describes, with its model loaded.

    Raises:
        ConfigError: it cannot be built: wrong model, template or function.
    """
    if isinstance(config, RewardModelScorer):
        from mpo_megatron.rollout.scorers.reward_model import RewardModel

        return RewardModel(name, config)
    if isinstance(config, ServedRewardModelScorer):
        from mpo_megatron.rollout.scorers.served import ServedRewardModel

        return ServedRewardModel(name, config)
    if isinstance(config, PairwiseScorer):
        from mpo_megatron.rollout.scorers.pairwise import PairwiseRanker

        return PairwiseRanker(name, config)
    if isinstance(config, JudgeScorer):
        from mpo_megatron.rollout.scorers.judge import Judge

        return Judge(name, config)
    if isinstance(config, FunctionScorer):
        from mpo_megatron.rollout.scorers.function import Function

        return Function(name, config)
    from mpo_megatron.rollout.scorers import verifiable

    if isinstance(config, MatchScorer):
        return verifiable.Match(name, config)
    assert isinstance(config, RegexScorer)
    return verifiable.Regex(name, config)


def join_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as plain text: a single question unchanged, else one paragraph per turn after its role, calls as JSON."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {_text_of(message)}" for message in messages)


def _text_of(message: Mapping[str, Any]) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])
