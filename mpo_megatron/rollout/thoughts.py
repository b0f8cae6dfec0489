"""Thoughts that a server takes out of an answer, put back as the chat template writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from mpo_megatron.config import ConfigError
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Message
from mpo_megatron.rollout.client import UnusableAnswerError


class Thoughts:
    """Writes the thoughts of answers to one conversation."""

    def __init__(self, chat: Chat, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> None:
        self.chat, self.messages, self.tools = chat, messages, tools

    def put_back(self, thought: str, answer: str) -> str:
        """What the model wrote behind the prompt, by the template's rendering of thought and answer.

        Raises:
            ConfigError: the template does not write the thought there.
            UnusableAnswerError: the template refuses the answer.
        """
        message: Message = {"role": "assistant", "content": answer, "reasoning_content": thought}
        try:
            prompt, _ = self.chat.prompt(self.messages, self.tools)
            return self.chat.answer(prompt, self.messages, (message,), self.tools).text
        except TemplateError as error:
            raise UnusableAnswerError("template", f"the chat template refuses it: {error}") from error
        except RowError as error:
            raise ConfigError(
                "endpoint: the server returns a thought beside the answer (reasoning_content), and the tokenizer's chat template "
                f"does not write thoughts into an answer ({error.reason}); start the server without its reasoning parser, set "
                "endpoint.api = tokens or text, or give a chat_template that writes reasoning_content."
            ) from error
