"""Assign prompts to rounds and hold some out, by hash: neither the order of the file nor a restart changes the split.

Prompts are kept in a temporary file, so memory grows with their ids and digests only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, require
from mpo_megatron.data.conversations import read_prompt
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, read_id
from mpo_megatron.data.rewards import hash_unit
from mpo_megatron.data.spill import SpilledList
from mpo_megatron.data.tools import read_tools
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import unseal_line
from mpo_megatron.rollout.records import find_repeated

PromptRow = dict[str, Any]


@dataclass(frozen=True)
class PromptPart:
    """Some of the prompts, in the order of their source file: its rows, each with an id."""

    _rows: SpilledList[PromptRow]
    _numbers: list[int]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[PromptRow]:
        return map(self._rows.__getitem__, self._numbers)


@dataclass(frozen=True, kw_only=True)
class PromptSplit:
    """The prompts of each round, and the held-out ones."""

    rounds: list[PromptPart]
    held_out: PromptPart
    num_duplicates: int
    """Prompts dropped because an earlier line has the same one."""
    digest: str
    """All rows with their other fields."""


def split_prompts(path: Path, *, rounds: int, held_out: int, seed: int) -> PromptSplit:
    """Read and assign prompts; round sizes differ by at most one, and no prompt is used twice.

    Raises:
        ConfigError: no such file, or too few prompts.
        DataError: a line has no usable prompt, or two prompts share an id; names the line or the id.
    """
    rows, keys, ids = SpilledList[PromptRow](), dict[bytes, None](), list[str]()
    num_lines, digest = 0, hashlib.sha256()
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            row, key = read_row(line, f"{path}:{number}")
            num_lines += 1
            digest.update(line + b"\n")
            if key not in keys:
                keys[key] = None
                ids.append(row["group_id"])
                rows.append(row)
    require(
        len(rows) >= held_out + rounds,
        f"prompts = {path} holds {len(rows)} different prompts; rounds = {rounds} and held_out = {held_out} need at least "
        f"{held_out + rounds}.",
    )
    repeated = find_repeated(ids)
    if repeated is not None:
        raise DataError(f"{path}: the id {repeated} belongs to two different prompts; give each its own.")
    names = [key.hex() for key in keys]
    order = sorted(range(len(names)), key=lambda number: (hash_unit(seed, "rounds", names[number]), names[number]))
    parts = [order[:held_out], *(order[held_out + number :: rounds] for number in range(rounds))]
    apart, *in_rounds = (PromptPart(rows, sorted(part)) for part in parts)
    return PromptSplit(rounds=in_rounds, held_out=apart, num_duplicates=num_lines - len(rows), digest=digest.hexdigest())


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines without their ends.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"prompts = {path}; cannot be read: {error.strerror or error}.") from error


def read_row(line: bytes, where: str) -> tuple[PromptRow, bytes]:
    """A line as a row with an id, and the key that identifies equal prompts.

    Raises:
        DataError: the line is no object with a prompt, or its id is unusable.
    """
    try:
        row = unseal_line(line)
        if not isinstance(row, dict):
            raise RowError("row", f"is of type {type(row).__name__}, not an object with fields")
        record = FieldRecord(row)
        messages, tools, own = read_prompt(record), read_tools(record), read_id(record)
    except RowError as error:
        raise DataError(f"{where}: {error}") from error
    except ValueError as error:
        raise DataError(f"{where}: is not valid JSON ({error}); fix or remove the line.") from error
    content = [messages, tools] if tools else messages
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return {**row, "group_id": own or key.hex()[:20]}, key
