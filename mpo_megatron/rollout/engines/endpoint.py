"""Any server that speaks the OpenAI protocol: vLLM, SGLang, `transformers serve`, or somebody's API.

One request a response, with its own seed: so a lost one costs one response, and a server with a prefix cache computes the prompt
once all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mpo_megatron.config import ConfigError, EndpointConfig
from mpo_megatron.data import DataError
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.rollout.client import Client, UnusableAnswerError
from mpo_megatron.rollout.engines import Generation, Prompt, Response, Sampling


class _Question(NamedTuple):
    prompt: Prompt
    seed: int
    sampling: Sampling


class EndpointEngine:
    """Generates by asking a server."""

    def __init__(self, config: EndpointConfig, tokenizer: Tokenizer) -> None:
        """Take the server, and the tokenizer that counts tokens where the server does not."""
        self.config, self.tokenizer, self.client = config, tokenizer, Client(config)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Ask for all responses of all prompts; a prompt is yielded when its last request has come to an end.

        Raises:
            ConfigError, DataError: as `Client.ask_all`.
        """
        questions = [_Question(prompt, seed, sampling) for prompt in prompts for seed in prompt.response_seeds(sampling)]
        waiting = {prompt.group_id: len(prompt.response_seeds(sampling)) for prompt in prompts}
        responses: dict[str, dict[int, Response]] = {prompt.group_id: {} for prompt in prompts}
        errors: dict[str, str] = {}
        try:
            for index, response, error in self.client.ask_all(questions, self._ask):
                group_id = questions[index].prompt.group_id
                waiting[group_id] -= 1
                if response is not None:
                    responses[group_id][index] = response
                if error is not None:
                    errors[group_id] = error
                if waiting[group_id] == 0:
                    yield _gather(group_id, responses.pop(group_id), errors.get(group_id))
        except (ConfigError, DataError):
            for group_id, arrived in responses.items():  # what has come is worth keeping, though not a group yet
                if arrived:
                    yield _gather(group_id, arrived, "the server went away while others were under way")
            raise

    async def _ask(self, client: Any, question: _Question) -> Response:
        sampling, config = question.sampling, self.config
        options: dict[str, Any] = {
            "model": config.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": question.seed,
        }
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        extra: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        if config.api == "chat":
            answer = await client.chat.completions.create(messages=list(question.prompt.messages), extra_body=extra, **options)
        elif config.api == "text":
            text = self.tokenizer.decode(question.prompt.token_ids)
            answer = await client.completions.create(prompt=text, extra_body=extra, **options)
        else:
            extra["stop_token_ids"] = list(sampling.stop_token_ids)  # servers that take token ids know this, too
            ids = list(question.prompt.token_ids)
            answer = await client.completions.create(prompt=ids, extra_body=extra, **options)
        return self._read(answer, question.seed)

    def _read(self, answer: Any, seed: int) -> Response:
        """The response in a server's answer.

        Raises:
            UnusableAnswerError: it holds none.
        """
        try:
            [choice] = answer.choices
            text = choice.message.content if self.config.api == "chat" else choice.text
            reason = choice.finish_reason
        except (AttributeError, TypeError, ValueError) as error:
            raise UnusableAnswerError(f"it holds not one choice with a text ({_shorten(answer)})") from error
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise UnusableAnswerError(f"text of type {type(text).__name__}, finish_reason = {reason!r}")
        counted = getattr(getattr(answer, "usage", None), "completion_tokens", None)
        num_tokens = counted if isinstance(counted, int) else len(self.tokenizer.encode(text))
        return Response(text=text, finish_reason=reason, num_tokens=num_tokens, seed=seed)

    def close(self) -> None:
        """Nothing is kept open between calls."""


def _gather(group_id: str, arrived: Mapping[int, Response], error: str | None) -> Generation:
    """What has come for a prompt, in the order it was asked for."""
    return Generation(group_id=group_id, responses=tuple(arrived[key] for key in sorted(arrived)), error=error)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "…"
