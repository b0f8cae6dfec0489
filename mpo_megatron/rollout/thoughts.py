"""Thoughts that a server takes out of an answer, put back as the chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from mpo_megatron.config import ConfigError
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import Message
from mpo_megatron.rollout.client import UnusableAnswerError


class Thoughts:
    """Writes the thoughts of answers to one conversation."""

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        self.chat, self.messages, self.tools = chat, messages, tools

    def put_back(self, thought: str, answer: str) -> str:
        """What the model wrote: all between the prompt and the end token in the template's rendering of thought and answer.

        Raises:
            ConfigError: the template does not write the thought there.
            UnusableAnswerError: the template refuses the answer.
        """
        prompt, _ = self.chat.prompt(self.messages, self.tools)
        messages: list[Message] = [*self.messages, {"role": "assistant", "content": answer, "reasoning_content": thought}]
        tokenizer = self.chat.tokenizer
        try:
            whole = self.chat.render(messages, add_generation_prompt=False, tools=self.tools)
        except TemplateError as error:
            raise UnusableAnswerError("template", f"the chat template refuses it: {error}") from error
        written = whole[len(prompt) :].rpartition(tokenizer.decode([self.chat.end_token_id]))[0]
        if not whole.startswith(prompt) or thought.strip() not in written or answer.strip() not in written:
            raise ConfigError(
                "endpoint: the server returns a thought beside the answer (reasoning_content), and the tokenizer's chat template "
                "does not write thoughts into an answer; start the server without its reasoning parser, set endpoint.api = "
                "tokens or text, or give a chat_template that writes reasoning_content."
            )
        return written
