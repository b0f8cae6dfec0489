"""From chat messages to token ids: exactly what the model sees before it answers, and what it would then generate.

The prompt is the chat template's text with its generation prompt. A text response is the model's own output and follows the
prompt unchanged; a response in messages is rendered by the template after the prompt (turns.py). Responses are tokenized
separately: in one text with the prompt, the first characters could merge with the template's last ones (ChatML's newline, and a
response that starts with one) into a token that generation never produces. The end token of a turn is read from the template.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from mpo_megatron.config import ConfigError, require
from mpo_megatron.data.arrays import Bools, Int32
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Answer, Message
from mpo_megatron.data.thoughts import begin_answer, find_seam
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.data.turns import Turn, write_turns

_QUESTION, _ANSWER = "Question", "Answer"
"""Contents of the conversation used to probe a template."""
_ANCHORS = ("\n", "\0", "¶")
"""Text before a response during tokenization, if the tokenizer would otherwise insert a space."""
_MARKERS = re.compile(
    r"\s*(<\|im_start\|>|<\|start_header_id\|>|<\|begin_of_text\|>|<start_of_turn>|<bos>|<s>\s*\[INST\]|\[INST\]|<\|user\|>|<｜User｜>"
    r"|<｜begin▁of▁sentence｜>|<\|begin▁of▁sentence\|>)"
)
"""How texts start that some model's template has already been applied to."""
_PIECE, _SLACK = 1 << 16, 256
"""Characters of a long text that are counted at a time, and the tokens that a boundary between two pieces may add."""
_OTHER_TEMPLATE = "copy the tokenizer again, or give another template with the option chat_template"
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError)
"""Errors that a template may raise on unexpected messages."""


class Tokens(NamedTuple):
    """A response as the model would generate it."""

    text: str
    """Without the end token."""
    ids: Int32
    """[R] token ids, the end token last."""
    scored: Bools | None
    """[R] False for tokens that the model did not generate; None if it generated all of them."""
    exact: bool = True
    """Whether the template renders the whole conversation exactly like this; otherwise earlier turns are used as generated."""


_NOTHING = Tokens("", np.zeros(0, np.int32), None)


class Asked(NamedTuple):
    """A prompt with its responses."""

    prompt_text: str
    """The prompt's messages, rendered."""
    messages: Sequence[Message]
    answers: Sequence[Answer]
    tools: Sequence[dict[str, Any]] = ()


class Chat:
    """A tokenizer with its chat template: messages to prompt ids, responses to response ids."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        system_prompt: str | None = None,
        variables: Mapping[str, Any] | None = None,
        templated: bool = False,
    ) -> None:
        """Probe the template.

        Args:
            tokenizer: the tokenizer; its template renders.
            system_prompt: system message added before prompts without one.
            variables: extra variables for the template, for example {"enable_thinking": False}.
            templated: prompts have already gone through the template, and are used unchanged.

        Raises:
            ConfigError: the template refuses a plain conversation or a system message, lacks a variable, or has no end token.
        """
        self.tokenizer, self.system_prompt, self.variables = tokenizer, system_prompt, dict(variables or {})
        self.templated = False
        where = f"tokenizer = {tokenizer.source}: its chat template"
        template = tokenizer.template
        text = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
        for name in self.variables:
            known = re.search(rf"\b{re.escape(name)}\b", text) is not None
            require(known, f"chat_template_kwargs: {name}: {where} has no such variable; correct the name, or remove it.")
        question: list[Message] = [{"role": "user", "content": _QUESTION}]
        try:
            prompt, _ = self.prompt(question)
            whole = self.render([*question, {"role": "assistant", "content": _ANSWER}], add_generation_prompt=False)
        except TemplateError as error:
            what = "a system message" if system_prompt is not None else "a question and an answer"
            raise ConfigError(f"{where} refuses {what}: {error}; {_OTHER_TEMPLATE}.") from error
        before, found, after = whole.rpartition(_ANSWER)
        if not found:
            raise ConfigError(f"{where} omits the assistant's message: it renders {whole!r}; {_OTHER_TEMPLATE}.")
        self.end_token_id = self._find_end(after)
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        """What the template renders between the generation prompt and the assistant's words; "" in most templates."""
        self.seam = find_seam(prompt)
        """The thought that the generation prompt opens or closes, if any."""
        self._cue = prompt.rpartition(_QUESTION)[2].strip()
        names = [name for token in sorted(tokenizer.special_ids) if (name := tokenizer.decode([token]))]
        self.end = tokenizer.decode([self.end_token_id])
        self._special = re.compile("|".join(map(re.escape, names))) if names else None
        end_ids = (self.end_token_id, tokenizer.eos_id, tokenizer.pad_id)
        ends = {tokenizer.decode([token]) for token in end_ids if token is not None}
        self._end_names = tuple(sorted(filter(None, ends)))
        self._ends = re.compile(rf"(?:(?:{'|'.join(map(re.escape, self._end_names))})\s*)+\Z")
        self._last_special = re.compile(rf"({'|'.join(map(re.escape, names))})\s*\Z") if names else None
        self._tail = after.removeprefix(self.end) if after.startswith(self.end) else after
        self._adds_space = tokenizer.encode(_ANSWER) != self._behind(_ANSWER, "\n")
        self._read_lead(prompt, whole)
        self.templated = templated

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """`Tokenizer.digest()`, computed once."""
        return self.tokenizer.digest()

    def _find_end(self, after: str) -> int:
        """The first special token after the assistant's words, or else the tokenizer's end of text."""
        for token in self.tokenizer.encode(after):
            if token in self.tokenizer.special_ids:
                return token
        if self.tokenizer.eos_id is None:
            raise ConfigError(
                f"tokenizer = {self.tokenizer.source}: neither its template nor its settings define the token that ends a "
                "response; set eos_token in its tokenizer_config.json."
            )
        return self.tokenizer.eos_id

    def _read_lead(self, prompt: str, whole: str) -> None:
        """Determine how a response starts: as tokenized in the template's own rendering of a whole conversation.

        Only white space that the template writes before the assistant's words is adopted. Anything longer (Qwen3's empty <think>
        block without `enable_thinking: false`) is not part of the answer in the data.
        """
        prompt_ids, whole_ids = self.tokenizer.encode(prompt), self.tokenizer.encode(whole)
        lead = self.lead if self.lead.isspace() else ""
        for start in (("", False), ("", True), (lead, False), (lead, True)):
            self._prefix, self._anchored = start
            ids = [*prompt_ids, *self._text_ids(self._prefix + _ANSWER)]
            if whole_ids[: len(ids)] == ids:
                return
        self._prefix, self._anchored = "", False

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, with the system prompt first if they have no system message."""
        if self.system_prompt is not None and (not messages or messages[0]["role"] not in ("system", "developer")):
            return [{"role": "system", "content": self.system_prompt}, *messages]
        return list(messages)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The template's text for a conversation.

        Raises:
            jinja2.TemplateError: the template refuses it.
        """
        messages = self.with_system(messages)
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "variables": self.variables, "tools": tools}
        try:
            return self.tokenizer.render(messages, **options)
        except _TEMPLATE_FAILURES as error:
            if any(message.get("tool_calls") for message in messages):  # DeepSeek's templates need a call's arguments as text
                with contextlib.suppress(*_TEMPLATE_FAILURES):
                    return self.tokenizer.render([with_text_arguments(message) for message in messages], **options)
            if isinstance(error, TemplateError):
                raise
            raise TemplateError(f"it fails with {type(error).__name__}: {error}") from error

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), limit: int | None = None
    ) -> tuple[str, Int32]:
        """The rendered prompt and its ids [P].

        Args:
            limit: for a text with far more tokens, stop soon after this many

        Raises:
            jinja2.TemplateError: the template refuses the conversation, for example because of its order of roles.
        """
        if self.templated:
            if len(messages) != 1:
                raise TemplateError(f"prompt_format = templated needs one text, but the prompt has {len(messages)} messages")
            text = str(messages[0]["content"])
        else:
            messages = [_with_content(message, self.shorten(message["content"], limit)) for message in messages]
            text = self.render(messages, add_generation_prompt=True, tools=tools)
        return text, np.array(self.tokenizer.encode(self.shorten(text, limit)), np.int32)

    def prompts(
        self, conversations: Sequence[tuple[Sequence[Message], Sequence[dict[str, Any]]]], limit: int | None = None
    ) -> list[tuple[str, Int32] | TemplateError]:
        """Results, or errors, of `prompt` for conversations with their tools; faster than one by one."""
        if self.templated or any(message.get("tool_calls") for messages, _ in conversations for message in messages):
            return [self._try_prompt(messages, tools, limit) for messages, tools in conversations]
        said = [
            ([_with_content(message, self.shorten(message["content"], limit)) for message in self.with_system(messages)], tools)
            for messages, tools in conversations
        ]
        texts = self.tokenizer.render_many(said, variables=self.variables)
        ids = iter(self.tokenizer.encode_many([self.shorten(text, limit) for text in texts if isinstance(text, str)]))
        return [(text, next(ids)) if isinstance(text, str) else text for text in texts]

    def _try_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], limit: int | None
    ) -> tuple[str, Int32] | TemplateError:
        try:
            return self.prompt(messages, tools, limit)
        except TemplateError as error:
            return error

    def response(self, text: str, prompt_text: str | None = None, limit: int | None = None) -> Int32:
        """Ids [R] of one text response, ending with one end token, even if the text spells it out.

        Args:
            prompt_text: the preceding prompt, if it does not come from the template
            limit: as in `prompt`

        Raises:
            RowError: it has a thought, but the prompt closes it; or it has no words.
        """
        text = begin_answer(self.seam if prompt_text is None else find_seam(prompt_text), self.strip_end(text))
        ids = [*self._text_ids(self.shorten(self._prefix + text, limit)), self.end_token_id]
        return np.array(ids, np.int32)

    def answers(self, asked: Sequence[Asked], limit: int | None = None) -> list[list[Tokens | RowError]]:
        """What `answer` gives, or raises, for each response of several prompts; faster than one by one.

        Args:
            limit: as for `prompt`
        """
        found = list[list[Tokens | RowError]]()
        texts, places = list[str](), list[tuple[list[Tokens | RowError], int, str]]()
        anchored = self._adds_space and self._anchored
        for prompt_text, messages, answers, tools in asked:
            seam, own = find_seam(prompt_text), list[Tokens | RowError]()
            for answer in answers:
                try:
                    if anchored or not isinstance(answer, str):
                        own.append(self.answer(prompt_text, messages, answer, tools, limit))
                        continue
                    text = begin_answer(seam, self.strip_end(answer))
                    places.append((own, len(own), text))
                    texts.append(self.shorten(self._prefix + text, limit))
                    own.append(_NOTHING)
                except RowError as error:
                    own.append(error)
            found.append(own)
        for (own, place, text), ids in zip(places, self.tokenizer.encode_many(texts, self.end_token_id), strict=True):
            own[place] = Tokens(text, ids, None)
        return found

    def strip_end(self, text: str) -> str:
        """The text without spelled-out end tokens at its end, and white space after them."""
        if not text.rstrip().endswith(self._end_names):  # the common case: the expression reads the whole text
            return text
        return self._ends.sub("", text)

    def answer(
        self,
        prompt_text: str,
        messages: Sequence[Message],
        answer: Answer,
        tools: Sequence[dict[str, Any]] = (),
        limit: int | None = None,
    ) -> Tokens:
        """A response after its prompt.

        Args:
            prompt_text: the prompt's messages, rendered
            limit: as in `prompt`

        Raises:
            RowError: the template omits a part of the answer, or renders another conversation.
        """
        if isinstance(answer, str):
            text = begin_answer(find_seam(prompt_text), self.strip_end(answer))
            return Tokens(text, self.response(answer, prompt_text, limit), None)
        if self.templated:
            raise RowError("", "holds messages, but after an already templated prompt a response must be text")
        said = [_with_content(message, self.shorten(message["content"], limit)) for message in answer]
        try:
            turns, exact = write_turns(self, list(messages), said, tools)
        except TemplateError as error:
            raise RowError("", f"is refused by the chat template: {error}") from error
        ids: list[int] = []
        scored: list[bool] = []
        for turn in turns:
            part = self.turn_ids(turn, limit)
            ids += part
            scored += [turn.scored] * len(part)
        text = "".join(f"{turn.text}{turn.end if turn is not turns[-1] else ''}" for turn in turns)
        mask = None if all(scored) else np.array(scored, np.bool_)
        return Tokens(text, np.array(ids, np.int32), mask, exact)

    def turn_ids(self, turn: Turn, limit: int | None = None) -> list[int]:
        """Ids of one part of a response."""
        text = self.shorten(self._prefix + turn.text if turn.is_plain else turn.text, limit)
        if not turn.scored:  # after an end token: nothing merges with it
            return self.tokenizer.encode(text)
        return [*self._text_ids(text), *(self.tokenizer.encode(turn.end) or [self.end_token_id])]

    def cut_end(self, text: str) -> tuple[str, str]:
        """Split a turn, as rendered by the template, into the model's text and the token that ends it."""
        found = self._last_special.search(text) if self._last_special else None
        if found:
            return text[: found.start()], found[1]
        return text.removesuffix(self._tail), self.end

    def looks_templated(self, messages: Sequence[Message]) -> bool:
        """Whether a prompt is text that a chat template has already been applied to."""
        if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
            return False
        content = messages[0]["content"]
        return _MARKERS.match(content) is not None or bool(len(self._cue) > 3 and content.strip().endswith(self._cue))

    def spells_special(self, messages: Sequence[Message], responses: Iterable[Answer]) -> bool:
        """Whether a text spells out a special token, which is then encoded as such; a response may end with its end token."""
        answers = ([said] if isinstance(said, str) else [message["content"] for message in said] for said in responses)
        texts = [self.strip_end(str(said or "")) for said in itertools.chain.from_iterable(answers)]
        texts += [str(message["content"] or "") for message in messages]
        return self._special is not None and any(map(self._special.search, texts))

    def shorten[Text: (str, str | None)](self, text: Text, limit: int | None) -> Text:
        """The text, or its beginning if it has more than `limit` tokens anyway: tokenizers need 250 bytes per character."""
        if text is None or limit is None or len(text) <= max(_PIECE, 32 * limit):
            return text
        tokens = 0
        for end in range(_PIECE, len(text) + _PIECE, _PIECE):
            tokens += len(self.tokenizer.encode(text[end - _PIECE : end]))
            if tokens > limit + _SLACK * (end // _PIECE):
                return text[:end]
        return text

    def _text_ids(self, text: str) -> list[int]:
        if not text:
            return []
        if not (self._adds_space and self._anchored):
            return self.tokenizer.encode(text)
        for anchor in _ANCHORS:
            ids = self._behind(text, anchor)
            if ids is not None:
                return ids
        raise ValueError(f"cannot be tokenized after any of {_ANCHORS!r} without merging with it")

    def _behind(self, text: str, anchor: str) -> list[int] | None:
        """Ids of a text after `anchor`; None if the two merge."""
        alone, together = self.tokenizer.encode(anchor), self.tokenizer.encode(anchor + text)
        return together[len(alone) :] if together[: len(alone)] == alone else None


def check_templated(prompts: Sequence[Sequence[Message]], chat: Chat) -> None:
    """Check that most of these prompts are not already templated text.

    Raises:
        ConfigError: most are; the message shows one.
    """
    templated = [prompt for prompt in prompts if chat.looks_templated(prompt)]
    require(
        2 * len(templated) <= len(prompts),
        f"prompt_format = auto; {len(templated)} of the first {len(prompts)} prompts look as if a chat template had already "
        f"been applied to them, for example {templated[0][0]['content'][:60] if templated else ''!r}; set prompt_format to "
        "templated to use them unchanged, or to chat to apply the template again.",
    )


def _with_content(message: Message, content: str | None) -> Message:
    return message if content is message["content"] else message | {"content": content}


def with_text_arguments(message: Message) -> Message:
    """The message with its calls' arguments as JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
    return message | {
        "tool_calls": [
            call | {"function": call["function"] | {"arguments": text}} for call, text in zip(calls, texts, strict=True)
        ]
    }
