"""Formats with one response in a row, whose rows are joined by prompt: labels (unpaired) and ratings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpo_megatron.data.conversations import PROMPT_FIELDS, is_answered, read_answer
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, is_number, read_label
from mpo_megatron.data.format_parts import average, finish
from mpo_megatron.data.formats import Format, InputLayout, Options, Parsed, Responses, Sample
from mpo_megatron.files import DataError

_RATING_NAMES = ("helpfulness", "reward", "score", "rating", "overall_score")
_COMPLETIONS = ("completion", "response", "output")
_LABELS = ("label", "kto_tag")


def _fits_unpaired(sample: Sample) -> bool:
    ends = sample.any("messages", is_answered) or sample.any("conversations", is_answered)
    # Labels of another kind are refused by name, unless a number may be what counts.
    labels = any(sample.any(name, _is_label) for name in _LABELS) or (sample.has(*_LABELS) and not _numbers(sample))
    return labels and (ends or (sample.has(*PROMPT_FIELDS) and sample.has(*_COMPLETIONS)))


def _is_label(value: Any) -> bool:
    try:
        return read_label(value, "") in (0, 1)
    except RowError:
        return False


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
    found = Responses(row=row)
    found.read(lambda: (read_answer(row, row.get(field), field), *judge()))
    return finish(row, found, [field], least=1)


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
    return _one_answer(row, lambda: (average(row, layout.ratings), None))


UNPAIRED = Format(
    name="unpaired",
    looks="one response per row with a label; all rows of a prompt form a group",
    uses=(*_LABELS, *_COMPLETIONS, "messages", "conversations", *PROMPT_FIELDS),
    fits=_fits_unpaired,
    settle=_settle_unpaired,
    parse=_parse_unpaired,
    joins_rows=True,
)

RATINGS = Format(
    name="ratings",
    looks="one response per row with numeric attributes; all rows of a prompt form a group",
    uses=(*_COMPLETIONS, *PROMPT_FIELDS),
    fits=_fits_ratings,
    settle=_settle_ratings,
    parse=_parse_ratings,
    joins_rows=True,
)
