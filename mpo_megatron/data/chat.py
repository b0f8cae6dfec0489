"""From chat messages to token ids: exactly what the model sees before it answers, and what it would then generate.

The prompt is the chat template's text with its generation prompt. A response is tokenized on its own: in one text with
the prompt, a response's first characters could merge with the template's last ones (ChatML's newline with a response
that starts with one) into a token that generation never produces. The token that ends a turn is read off the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from mpo_megatron.config import ConfigError
from mpo_megatron.data.group import Int32, Message
from mpo_megatron.data.tokenizer import Tokenizer

_QUESTION, _ANSWER = "Question", "Answer"
"""Contents of the conversation that a template is probed with."""
_ANCHORS = ("\n", "\0", "¶")
"""Characters a response is tokenized behind when the tokenizer would otherwise put a space before it."""


class Chat:
    """A tokenizer with its chat template: messages to prompt ids, responses to response ids."""

    def __init__(
        self, tokenizer: Tokenizer, *, system_prompt: str | None = None, variables: Mapping[str, Any] | None = None
    ) -> None:
        """Probe the template.

        Args:
            tokenizer: the tokenizer; its template renders.
            system_prompt: system message put before prompts that have none of their own.
            variables: extra variables for the template, for example {"enable_thinking": False}.

        Raises:
            ConfigError: the template refuses a plain conversation or a system message, or no end token can be found.
        """
        self.tokenizer, self.system_prompt, self.variables = tokenizer, system_prompt, dict(variables or {})
        question: list[Message] = [{"role": "user", "content": _QUESTION}]
        try:
            prompt, _ = self.prompt(question)
            whole = self._render([*question, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
        except TemplateError as error:
            what = "a system message" if system_prompt is not None else "a question and an answer"
            raise ConfigError(f"chat_template: the template refuses {what}: {error}") from error
        before, found, after = whole.rpartition(_ANSWER)
        if not found:
            raise ConfigError(f"chat_template: the template does not show an assistant's message; it gives {whole!r}.")
        self.end_token_id = self._find_end(after)
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        """What the template writes between the generation prompt and the assistant's words; "" in most templates."""
        names = [name for token in sorted(tokenizer.special_ids) if (name := tokenizer.decode([token]))]
        self._end = tokenizer.decode([self.end_token_id])
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        self._adds_space = tokenizer.encode(_ANSWER) != self._behind(_ANSWER, "\n")
        self._read_lead(prompt, whole)

    def _find_end(self, after: str) -> int:
        """The first special token behind the assistant's words, else the tokenizer's end of text."""
        for token in self.tokenizer.encode(after):
            if token in self.tokenizer.special_ids:
                return token
        if self.tokenizer.eos_id is None:
            raise ConfigError("tokenizer: neither its template nor its settings (eos_token) say which token ends a response.")
        return self.tokenizer.eos_id

    def _read_lead(self, prompt: str, whole: str) -> None:
        """Decide how a response starts: as the tokenizer reads the template's own rendering of a whole conversation.

        Only white space that the template writes before the assistant's words is taken over; anything longer (Qwen3's empty
        <think> block without `enable_thinking: false`) is not part of what the data says the model answered.
        """
        prompt_ids, whole_ids = self.tokenizer.encode(prompt), self.tokenizer.encode(whole)
        lead = self.lead if self.lead.isspace() else ""
        for start in (("", False), ("", True), (lead, False), (lead, True)):
            self._prefix, self._anchored = start
            ids = [*prompt_ids, *self._response_ids(_ANSWER)]
            if whole_ids[: len(ids)] == ids:
                return
        self._prefix, self._anchored = "", False

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        if self.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return self.tokenizer.render(messages, add_generation_prompt=add_generation_prompt, variables=self.variables)

    def prompt(self, messages: Sequence[Message]) -> tuple[str, Int32]:
        """The rendered prompt and its ids [P].

        Raises:
            jinja2.TemplateError: the template refuses the conversation, for example for its order of roles.
        """
        text = self._render(messages, add_generation_prompt=True)
        return text, np.array(self.tokenizer.encode(text), np.int32)

    def response(self, text: str) -> Int32:
        """Ids [R] of one response, its end token last (once, even if the text writes it out)."""
        ids = self._response_ids(text)
        if not ids or ids[-1] != self.end_token_id:
            ids.append(self.end_token_id)
        return np.array(ids, np.int32)

    def spells_special(self, messages: Sequence[Message], responses: Iterable[str]) -> bool:
        """Whether a text writes out a special token, and so is read with it; a response may end with its end token."""
        texts = [*(message["content"] for message in messages), *(text.removesuffix(self._end) for text in responses)]
        return self._special is not None and any(map(self._special.search, texts))

    def _response_ids(self, text: str) -> list[int]:
        text = self._prefix + text
        if not (self._adds_space and self._anchored):
            return self.tokenizer.encode(text)
        for anchor in _ANCHORS:
            ids = self._behind(text, anchor)
            if ids is not None:
                return ids
        raise ValueError(f"cannot be tokenized behind any of {_ANCHORS!r} without merging with it")

    def _behind(self, text: str, anchor: str) -> list[int] | None:
        """Ids of a text as they are behind `anchor`; None if the two merge."""
        alone, together = self.tokenizer.encode(anchor), self.tokenizer.encode(anchor + text)
        return together[len(alone) :] if together[: len(alone)] == alone else None
