"""Conversations in a row: messages with tools and thoughts, prompts in all their forms, and where answers begin.

A prompt may be a string, messages, messages as a JSON string, a transcript, or an instruction with input and history. Several
answers may each repeat the whole conversation, or continue it; their common start belongs to the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import (
    RowError,
    check_names,
    check_unicode,
    drop_nulls,
    parse_json,
    read_list,
    read_text,
    split_columns,
)
from mpo_megatron.data.group import Answer, Message
from mpo_megatron.data.tools import read_calls
from mpo_megatron.data.unread import check_unread

PROMPT_FIELDS = (
    *("prompt", "messages", "conversations", "conversation", "context", "trajectory"),
    *("instruction", "question", "query", "input"),
)
_LISTS_ONLY = ("context",)
"""Fields that hold a prompt only if they hold messages: as text they mean something else."""
_SYSTEM_FIELDS = ("system", "system_prompt")
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of messages that are calls (ShareGPT, ms-swift): parallel calls, and the words before them, are separate messages."""
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", *_CALL_ROLES), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **{name: name for name in ("system", "developer")},
}
_EXTRAS = ("tool_calls", "reasoning_content", "thinking", "name", "tool_call_id", "tool_plan")
"""Fields of a message besides role and content; templates read them."""
_SYSTEM_ROLES = ("system", "developer")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|$)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_HELPSTEER_TURNS = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")

# --------------------------------------------------------------------------------------------------- messages


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and _role_name(item) is not None and _says(item) for item in value)
    )


def _role_name(item: dict[str, Any]) -> Any:
    role = item.get("role")
    return item.get("from") if role is None else role


def _has_role(item: Any) -> bool:
    return isinstance(item, dict) and str(_role_name(item)) in _ROLES


def _says(item: dict[str, Any]) -> bool:
    return any(item.get(name) is not None for name in ("content", "value", "tool_calls"))


def as_messages(value: Any) -> Any:
    """Messages in a JSON string or in lists of roles and contents; one message as a list of one; any other value unchanged."""
    if isinstance(value, str):
        parsed = parse_json(parse_json(value, "["), "{")
        parsed = [parsed] if isinstance(parsed, dict) and _has_role(parsed) else parsed
        # Known roles suffice: a message without content is a fault to name, not text.
        are_messages = isinstance(parsed, list) and bool(parsed) and all(map(_has_role, parsed))
        return parsed if parsed is not value and (are_messages or is_conversation(parsed)) else value
    if not isinstance(value, dict) or _role_name(value) is None:
        return value
    return split_columns(value) if isinstance(_role_name(value), list) else [value]


def is_answered(value: Any) -> bool:
    """Whether a value is a conversation that ends with the assistant's message."""
    messages = as_messages(value)
    return is_conversation(messages) and _ROLES.get(str(_role_name(messages[-1]))) == "assistant"


def read_messages(row: FieldRecord, value: Any, field: str, *, last_assistant: bool = False) -> tuple[Message, ...]:
    """A conversation: known roles, system message only at the start, ending with the assistant's turn iff `last_assistant`."""
    messages = list[Message]()
    for index, item in enumerate(read_list(value, field)):
        message = _read_message(row, item, f"{field}[{index}]", index)
        last = messages[-1] if messages else {}
        if last.get("role") == "assistant" and _role_name(item) in _CALL_ROLES:
            calls = [*last.get("tool_calls", []), *message["tool_calls"]]
            messages[-1] = message | last | {"tool_calls": calls}
        else:
            messages.append(message)
    if (messages[-1]["role"] == "assistant") != last_assistant:
        wanted = "must end with the assistant's message" if last_assistant else "ends with an assistant message, not a question"
        raise RowError(field, wanted)
    if messages[-1]["role"] in _SYSTEM_ROLES:
        raise RowError(field, "has a system message but no question")
    return tuple(messages)


def _read_message(row: FieldRecord, item: Any, place: str, index: int) -> Message:
    if not isinstance(item, dict):
        raise RowError(place, f"is of type {type(item).__name__}, not a message")
    check_names(item, place)
    record = row.within(item, place)
    given = record.get(record.find(("role", "from")) or "role")
    role = _ROLES.get(str(given))
    if role is None:
        name = "None" if given is None else repr(str(given)[:40])
        raise RowError(f"{place}.role", f"is {name}; use system, user, assistant or tool")
    if role in _SYSTEM_ROLES and index:
        raise RowError(f"{place}.role", "is system; only the first message can be")
    content = _join_parts(record, record.get(record.find(("content", "value")) or "content"), f"{place}.content")
    extras = {name: record.get(name) for name in _EXTRAS if record.has(name)}
    if record.has("reasoning"):
        thought = record.get("reasoning")
        if extras.get("reasoning_content", thought) != thought:
            raise RowError(f"{place}.reasoning", f"contradicts {place}.reasoning_content")
        extras["reasoning_content"] = thought
    for name in ("reasoning_content", "thinking"):
        said = extras.get(name, "")
        if not isinstance(said, str):
            raise RowError(f"{place}.{name}", "is not a string")
        if not check_unicode(said, f"{place}.{name}").strip():
            extras.pop(name, None)
    if given in _CALL_ROLES:
        extras["tool_calls"], content = parse_json(parse_json(content, "{"), "["), None
    if "tool_calls" in extras:
        calls = parse_json(extras.pop("tool_calls"), "[")
        if calls not in ([], {}, ""):
            extras["tool_calls"] = read_calls(record, calls, f"{place}.tool_calls")
    if role == "tool" and isinstance(content, dict | list):
        content = json.dumps(drop_nulls(content, record, "content"), ensure_ascii=False)
    if (content in (None, "", []) and "tool_calls" in extras) or (role == "tool" and content == ""):
        return {"role": role, "content": None if content == [] else content, **extras}
    if not content:
        check_unread(record.unread())
    return {"role": role, "content": read_text(content, f"{place}.content"), **extras}


def _join_parts(record: FieldRecord, content: Any, place: str) -> Any:
    """The text of content that is given in parts."""
    if not (isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content)):
        return content
    texts = []
    for index, part in enumerate(content):
        if part["type"] != "text":
            raise RowError(f"{place}[{index}]", f"is of type {str(part['type'])[:40]!r}; only text is read")
        fields = record.within(part, f"content[{index}]")
        fields.get("type")
        texts.append(str(fields.get("text") or ""))
    return "".join(texts)


# --------------------------------------------------------------------------------------------------- prompts


def is_ordinary(value: Any) -> bool:
    """Whether a value is clearly a text and nothing else: not empty, not JSON, and no transcript. False: look closer."""
    if not isinstance(value, str) or not value or value[0].isspace() or value.startswith(("[", "{", "Human:")):
        return False
    return "<extra_id_1>" not in value and (value.isascii() or _SURROGATE.search(value) is None)


def split_transcript(text: str) -> list[Message]:
    """Messages of "\\n\\nHuman: …\\n\\nAssistant: …" text, or of HelpSteer's markers; empty for any other text."""
    if "<extra_id_1>" in text and _HELPSTEER_TURNS.search(text):
        head, *rest = _HELPSTEER_TURNS.split(text)
        messages: list[Message] = [{"role": "user", "content": head}] if head.strip() else []
    elif text.startswith("\n\nHuman:") or (text.startswith("Human:") and "\n\nAssistant:" in text):
        _, *rest = _TRANSCRIPT.split("\n\n" + text.lstrip("\n"))
        messages = []
    else:
        return []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        messages.append({"role": "assistant" if speaker == "Assistant" else "user", "content": content.strip()})
    return messages


def read_prompt(row: FieldRecord, *, required: bool = True) -> tuple[Message, ...]:
    """The row's prompt: its messages, plus history and system message from separate fields."""
    field = find_prompt(row)
    if field is None:
        if required:
            raise RowError("prompt", "is missing")
        return ()
    return _with_system(row, _read_turns(row, row.get(field), field), field)


def find_prompt(row: FieldRecord) -> str | None:
    """The field that holds the row's prompt; marks it as read."""
    text_only = [name for name in _LISTS_ONLY if isinstance(as_messages(row.values.get(name)), str)]
    return row.find([name for name in PROMPT_FIELDS if name not in text_only] if text_only else PROMPT_FIELDS)


def _read_turns(row: FieldRecord, value: Any, field: str) -> tuple[Message, ...]:
    text = value
    if not is_ordinary(value):
        value = as_messages(value)
        if not isinstance(value, str | list):
            raise RowError(field, f"is of type {type(value).__name__}, not a string or messages")
        turns = split_transcript(value) if isinstance(value, str) else []
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            turns.pop()
        if field == "instruction" and (turns or not isinstance(value, str)) and not _is_blank(row.values.get("input")):
            raise RowError("input", "is not read: it continues an instruction given as text, but this one holds turns")
        if not isinstance(value, str):
            return read_messages(row, value, field)
        if turns:
            return read_messages(FieldRecord({}), turns, field)
        text = read_text(value, field)
    if field == "instruction" and not _is_blank(row.get("input")):
        text = f"{text}\n{read_text(row.get('input'), 'input')}"
    return (*_read_history(row), {"role": "user", "content": text})


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _read_history(row: FieldRecord) -> tuple[Message, ...]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    if not row.has("history"):
        return ()
    value = parse_json(row.get("history"), "[")
    if value in ("", []):
        return ()
    if is_conversation(value):
        return read_messages(row, value, "history", last_assistant=True)
    messages: list[Message] = []
    for index, turn in enumerate(read_list(value, "history")):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowError(f"history[{index}]", "is not a pair of a question and its answer")
        for role, part in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": read_text(part, f"history[{index}]")})
    return tuple(messages)


def _with_system(row: FieldRecord, messages: tuple[Message, ...], field: str) -> tuple[Message, ...]:
    """The messages, with a system message from a separate field of the row."""
    given = {name: row.get(name) for name in _SYSTEM_FIELDS if not _is_blank(row.values.get(name))}
    if not given:
        return messages
    (name, value), *others = given.items()
    system = read_text(value, name)
    for other, text in others:
        if text != value:
            raise RowError(other, f"contradicts {name}")
    if messages and messages[0]["role"] in _SYSTEM_ROLES:
        if messages[0]["content"].strip() != system.strip():
            raise RowError(name, f"contradicts the system message in {field}[0]")
        return messages
    return ({"role": "system", "content": system}, *messages)


# --------------------------------------------------------------------------------------------------- answers


def read_answer(row: FieldRecord, value: Any, field: str) -> Answer:
    """An answer as its text, or as messages that may repeat the conversation before it."""
    if is_ordinary(value):
        return str(value)
    value = as_messages(value)
    if isinstance(value, str):
        turns = split_transcript(value)
        if len(turns) > 1 and turns[-1]["role"] == "assistant":
            return read_messages(FieldRecord({}), turns, field, last_assistant=True)
        return read_text(value, field)
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, list):
        raise RowError(field, f"is of type {type(value).__name__}, not a string or messages")
    return read_messages(row, value, field, last_assistant=True)


def join_answers(row: FieldRecord, answers: Sequence[tuple[str, Answer]]) -> tuple[tuple[Message, ...], list[Answer]]:
    """The prompt, and the rest of each answer: the answers' common start belongs to the prompt.

    Args:
        answers: each answer with its field

    Raises:
        RowError: an answer belongs to another conversation than the prompt or another answer; names both.
    """
    field = find_prompt(row) if _needs_prompt(row, answers) else None
    own = read_prompt(row, required=False) if field is not None else ()
    if own and all(isinstance(answer, str) for _, answer in answers):  # nearly all rows
        return own, [answer for _, answer in answers]
    wholes: list[tuple[Any, ...]] = []
    for place, answer in answers:
        if isinstance(answer, str):
            wholes.append((*own, answer))
        elif answer[0]["role"] == "assistant":
            wholes.append((*own, *answer))
        else:
            wholes.append(_check_whole(row, own, field, place, _with_system(row, answer, place)))
    shared, first = 0, wholes[0]
    if len(wholes) == 1 and own:
        shared = len(own)
    while len(wholes) > 1 and all(len(whole) > shared + 1 and whole[shared] == first[shared] for whole in wholes):
        shared += 1
    if len(wholes) == 1 and not own:
        shared = len(first) - 1
    while shared and not _starts_answer(wholes, shared):
        shared -= 1
    if shared == 0:
        if any(len(whole) > 1 and whole[0] != first[0] for whole in wholes) or (own and len(wholes) > 1):
            place, other = answers[-1][0], answers[0][0]
            raise RowError(place, f"belongs to another conversation than {other}: their messages differ before the last one")
        places = " and ".join(sorted({re.sub(r"\[\d+\]", "", place) for place, _ in answers}))
        raise RowError("prompt", f"is missing, and {places} hold only an answer")
    rest = [whole[shared:] for whole in wholes]
    return first[:shared], [part[0] if isinstance(part[0], str) else part for part in rest]


def _starts_answer(wholes: Sequence[tuple[Any, ...]], place: int) -> bool:
    """Whether the assistant starts to speak at this message, in every answer."""
    before = wholes[0][place - 1]
    speaks = all(isinstance(whole[place], str) or whole[place]["role"] == "assistant" for whole in wholes)
    return speaks and before["role"] not in ("assistant", *_SYSTEM_ROLES)


def _needs_prompt(row: FieldRecord, answers: Sequence[tuple[str, Answer]]) -> bool:
    """Whether to read a prompt field: not if it is `messages` beside answers that hold the whole conversation."""
    wholes = all(not isinstance(answer, str) and answer[0]["role"] != "assistant" for _, answer in answers)
    if not wholes:
        return True
    name = find_prompt(FieldRecord(row.values))
    if name is None:
        return False
    return not is_answered(row.values[name])


def _check_whole(
    row: FieldRecord, own: tuple[Message, ...], field: str | None, place: str, whole: tuple[Message, ...]
) -> tuple[Message, ...]:
    """The conversation of an answer that repeats it, checked against the row's prompt."""
    if field is None:
        return whole
    if own == whole[: len(own)]:
        return whole
    texts = [message["content"].strip() for message in whole if message["role"] == "user" and message["content"]]
    said = own[-1]["content"]
    as_text = isinstance(as_messages(row.values[field]), str)
    bare = tuple(message for message in own if message["role"] not in _SYSTEM_ROLES)
    rest = tuple(message for message in whole if message["role"] not in _SYSTEM_ROLES)
    if (as_text and len(bare) == 1 and said is not None and said.strip() in texts) or bare == rest[: len(bare)]:
        if len(bare) == len(own) or own[0] == whole[0]:
            return whole
        if whole[0]["role"] not in _SYSTEM_ROLES:  # only the prompt has the system message
            return (own[0], *whole)
        raise RowError(place, f"contradicts {field}: their system messages differ")
    raise RowError(place, f"contradicts {field}: it belongs to another conversation")
