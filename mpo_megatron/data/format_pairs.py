"""Formats with two answers in a row: pairs (chosen, rejected), and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpo_megatron.data.conversations import PROMPT_FIELDS, as_messages, is_conversation, read_answer
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, read_number
from mpo_megatron.data.format_parts import empty_scores, finish
from mpo_megatron.data.formats import Format, InputLayout, Options, Parsed, Responses, Sample
from mpo_megatron.files import DataError

_SCORE_NAMES = ("score", "rating", "reward")
_SIDES = (
    *(("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_messages", "rejected_messages")),
    ("preferred_output", "non_preferred_output"),
)
_SWIFT = ("rejected_response", "rejected_messages", "negative_messages")
_COMPARED = (
    *(("response_0", "response_1"), ("response1", "response2"), ("response_1", "response_2"), ("response_a", "response_b")),
    ("conversation_a", "conversation_b"),
)
_STRONGEST = 3
"""Largest strength of a preference, by HelpSteer's scale."""
_WINNERS = ("better_response_id", "overall_preference", "preference_strength", "winner")


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
    sides = {"messages": "chosen"}.get(side, side.rpartition("_")[0] or side)
    return [form for name in names or _SCORE_NAMES for form in (f"{sides}_{name}", f"{sides}-{name}", f"{name}_{sides}")]


def _settle_pairs(sample: Sample, options: Options) -> InputLayout:
    rating = "+".join(options.ratings)
    if len(options.ratings) > 1:
        raise DataError(f"rating = {rating}; format pairs takes one name, not several; choose one.")
    sides = _sides(sample.columns) or ("chosen", "rejected")
    names = [name for side in sides for name in _score_fields(side, options.ratings)]
    scored = sample.has(*names)
    if options.ratings and not scored:
        wanted = " or ".join(_score_fields(side, options.ratings)[0] for side in sides)
        raise DataError(f"rating = {rating}; no column {wanted} holds anything; found {sorted(sample.columns)}.")
    return InputLayout(
        format="pairs",
        reward_kind="scores" if scored else "labels",
        ratings=options.ratings,
        empty_scores=() if scored else empty_scores(sample, names),
    )


def _parse_pairs(row: FieldRecord, layout: InputLayout) -> Parsed:
    present = {name for name in row.values if row.has(name)}
    sides = _sides(present) or _sides(row.values) or ("chosen", "rejected")
    scores = {side: row.find(_score_fields(side, layout.ratings)) for side in sides}
    scored = any(name is not None for name in scores.values())
    found, places = Responses(row=row), list[str]()
    for side, label in zip(sides, (1, 0), strict=True):
        for place, value in _answers_of(row, side):

            def read(place: str = place, value: Any = value, side: str = side, label: int = label) -> Any:
                response = read_answer(row, value, place)
                reward = None
                if scored:
                    name = scores[side]
                    if name is None:
                        given = next(filter(None, scores.values()))
                        remedy = f"to use labels instead, rename that column: --columns unused={given}"
                        raise RowError(_score_like(scores, side, layout.ratings), f"is missing, but {given} is there; {remedy}")
                    reward = read_number(row.get(name), name)
                places.append(place)
                return response, reward, label

            found.read(read)
    if "messages" in sides:
        _complete_swift(found)
    return finish(row, found, places, least=2)


def _score_like(scores: Mapping[str, str | None], side: str, names: Sequence[str]) -> str:
    """The name of the missing score, formed like the other side's."""
    forms = _score_fields(side, names)
    given = [_score_fields(other, names).index(name) for other, name in scores.items() if name is not None]
    return forms[given[0] if given else 0]


def _answers_of(row: FieldRecord, side: str) -> list[tuple[str, Any]]:
    """A side's answer with its place; several if the field holds a list. Text is one answer, even if it is a list in JSON."""
    value = row.get(side)
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
    winner = next((name for name in options.ratings or _WINNERS if name in sample.columns), None)
    if winner is None:
        raise DataError(
            f"format comparison: which column names the better answer? Set rating to one of {sorted(sample.columns)}."
        )
    by_strength = winner in ("overall_preference", "preference_strength")
    return InputLayout(format="comparison", reward_kind="scores" if by_strength else "labels", ratings=(winner,))


def _parse_comparison(row: FieldRecord, layout: InputLayout) -> Parsed:
    pair = _compared(row.values) or _COMPARED[0]
    (winner,) = layout.ratings
    value = row.get(winner)
    if layout.reward_kind == "scores":  # −3 … 3, positive if the second is better
        strength = read_number(value, winner)
        if abs(strength) > _STRONGEST:  # HelpSteer: −100 if no answer is valid
            raise RowError(winner, f"is {strength:g}; it must be within ±{_STRONGEST}")
        judged: list[tuple[float | None, int | None]] = [(-strength / 2, None), (strength / 2, None)]
    else:
        second = _read_winner(value, winner, pair)
        judged = [(None, 1 - second), (None, second)]
    found, places = Responses(row=row), list[str]()
    for name, (reward, label) in zip(pair, judged, strict=True):

        def read(name: str = name, reward: float | None = reward, label: int | None = label) -> Any:
            response = read_answer(row, row.get(name), name)
            places.append(name)
            return response, reward, label

        found.read(read)
    return finish(row, found, places)


def _read_winner(value: Any, field: str, pair: tuple[str, str]) -> int:
    """0 if the first answer is better, 1 if the second is."""
    if value is None:
        raise RowError(field, "is missing")
    names = [name.removeprefix("response").removeprefix("conversation").strip("_") for name in pair]
    word = str(int(value)) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else str(value)
    for place, name in enumerate(names):
        if word.strip().lower().removeprefix("response_").removeprefix("model_") in (name, pair[place]):
            return place
    raise RowError(field, f"is {word[:40]!r}; it must be {' or '.join(names)}, for {' or '.join(pair)}")


PAIRS = Format(
    name="pairs",
    looks="a chosen and a rejected answer",
    uses=(*(name for pair in _SIDES for name in pair), "messages", *_SWIFT, *PROMPT_FIELDS),
    fits=_fits_pairs,
    settle=_settle_pairs,
    parse=_parse_pairs,
)

COMPARISON = Format(
    name="comparison",
    looks="two responses in separate columns, and which is better",
    uses=(*(name for pair in _COMPARED for name in pair), *_WINNERS, *PROMPT_FIELDS),
    fits=_fits_comparison,
    settle=_settle_comparison,
    parse=_parse_comparison,
)
