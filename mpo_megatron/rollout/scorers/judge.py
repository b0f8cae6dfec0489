"""A language model behind an endpoint as the judge: a template makes the question, a parser reads the verdict."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from mpo_megatron.config import ConfigError, require, to_dict
from mpo_megatron.config.score import JudgeScorer
from mpo_megatron.data.bounded import LimitError
from mpo_megatron.data.templates import Renderer, fill
from mpo_megatron.rollout.client import Client
from mpo_megatron.rollout.engines import read_finish_reason, response_seed
from mpo_megatron.rollout.engines.answers import find_choice, read_text
from mpo_megatron.rollout.engines.servers import ServerKind, find_kind
from mpo_megatron.rollout.http_responses import UnusableAnswerError
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, Scores, join_messages
from mpo_megatron.rollout.scorers.comparison import Pair, score_by_comparison
from mpo_megatron.rollout.scorers.patterns import TOO_SLOW, Pattern
from mpo_megatron.rollout.scorers.verdicts import read_comparison, read_grade, to_number, to_winner
from mpo_megatron.terminal.progress import describe_speed

_STRUCTURED: frozenset[ServerKind] = frozenset({"vllm", "sglang", "llamacpp", "openai"})
"""Kinds of server that support JSON schemas; others may ignore one silently."""


class _Question(NamedTuple):
    group_id: str
    text: str
    key: str
    """Which response or pair of the group the question is about; part of its seed."""
    attempt: int = 0
    """Number of earlier attempts without a verdict; part of its seed."""


class Judge(Scorer):
    """Grades single responses, or compares them in pairs."""

    config: JudgeScorer

    def __init__(self, name: str, config: JudgeScorer) -> None:
        """Compile the template.

        Raises:
            ConfigError: the template is not valid Jinja.
        """
        super().__init__(name, config)
        self.client = Client(config.endpoint)
        self._checked = False
        self._num_answers, self._seconds = 0, 0.0
        self._source = Path(config.template).read_text(encoding="utf-8")
        self._parse = Pattern(config.parse) if config.parse is not None else None
        try:
            self._fill = Renderer(fill, f"scorers.{name}.template = {config.template}")
            self._fill(self._source, None)
        except TemplateError as error:
            raise ConfigError(f"scorers.{name}.template = {config.template}; it cannot be compiled: {error}") from error

    def score(self, groups: Sequence[Record]) -> Scores:
        """The grade, or the share of comparisons won; None without a verdict.

        Raises:
            ConfigError, DataError: the template cannot be filled, or as in `Client.ask_all`.
        """
        if self.config.mode == "compare":
            return score_by_comparison(
                groups,
                functools.partial(self._compare, groups),
                tournament=self.config.comparisons == "tournament",
                both_orders=self.config.both_orders,
                notes=self.notes,
                contradictions=self.config.contradictions,
            )
        questions = [
            self._question(group, str(number), {"response": response["text"]})
            for group in groups
            for number, response in enumerate(group["responses"])
        ]
        values = iter(self._ask_all(questions))
        return [[next(values) for _ in group["responses"]] for group in groups]

    def _compare(self, groups: Sequence[Record], pairs: Sequence[Pair]) -> list[float | None]:
        questions = []
        for pair in pairs:
            group = groups[pair.group]
            texts = {name: group["responses"][index]["text"] for name, index in (("a", pair.a), ("b", pair.b))}
            questions.append(self._question(group, f"{pair.a},{pair.b}", texts))
        return self._ask_all(questions)

    def _question(self, group: Record, key: str, texts: Mapping[str, str]) -> _Question:
        prompt = join_messages(group["prompt"])
        try:
            variables = {"prompt": prompt, "messages": group["prompt"], "group": group, **texts}
            text = self._fill(self._source, variables)
        except TemplateError as error:
            raise ConfigError(
                f"scorers.{self.name}.template = {self.config.template}; it cannot be filled for group {group['group_id']}: "
                f"{error}; it may use prompt, messages, group, {', '.join(texts)}."
            ) from error
        return _Question(group["group_id"], text, key)

    def _ask_all(self, questions: Sequence[_Question]) -> list[float | None]:
        """The verdict on each question; a question without one is retried with another seed, `garbage_retries` times."""
        values: list[float | None] = [None] * len(questions)
        places = list(range(len(questions)))
        started = time.monotonic()
        for attempt in range(self.config.garbage_retries + 1 if questions else 0):
            self._check_server()
            again: list[int] = []
            asked = [questions[place]._replace(attempt=attempt) for place in places]
            for position, verdict, failure in self.client.ask_all(asked, self._ask):
                place = places[position]
                if failure is None:
                    values[place] = verdict
                elif failure.kind == "unusable":
                    self.note(questions[place].group_id, failure.label)
                    again.append(place)
                else:
                    self.note(questions[place].group_id, f"failed: {failure.reason}")
            places = sorted(again)
        self._seconds += time.monotonic() - started
        return values

    def _check_server(self) -> None:
        """Refuse a server that is known to ignore an option of the configuration.

        Raises:
            ConfigError: names the option.
        """
        if not self.config.structured or self._checked:
            return
        kind = find_kind(self.config.endpoint, self.client)
        require(
            kind in _STRUCTURED,
            f"scorers.{self.name}.structured = true; a server of kind {kind} ignores JSON schemas; remove it, or choose "
            "another server.",
        )
        self._checked = True

    async def _ask(self, client: Any, question: _Question) -> float:
        """The verdict in the judge's answer.

        Raises:
            UnusableAnswerError: the answer holds none.
        """
        config = self.config
        body = {
            "model": config.endpoint.model,
            "messages": [{"role": "user", "content": question.text}],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "seed": response_seed(0, f"{question.group_id}/{question.key}", 0, question.attempt),
        }
        if config.structured:
            schema = {"name": "verdict", "strict": True, "schema": self._schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        answer = await client.post("/chat/completions", cast_to=object, body=body)
        self.client.find_other_model(answer, str(body["model"]))
        self._count(question.group_id, answer)
        choice = find_choice(answer)
        message = choice.get("message")
        text = read_text(message if isinstance(message, dict) else {}, "content")
        if read_finish_reason(choice.get("finish_reason")) != "stop":
            raise UnusableAnswerError("cut", f"it was truncated at max_tokens = {config.max_tokens}, before the verdict")
        verdict = self.read_verdict(text)
        if verdict is None:
            raise UnusableAnswerError("garbage", "it states no verdict")
        return verdict

    def _schema(self) -> dict[str, Any]:
        """JSON schema of a structured verdict; the reason comes first, so that the judge thinks before it decides."""
        if self.config.mode == "compare":
            verdict: tuple[str, dict[str, Any]] = ("winner", {"type": "string", "enum": ["A", "B", "tie"]})
        else:
            limits = dict(zip(("minimum", "maximum"), self.config.scale, strict=False))
            verdict = ("score", {"type": "number", **limits})
        properties = {"reason": {"type": "string"}, verdict[0]: verdict[1]}
        return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}

    def _count(self, group_id: str, answer: Any) -> None:
        """Count an answer and its tokens, as reported by the server."""
        self._num_answers += 1
        self.note(group_id, "answers")
        usage = answer.get("usage") if isinstance(answer, dict) else None
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name) if isinstance(usage, dict) else None
            if isinstance(count, int) and not isinstance(count, bool) and 0 < count < 10**9:
                self.note(group_id, name, count)

    def read_verdict(self, text: str) -> float | None:
        """The last number, or P(a > b), stated in an answer; None without one.

        Raises:
            UnusableAnswerError: the expression `parse` takes too long.
        """
        compares = self.config.mode == "compare"
        if self._parse is None:
            value = read_comparison(text) if compares else read_grade(text)
        else:
            [verdict] = self._parse.last([text])
            if isinstance(verdict, LimitError):
                raise UnusableAnswerError(TOO_SLOW, f"parse = {self.config.parse}: {verdict}") from verdict
            value = to_winner(verdict or "") if compares else to_number(verdict or "")
        scale = self.config.scale
        return value if value is None or not scale or scale[0] <= value <= scale[1] else None

    def report(self) -> str | None:
        """The judge's speed in this run."""
        return describe_speed(self._num_answers, "answers", self._seconds) if self._num_answers else None

    def settings(self) -> dict[str, Any]:
        """The judge's name, the template's text and all options except address, speed and price."""
        settings = to_dict(self.config) | {"endpoint": self.config.endpoint.model, "template": self._source}
        return {name: value for name, value in settings.items() if not name.endswith("_price")}
