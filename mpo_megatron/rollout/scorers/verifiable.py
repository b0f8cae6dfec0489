"""Verifiable rewards: the answer equals the reference, or a pattern matches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_megatron.config.score import MatchScorer, RegexScorer
from mpo_megatron.data.bounded import LimitError
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, Scores
from mpo_megatron.rollout.scorers.patterns import TOO_SLOW, Pattern

_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?|[-+−]?\.\d+")


class Match(Scorer):
    """1.0 if the answer in a response equals the reference."""

    config: MatchScorer

    def __init__(self, name: str, config: MatchScorer) -> None:
        super().__init__(name, config)
        self._extract = Pattern(config.extract) if config.extract is not None else None

    def score(self, groups: Sequence[Record]) -> Scores:
        """1.0 or 0.0 per response; None for a whole group without a reference.

        Raises:
            DataError: mode is numeric and a reference is not a number.
        """
        return [self._score_group(group) for group in groups]

    def _score_group(self, group: Record) -> list[float | None]:
        reference: Any = group
        for part in self.config.field.split("."):
            reference = reference.get(part) if isinstance(reference, Mapping) else None
        if reference is None or reference == []:
            self.note(group["group_id"], "no_reference")
            return [None] * len(group["responses"])
        references = [str(item) for item in (reference if isinstance(reference, list) else [reference])]
        if self.config.mode == "numeric":
            for item in references:
                if read_number(item) is None:
                    raise DataError(
                        f"scorers.{self.name}: group {group['group_id']}: {self.config.field} = {item!r} is not a number; set "
                        "mode = exact, or fix the prompt file."
                    )
        answers = self._answers([response["text"] for response in group["responses"]])
        scores: list[float | None] = []
        for answer in answers:
            if isinstance(answer, LimitError):
                self.note(group["group_id"], TOO_SLOW)
                scores.append(None)
            else:
                scores.append(float(self._matches(answer, references)))
        return scores

    def _matches(self, answer: str | None, references: Sequence[str]) -> bool:
        if answer is None:
            return False
        if self.config.mode == "exact":
            fold = str.casefold if self.config.ignore_case else str
            return any(fold(answer.strip()) == fold(reference.strip()) for reference in references)
        value = read_number(answer)
        return value is not None and any(
            math.isclose(value, read_number(reference) or 0.0, rel_tol=self.config.tolerance, abs_tol=self.config.tolerance)
            for reference in references
        )

    def _answers(self, texts: Sequence[str]) -> Sequence[str | LimitError | None]:
        """The answer that each response states; None without one."""
        if self._extract is not None:
            return self._extract.last(texts)
        if self.config.mode == "exact":
            return texts
        return [numbers[-1] if (numbers := _NUMBER.findall(text)) else None for text in texts]


def read_number(text: str) -> float | None:
    """The number in a text, ignoring what surrounds it; None if the text holds none, or several.

    Commas may separate thousands; a fraction is evaluated.
    """
    found = _NUMBER.findall(text)
    if len(found) != 1:
        return None
    top, _, bottom = found[0].replace(",", "").replace("−", "-").replace(" ", "").partition("/")
    if bottom and float(bottom) == 0:
        return None
    value = float(top) / float(bottom or 1)
    return value if math.isfinite(value) else None


class Regex(Scorer):
    """Scores by whether a pattern matches."""

    config: RegexScorer

    def __init__(self, name: str, config: RegexScorer) -> None:
        super().__init__(name, config)
        self._pattern = Pattern(config.pattern)

    def score(self, groups: Sequence[Record]) -> Scores:
        """`found` or `absent` per response; None where the pattern takes too long."""
        return [self._score_group(group) for group in groups]

    def _score_group(self, group: Record) -> list[float | None]:
        scores: list[float | None] = []
        for found in self._pattern.matches([response["text"] for response in group["responses"]], full=self.config.full):
            if isinstance(found, LimitError):
                self.note(group["group_id"], TOO_SLOW)
                scores.append(None)
            else:
                scores.append(self.config.found if found else self.config.absent)
        return scores
