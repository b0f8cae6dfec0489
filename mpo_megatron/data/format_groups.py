"""Formats with all responses of a prompt in a row: groups, UltraFeedback, Nectar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mpo_megatron.config.values import LARGEST_REWARD
from mpo_megatron.data.conversations import PROMPT_FIELDS, is_ordinary
from mpo_megatron.data.drawn import Drawn, read_drawn
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, parse_json, read_label, read_list, read_number
from mpo_megatron.data.format_parts import Column, average, empty_scores, finish, read_item
from mpo_megatron.data.formats import Format, InputLayout, Options, Parsed, Responses, Sample
from mpo_megatron.data.sampled_prompt import read_digests
from mpo_megatron.files import DataError

_RESPONSES = ("responses", "all_generated_responses", "answers", "candidates", "completions", "outputs", "generations")
_PLAIN = frozenset(("text", "reward"))
"""The keys of a plain response."""
_REWARDS = ("rewards", "scores", "all_rm_scores")
_RANKS = ("ranks", "rank")
_VALUES = frozenset((*_REWARDS, ".reward", ".score", *_RANKS, ".rank", "labels", ".label"))
"""What may judge responses, in the row or (after a point) in the responses."""
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def _fits_groups(sample: Sample) -> bool:
    if not sample.has(*PROMPT_FIELDS):
        return False
    if not sample.has(*_RESPONSES[:2]) and not any(
        sample.any(name, lambda value: isinstance(parse_json(value, "["), list)) for name in _RESPONSES[2:]
    ):
        return False
    return not sample.columns.issuperset(("chosen", "rejected")) or not _VALUES.isdisjoint(_keys(sample))


def _keys(sample: Sample) -> set[str]:
    """Names of columns, and those of the responses' keys after a point."""
    keys = set(sample.columns)
    for row in sample.rows:
        for field in _RESPONSES:
            items = parse_json(row.get(field), "[")
            for item in items if isinstance(items, list) else []:
                keys |= {f".{key}" for key in item} if isinstance(item, dict) else set()
    return keys


def _settle_groups(sample: Sample, options: Options) -> InputLayout:
    keys = _keys(sample)
    has_rewards = bool(keys & {*_REWARDS, ".reward", ".score"}) or bool(options.ratings)
    has_ranks = bool(keys & {*_RANKS, ".rank"})
    has_labels = bool(keys & {"labels", ".label"})
    kind: Any = "scores" if has_rewards else "ranks" if has_ranks else "labels" if has_labels else "scores"
    return InputLayout(format="groups", reward_kind=kind, ratings=options.ratings, empty_scores=empty_scores(sample, _REWARDS))


def _parse_groups(row: FieldRecord, layout: InputLayout) -> Parsed:
    field = row.find(_RESPONSES) or "responses"
    items = read_list(row.get(field), field)
    beside = any(map(row.has, (*_REWARDS, *_RANKS, "labels")))
    if not layout.ratings and all(map(_is_plain, items)) and not beside:
        found = Responses(row=row, responses=[item["text"] for item in items], rewards=[float(item["reward"]) for item in items])
        return _with_digests(row, finish(row, found, [f"{field}[{index}]" for index in range(len(items))]))
    # A column counts as read once it is asked for: ranks only without rewards, and neither with `rating`.
    judges = [(("reward", "score"), _REWARDS, 1), (("rank",), _RANKS, -1)] if not layout.ratings else []
    columns = ((Column(row, len(items), inner, outer, read_number), sign) for inner, outer, sign in judges)
    rewards, sign = next(((column, sign) for column, sign in columns if any(map(column.given, items))), (None, 1))
    labels = Column(row, len(items), ("label",), ("labels",), read_label)
    has_labels = any(map(labels.given, items))
    if not (rewards or has_labels or layout.ratings):
        place = f"{field}[0].reward" if any(isinstance(item, dict) for item in items) else "rewards"
        raise RowError(place, "is missing; map its column (--columns rewards=…), or set rating to a key of the responses")
    found, places, drawn = Responses(row=row), list[str](), list[Drawn | None]()

    def read(index: int, item: Any) -> tuple[Any, float | None, int | None]:
        place = f"{field}[{index}]"
        response, record = read_item(row, item, place)
        ids = read_drawn(row, record)
        reward = None
        if layout.ratings:
            reward = average(record, layout.ratings)
        elif rewards is not None:
            reward = sign * rewards.read(record, index)
        label = labels.read(record, index) if has_labels else None
        places.append(place)
        drawn.append(ids if isinstance(response, str) else None)
        return response, reward, label

    for index, item in enumerate(items):
        found.read(read, index, item)
    parsed = _with_digests(row, finish(row, found, places))
    return replace(parsed, drawn=tuple(drawn)) if any(drawn) else parsed


def _is_plain(item: Any) -> bool:
    """Whether a response is a text and its reward, both clearly usable, and nothing else; nearly all are. False: look closer."""
    return (
        isinstance(item, dict)
        and item.keys() == _PLAIN
        and type(item["reward"]) in (float, int)
        and -LARGEST_REWARD < item["reward"] < LARGEST_REWARD
        and is_ordinary(item["text"])
    )


def _with_digests(row: FieldRecord, parsed: Parsed) -> Parsed:
    digests = read_digests(row)
    return parsed if digests is None else replace(parsed, sampled_prompt=digests)


def _fits_ultrafeedback(sample: Sample) -> bool:
    return sample.has(*PROMPT_FIELDS) and sample.any("completions", _is_annotated)


def _is_annotated(value: Any) -> bool:
    items = _records(value)
    return any("annotations" in item or "overall_score" in item for item in items)


def _records(value: Any) -> list[Any]:
    try:
        return [item for item in read_list(value, "") if isinstance(item, dict)]
    except RowError:
        return []


def _settle_ultrafeedback(sample: Sample, options: Options) -> InputLayout:
    scored = any(item.get("overall_score") is not None for value in sample.values("completions") for item in _records(value))
    ratings = options.ratings or (("overall_score",) if scored else _ASPECTS)
    return InputLayout(format="ultrafeedback", reward_kind="scores", ratings=ratings)


def _parse_ultrafeedback(row: FieldRecord, layout: InputLayout) -> Parsed:
    return _parse_records(row, "completions", lambda record, place: average(record, layout.ratings), "response")


def _parse_records(row: FieldRecord, field: str, reward: Callable[[FieldRecord, str], float | None], text: str) -> Parsed:
    """Responses in records, each with the source of its reward; None drops a response deliberately."""
    found, places = Responses(row=row), list[str]()

    def read(index: int, item: Any) -> tuple[Any, float | None, int | None] | None:
        place = f"{field}[{index}]"
        if not isinstance(item, dict):
            raise RowError(place, f"is of type {type(item).__name__}, not a record")
        response, record = read_item(row, item, place, text)
        value = reward(record, place)
        if value is None:
            return None
        places.append(place)
        return response, value, None

    for index, item in enumerate(read_list(row.get(field), field)):
        found.read(read, index, item)
    return finish(row, found, places)


def _fits_nectar(sample: Sample) -> bool:
    return sample.has(*PROMPT_FIELDS) and sample.any("answers", lambda value: any("rank" in item for item in _records(value)))


def _settle_nectar(sample: Sample, options: Options) -> InputLayout:
    if options.ratings:
        rating = "+".join(options.ratings)
        raise DataError(f"rating = {rating}; it has no effect on format nectar, whose reward is −rank; remove it.")
    return InputLayout(format="nectar", reward_kind="ranks", drop_ranks=options.drop_ranks)


def _parse_nectar(row: FieldRecord, layout: InputLayout) -> Parsed:
    def reward(record: FieldRecord, place: str) -> float | None:
        rank = read_number(record.get("rank"), f"{record.place}rank")
        return None if rank in layout.drop_ranks else -rank

    return _parse_records(row, "answers", reward, "answer")


ULTRAFEEDBACK = Format(
    name="ultrafeedback",
    looks="an instruction with completions, each with annotations or an overall_score",
    uses=("completions", "instruction"),
    fits=_fits_ultrafeedback,
    settle=_settle_ultrafeedback,
    parse=_parse_ultrafeedback,
)

NECTAR = Format(
    name="nectar",
    looks="a prompt with answers, each with a rank",
    uses=("answers", "prompt"),
    fits=_fits_nectar,
    settle=_settle_nectar,
    parse=_parse_nectar,
)

GROUPS = Format(
    name="groups",
    looks="a prompt and a list of responses, with rewards, ranks or labels in or beside them",
    uses=(*_RESPONSES, *PROMPT_FIELDS, *_REWARDS, *_RANKS, "labels"),
    fits=_fits_groups,
    settle=_settle_groups,
    parse=_parse_groups,
)
