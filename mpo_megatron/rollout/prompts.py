"""Read prompt files: check each line, drop duplicates, and make token ids as `mpo prepare` does.

A line holds a prompt (a string, or messages). It may hold `group_id` and `reference_answer`; any other field is kept
under `meta`. Inputs of `mpo prepare`, and folders it wrote, are also accepted: their prompts are used. Prompts are kept in a
temporary file, so memory grows with their ids only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from mpo_megatron.data.chat import Chat
from mpo_megatron.data.conversations import read_prompt
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, read_id
from mpo_megatron.data.formats import InputLayout, detect, parse, unfold
from mpo_megatron.data.group import Message
from mpo_megatron.data.raw_rows import RawRow, Rejection
from mpo_megatron.data.readers import read_inputs
from mpo_megatron.data.sampled_prompt import FIELD, digest_prompt
from mpo_megatron.data.sources import STANDARD_INPUT, open_source
from mpo_megatron.data.spill import Spill, SpilledList
from mpo_megatron.data.store import INFO_FILE, load_groups
from mpo_megatron.data.tools import read_tools
from mpo_megatron.data.unread import check_unread
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import Record

_SAMPLE = 64
"""Rows read to detect the format."""
_NOT_META = {
    *("group_id", "id", "meta", FIELD, "reference_answer", "messages", "question", "instruction"),
    *("responses", "all_generated_responses", "rewards", "scores", "all_rm_scores", "labels"),
}
"""Fields of a row that have another place in a line, or belong to responses, which are dropped."""


@dataclass(kw_only=True)
class PromptSet:
    """The distinct prompts of an input, in its order."""

    records: SpilledList[Record] = field(default_factory=SpilledList)
    """Group lines without responses, with digests of the rendered prompts."""
    group_ids: list[str] = field(default_factory=list)
    """Their ids."""
    token_ids: SpilledList[array[int]] = field(default_factory=SpilledList)
    """Of each: [P] token ids of the rendered prompt, as `mpo prepare` would store it."""
    longest: int = 0
    """Tokens of the longest prompt."""
    rejections: SpilledList[Rejection] = field(default_factory=SpilledList)
    """Rows without a usable prompt, duplicates included, and why."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of rows by outcome: prompts, duplicates, invalid, refused (by the template), too_long."""
    _digest: Any = field(default_factory=hashlib.sha256)

    def append(self, record: Record, token_ids: array[int]) -> None:
        """Add a prompt."""
        self.records.append(record)
        self.group_ids.append(record["group_id"])
        self.token_ids.append(token_ids)
        self.longest = max(self.longest, len(token_ids))
        self.counts["prompts"] += 1
        self._digest.update(json.dumps([record["group_id"], token_ids.tolist()]).encode())

    def leave_out(self, kind: str, where: str, group_id: str, reason: str) -> None:
        """Count a dropped prompt, and record why."""
        file, _, line = where.rpartition(":")
        self.rejections.append(Rejection(file=file, line=int(line), group_id=group_id, field="prompt", reason=reason))
        self.counts[kind] += 1

    def digest(self) -> str:
        """sha256 over ids and tokens in order, which are the engine's input."""
        digest: str = self._digest.hexdigest()
        return digest


def load_prompts(source: str, chat: Chat, *, max_prompt_tokens: int, max_prompts: int | None = None) -> PromptSet:
    """Read, number and tokenize the prompts of an input.

    Raises:
        DataError: the input cannot be read, holds no prompt, or has two prompts with one id.
    """
    found, seen = PromptSet(), Spill()
    for where, item in _read_rows(source):
        if max_prompts is not None and len(found.records) == max_prompts:
            break
        if isinstance(item, Rejection):
            found.rejections.append(item)
            found.counts["invalid"] += 1
            continue
        tools = item.get("tools", [])
        group_id = item["group_id"]
        first = seen.first_place("prompt " + json.dumps([item["prompt"], tools], sort_keys=True), where)
        if first is not None:
            found.leave_out("duplicates", where, group_id, f"repeats the prompt of {first}")
            continue
        owner = seen.first_place("id " + group_id, where)
        if owner is not None:
            raise DataError(f"{where}: group_id = {group_id} already belongs to the prompt at {owner}; give each its own.")
        try:
            ids = array("i", chat.prompt(item["prompt"], tools)[1].tolist())
        except TemplateError as error:
            found.leave_out("refused", where, group_id, f"is refused by the chat template: {error}")
            continue
        if len(ids) > max_prompt_tokens:
            found.leave_out("too_long", where, group_id, f"has {len(ids)} tokens, but max_prompt_tokens = {max_prompt_tokens}")
            continue
        found.append(item | {FIELD: digest_prompt(chat, item["prompt"], tools, ids)._asdict()}, ids)
    if not found.records:
        first_rejection = next(iter(found.rejections), None)
        reason = (
            f"; the first: {first_rejection.file}:{first_rejection.line}: {first_rejection.field} {first_rejection.reason}"
            if first_rejection
            else ""
        )
        raise DataError(f'prompts = {source}; it holds no usable prompt{reason}; write one {{"prompt": "…"}} per line.')
    return found


def _read_rows(source: str) -> Iterator[tuple[str, Record | Rejection]]:
    """`file:line` and prompt of every row of an input of any kind."""
    if (Path(source) / INFO_FILE).is_file():
        yield from _read_prepared(Path(source))
        return
    rows = iter(open_source(source, option="prompts").rows)
    head = list(itertools.islice(rows, _SAMPLE))
    layout = _detect(head)
    for row in itertools.chain(head, rows):
        try:
            if isinstance(row.value, RowError):
                raise row.value
            yield f"{row.file}:{row.line}", _read_row(row.value, layout)
        except RowError as error:
            yield f"{row.file}:{row.line}", row.reject(error)
        except RecursionError:
            yield f"{row.file}:{row.line}", row.reject(RowError("row", "is nested too deeply"))


def _detect(head: Iterable[RawRow]) -> InputLayout | None:
    """Where a row holds the prompt; None for the fields of a prompt file."""
    sample = [row.value for row in head if isinstance(row.value, dict)]
    try:
        layout = detect(sample)
    except DataError:
        return None  # prompts without responses, or responses without rewards
    return None if layout.format == "groups" else layout


def _read_row(row: Any, layout: InputLayout | None) -> Record:
    """The group line of one row, without responses.

    Raises:
        RowError: the row has no prompt.
    """
    if layout is not None:
        parsed = parse(row, layout)
        return _build(parsed.prompt, parsed.tools, parsed.group_id, {})
    if not isinstance(row, dict):
        raise RowError("row", f"is of type {type(row).__name__}, not an object with fields")
    row = unfold(row)
    record = FieldRecord(row)
    prompt, tools, group_id = read_prompt(record), read_tools(record), read_id(record)
    check_unread(record.unread())
    return _build(prompt, tools, group_id, {name: value for name, value in row.items() if name not in record.used})


def _build(
    prompt: tuple[Message, ...], tools: tuple[dict[str, Any], ...], group_id: str | None, row: Mapping[str, Any]
) -> Record:
    """The line of one prompt, with the remaining fields of its row."""
    messages = [dict(message) for message in prompt]
    if group_id is None:
        content = [messages, tools] if tools else messages
        group_id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
    record: Record = {"group_id": group_id, "prompt": messages}
    if tools:
        record["tools"] = list(tools)
    if row.get("reference_answer") is not None:
        record["reference_answer"] = row["reference_answer"]
    own = row.get("meta") or {}
    if not isinstance(own, Mapping):
        raise RowError("meta", f"is of type {type(own).__name__}, not an object with fields")
    meta = {name: value for name, value in row.items() if name not in _NOT_META and value is not None} | dict(own)
    if meta:
        record["meta"] = meta
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError("row", f"has a field that JSON cannot hold: {error}") from error
    return record


def _read_prepared(folder: Path) -> Iterator[tuple[str, Record]]:
    """Prompts of the groups in a folder of `mpo prepare`. It keeps only tokens, so messages are read from its source file."""
    groups = load_groups(folder)
    wanted, options = set(groups.group_ids()), groups.info.config
    source = options.get("input")
    if source is None:
        raise DataError(f"prompts = {folder}; it does not record its source file; name a file with the prompts.")
    sources = [source] if isinstance(source, str) else source
    if STANDARD_INPUT in sources:
        raise DataError(f"prompts = {folder}; it was prepared from standard input, which is gone; name a file with the prompts.")
    try:
        streams = read_inputs(
            sources,
            format_name=options["format"],
            **{name: options[name] for name in ("split", "subset", "rating", "columns", "drop_ranks")},
        )
    except DataError as error:
        raise DataError(f"prompts = {folder}; its source file cannot be read: {error}") from error
    for item in itertools.chain.from_iterable(stream.items for stream in streams):
        if not isinstance(item, Rejection) and item.group_id in wanted:
            wanted.remove(item.group_id)
            yield item.where, _build(item.prompt, item.tools, item.group_id, {})
    if wanted:
        raise DataError(
            f"prompts = {folder}; {len(wanted)} of its groups, for example {min(wanted)}, are no longer in {source}, its source "
            "file; name a file with the prompts."
        )
