"""Pairwise rankers: a cross-encoder reads a prompt and two candidates; its logit gives P(a > b)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from mpo_megatron.config.score import PairwiseScorer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.loading import loading
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, Scores, join_messages
from mpo_megatron.rollout.scorers.classifier import Classifier
from mpo_megatron.rollout.scorers.comparison import Pair, score_by_comparison


class PairwiseRanker(Scorer):
    """Cross-encoders like PairRM (Jiang et al., 2023), as sequence classifiers with one output."""

    config: PairwiseScorer

    def __init__(self, name: str, config: PairwiseScorer) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError: as in `Classifier`; or transformers cannot load the tokenizer.
        """
        from transformers import AutoTokenizer  # seconds to import

        super().__init__(name, config)
        self.classifier = Classifier(name, config)
        with loading(f"scorers.{name}.model = {config.model}; its tokenizer: transformers"):
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True, trust_remote_code=False)

    def score(self, groups: Sequence[Record]) -> Scores:
        """The share of comparisons won, weighted by the model's probabilities.

        Raises:
            DataError: a comparison is too long.
        """
        return score_by_comparison(
            groups,
            functools.partial(self._compare, groups),
            tournament=self.config.comparisons == "tournament",
            both_orders=self.config.both_orders,
            notes=self.notes,
        )

    def _compare(self, groups: Sequence[Record], pairs: Sequence[Pair]) -> list[float | None]:
        values: list[float | None] = [None] * len(pairs)
        places: list[int] = []
        sequences: list[list[int]] = []
        for place, pair in enumerate(pairs):
            ids = self._encode(groups[pair.group], pair)
            if len(ids) <= self.classifier.max_length:
                places.append(place)
                sequences.append(ids)
                continue
            group_id = groups[pair.group]["group_id"]
            if self.config.too_long == "error":
                raise DataError(
                    f"scorers.{self.name}: group {group_id}, responses {pair.a} and {pair.b} have {len(ids)} tokens with the "
                    f"prompt, but max_length = {self.classifier.max_length}; raise it if the model allows it, or set "
                    "too_long = missing."
                )
            self.note(group_id, "too_long")
        for place, logit in zip(places, self.classifier.run(sequences), strict=True):
            values[place] = 0.5 * (1.0 + math.tanh(0.5 * logit))  # sigmoid without overflow
        return values

    def _encode(self, group: Record, pair: Pair) -> list[int]:
        parts = {"prompt": join_messages(group["prompt"])}
        parts |= {name: group["responses"][index]["text"] for name, index in (("a", pair.a), ("b", pair.b))}
        ids: list[int] = self.tokenizer.encode(self.config.template.format(**parts), verbose=False)
        return ids

    def settings(self) -> dict[str, Any]:
        """The checkpoint, the template, and the scheme of pairs."""
        return {
            "model": self.classifier.digest(),
            "template": self.config.template,
            "comparisons": self.config.comparisons,
            "both_orders": self.config.both_orders,
            "dtype": self.config.dtype,
            "max_length": self.classifier.max_length,
        }

    def close(self) -> None:
        """Free the model's memory."""
        self.classifier.close()
