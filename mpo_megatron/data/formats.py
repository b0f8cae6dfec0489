"""What a format is, how an input's format is found, and how a row becomes a group.

A format is one `Format` in `FORMATS` (known_formats.py): its name, what it looks like, how its rows are recognised, settled and
parsed. `detect` looks at the first rows once and settles what all rows must have (`InputLayout`); `parse` turns one row into its
parts and names the columns that it did not use; `build_group` makes the record. Anything wrong raises `RowError`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpo_megatron.data.conversations import read_tools
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.group import Answer, Group, Message, RewardKind
from mpo_megatron.files import DataError

RowValues = dict[str, Any]


class Sample:
    """The first rows of an input: which columns hold something, and what."""

    def __init__(self, rows: Sequence[RowValues]) -> None:
        self.rows = rows
        self.columns = {name for row in rows for name, value in row.items() if value is not None}
        self.empty = {name for row in rows for name in row} - self.columns
        """Columns that hold nothing in these rows."""

    def has(self, *names: str) -> bool:
        """Whether any of these columns holds something."""
        return not self.columns.isdisjoint(names)

    def values(self, name: str) -> list[Any]:
        """What a column holds, row by row, absences left out."""
        return [row[name] for row in self.rows if row.get(name) is not None]

    def any(self, name: str, test: Callable[[Any], bool]) -> bool:
        """Whether any value of a column passes a test."""
        return any(map(test, self.values(name)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user says of a format."""

    ratings: tuple[str, ...] = ()
    """Fields that hold the reward, averaged; empty: the format's own."""
    drop_ranks: tuple[int, ...] = ()
    """Ranks whose answers are left out."""


@dataclass(frozen=True, kw_only=True)
class InputLayout:
    """What the rows of an input have in common."""

    format: str
    why: str = ""
    """What decided the format: for messages."""
    reward_kind: RewardKind
    """What the first rows hold."""
    ratings: tuple[str, ...] = ()
    """Fields averaged into the reward; empty where the format has a fixed one."""
    drop_ranks: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know of how the columns were read."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The parts of a group that one row holds."""

    prompt: tuple[Message, ...]
    responses: tuple[Answer, ...]
    tools: tuple[dict[str, Any], ...] = ()
    rewards: tuple[float, ...] | None = None
    labels: tuple[int, ...] | None = None
    group_id: str | None = None
    """The row's own id, if it has one."""
    dropped: tuple[RowError, ...] = ()
    """Responses that cannot be used, and why."""
    unused: tuple[str, ...] = ()
    """Columns and keys of the row that say something and were not read."""
    drawn: tuple[tuple[int, ...] | None, ...] = ()
    """As `Group.drawn`."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way people write groups down."""

    name: str
    looks: str
    """What a row looks like, in one line."""
    uses: tuple[str, ...]
    """The columns it reads, those that decide first."""
    fits: Callable[[Sample], bool]
    """Whether the columns are this format's."""
    settle: Callable[[Sample, Options], InputLayout]
    """What the rows have in common. Raises DataError if an option fits nothing there."""
    parse: Callable[[FieldRecord, InputLayout], Parsed]
    """The parts of one row. Raises RowError."""
    joins_rows: bool = False
    """Whether a row holds one response, and the rows of a prompt make its group."""


def rename(row: Any, columns: dict[str, str]) -> Any:
    """The row with its columns named as the formats name them.

    Args:
        columns: our name → the input's
    """
    if not columns or not isinstance(row, dict):
        return row
    theirs = {name: ours for ours, name in columns.items()}
    return {theirs.get(name, name): value for name, value in row.items() if name in theirs or name not in columns}


def find_format(name: str) -> Format:
    """The format of this name."""
    from mpo_megatron.data.known_formats import FORMATS  # it needs the classes above

    return next(item for item in FORMATS if item.name == name)


def detect(rows: Sequence[RowValues], format_name: str = "auto", options: Options | None = None) -> InputLayout:
    """Settle the format, and what the reward is, from the input's first well-formed rows.

    Raises:
        DataError: no format fits, or no reward field does; the message lists what was found.
    """
    from mpo_megatron.data.known_formats import FORMATS

    sample = Sample(rows)
    if format_name == "auto":
        found = next((item for item in FORMATS if item.fits(sample)), None)
        if found is None:
            known = "; ".join(f"{item.name}: {item.looks}" for item in FORMATS)
            raise DataError(
                f"format = auto; the columns {sorted(sample.columns)} fit no known format ({known}); map them, for example "
                "--columns prompt=question responses=answers rewards=scores."
            )
        columns = [name for name in found.uses if name in sample.columns]
        why = f"its columns {', '.join(columns)} look like {found.looks}"
    else:
        found, why = find_format(format_name), "the option format says so"
    options = options or Options()
    if options.drop_ranks and found.name != "nectar":
        raise DataError(
            f"drop_ranks = {list(options.drop_ranks)}; it has an effect on format nectar only, and this is {found.name}."
        )
    layout = found.settle(sample, options)
    reward = f"; the reward is {'+'.join(layout.ratings)}" if found.name in ("ratings", "ultrafeedback") else ""
    return replace(layout, why=why + reward)


def parse(row: Any, layout: InputLayout) -> Parsed:
    """The parts of a group that one row holds.

    Raises:
        RowError: what is wrong, and in which field.
    """
    if not isinstance(row, dict):
        raise RowError("row", f"is of type {type(row).__name__}, not an object with fields")
    record = FieldRecord(row)
    parsed = find_format(layout.format).parse(record, layout)
    tools = read_tools(record)
    return replace(parsed, tools=tools, unused=tuple(dict.fromkeys(record.unused())))


@dataclass(kw_only=True)
class Responses:
    """A row's responses: the usable ones, and why the others are not."""

    responses: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    dropped: list[RowError] = field(default_factory=list)

    def read(self, read: Callable[[], tuple[Any, float | None, int | None] | None]) -> None:
        """Take one response with its reward and label over, or note why not; None leaves it out by choice."""
        try:
            found = read()
        except RowError as error:
            self.dropped.append(error)
            return
        if found is None:
            return
        response, reward, label = found
        self.responses.append(response)
        if reward is not None:
            self.rewards.append(reward)
        if label is not None:
            self.labels.append(label)

    def require(self, least: int) -> None:
        """Raise the first response's fault if fewer than `least` are left because of such faults."""
        if len(self.responses) < least and self.dropped:
            raise self.dropped[0]


def build_group(parsed: Parsed, where: str, source: int = 0) -> Group:
    """The record. A row without an id receives one from its content, which does not depend on the row's place.

    Raises:
        RowError: fewer than two responses.
    """
    if len(parsed.responses) < 2:
        if parsed.dropped:
            raise parsed.dropped[0]
        raise RowError("responses", f"has K = {len(parsed.responses)} response; a group needs at least two")
    group_id = parsed.group_id
    if group_id is None:
        content = [parsed.prompt, parsed.responses, parsed.rewards, parsed.labels, *([parsed.tools] if parsed.tools else [])]
        group_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
    return Group(
        group_id=group_id,
        prompt=parsed.prompt,
        responses=parsed.responses,
        tools=parsed.tools,
        rewards=parsed.rewards,
        labels=parsed.labels,
        where=where,
        source=source,
        dropped=tuple(str(error) for error in parsed.dropped),
        drawn=parsed.drawn,
    )
