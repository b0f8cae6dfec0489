"""Restore thoughts and tool calls that a server removed from an answer, as the chat template renders them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from mpo_megatron.config import ConfigError
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Message
from mpo_megatron.rollout.http_responses import UnusableAnswerError


class Thoughts:
    """Renders thoughts and tool calls in answers to one conversation."""

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        self.chat, self.messages, self.tools = chat, messages, tools

    def put_back(self, answer: str, thought: str | None = None, calls: Sequence[dict[str, Any]] = ()) -> str:
        """The model's text after the prompt, as the template renders thought, answer and calls.

        Raises:
            ConfigError: the template does not render one of them.
            UnusableAnswerError: the template refuses the answer.
        """
        message: Message = {"role": "assistant", "content": self.chat.strip_end(answer)}  # an end token alone is an empty answer
        message |= {"reasoning_content": thought} if thought is not None else {}
        message |= {"tool_calls": list(calls)} if calls else {}
        try:
            prompt, _ = self.chat.prompt(self.messages, self.tools)
            return self.chat.answer(prompt, self.messages, (message,), self.tools).text
        except TemplateError as error:
            raise UnusableAnswerError("template", f"the chat template refuses it: {error}") from error
        except RowError as error:
            raise ConfigError(
                "endpoint: the server returns a thought or a call beside the answer (reasoning_content, tool_calls), but the "
                f"tokenizer's chat template does not render it in an answer ({error.field} {error.reason}); start the server "
                "without its parser, set endpoint.api = tokens or text, or give a chat_template that renders it."
            ) from error
