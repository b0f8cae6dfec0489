"""Answers that are messages, rendered as in generation: the assistant's turns, and the text between them.

For each assistant turn, render the prompt that inference would use, and the conversation up to and including the turn: the
difference is what the model generates. The text between two turns is what the template writes after the first and before the
second: tool results, headers. So every turn follows the same text as in a session that keeps what was generated, even if the
template later renders earlier turns differently (Qwen3 drops their thoughts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Message
from mpo_megatron.data.thoughts import close_thought, continue_prompt, find_seam, split_thought

if TYPE_CHECKING:
    from mpo_megatron.data.chat import Chat

GENERATED = ("thinking", "tool_plan")
"""Fields of a message, besides its content, thought and calls, that hold words of the model."""
_OTHER = "¤"
"""Placeholder content that shows where real content starts."""


class Turn(NamedTuple):
    """A part of a response."""

    text: str
    end: str
    """The token that ends it; "" for text between turns."""
    scored: bool
    """Whether the model generates it."""
    is_plain: bool = False
    """Whether it is the message's own words, not text from the template."""


def write_turns(
    chat: Chat, messages: list[Message], answer: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> tuple[list[Turn], bool]:
    """The parts of an answer in order, and whether the template renders the whole conversation exactly like this.

    Raises:
        RowError: the template omits part of a message, or renders another conversation when the answer is included.
        jinja2.TemplateError: the template refuses the conversation.
    """
    turns: list[Turn] = []
    before, exact, written = list(messages), True, ""
    for place, message in enumerate(answer):
        if message["role"] != "assistant":
            before.append(message)
            continue
        message = without_end(chat, message, place)
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


def without_end(chat: Chat, message: Message, place: int) -> Message:
    """The message without end tokens that its text spells out: the template writes one.

    Args:
        place: index in the answer, for messages

    Raises:
        RowError: no words are left.
    """
    content = message["content"]
    text = chat.strip_end(content) if content else content
    if text == content:
        return message
    if not text.strip() and not message.get("tool_calls"):
        raise RowError("" if place == 0 else f"[{place}]", "is empty")
    return message | {"content": text}


def _write_turn(
    chat: Chat, before: list[Message], message: Message, prompt: str, tools: Sequence[dict[str, Any]], place: int
) -> Turn:
    """The text that the model generates for one message."""
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
        raise RowError(where, "cannot follow its prompt: with it, the chat template renders the conversation differently")
    generated = [(name, str(message[name])) for name in GENERATED if message.get(name)]
    for name, value in (("reasoning_content", thought), ("content", words), *generated):
        if value.strip() and value.strip() not in text:
            raise RowError(f"{where}.{name}", "is omitted by the chat template, and would be lost")
    if message.get("tool_calls"):
        bare = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": words}
        if chat.render([*before, bare], add_generation_prompt=False, tools=tools) == whole:
            raise RowError(f"{where}.tool_calls", "are omitted by the chat template, and would be lost")
    return Turn(text, end, scored=True, is_plain=is_plain)


def _between(chat: Chat, before: list[Message], prompt: str, written: str, tools: Sequence[dict[str, Any]]) -> str:
    """The template's text between the last turn and the next: tool results and headers, up to the generation prompt."""
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
        raise RowError("", "has several turns, but the chat template writes no token between them")
    return prompt[end + len(chat.end) :]
