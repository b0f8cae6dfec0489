"""Reward models: a sequence classifier reads the conversation with the response, in its own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from mpo_megatron.config.score import RewardModelScorer
from mpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, Scores
from mpo_megatron.rollout.scorers.classifier import Classifier


class RewardModel(Scorer):
    """Skywork-Reward, GRM, ArmoRM and similar models."""

    config: RewardModelScorer

    def __init__(self, name: str, config: RewardModelScorer) -> None:
        """Load the checkpoint.

        Raises:
            ConfigError: as in `Classifier`; or there is no tokenizer with a chat template.
        """
        super().__init__(name, config)
        self.classifier = Classifier(name, config)
        self.tokenizer = load_tokenizer(config.model)

    def score(self, groups: Sequence[Record]) -> Scores:
        """The model's output for each response. Responses of all groups are batched by length.

        Raises:
            DataError: the template refuses a conversation, or one is too long.
        """
        scores: Scores = [[None] * len(group["responses"]) for group in groups]
        places: list[tuple[int, int]] = []
        sequences: list[list[int]] = []
        for index, group in enumerate(groups):
            for number, response in enumerate(group["responses"]):
                ids = encode_conversation(self.name, self.tokenizer, group, response["text"])
                if len(ids) <= self.classifier.max_length:
                    places.append((index, number))
                    sequences.append(ids)
                    continue
                if self.config.too_long == "error":
                    raise DataError(
                        f"scorers.{self.name}: group {group['group_id']}, response {number} has {len(ids)} tokens with its "
                        f"prompt, but max_length = {self.classifier.max_length}; raise it if the model allows it, or set "
                        "too_long = missing."
                    )
                self.note(group["group_id"], "too_long")
        for (index, number), value in zip(places, self.classifier.run(sequences), strict=True):
            scores[index][number] = value
        return scores

    def settings(self) -> dict[str, Any]:
        """The checkpoint and its tokenizer."""
        return {
            "model": self.classifier.digest(),
            "tokenizer": self.tokenizer.digest(),
            "dtype": self.config.dtype,
            "max_length": self.classifier.max_length,
        }

    def close(self) -> None:
        """Free the model's memory."""
        self.classifier.close()


def encode_conversation(name: str, tokenizer: Tokenizer, group: Record, response: str) -> list[int]:
    """Token ids of a prompt and one response, as the reward model's chat template renders them.

    Raises:
        DataError: the template refuses the conversation.
    """
    messages = [*group["prompt"], {"role": "assistant", "content": response}]
    try:
        text = tokenizer.render(messages, add_generation_prompt=False, variables={})
    except TemplateError as error:
        raise DataError(
            f"scorers.{name}: group {group['group_id']}: the reward model's chat template refuses it: {error}"
        ) from error
    return tokenizer.encode(text)
