"""Notice a server that ignores seed and temperature: all responses to a prompt are the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mpo_megatron.rollout.engines import Response, Sampling
from mpo_megatron.terminal.visible import visible

WATCHED_PROMPTS = 8
"""Prompts watched at the start of a run."""
LONG = 8
"""Tokens from which equal responses are suspicious: a short answer may simply be certain."""


class SeedWatch:
    """Warns once if the first prompts each get equal responses."""

    def __init__(self, base_url: str) -> None:
        self.base_url, self.watched, self.alike = base_url, 0, 0

    def watch(self, responses: Sequence[Response], sampling: Sampling) -> None:
        """Compare the responses to one prompt."""
        long = len(responses) > 1 and max(response.num_tokens for response in responses) >= LONG
        if not long or sampling.temperature == 0 or self.watched == WATCHED_PROMPTS:
            return
        self.watched += 1
        self.alike += len({response.text for response in responses}) == 1
        if self.alike == WATCHED_PROMPTS:
            text = (
                f"WARNING: {self.base_url} gave equal responses to different seeds, for all of the first {WATCHED_PROMPTS} "
                f"prompts, at temperature {sampling.temperature:g}. It may ignore seed or temperature, or cache its answers; "
                "such groups have no contrast."
            )
            print(visible(text), file=sys.stderr)
