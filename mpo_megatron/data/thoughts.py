"""Thoughts at the boundary of prompt and answer: an answer must not reopen what the prompt opened or closed."""

from __future__ import annotations

import re
from typing import NamedTuple

from mpo_megatron.data.fields import RowError

_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
"""How models mark a thought."""
_ENDS = tuple(tag for tags in _TAGS for tag in tags)


class Seam(NamedTuple):
    """The end of a prompt."""

    tag: str
    end_tag: str
    start: int
    """Start of the prompt's own thought."""
    closed: bool
    """Whether the prompt closes the thought that it opens, so that the model does not think."""
    space: str
    """White space after the last tag."""


def find_seam(prompt: str) -> Seam | None:
    """The thought at the end of a prompt, opened or closed; None without one."""
    text = prompt.rstrip()
    if not text.endswith(_ENDS):
        return None
    space = prompt[len(text) :]
    for tag, end_tag in _TAGS:
        if text.endswith(tag):
            return Seam(tag, end_tag, len(text) - len(tag), False, space)
        if text.endswith(end_tag):
            before = text[: -len(end_tag)].rstrip()
            if before.endswith(tag):
                return Seam(tag, end_tag, len(before) - len(tag), True, space)
    return None


def continue_prompt(seam: Seam | None, answer: str) -> str:
    """The answer as a continuation of the prompt: without an opening tag that the prompt already has.

    Raises:
        RowError: the answer has a thought, but the prompt closes it.
    """
    if seam is None or not answer.lstrip().startswith(seam.tag):
        return answer
    rest = answer.lstrip()[len(seam.tag) :]
    if not seam.closed:
        return rest.removeprefix(seam.space) if rest.startswith(seam.space) else rest.lstrip("\n")
    thought, end, content = rest.partition(seam.end_tag)
    if thought.strip() or not end:
        raise RowError("", "has a thought, but the prompt closes it: set chat_template_kwargs so that the model may think")
    return content.removeprefix(seam.space) if content.startswith(seam.space) else content.lstrip("\n")


def begin_answer(seam: Seam | None, answer: str) -> str:
    """The words of an answer given as text, without its end token, after its prompt.

    Raises:
        RowError: as `continue_prompt`; or no words are left.
    """
    text = answer if seam is None else continue_prompt(seam, answer)
    if not text or text.isspace():
        raise RowError("", "is empty")
    return text


def leaves_open(seam: Seam | None, answer: str) -> bool:
    """Whether the prompt opens a thought that the answer never closes."""
    return seam is not None and not seam.closed and seam.end_tag not in answer


def split_thought(message: dict[str, object]) -> tuple[str, str]:
    """The thought and the words of an assistant's message; the thought may be part of its text."""
    content, thought = str(message.get("content") or ""), message.get("reasoning_content")
    if isinstance(thought, str):
        return thought, content
    for tag, end_tag in _TAGS:
        if end_tag in content:
            before, _, after = content.partition(end_tag)
            return re.sub(rf"^\s*{re.escape(tag)}", "", before).strip("\n"), after.lstrip("\n")
    return "", content


def close_thought(seam: Seam, thought: str, words: str) -> str:
    """The model's text after a prompt that opened a thought: the thought, its end, and the answer."""
    thought = thought.strip("\n")
    return f"{thought}\n{seam.end_tag}\n\n{words}"
