"""Reward models behind a server: vLLM's `/classify`, `/pooling` and `/score`, SGLang's `/classify`.

One request per response, so that a bad answer costs one score. The conversation is rendered and tokenized here, with the reward
model's own chat template, and sent as token ids: the scores are those of the kind `reward_model`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mpo_megatron.config import require, to_dict
from mpo_megatron.config.score import ServedRewardModelScorer
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.client import Client
from mpo_megatron.rollout.engines.answers import shorten
from mpo_megatron.rollout.engines.servers import ServerKind, find_kind
from mpo_megatron.rollout.http_responses import UnusableAnswerError
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, Scores, join_messages
from mpo_megatron.rollout.scorers.reward_model import encode_conversation
from mpo_megatron.terminal.progress import describe_speed

_APIS: dict[ServerKind, tuple[str, ...]] = {"vllm": ("classify", "pooling", "score"), "sglang": ("classify",)}
"""Endpoints of each kind of server. SGLang's /v1/score differs: it returns probabilities of given tokens."""
_FIELDS = {"classify": "probs", "pooling": "data", "score": "score"}
"""Field with the numbers in the answer of each vLLM endpoint."""


class _Question(NamedTuple):
    group_id: str
    prompt: str
    response: str
    token_ids: tuple[int, ...]


class ServedRewardModel(Scorer):
    """A sequence classifier with one output, run by a server."""

    config: ServedRewardModelScorer

    def __init__(self, name: str, config: ServedRewardModelScorer) -> None:
        """Load the tokenizer; the server's kind is detected at the first question.

        Raises:
            ConfigError: there is no tokenizer with a chat template.
        """
        super().__init__(name, config)
        self.client = Client(config.endpoint)
        self.tokenizer = None if config.api == "score" else load_tokenizer(config.tokenizer)
        self._kind: ServerKind | None = None
        self._num_answers, self._seconds = 0, 0.0

    def score(self, groups: Sequence[Record]) -> Scores:
        """The served model's output for each response; None without a usable answer.

        Raises:
            ConfigError, DataError: the server lacks the endpoint, the template refuses a conversation, one is too long, or as
                in `Client.ask_all`.
        """
        self._find_server()
        scores: Scores = [[None] * len(group["responses"]) for group in groups]
        places: list[tuple[int, int]] = []
        questions: list[_Question] = []
        for index, group in enumerate(groups):
            for number, response in enumerate(group["responses"]):
                question = self._question(group, response["text"])
                if len(question.token_ids) > self.config.max_length:
                    if self.config.too_long == "error":
                        raise DataError(
                            f"scorers.{self.name}: group {group['group_id']}, response {number} has {len(question.token_ids)} "
                            f"tokens with its prompt, but max_length = {self.config.max_length}; raise it if the server "
                            "allows it, or set too_long = missing."
                        )
                    self.note(question.group_id, "too_long")
                    continue
                places.append((index, number))
                questions.append(question)
        started = time.monotonic()
        for position, value, failure in self.client.ask_all(questions, self._ask):
            if failure is None:
                index, number = places[position]
                scores[index][number] = value
            else:
                label = failure.label if failure.kind == "unusable" else f"failed: {failure.reason}"
                self.note(questions[position].group_id, label)
        self._seconds += time.monotonic() - started
        self._num_answers += len(questions)
        return scores

    def _question(self, group: Record, response: str) -> _Question:
        ids = () if self.tokenizer is None else tuple(encode_conversation(self.name, self.tokenizer, group, response))
        return _Question(group["group_id"], join_messages(group["prompt"]), response, ids)

    def _find_server(self) -> None:
        """Detect the kind of server.

        Raises:
            ConfigError: the server lacks the endpoint.
        """
        if self._kind is not None:
            return
        kind, api = find_kind(self.config.endpoint, self.client), self.config.api
        where = f"scorers.{self.name}.endpoint"
        require(
            kind in _APIS,
            f"{where}.server: {self.config.endpoint.base_url} is not known to be vLLM or SGLang, which serve reward models; "
            f"set {where}.server if it is one of them.",
        )
        require(
            api in _APIS[kind],
            f"scorers.{self.name}.api = {api}; a server of kind {kind} has {' and '.join(_APIS[kind])}.",
        )
        self._kind = kind

    async def _ask(self, client: Any, question: _Question) -> float:
        """The server's number for one response.

        Raises:
            UnusableAnswerError: there is none, several, or a non-finite one.
        """
        model, api = self.config.endpoint.model, self.config.api
        body: dict[str, Any] = {"model": model}
        if self._kind == "sglang":
            body |= {"input_ids": list(question.token_ids)}
        elif api == "score":
            body |= {"text_1": question.prompt, "text_2": question.response, "use_activation": False}
        else:
            body |= {"input": list(question.token_ids), "use_activation": False}  # the logit, not its sigmoid
            body |= {"task": "classify"} if api == "pooling" else {}
        # These endpoints are at the server's root, beside /v1.
        parts = urlsplit(self.config.endpoint.base_url)
        root = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        answer = await client.post(f"{root}/{api}", cast_to=object, body=body)
        return read_number(answer, "embedding" if self._kind == "sglang" else _FIELDS[api])

    def report(self) -> str | None:
        """The server's speed in this run."""
        return describe_speed(self._num_answers, "answers", self._seconds) if self._num_answers else None

    def settings(self) -> dict[str, Any]:
        """The model's name, its tokenizer and all options except address and speed."""
        tokenizer = None if self.tokenizer is None else self.tokenizer.digest()
        return to_dict(self.config) | {"endpoint": self.config.endpoint.model, "tokenizer": tokenizer}


def read_number(answer: Any, field: str) -> float:
    """The number in an answer about one input: `{"data": [{field: …}]}`, `[{field: …}]` or `{field: …}`.

    Raises:
        UnusableAnswerError: there is not exactly one, or it is not finite.
    """
    if isinstance(answer, str):  # openai returns a str where the content type is not JSON
        raise UnusableAnswerError("not_json", f"its body is not JSON ({shorten(answer)})")
    found = answer.get("data", answer) if isinstance(answer, dict) else answer
    if isinstance(found, list):
        found = found[0] if len(found) == 1 else None
    value = found.get(field) if isinstance(found, dict) else None
    for _ in range(2):  # [x] and [[x]]
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableAnswerError("no_number", f"it does not have exactly one number under {field} ({shorten(answer)})")
    try:
        number = float(value)
    except OverflowError:  # an integer of 400 digits
        number = math.inf
    if not math.isfinite(number):
        raise UnusableAnswerError("not_finite", f"its {field} is not finite ({shorten(value)})")
    return number
