"""Assign prompts to rounds and hold some out, by hash: neither the order of the file nor a restart changes the split."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, require
from mpo_megatron.data.conversations import read_prompt, read_tools
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, read_id
from mpo_megatron.data.rewards import hash_unit
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import unseal_line
from mpo_megatron.rollout.records import find_repeated

PromptRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PromptSplit:
    """The prompts of each round and the held-out ones, as rows of their source file, each with an id."""

    rounds: list[list[PromptRow]]
    held_out: list[PromptRow]
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
    rows: dict[str, PromptRow] = {}
    num_lines, digest = 0, hashlib.sha256()
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"prompts = {path}; cannot be read: {error.strerror or error}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row, key = read_row(line, f"{path}:{number}")
            num_lines += 1
            rows.setdefault(key, row)
            digest.update(line + b"\n")
    require(
        len(rows) >= held_out + rounds,
        f"prompts = {path} holds {len(rows)} different prompts; rounds = {rounds} and held_out = {held_out} need at least "
        f"{held_out + rounds}.",
    )
    repeated = find_repeated(row["group_id"] for row in rows.values())
    if repeated is not None:
        raise DataError(f"{path}: the id {repeated} belongs to two different prompts; give each its own.")
    order = sorted(rows, key=lambda key: (hash_unit(seed, "rounds", key), key))
    place = {key: -1 if rank < held_out else (rank - held_out) % rounds for rank, key in enumerate(order)}
    return PromptSplit(
        rounds=[[row for key, row in rows.items() if place[key] == number] for number in range(rounds)],
        held_out=[row for key, row in rows.items() if place[key] == -1],
        num_duplicates=num_lines - len(rows),
        digest=digest.hexdigest(),
    )


def read_row(line: bytes, where: str) -> tuple[PromptRow, str]:
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
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**row, "group_id": own or key[:20]}, key
