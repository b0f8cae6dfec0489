"""Answers that are messages, rendered as generation would: the assistant's turns, and the text between them.

For each of the assistant's turns, render the prompt that inference would render before it, and the conversation up to and with
it: what the second adds to the first is what the model generates. Between two turns is what the template writes behind the first
and before the second: tool results, headers. So every turn follows what it would follow in a session of calls that keeps what
was generated, also where a template later shows earlier turns otherwise (Qwen3 drops their thoughts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Message
from mpo_megatron.data.thoughts import close_thought, continue_prompt, find_seam, split_thought

if TYPE_CHECKING:
    from mpo_megatron.data.chat import Chat

_OTHER = "¤"
"""Content that takes another's place to see where that one begins."""


class Turn(NamedTuple):
    """A part of a response."""

    text: str
    end: str
    """The token that ends it; "" for the text between turns."""
    scored: bool
    """Whether the model generates it."""
    is_plain: bool = False
    """Whether it is the message's words, which the template did not write."""


def write_turns(
    chat: Chat, messages: list[Message], answer: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> tuple[list[Turn], bool]:
    """The parts of an answer in order, and whether the template writes the whole conversation just so.

    Raises:
        RowError: a part of a message is not written by the template, or the conversation is another one with the answer.
        jinja2.TemplateError: the template refuses the conversation.
    """
    turns: list[Turn] = []
    before, exact, written = list(messages), True, ""
    for place, message in enumerate(answer):
        if message["role"] != "assistant":
            before.append(message)
            continue
        prompt = chat.render(before, add_generation_prompt=True, tools=tools)
        if turns:
            glue = _between(chat, before, prompt, written, tools)
            turns.append(Turn(glue, "", scored=False))
            written += glue
            exact &= prompt == written
        else:
            written = prompt
        turn = _write_turn(chat, before, message, prompt, tools, place)
        turns.append(turn)
        written += turn.text + turn.end
        before.append(message)
    return turns, exact


def _write_turn(
    chat: Chat, before: list[Message], message: Message, prompt: str, tools: Sequence[dict[str, Any]], place: int
) -> Turn:
    """What the model generates for one message."""
    whole = chat.render([*before, message], add_generation_prompt=False, tools=tools)
    where = "" if place == 0 else f"[{place}]"
    thought, words = split_thought(message)
    seam = find_seam(prompt)
    is_plain = False
    if whole.startswith(prompt):
        text, end = chat.cut_end(whole[len(prompt) :])
    elif seam is not None and whole.startswith(prompt[: seam.start]):
        text, end = chat.cut_end(whole[seam.start :])
        continued = continue_prompt(seam, text)
        text = close_thought(seam, thought, text) if continued == text and not seam.closed else continued
    elif set(message) == {"role", "content"}:
        text, end, is_plain = words, chat.end, True
    else:
        raise RowError(where, "cannot follow its prompt: the chat template writes the conversation differently with it")
    for name, value in (("reasoning_content", thought), ("content", words)):
        if value.strip() and value.strip() not in text:
            raise RowError(f"{where}.{name}", "is not written by the chat template, and would be lost")
    if message.get("tool_calls"):
        bare = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": words}
        if chat.render([*before, bare], add_generation_prompt=False, tools=tools) == whole:
            raise RowError(f"{where}.tool_calls", "are not written by the chat template, and would be lost")
    return Turn(text, end, scored=True, is_plain=is_plain)


def _between(chat: Chat, before: list[Message], prompt: str, written: str, tools: Sequence[dict[str, Any]]) -> str:
    """What the template writes between the last turn and the next: tool results and headers, up to the generation prompt."""
    if prompt.startswith(written):
        return prompt[len(written) :]
    last = max(place for place, message in enumerate(before) if message["role"] == "assistant")
    edge = len(prompt)
    if last + 1 < len(before):
        changed = [*before[: last + 1], before[last + 1] | {"content": _OTHER}, *before[last + 2 :]]
        other = chat.render(changed, add_generation_prompt=True, tools=tools)
        edge = next((place for place, (ours, its) in enumerate(zip(prompt, other, strict=False)) if ours != its), edge)
    end = prompt.rfind(chat.end, 0, edge)
    if end < 0:
        raise RowError("", "has several turns, and the chat template writes no token between them")
    return prompt[end + len(chat.end) :]
