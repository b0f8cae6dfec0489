"""The formats people have, row → group.

A row is a dictionary. `detect` looks at the first rows once and settles what all rows must have (`Layout`); `parse` turns
one row into its parts (fields.py reads and checks each); `build_group` makes the record. Anything wrong raises `RowError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mpo_megatron.data import DataError
from mpo_megatron.data.fields import (
    PROMPT_FIELDS,
    Row,
    RowError,
    read_id,
    read_label,
    read_list,
    read_messages,
    read_number,
    read_prompt,
    read_records,
    read_text,
)
from mpo_megatron.data.group import Group, Message, RewardKind

FORMATS = {
    "groups": "prompt and responses, with rewards (or labels) in or beside them",
    "ultrafeedback": "instruction and completions",
    "nectar": "prompt and answers (each with a rank)",
    "pairs": "chosen and rejected",
    "ratings": "prompt, response and numeric attributes",
}
_RESPONSES_FIELDS = ("responses", "all_generated_responses")
_REWARDS_FIELDS = ("rewards", "scores", "all_rm_scores")
_SCORE_NAMES = ("score", "rating", "reward")
_RATING_NAMES = ("helpfulness", "reward", "score", "rating", "overall_score")
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
_HUMAN_TURNS = re.compile(r"\n\n(Human|Assistant):(?: |(?=\n)|$)")
_HELPSTEER_TURNS = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")


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
    return Parsed(prompt=read_prompt(row), responses=responses, rewards=rewards, labels=labels, group_id=read_id(row))


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
    items = read_records(row.get("completions"), "completions")
    return Parsed(
        prompt=read_prompt(row),
        responses=tuple(_response_text(item, f"completions[{index}]") for index, item in enumerate(items)),
        rewards=tuple(_average(item, layout.ratings, f"completions[{index}].") for index, item in enumerate(items)),
        group_id=read_id(row),
    )


def _parse_nectar(row: Row, layout: Layout) -> Parsed:
    value = row.get("prompt")
    turns = _transcript(value) if isinstance(value, str) else []
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    prompt = read_messages(turns, "prompt") if turns else read_prompt(row)
    items = read_records(row.get("answers"), "answers")
    return Parsed(
        prompt=prompt,
        responses=tuple(read_text(item.get("answer"), f"answers[{index}].answer") for index, item in enumerate(items)),
        rewards=tuple(-read_number(item.get("rank"), f"answers[{index}].rank") for index, item in enumerate(items)),
        group_id=read_id(row),
    )


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
    return Parsed(prompt=prompt, responses=responses, rewards=rewards, labels=(1, 0), group_id=read_id(row))


def _read_side(row: Row, side: str) -> tuple[tuple[Message, ...], str]:
    """Prompt and answer of one side: from its own messages if it repeats the conversation, else from the prompt field."""
    value = row.get(side)
    if isinstance(value, str):
        turns = _transcript(value) if not any(row.get(name) for name in PROMPT_FIELDS) else []
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
    has_prompt = bool(columns & set(PROMPT_FIELDS))
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
