"""What a format is, how an input's format is detected, and how a row becomes a group.

A format is one `Format` in `FORMATS` (known_formats.py): its name, its description, and functions that recognise, settle and
parse its rows. `detect` reads the first rows once and settles what all rows have in common (`InputLayout`). `parse` splits one
row into its parts and lists unused columns; `build_group` makes the group. Any error raises `RowError`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpo_megatron.data.conversations import PROMPT_FIELDS
from mpo_megatron.data.field_record import FieldRecord, says_nothing, without_indices
from mpo_megatron.data.fields import RowError, check_names, parse_json
from mpo_megatron.data.group import Answer, Group, Message, PromptDigests, RewardKind
from mpo_megatron.data.tools import read_tools
from mpo_megatron.data.unread import check_unread
from mpo_megatron.files import DataError

RowValues = dict[str, Any]


class Sample:
    """The first rows of an input: which columns have values, and which values."""

    def __init__(self, rows: Sequence[RowValues]) -> None:
        self.rows = rows
        self.columns = {name for row in rows for name, value in row.items() if value is not None}
        self.empty = {name for row in rows for name in row} - self.columns
        """Columns without values in these rows."""

    def has(self, *names: str) -> bool:
        """Whether any of these columns has values."""
        return not self.columns.isdisjoint(names)

    def values(self, name: str) -> list[Any]:
        """The values of a column, row by row, without missing ones."""
        return [row[name] for row in self.rows if row.get(name) is not None]

    def any(self, name: str, test: Callable[[Any], bool]) -> bool:
        """Whether any value of a column passes a test."""
        return any(map(test, self.values(name)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's options about a format."""

    ratings: tuple[str, ...] = ()
    """Fields averaged into the reward; empty: the format's default."""
    drop_ranks: tuple[int, ...] = ()
    """Ranks whose answers are dropped."""


@dataclass(frozen=True, kw_only=True)
class InputLayout:
    """What the rows of an input have in common."""

    format: str
    why: str = ""
    """Why this format was chosen, for messages."""
    reward_kind: RewardKind
    """Meaning of the rewards in the first rows."""
    ratings: tuple[str, ...] = ()
    """Fields averaged into the reward; empty if the format has a fixed one."""
    drop_ranks: tuple[int, ...] = ()
    empty_scores: tuple[str, ...] = ()
    """Columns for rewards that are empty in the first rows."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The parts of a group in one row."""

    prompt: tuple[Message, ...]
    responses: tuple[Answer, ...]
    tools: tuple[dict[str, Any], ...] = ()
    rewards: tuple[float, ...] | None = None
    labels: tuple[int, ...] | None = None
    group_id: str | None = None
    """The row's own id, if any."""
    dropped: tuple[RowError, ...] = ()
    """Unusable responses, and why."""
    unused: tuple[str, ...] = ()
    """Columns and keys of the row with values that were not read."""
    drawn: tuple[tuple[int, ...] | None, ...] = ()
    """As `Group.drawn`."""
    sampled_prompt: PromptDigests | None = None
    """As `Group.sampled_prompt`."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to store groups."""

    name: str
    looks: str
    """One-line description of a row."""
    uses: tuple[str, ...]
    """The columns it reads, decisive ones first."""
    fits: Callable[[Sample], bool]
    """Whether columns have this format."""
    settle: Callable[[Sample, Options], InputLayout]
    """Settles what the rows have in common. Raises DataError if an option does not apply."""
    parse: Callable[[FieldRecord, InputLayout], Parsed]
    """Splits one row into its parts. Raises RowError."""
    joins_rows: bool = False
    """Whether a row holds one response, so that all rows of a prompt form its group."""


def rename(row: Any, columns: Mapping[str, str]) -> Any:
    """The row with its columns renamed to the formats' names; a column whose name another one takes stays, as unused.

    Args:
        columns: our name → the input's
    """
    if not columns or not isinstance(row, dict):
        return row
    theirs = {name: ours for ours, name in columns.items()}
    return {
        theirs.get(name, f"{name} (replaced by {columns[name]})" if name in columns else name): value
        for name, value in row.items()
    }


@functools.cache
def find_format(name: str) -> Format:
    """The format of this name."""
    from mpo_megatron.data.known_formats import FORMATS  # it imports the classes above

    return next(item for item in FORMATS if item.name == name)


def detect(rows: Sequence[RowValues], format_name: str = "auto", options: Options | None = None) -> InputLayout:
    """Determine the format and the reward from the input's first well-formed rows.

    Raises:
        DataError: no format, or no reward field, matches; the message lists what was found.
    """
    from mpo_megatron.data.known_formats import FORMATS

    sample = Sample(rows)
    if format_name == "auto":
        found = next((item for item in FORMATS if item.fits(sample)), None)
        if found is None:
            known = "; ".join(f"{item.name}: {item.looks}" for item in FORMATS)
            raise DataError(
                f"format = auto; the columns {sorted(sample.columns)} match no known format ({known}); map them, for example "
                "--columns prompt=question responses=answers rewards=scores, or chosen=good rejected=bad, or response_a=first "
                "response_b=second winner=better."
            )
        columns = dict.fromkeys(name for name in found.uses if name in sample.columns)
        why = f"its columns {', '.join(columns)} look like {found.looks}"
    else:
        found, why = find_format(format_name), "the option format says so"
    options = options or Options()
    if options.drop_ranks and found.name != "nectar":
        raise DataError(
            f"drop_ranks = {list(options.drop_ranks)}; it applies to format nectar only, but this is {found.name}; remove it."
        )
    layout = found.settle(sample, options)
    reward = f"; the reward is {'+'.join(layout.ratings)}" if found.name in ("ratings", "ultrafeedback") else ""
    return replace(layout, why=why + reward)


def parse(row: Any, layout: InputLayout) -> Parsed:
    """The parts of a group in one row.

    Raises:
        RowError: names the field and the problem.
    """
    if not isinstance(row, dict):
        raise RowError("row", f"is of type {type(row).__name__}, not an object with fields")
    record = FieldRecord(unfold(row))
    parsed = find_format(layout.format).parse(record, layout)
    tools, unread = read_tools(record), list(record.unread())
    check_unread(unread)
    unused = tuple(dict.fromkeys(without_indices(place) for place, _ in unread))
    return replace(parsed, tools=tools, unused=unused) if tools or unused else parsed


def unfold(row: RowValues) -> RowValues:
    """The row with the messages and tools that OpenAI's form of a pair holds in `input`, as JSON text only if it is the prompt.

    Raises:
        RowError: the row itself has others.
    """
    request = row.get("input")
    if not any(row.get(name) is not None for name in PROMPT_FIELDS if name != "input"):
        request = parse_json(request, "{")
    if not isinstance(request, dict) or "messages" not in request:
        return row
    check_names(request, "input")
    request = {name: value for name, value in request.items() if not says_nothing(value)}
    rest = {name: value for name, value in row.items() if name != "input"}
    for name in request.keys() & rest.keys():
        if request[name] != rest[name] and not says_nothing(rest[name]):
            raise RowError(f"input.{name}", f"contradicts {name}: the row has both")
    return rest | request


@dataclass(kw_only=True)
class Responses:
    """A row's responses: the usable ones, and why others are not."""

    row: FieldRecord
    responses: list[Any] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    dropped: list[RowError] = field(default_factory=list)

    def read(self, read: Callable[..., tuple[Any, float | None, int | None] | None], *given: Any) -> None:
        """Add what `read` returns, a response with its reward and label, or record its error; None drops it deliberately."""
        before = len(self.row.inner)
        try:
            found = read(*given)
        except RowError as error:
            self.dropped.append(error)
            del self.row.inner[before:]  # the fields that it did not reach are not unused
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
        """Raise the first response's error if such errors leave fewer than `least` responses."""
        if len(self.responses) < least and self.dropped:
            raise self.dropped[0]


def build_group(parsed: Parsed, where: str, source: int = 0) -> Group:
    """Build the group. A row without an id gets one from its content, independent of the row's position.

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
        sampled_prompt=parsed.sampled_prompt,
    )
