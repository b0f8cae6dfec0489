"""The quickstart's task as a verifiable reward for sampled answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.quickstart.task import WORDS


def reward(response: str, group: Mapping[str, Any]) -> float:
    """Number of distinct correct things, divided by the number asked for, or by the number named if that is larger.

    So neither a short answer, nor a long one, nor repetition gets the full reward of 1.
    """
    asked = group["meta"]
    things = [thing.strip() for thing in response.split(",")]
    right = {thing for thing in things if thing in WORDS[asked["kind"]]}
    return len(right) / max(asked["count"], len(things))
