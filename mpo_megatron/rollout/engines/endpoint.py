"""Any server that speaks the OpenAI protocol: vLLM, SGLang, llama.cpp, `transformers serve`, or a hosted API.

One request per response, each with its own seed: a bad answer costs one response, and a server with a prefix cache still
computes the prompt once. The body of an answer is read as plain JSON because servers add and omit fields.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mpo_megatron.config import ConfigError, EndpointConfig, require
from mpo_megatron.data.chat import Chat, with_text_arguments
from mpo_megatron.data.group import Message
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.client import Client
from mpo_megatron.rollout.engines import Generation, Miss, Prompt, Response, Sampling
from mpo_megatron.rollout.engines.answers import read_answer, refuse_echo
from mpo_megatron.rollout.engines.seeds import SeedWatch
from mpo_megatron.rollout.engines.served_adapter import ServedAdapter
from mpo_megatron.rollout.engines.servers import UNCONTROLLED, find_kind, request_fields
from mpo_megatron.rollout.thoughts import Thoughts
from mpo_megatron.terminal.visible import visible


class _Question(NamedTuple):
    prompt: Prompt
    seed: int
    sampling: Sampling


class EndpointEngine:
    """Generates by sending requests to a server."""

    def __init__(
        self, config: EndpointConfig, chat: Chat | Tokenizer, adapter: Path | None = None, *, keep_adapter: bool = False
    ) -> None:
        """Identify the server, and load the adapter on it if there is one.

        Args:
            config: the server
            chat: counts tokens where the server does not, and restores thoughts; for `api: tokens`, a tokenizer is enough
            adapter: PEFT folder of an adapter of the server's model
            keep_adapter: leave the adapter on the server at the end, because other clients may still use it
        Raises:
            ConfigError, DataError: as in `find_kind` and `ServedAdapter.load`; or the server renders the chat template without
                the variables of `chat_template_kwargs`.
        """
        self.config, self.client = config, Client(config)
        self.tokenizer = chat.tokenizer if isinstance(chat, Chat) else chat
        self._chat = chat if isinstance(chat, Chat) else None
        self.kind = find_kind(config, self.client)
        self.uncontrolled = UNCONTROLLED[self.kind]
        require(
            config.api != "chat" or not self.chat.variables or self.kind != "openai",
            "chat_template_kwargs is set, but the server may ignore it with endpoint.api = chat; set "
            "endpoint.api = text or tokens, or endpoint.server to its kind.",
        )
        self.adapter = None if adapter is None else ServedAdapter(config, self.kind, adapter)
        self.keep_adapter = keep_adapter
        self.model_fields = {"model": config.model}
        self.seeds = SeedWatch(config.base_url)
        if self.adapter is not None:
            self.adapter.load()
            self.model_fields = self.adapter.fields

    @property
    def chat(self) -> Chat:
        """The chat template used to build requests."""
        assert self._chat is not None
        return self._chat

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Request all responses of all prompts; yield a prompt when its last request has ended.

        Raises:
            ConfigError, DataError: as in `Client.ask_all`.
        """
        questions = [_Question(prompt, seed, sampling) for prompt in prompts for seed in prompt.response_seeds(sampling)]
        waiting = {prompt.group_id: len(prompt.response_seeds(sampling)) for prompt in prompts}
        arrived: dict[str, dict[int, Response]] = {prompt.group_id: {} for prompt in prompts}
        misses: defaultdict[str, list[Miss]] = defaultdict(list)
        lost: dict[str, str] = {}

        def gather(group_id: str, error: str | None) -> Generation:
            found = arrived.pop(group_id)
            responses = tuple(found[position] for position in sorted(found))
            self.seeds.watch(responses, sampling)
            return Generation(group_id=group_id, responses=responses, misses=tuple(misses.pop(group_id, ())), error=error)

        try:
            for position, response, failure in self.client.ask_all(questions, self._ask):
                group_id = questions[position].prompt.group_id
                waiting[group_id] -= 1
                if failure is None:
                    assert response is not None
                    arrived[group_id][position] = response
                elif failure.kind == "lost":
                    lost[group_id] = failure.reason
                else:
                    again = failure.kind == "unusable"
                    seed = questions[position].seed
                    misses[group_id].append(Miss(seed=seed, label=failure.label, reason=failure.reason, again=again))
                if waiting[group_id] == 0:
                    yield gather(group_id, lost.get(group_id))
        except (ConfigError, DataError):
            for group_id in [group_id for group_id, found in arrived.items() if found]:  # keep the responses that arrived
                yield gather(group_id, "the server stopped answering before the other responses arrived")
            raise

    async def _ask(self, client: Any, question: _Question) -> Response:
        prompt, sampling, api = question.prompt, question.sampling, self.config.api
        body = self.model_fields | request_fields(self.kind, sampling, question.seed)
        if api == "chat":
            body["messages"] = self._messages(prompt)
            if prompt.tools:
                body["tools"] = list(prompt.tools)
            if self.chat.variables:
                body["chat_template_kwargs"] = dict(self.chat.variables)
        elif api == "text":
            body["prompt"] = self.tokenizer.decode(prompt.token_ids)
            if self.kind == "vllm":
                body["add_special_tokens"] = False  # the rendered prompt already contains them
        else:
            body["prompt"] = list(prompt.token_ids)
            if self.kind == "openai":
                body["stop_token_ids"] = list(sampling.stop_token_ids)  # servers that accept token ids accept these too
        path = "/chat/completions" if api == "chat" else "/completions"
        answer = await client.post(path, cast_to=object, body=body)
        thoughts = Thoughts(self.chat, prompt.messages, prompt.tools) if prompt.messages else None
        options: dict[str, Any] = {"sampling": sampling, "tokenizer": self.tokenizer, "thoughts": thoughts}
        response = read_answer(answer, api=api, seed=question.seed, **options)
        refuse_echo(response.text, prompt.token_ids, self.tokenizer)
        other = self.client.find_other_model(answer, str(self.model_fields.get("model", self.config.model)))
        return response if other is None else replace(response, model=other)

    def _messages(self, prompt: Prompt) -> list[Message]:
        """The conversation, with the system message that `Chat` adds, and with tool arguments as text."""
        return [with_text_arguments(message) for message in self.chat.with_system(prompt.messages)]

    def close(self) -> None:
        """Unload an adapter that this engine loaded; nothing else stays open between calls."""
        if self.adapter is None or self.keep_adapter or not self.adapter.loaded_here:
            return
        problem = self.adapter.unload()
        if problem is not None:
            left = f"{self.config.base_url} still holds the adapter {self.adapter.name}: {problem}"
            print(visible(left), file=sys.stderr)
