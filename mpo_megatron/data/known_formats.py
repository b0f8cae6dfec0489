"""The known formats. Each is one `Format` at the end of this file; docs/extending.md explains how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpo_megatron.data.conversations import PROMPT_FIELDS, as_messages, is_conversation, join_answers, read_answer
from mpo_megatron.data.drawn import Drawn, read_drawn
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, is_number, parse_json, read_id, read_label, read_list, read_number
from mpo_megatron.data.formats import Format, InputLayout, Options, Parsed, Responses, Sample
from mpo_megatron.data.group import Answer
from mpo_megatron.data.sampled_prompt import read_digests
from mpo_megatron.files import DataError

_RESPONSES = ("responses", "all_generated_responses", "answers", "candidates", "completions", "outputs", "generations")
_TEXTS = ("text", "response", "content", "answer", "completion", "output", "messages")
_REWARDS = ("rewards", "scores", "all_rm_scores")
_RANKS = ("ranks", "rank")
_SCORE_NAMES = ("score", "rating", "reward")
_RATING_NAMES = ("helpfulness", "reward", "score", "rating", "overall_score")
_ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
_SIDES = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages"))
_SWIFT = ("rejected_response", "rejected_messages", "negative_messages")
_COMPARED = (("response_0", "response_1"), ("response1", "response2"), ("response_1", "response_2"), ("response_a", "response_b"))
_WINNERS = ("better_response_id", "overall_preference", "preference_strength", "winner")
_MESSAGE_KEYS = {"role", "from", "tool_calls", "reasoning_content", "reasoning"}
"""Keys that make a record with a text a message."""
_COMPLETIONS = ("completion", "response", "output")
_LABELS = ("label", "kto_tag")

# --------------------------------------------------------------------------------------------------- parts that formats share


def _read_item(row: FieldRecord, item: Any, place: str, name: str = "text") -> tuple[Answer, FieldRecord]:
    """A response given as text, as messages, or inside a record; and that record, for its other fields."""
    if not isinstance(item, dict):
        return read_answer(row, item, place), row.within({}, place)
    record = row.within(item, place)
    name = record.find(_TEXTS) or name
    text = record.get(name)
    keys = [key for key in record.values.keys() & _MESSAGE_KEYS if record.has(key)]
    if keys and not isinstance(as_messages(text), list):
        message = {"role": "assistant", "content": text} | {key: record.get(key) for key in keys}
        return read_answer(record, [message], place), record
    return read_answer(row, text, f"{place}.{name}"), record


def _average(record: FieldRecord, names: Sequence[str]) -> float:
    """Mean of one record's named ratings; a name may also be an UltraFeedback aspect."""
    total = 0.0
    for name in names:
        aspects = record.values.get("annotations")
        if not record.has(name) and isinstance(aspects, dict) and isinstance(aspects.get(name), dict):
            record.get("annotations")
            aspect = record.within(aspects[name], f"annotations.{name}")
            rating = aspect.get(aspect.find(("Rating", "rating")) or "Rating")
            total += read_number(rating, f"{record.place}annotations.{name}.Rating")
        else:
            total += read_number(record.get(name), f"{record.place}{name}")
    return total / len(names)


class _Column:
    """One value per response: from a list in the row, or from the responses themselves."""

    def __init__(
        self, row: FieldRecord, size: int, inner: Sequence[str], outer: Sequence[str], read: Callable[[Any, str], Any]
    ) -> None:
        self.inner, self.names, self.convert = inner, frozenset(inner), read
        self.outer = row.find(outer)
        self.values = None if self.outer is None else read_list(row.get(self.outer), self.outer)
        if self.values is not None and len(self.values) != size:
            raise RowError(str(self.outer), f"has {len(self.values)} values for {size} responses")

    def given(self, item: Any) -> bool:
        """Whether a response, or the row, gives a value at all."""
        return self.values is not None or (isinstance(item, dict) and not self.names.isdisjoint(item))

    def read(self, record: FieldRecord, index: int, default: str | None = None) -> Any:
        """The value of one response; if both places have one, they must agree."""
        name = record.find(self.inner)
        if self.values is None:
            name = name or next((name for name in self.inner if name in record.values), default or self.inner[0])
            return self.convert(record.get(name), f"{record.place}{name}")
        value = self.convert(self.values[index], f"{self.outer}[{index}]")
        if name is not None and self.convert(record.get(name), f"{record.place}{name}") != value:
            raise RowError(f"{self.outer}[{index}]", f"contradicts {record.place}{name}")
        return value


def _finish(row: FieldRecord, found: Responses, places: Sequence[str], *, least: int = 2) -> Parsed:
    """The parts of a row whose responses have been read."""
    found.require(least)
    if not found.responses:
        raise RowError("responses", "has K = 0 responses; a group needs at least two")
    prompt, responses = join_answers(row, list(zip(places, found.responses, strict=True)))
    return Parsed(
        prompt=prompt,
        responses=tuple(responses),
        rewards=tuple(found.rewards) or None,
        labels=tuple(found.labels) or None,
        group_id=read_id(row),
        dropped=tuple(found.dropped),
    )


# --------------------------------------------------------------------------------------------------- groups


def _fits_groups(sample: Sample) -> bool:
    if not sample.has(*PROMPT_FIELDS):
        return False
    if sample.has(*_RESPONSES[:2]):
        return True
    return any(sample.any(name, lambda value: isinstance(parse_json(value, "["), list)) for name in _RESPONSES[2:])


def _settle_groups(sample: Sample, options: Options) -> InputLayout:
    keys = set(sample.columns)
    for row in sample.rows:
        for field in _RESPONSES:
            items = parse_json(row.get(field), "[")
            for item in items if isinstance(items, list) else []:
                keys |= {f".{key}" for key in item} if isinstance(item, dict) else set()
    has_rewards = bool(keys & {*_REWARDS, ".reward", ".score"}) or bool(options.ratings)
    has_ranks = bool(keys & {*_RANKS, ".rank"})
    has_labels = bool(keys & {"labels", ".label"})
    kind: Any = "scores" if has_rewards else "ranks" if has_ranks else "labels" if has_labels else "scores"
    return InputLayout(format="groups", reward_kind=kind, ratings=options.ratings, notes=_empty_scores(sample, _REWARDS))


def _empty_scores(sample: Sample, names: Sequence[str]) -> tuple[str, ...]:
    """A note that score columns exist but are empty."""
    empty = [name for name in names if name in sample.empty]
    return (f"{' and '.join(empty)}: empty in the first rows; labels are used instead of rewards",) if empty else ()


def _parse_groups(row: FieldRecord, layout: InputLayout) -> Parsed:
    field = row.find(_RESPONSES) or "responses"
    items = read_list(row.get(field), field)
    rewards = _Column(row, len(items), ("reward", "score"), _REWARDS, read_number)
    ranks = _Column(row, len(items), ("rank",), _RANKS, read_number)
    labels = _Column(row, len(items), ("label",), ("labels",), read_label)
    has_rewards = any(map(rewards.given, items))
    has_ranks = not has_rewards and not layout.ratings and any(map(ranks.given, items))
    has_labels = any(map(labels.given, items))
    if not (has_rewards or has_ranks or has_labels or layout.ratings):
        raise RowError("rewards" if not any(isinstance(item, dict) for item in items) else f"{field}[0].reward", "is missing")
    found, places, drawn = Responses(), list[str](), list[Drawn | None]()

    def read(index: int, item: Any) -> tuple[Any, float | None, int | None]:
        place = f"{field}[{index}]"
        response, record = _read_item(row, item, place)
        ids = read_drawn(row, record)
        reward = None
        if layout.ratings:
            reward = _average(record, layout.ratings)
        elif has_rewards:
            reward = rewards.read(record, index)
        elif has_ranks:
            reward = -ranks.read(record, index)
        label = labels.read(record, index) if has_labels else None
        places.append(place)
        drawn.append(ids if isinstance(response, str) else None)
        return response, reward, label

    for index, item in enumerate(items):
        found.read(read, index, item)
    parsed = replace(_finish(row, found, places), sampled_prompt=read_digests(row))
    return replace(parsed, drawn=tuple(drawn)) if any(drawn) else parsed


# --------------------------------------------------------------------------------------------------- ultrafeedback, nectar


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
    return _parse_records(row, "completions", lambda record, place: _average(record, layout.ratings), "response")


def _parse_records(row: FieldRecord, field: str, reward: Callable[[FieldRecord, str], float | None], text: str) -> Parsed:
    """Responses in records, each with the source of its reward; None drops a response deliberately."""
    found, places = Responses(), list[str]()

    def read(index: int, item: Any) -> tuple[Any, float | None, int | None] | None:
        place = f"{field}[{index}]"
        if not isinstance(item, dict):
            raise RowError(place, f"is of type {type(item).__name__}, not a record")
        response, record = _read_item(row, item, place, text)
        value = reward(record, place)
        if value is None:
            return None
        places.append(place)
        return response, value, None

    for index, item in enumerate(read_list(row.get(field), field)):
        found.read(read, index, item)
    return _finish(row, found, places)


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


# --------------------------------------------------------------------------------------------------- pairs


def _sides(values: Mapping[str, Any] | set[str]) -> tuple[str, str] | None:
    """The columns of the preferred and of the other answer."""
    pair = next((pair for pair in _SIDES if set(pair) <= set(values)), None)
    if pair is None and "messages" in values:
        other = next((name for name in _SWIFT if name in values), None)
        pair = None if other is None else ("messages", other)
    return pair


def _fits_pairs(sample: Sample) -> bool:
    return _sides(sample.columns) is not None


def _score_fields(side: str, names: Sequence[str]) -> list[str]:
    sides = {"messages": "chosen"}.get(side, side.partition("_")[0])
    return [form for name in names or _SCORE_NAMES for form in (f"{sides}_{name}", f"{sides}-{name}", f"{name}_{sides}")]


def _settle_pairs(sample: Sample, options: Options) -> InputLayout:
    rating = "+".join(options.ratings)
    if len(options.ratings) > 1:
        raise DataError(f"rating = {rating}; format pairs takes one name, not several; choose one.")
    names = [name for side in ("chosen", "rejected") for name in _score_fields(side, options.ratings)]
    scored = sample.has(*names)
    if options.ratings and not scored:
        raise DataError(
            f"rating = {rating}; no column chosen_{rating} or rejected_{rating} holds anything; found {sorted(sample.columns)}."
        )
    return InputLayout(
        format="pairs",
        reward_kind="scores" if scored else "labels",
        ratings=options.ratings,
        notes=() if scored else _empty_scores(sample, names),
    )


def _parse_pairs(row: FieldRecord, layout: InputLayout) -> Parsed:
    present = {name for name in row.values if row.has(name)}
    sides = _sides(present) or _sides(row.values) or ("chosen", "rejected")
    scores = {side: row.find(_score_fields(side, layout.ratings)) for side in sides}
    scored = any(name is not None for name in scores.values())
    found, places = Responses(), list[str]()
    for side, label in zip(sides, (1, 0), strict=True):
        for place, value in _answers_of(row, side):

            def read(place: str = place, value: Any = value, side: str = side, label: int = label) -> Any:
                response = read_answer(row, value, place)
                reward = None
                if scored:
                    name = scores[side] or _score_like(scores, side, layout.ratings)
                    reward = read_number(row.get(name), name)
                places.append(place)
                return response, reward, label

            found.read(read)
    if "messages" in sides:
        _complete_swift(found)
    return _finish(row, found, places, least=2)


def _score_like(scores: Mapping[str, str | None], side: str, names: Sequence[str]) -> str:
    """The name of the missing score, formed like the other side's."""
    forms = _score_fields(side, names)
    given = [_score_fields(other, names).index(name) for other, name in scores.items() if name is not None]
    return forms[given[0] if given else 0]


def _answers_of(row: FieldRecord, side: str) -> list[tuple[str, Any]]:
    """A side's answer with its place; several if the field holds a list."""
    value = parse_json(row.get(side), "[")
    if not isinstance(value, list) or is_conversation(value):
        return [(side, value)]
    items = [as_messages(item) for item in value]
    if items and all(isinstance(item, str) or is_conversation(item) for item in items):
        return [(f"{side}[{index}]", item) for index, item in enumerate(items)]
    return [(side, value)]


def _complete_swift(found: Responses) -> None:
    """ms-swift gives only the text of the other answer; prefix it with the conversation in `messages`."""
    whole = found.responses[0] if found.responses else None
    if not isinstance(whole, tuple):
        return
    last = max((place for place, message in enumerate(whole) if message["role"] == "user"), default=-1)
    for place, answer in enumerate(found.responses[1:], start=1):
        if isinstance(answer, str):
            found.responses[place] = (*whole[:-1], {"role": "assistant", "content": answer})
        elif answer[0]["role"] == "assistant":
            found.responses[place] = (*whole[: last + 1], *answer)


# --------------------------------------------------------------------------------------------------- two answers compared


def _compared(values: Mapping[str, Any] | set[str]) -> tuple[str, str] | None:
    return next((pair for pair in _COMPARED if set(pair) <= set(values)), None)


def _fits_comparison(sample: Sample) -> bool:
    return _compared(sample.columns) is not None and sample.has(*_WINNERS)


def _settle_comparison(sample: Sample, options: Options) -> InputLayout:
    if len(options.ratings) > 1 or any(name not in sample.columns for name in options.ratings):
        raise DataError(
            f"rating = {'+'.join(options.ratings)}; format comparison takes one column, which names the better "
            "answer; choose one."
        )
    winner = next((name for name in options.ratings or _WINNERS if name in sample.columns), "")
    by_strength = winner in ("overall_preference", "preference_strength")
    return InputLayout(format="comparison", reward_kind="scores" if by_strength else "labels", ratings=(winner,))


def _parse_comparison(row: FieldRecord, layout: InputLayout) -> Parsed:
    pair = _compared(row.values) or _COMPARED[0]
    (winner,) = layout.ratings
    value = row.get(winner)
    if layout.reward_kind == "scores":  # −3 … 3, positive if the second is better
        strength = read_number(value, winner)
        judged: list[tuple[float | None, int | None]] = [(-strength / 2, None), (strength / 2, None)]
    else:
        second = _read_winner(value, winner, pair)
        judged = [(None, 1 - second), (None, second)]
    found, places = Responses(), list[str]()
    for name, (reward, label) in zip(pair, judged, strict=True):

        def read(name: str = name, reward: float | None = reward, label: int | None = label) -> Any:
            response = read_answer(row, row.get(name), name)
            places.append(name)
            return response, reward, label

        found.read(read)
    return _finish(row, found, places)


def _read_winner(value: Any, field: str, pair: tuple[str, str]) -> int:
    """0 if the first answer is better, 1 if the second is."""
    if value is None:
        raise RowError(field, "is missing")
    names = [name.removeprefix("response").strip("_") for name in pair]
    word = str(int(value)) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else str(value)
    for place, name in enumerate(names):
        if word.strip().lower().removeprefix("response_").removeprefix("model_") in (name, pair[place]):
            return place
    raise RowError(field, f"is {word[:40]!r}; it must be {' or '.join(names)}, for {' or '.join(pair)}")


# --------------------------------------------------------------------------------------------------- one response a row


def _fits_unpaired(sample: Sample) -> bool:
    ends = sample.any("messages", _is_answered) or sample.any("conversations", _is_answered)
    # Labels of another kind are refused by name, unless a number may be what counts.
    labels = any(sample.any(name, _is_label) for name in _LABELS) or (sample.has(*_LABELS) and not _numbers(sample))
    return labels and (ends or (sample.has(*PROMPT_FIELDS) and sample.has(*_COMPLETIONS)))


def _is_label(value: Any) -> bool:
    try:
        return read_label(value, "") in (0, 1)
    except RowError:
        return False


def _is_answered(value: Any) -> bool:
    messages = as_messages(value)
    return is_conversation(messages) and str(messages[-1].get("role", messages[-1].get("from"))) in ("assistant", "gpt")


def _settle_unpaired(sample: Sample, options: Options) -> InputLayout:
    if options.ratings:
        raise DataError(f"rating = {'+'.join(options.ratings)}; format unpaired has labels; remove it.")
    return InputLayout(format="unpaired", reward_kind="labels")


def _parse_unpaired(row: FieldRecord, layout: InputLayout) -> Parsed:
    label_field = row.find(_LABELS) or "label"
    label = read_label(row.get(label_field), label_field)
    return _one_answer(row, lambda: (None, label))


def _one_answer(row: FieldRecord, judge: Callable[[], tuple[float | None, int | None]]) -> Parsed:
    """A row with one response: in a separate column, or as the end of its conversation."""
    field = row.find(_COMPLETIONS) or next((name for name in ("messages", "conversations") if row.has(name)), "response")
    found = Responses()
    found.read(lambda: (read_answer(row, row.get(field), field), *judge()))
    return _finish(row, found, [field], least=1)


def _fits_ratings(sample: Sample) -> bool:
    return sample.has(*PROMPT_FIELDS) and sample.has(*_COMPLETIONS) and bool(_numbers(sample))


def _numbers(sample: Sample) -> list[str]:
    """Columns that may hold a reward."""
    known = {*PROMPT_FIELDS, *_COMPLETIONS, "id", "group_id", "system", "system_prompt"}
    return sorted(name for name in sample.columns - known if sample.any(name, is_number))


def _settle_ratings(sample: Sample, options: Options) -> InputLayout:
    numbers = _numbers(sample)
    missing = [name for name in options.ratings if name not in sample.columns]
    if missing:
        raise DataError(f"rating = {'+'.join(options.ratings)}; no column {missing[0]}; choose from {numbers}.")
    # A number of another name may be a length, a seed or a turn.
    ratings = options.ratings or tuple(name for name in _RATING_NAMES if name in numbers)[:1]
    if not ratings:
        raise DataError(f"format ratings: which column is the reward? Set rating to one or more (a+b) of {numbers}.")
    return InputLayout(format="ratings", reward_kind="scores", ratings=ratings)


def _parse_ratings(row: FieldRecord, layout: InputLayout) -> Parsed:
    return _one_answer(row, lambda: (_average(row, layout.ratings), None))


# --------------------------------------------------------------------------------------------------- all of them

FORMATS = (
    Format(
        name="ultrafeedback",
        looks="an instruction with completions, each with annotations or an overall_score",
        uses=("completions", "instruction"),
        fits=_fits_ultrafeedback,
        settle=_settle_ultrafeedback,
        parse=_parse_ultrafeedback,
    ),
    Format(
        name="nectar",
        looks="a prompt with answers, each with a rank",
        uses=("answers", "prompt"),
        fits=_fits_nectar,
        settle=_settle_nectar,
        parse=_parse_nectar,
    ),
    Format(
        name="groups",
        looks="a prompt and a list of responses, with rewards, ranks or labels in or beside them",
        uses=(*_RESPONSES, *PROMPT_FIELDS, *_REWARDS, *_RANKS, "labels"),
        fits=_fits_groups,
        settle=_settle_groups,
        parse=_parse_groups,
    ),
    Format(
        name="pairs",
        looks="a chosen and a rejected answer",
        uses=(*(name for pair in _SIDES for name in pair), "messages", *_SWIFT, *PROMPT_FIELDS),
        fits=_fits_pairs,
        settle=_settle_pairs,
        parse=_parse_pairs,
    ),
    Format(
        name="comparison",
        looks="two responses in separate columns, and which is better",
        uses=(*(name for pair in _COMPARED for name in pair), *_WINNERS, *PROMPT_FIELDS),
        fits=_fits_comparison,
        settle=_settle_comparison,
        parse=_parse_comparison,
    ),
    Format(
        name="unpaired",
        looks="one response per row with a label; all rows of a prompt form a group",
        uses=(*_LABELS, *_COMPLETIONS, "messages", "conversations", *PROMPT_FIELDS),
        fits=_fits_unpaired,
        settle=_settle_unpaired,
        parse=_parse_unpaired,
        joins_rows=True,
    ),
    Format(
        name="ratings",
        looks="one response per row with numeric attributes; all rows of a prompt form a group",
        uses=(*_COMPLETIONS, *PROMPT_FIELDS),
        fits=_fits_ratings,
        settle=_settle_ratings,
        parse=_parse_ratings,
        joins_rows=True,
    ),
)
