"""The formats people have, row → group: every check of a row's content, each with its own message.

A row is a dictionary. `detect` looks at the first rows once and settles what all rows must have (`Layout`); `parse` turns
one row into its parts; `build_group` makes the record. Anything wrong raises `RowError(field, reason)`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpo_megatron.data import DataError
from mpo_megatron.data.group import Group, Message, RewardKind

Row = Mapping[str, Any]

FORMATS = {
    "groups": "prompt and responses, with rewards (or labels) in or beside them",
    "ultrafeedback": "instruction and completions",
    "nectar": "prompt and answers (each with a rank)",
    "pairs": "chosen and rejected",
    "ratings": "prompt, response and numeric attributes",
}
_PROMPT_FIELDS = ("prompt", "messages", "instruction", "question")
_SYSTEM_FIELDS = ("system", "system_prompt")
_RESPONSES_FIELDS = ("responses", "all_generated_responses")
_REWARDS_FIELDS = ("rewards", "scores", "all_rm_scores")
_SCORE_NAMES = ("score", "rating", "reward")
_RATING_NAMES = ("helpfulness", "reward", "score", "rating", "overall_score")
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_LARGEST = 1e30
"""Largest size of a reward: differences, squares and single precision still hold it."""
_HUMAN_TURNS = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|$)")
_HELPSTEER_TURNS = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


class RowError(ValueError):
    """A row that cannot become a group: the field at fault, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason


class Layout(NamedTuple):
    """What every row of an input must have."""

    format: str
    reward_kind: RewardKind
    has_labels: bool
    ratings: tuple[str, ...]
    """Fields averaged into the reward; empty where the format has a fixed one."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The parts of a group that one row holds."""

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    labels: tuple[int, ...] | None = None
    group_id: str | None = None
    """The row's own id, if it has one."""


# --------------------------------------------------------------------------------------------------- values


def read_text(value: Any, field: str) -> str:
    """A non-empty string that UTF-8 can hold."""
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, str):
        raise RowError(field, f"is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"has half a surrogate pair at character {error.start}") from error
    return value


def read_number(value: Any, field: str, *, from_text: bool = False) -> float:
    """A finite number; `from_text` also takes one written as a string ("4")."""
    if value is None:
        raise RowError(field, "is missing")
    if from_text and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError(field, f"is {value!r}, not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(field, f"is of type {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(field, f"is {number}; a reward must be finite")
    if abs(number) > _LARGEST:
        raise RowError(field, f"is {number}; a reward must lie within ±{_LARGEST:g}")
    return number


def read_list(value: Any, field: str) -> list[Any]:
    """A non-empty list. A dictionary of equally long lists (how Arrow stores a sequence of records) is turned into one."""
    if value is None:
        raise RowError(field, "is missing")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            raise RowError(field, "holds lists of different lengths")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise RowError(field, f"is of type {type(value).__name__}, not a list")
    if not value:
        raise RowError(field, "is empty")
    return list(value)


def read_label(value: Any, field: str) -> int:
    """1 (chosen) or 0 (rejected), also as a truth value."""
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, bool | int) or int(value) not in (0, 1):
        raise RowError(field, f"is {value!r}; a label is 1 (chosen) or 0 (rejected)")
    return int(value)


def _average(record: Row, names: Sequence[str], field: str) -> float:
    """Mean of the named ratings of one record; a name may also be an UltraFeedback aspect."""
    total = 0.0
    for name in names:
        aspects = record.get("annotations")
        if name not in record and isinstance(aspects, dict) and isinstance(aspects.get(name), dict):
            rating = aspects[name].get("Rating", aspects[name].get("rating"))
            total += read_number(rating, f"{field}annotations.{name}.Rating", from_text=True)
        else:
            total += read_number(record.get(name), f"{field}{name}", from_text=True)
    return total / len(names)


# --------------------------------------------------------------------------------------------------- prompts


def read_messages(value: Any, field: str, *, last_assistant: bool = False) -> tuple[Message, ...]:
    """A conversation: known roles, system only first, ending with the assistant's turn only if `last_assistant`."""
    messages: list[Message] = []
    for index, item in enumerate(read_list(value, field)):
        place = f"{field}[{index}]"
        if not isinstance(item, dict):
            raise RowError(place, f"is of type {type(item).__name__}, not a message")
        role = _ROLES.get(str(item.get("role", item.get("from"))))
        if role is None:
            raise RowError(f"{place}.role", f"is {item.get('role', item.get('from'))!r}; use system, user, assistant or tool")
        if role == "system" and index:
            raise RowError(f"{place}.role", "is system; only the first message can be")
        content = item.get("content", item.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        messages.append({"role": role, "content": read_text(content, f"{place}.content")})
    if (messages[-1]["role"] == "assistant") != last_assistant:
        wanted = "must end with the assistant's message" if last_assistant else "ends with an assistant message, not a question"
        raise RowError(field, wanted)
    if messages[-1]["role"] == "system":
        raise RowError(field, "has a system message and no question")
    return tuple(messages)


def _split_turns(text: str, pattern: re.Pattern[str], first_role: str | None) -> list[Message]:
    """A conversation written as one string. `first_role`: who speaks before the first mark (None: nobody may)."""
    head, *rest = pattern.split(text)
    messages = [{"role": first_role, "content": head}] if first_role else []
    if not first_role and head.strip():
        return []
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        messages.append({"role": "assistant" if speaker == "Assistant" else "user", "content": content.strip()})
    return messages


def _transcript(text: str) -> list[Message]:
    """Messages of "\\n\\nHuman: …\\n\\nAssistant: …" text; empty if it is not written so."""
    return _split_turns(text, _HUMAN_TURNS, None) if text.startswith("\n\nHuman:") else []


def read_prompt(row: Row, *, required: bool = True) -> tuple[Message, ...]:
    """The row's prompt, with its system message if it names one in a field of its own."""
    field = next((name for name in _PROMPT_FIELDS if row.get(name) is not None), None)
    if field is None:
        if required:
            raise RowError("prompt", "is missing")
        return ()
    value = row[field]
    if isinstance(value, str):
        messages: tuple[Message, ...] = ({"role": "user", "content": read_text(value, field)},)
    else:
        messages = read_messages(value, field)
    system = next((row[name] for name in _SYSTEM_FIELDS if row.get(name)), None)
    if system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": read_text(system, "system")}, *messages)
    return messages


# --------------------------------------------------------------------------------------------------- formats


def _response_text(item: Any, field: str) -> str:
    if isinstance(item, list) and len(item) == 1:  # a list of one message
        item, field = item[0], f"{field}[0]"
    if isinstance(item, dict):
        name = next((name for name in ("text", "response", "content", "answer") if name in item), "text")
        return read_text(item.get(name), f"{field}.{name}")
    return read_text(item, field)


def _parse_groups(row: Row, layout: Layout) -> Parsed:
    field = next((name for name in _RESPONSES_FIELDS if row.get(name) is not None), "responses")
    items = read_list(row.get(field), field)
    responses = tuple(_response_text(item, f"{field}[{index}]") for index, item in enumerate(items))
    rewards: tuple[float, ...] | None = None
    labels: tuple[int, ...] | None = None
    if layout.ratings:
        records = [item if isinstance(item, dict) else {} for item in items]
        rewards = tuple(_average(item, layout.ratings, f"{field}[{index}].") for index, item in enumerate(records))
    elif layout.reward_kind == "scores":
        rewards = tuple(_column(row, items, field, ("reward", "score"), _REWARDS_FIELDS, read_number))
    if layout.has_labels:
        labels = tuple(_column(row, items, field, ("label",), ("labels",), read_label))
    return Parsed(prompt=read_prompt(row), responses=responses, rewards=rewards, labels=labels, group_id=_read_id(row))


def _column(row: Row, items: Sequence[Any], field: str, inner: Sequence[str], outer: Sequence[str], read: Any) -> list[Any]:
    """One value per response: from the row's own list, or from inside the responses."""
    name = next((name for name in outer if row.get(name) is not None), None)
    if name is not None:
        values = read_list(row[name], name)
        if len(values) != len(items):
            raise RowError(name, f"has {len(values)} values for {len(items)} responses")
        return [read(value, f"{name}[{index}]") for index, value in enumerate(values)]
    if not any(isinstance(item, dict) for item in items):
        raise RowError(outer[0], "is missing")
    values = []
    for index, item in enumerate(items):
        record = item if isinstance(item, dict) else {}
        key = next((key for key in inner if key in record), inner[0])
        values.append(read(record.get(key), f"{field}[{index}].{key}"))
    return values


def _parse_ultrafeedback(row: Row, layout: Layout) -> Parsed:
    items = read_list(row.get("completions"), "completions")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise RowError(f"completions[{index}]", f"is of type {type(item).__name__}, not a record")
    return Parsed(
        prompt=read_prompt(row),
        responses=tuple(_response_text(item, f"completions[{index}]") for index, item in enumerate(items)),
        rewards=tuple(_average(item, layout.ratings, f"completions[{index}].") for index, item in enumerate(items)),
        group_id=_read_id(row),
    )


def _parse_nectar(row: Row, layout: Layout) -> Parsed:
    value = row.get("prompt")
    turns = _transcript(value) if isinstance(value, str) else []
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    prompt = read_messages(turns, "prompt") if turns else read_prompt(row)
    items = read_list(row.get("answers"), "answers")
    responses, rewards = [], []
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise RowError(f"answers[{index}]", f"is of type {type(item).__name__}, not a record")
        responses.append(read_text(item.get("answer"), f"answers[{index}].answer"))
        rewards.append(-read_number(item.get("rank"), f"answers[{index}].rank"))
    return Parsed(prompt=prompt, responses=tuple(responses), rewards=tuple(rewards), group_id=_read_id(row))


def _parse_pairs(row: Row, layout: Layout) -> Parsed:
    sides = [_read_side(row, side) for side in ("chosen", "rejected")]
    prompts = {json.dumps(prompt, sort_keys=True): prompt for prompt, _ in sides}
    if len(prompts) != 1:
        raise RowError("rejected", "answers another conversation than chosen: their messages differ before the last one")
    prompt = next(iter(prompts.values()))
    if len(prompt) == 0:
        raise RowError("prompt", "is missing, and chosen and rejected hold an answer only")
    rewards = None
    if layout.reward_kind == "scores":
        names = [_score_field(row, side, layout.ratings) for side in ("chosen", "rejected")]
        rewards = tuple(read_number(row.get(name), name, from_text=True) for name in names)
    responses = tuple(response for _, response in sides)
    return Parsed(prompt=prompt, responses=responses, rewards=rewards, labels=(1, 0), group_id=_read_id(row))


def _read_side(row: Row, side: str) -> tuple[tuple[Message, ...], str]:
    """Prompt and answer of one side: from its own messages if it repeats the conversation, else from the prompt field."""
    value = row.get(side)
    if isinstance(value, str):
        turns = _transcript(value) if not any(row.get(name) for name in _PROMPT_FIELDS) else []
        if not turns:
            return read_prompt(row, required=False), read_text(value, side)
        value = turns
    messages = read_messages(value, side, last_assistant=True)
    if len(messages) == 1:
        return read_prompt(row, required=False), messages[0]["content"]
    return messages[:-1], messages[-1]["content"]


def _score_field(row: Row, side: str, names: Sequence[str]) -> str:
    candidates = [form for name in names or _SCORE_NAMES for form in (f"{side}_{name}", f"{side}-{name}", f"{name}_{side}")]
    return next((name for name in candidates if name in row), candidates[0])


def _parse_ratings(row: Row, layout: Layout) -> Parsed:
    prompt = read_prompt(row)
    if len(prompt) == 1 and "<extra_id_1>" in prompt[0]["content"]:
        prompt = read_messages(_split_turns(prompt[0]["content"], _HELPSTEER_TURNS, "user"), "prompt")
    response = read_text(row.get("response"), "response")
    return Parsed(prompt=prompt, responses=(response,), rewards=(_average(row, layout.ratings, ""),))


_PARSERS = {
    "groups": _parse_groups,
    "ultrafeedback": _parse_ultrafeedback,
    "nectar": _parse_nectar,
    "pairs": _parse_pairs,
    "ratings": _parse_ratings,
}


def parse(row: Any, layout: Layout) -> Parsed:
    """The parts of a group that one row holds.

    Raises:
        RowError: what is wrong, and in which field.
    """
    if not isinstance(row, dict):
        raise RowError("row", f"is of type {type(row).__name__}, not an object with fields")
    return _PARSERS[layout.format](row, layout)


def _read_id(row: Row) -> str | None:
    value = next((row[name] for name in ("group_id", "id") if row.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError("id", f"is {value!r}; use a non-empty string or an integer")
    return read_text(str(value), "id")


def build_group(parsed: Parsed, where: str) -> Group:
    """The record. A row without an id gets one from its content, so that it does not depend on where the row stands.

    Raises:
        RowError: fewer than two responses.
    """
    if len(parsed.responses) < 2:
        raise RowError("responses", "has K = 1 response; a group needs at least two")
    group_id = parsed.group_id
    if group_id is None:
        content = [parsed.prompt, parsed.responses, parsed.rewards, parsed.labels]
        group_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
    return Group(
        group_id=group_id,
        prompt=parsed.prompt,
        responses=parsed.responses,
        rewards=parsed.rewards,
        labels=parsed.labels,
        where=where,
    )


# --------------------------------------------------------------------------------------------------- detection


def detect(sample: Sequence[Row], format_name: str, rating: str | None) -> Layout:
    """Settle the format, and what the reward is, from the input's first well-formed rows.

    Raises:
        DataError: no format fits, or no reward field does; the message lists what was found.
    """
    columns = sorted({name for row in sample for name, value in row.items() if value is not None})
    if format_name == "auto":
        format_name = _guess(set(columns))
    ratings = tuple(name.strip() for name in rating.split("+")) if rating else ()
    if format_name == "groups":
        has_rewards, has_labels = _groups_content(sample)
        return Layout("groups", "scores" if has_rewards or ratings or not has_labels else "labels", has_labels, ratings)
    if format_name == "ultrafeedback":
        scored = any("overall_score" in item for row in sample for item in _completions(row))
        return Layout("ultrafeedback", "scores", False, ratings or (("overall_score",) if scored else _ASPECTS))
    if format_name == "nectar":
        if ratings:
            raise DataError(f"rating = {rating}; it has no effect on format nectar, whose reward is −rank; leave it out.")
        return Layout("nectar", "ranks", False, ())
    if format_name == "pairs":
        if len(ratings) > 1:
            raise DataError(f"rating = {rating}; format pairs takes one name, not several.")
        scored = any(_score_field(row, side, ratings) in row for row in sample for side in ("chosen", "rejected"))
        if ratings and not scored:
            raise DataError(f"rating = {rating}; no column chosen_{rating} or rejected_{rating}; found {columns}.")
        return Layout("pairs", "scores" if scored else "labels", True, ratings)
    return Layout("ratings", "scores", False, _rating_fields(sample, ratings, columns))


def _guess(columns: set[str]) -> str:
    has_prompt = bool(columns & set(_PROMPT_FIELDS))
    if has_prompt and columns & set(_RESPONSES_FIELDS):
        return "groups"
    if has_prompt and "completions" in columns:
        return "ultrafeedback"
    if has_prompt and "answers" in columns:
        return "nectar"
    if {"chosen", "rejected"} <= columns:
        return "pairs"
    if has_prompt and "response" in columns:
        return "ratings"
    known = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    raise DataError(f"format = auto; the columns {sorted(columns)} fit no known format ({known}); rename columns.")


def _completions(row: Row) -> list[Row]:
    try:
        return [item for item in read_list(row.get("completions"), "completions") if isinstance(item, dict)]
    except RowError:
        return []


def _groups_content(sample: Sequence[Row]) -> tuple[bool, bool]:
    """Whether any row has rewards, and whether any has labels."""
    keys = {name for row in sample for name, value in row.items() if value is not None}
    for row in sample:
        for field in _RESPONSES_FIELDS:
            items = row.get(field)
            for item in items if isinstance(items, list) else []:
                keys |= {f".{key}" for key in item} if isinstance(item, dict) else set()
    return bool(keys & {*_REWARDS_FIELDS, ".reward", ".score"}), bool(keys & {"labels", ".label"})


def _rating_fields(sample: Sequence[Row], ratings: tuple[str, ...], columns: Sequence[str]) -> tuple[str, ...]:
    numbers = [name for name in columns if name != "id" and any(_is_number(row.get(name)) for row in sample)]
    missing = [name for name in ratings if name not in columns]
    if missing:
        raise DataError(f"rating = {'+'.join(ratings)}; no column {missing[0]}; numeric columns are {numbers}.")
    if ratings:
        return ratings
    for name in _RATING_NAMES:
        if name in numbers:
            return (name,)
    if len(numbers) == 1:
        return (numbers[0],)
    raise DataError(f"format ratings: which column is the reward? Set rating to one or more (a+b) of {numbers}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
