"""Group lines on disk: JSON lines that a stage can resume after a kill, and a summary that marks the stage complete.

    with LineWriter(path) as lines:         # drops an incomplete last line, left by a kill
        lines.write(record)                 # one line, on disk when the call returns
    for record in read_lines(path): …
    write_summary(folder / "score.json", …) # renamed into place last: a folder that has it is complete

Lines and summary carry digests: a damaged line is refused, and so is a file that differs from the one its summary lists.

A line holds one prompt:

    {"group_id": "…", "prompt": [{"role": "user", "content": "…"}, …], "reference_answer": …, "meta": {…},
     "responses": [{"text": "…", "finish_reason": "stop" | "length", "num_tokens": n, "seed": s,   # mpo generate
                    "scores": {"<scorer>": x, …}, "reward": r}, …]}                                # mpo score
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, final

from mpo_megatron.config import require
from mpo_megatron.config.values import LARGEST_REWARD, show
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file, writing
from mpo_megatron.files.digests import check_lines, seal, seal_line, unseal, unseal_line

Record = dict[str, Any]
"""One group line."""

SAMPLES_FILE, GENERATE_FILE, FAILURES_FILE = "samples.jsonl", "generate.json", "failures.jsonl"
SCORED_FILE, SCORE_FILE = "scored.jsonl", "score.json"
GROUPS_FILE, SELECT_FILE = "groups.jsonl", "select.json"


def encode_line(record: Record) -> bytes:
    """The record as one line, newline and digest included."""
    return seal_line(record)


def read_lines(path: str | Path) -> Iterator[Record]:
    """All records of a file that a stage continues, in order; skips an incomplete last line, left by a kill.

    Raises:
        DataError: no such file, or a line is damaged or no group line; names file and line.
        DamagedError: the file belongs to a finished stage, but differs from the one its summary lists.
    """
    return (record for _, record in _read_numbered(Path(path), begun=True))


def read_answered(path: str | Path) -> Iterator[Record]:
    """All records of an input, in order, each with a list of responses of the form that `mpo generate` writes.

    Raises:
        DataError: as in `read_lines`; the last line is incomplete; or a response has another form: names the line and the field.
        DamagedError: as in `read_lines`.
    """
    path = Path(path)
    for number, record in _read_numbered(path, begun=False):
        responses = record.get("responses")
        wrong = None if isinstance(responses, list) else 'it needs a list "responses", as `mpo generate` writes it'
        for index, response in enumerate(responses if isinstance(responses, list) else ()):
            wrong = wrong or _find_wrong(response, f"responses[{index}]")
        if wrong is not None:
            raise DataError(f"{path}:{number}: group {record['group_id']}: {wrong}; fix the line.")
        yield record


def _read_numbered(path: Path, *, begun: bool) -> Iterator[tuple[int, Record]]:
    """The line numbers and records of a file.

    Args:
        begun: the file may end with an incomplete line
    """
    check_lines(path)
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and not _is_json(line):
                if begun:
                    return
                raise DataError(
                    f"{path}:{number}: the last line is incomplete: the file was cut, or the command that writes it was killed; "
                    "copy the file again, repeat that command, or remove the line."
                )
            if line.strip():
                yield number, _decode(line, f"{path}:{number}")


FORM = 'does not have the form of a response: {"text": "…", "num_tokens": 17, "reward": 0.5}'


def _find_wrong(response: Any, place: str) -> str | None:
    """What is wrong with a response, beginning with the field; None if nothing is."""
    if not isinstance(response, dict):
        return f"{place} {FORM}"
    if not isinstance(response.get("text"), str):
        return f"{place}.text {FORM}"
    count, reward = response.get("num_tokens"), response.get("reward")
    is_count = isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**31
    if count is not None and not is_count:
        return f"{place}.num_tokens {FORM}"
    if isinstance(reward, int | float) and LARGEST_REWARD < abs(reward) != math.inf:
        return f"{place}.reward is {show(reward)}; a reward must be within ±{LARGEST_REWARD:g}"
    return None


def is_reward(value: object) -> bool:
    """Whether a value is a number that can be a reward: finite, and not so large that sums of squares overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_REWARD <= value <= LARGEST_REWARD


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decode(line: bytes, where: str) -> Record:
    try:
        record = unseal_line(line)
    except ValueError as error:
        reason = f"is not valid JSON ({error})" if isinstance(error, json.JSONDecodeError) else f"damaged or changed: {error}"
        raise DataError(f"{where}: {reason}; remove the line, and run the command that wrote it again.") from error
    if isinstance(record, dict) and isinstance(record.get("group_id"), str):
        return record
    group_id = record.get("group_id") if isinstance(record, dict) else None
    found = "no group_id" if group_id is None else f"group_id = {json.dumps(group_id)}"
    raise DataError(
        f'{where}: is not a group line: it has {found}; give each group a unique text there, {{"group_id": "1", '
        '"prompt": …, "responses": [{"text": …, "reward": …}, …]}.'
    )


@final
class LineWriter:
    """Appends whole lines to a file, so that a kill costs at most the line being written."""

    def __init__(self, path: str | Path) -> None:
        """Open for appending, and drop an incomplete last line.

        Raises:
            DataError: the file cannot be written.
        """
        self.path = Path(path)
        with writing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
            self._drop_incomplete_line()

    def _drop_incomplete_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b"\n")
            if newline >= 0:
                self._file.truncate(start + newline + 1)
                return
            end = start
        self._file.truncate(0)

    def write(self, record: Record) -> None:
        """Append one record.

        Raises:
            DataError: for example, the disk is full; earlier lines stay.
        """
        line = encode_line(record)
        try:
            if self._file.write(line) != len(line):
                raise OSError("only part of a line fitted")
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"{self.path}: cannot write: {reason}; earlier lines are kept: free space and run the same command again."
            ) from error

    def close(self) -> None:
        """Flush everything to disk."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_ids(path: str | Path) -> set[str]:
    """Ids of the groups that a file already holds; empty if there is no file."""
    return {record["group_id"] for record in read_lines(path)} if Path(path).is_file() else set()


@final
class IndexedLines:
    """Group lines of a file by id, read when asked for; the last one of a repeated id. Memory holds positions, not lines."""

    def __init__(self, path: Path) -> None:
        """Read the file once.

        Raises:
            DataError: no such file, or a line is damaged or no group line; names file and line.
        """
        self._path, self._positions = path, dict[str, int]()
        self._file = _open(path)
        position = 0
        for number, line in enumerate(self._file, start=1):
            if line.endswith(b"\n") and line.strip():
                self._positions[_decode(line, f"{path}:{number}")["group_id"]] = position
            position += len(line)

    def get(self, group_id: str) -> Record | None:
        """The line of this group, if there is one."""
        if group_id not in self._positions:
            return None
        self._file.seek(self._positions[group_id])
        return _decode(self._file.readline(), f"{self._path}: group {group_id}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def find_repeated(ids: Iterable[str]) -> str | None:
    """The first id that appears a second time; None if all are unique."""
    seen: set[str] = set()
    for group_id in ids:
        if group_id in seen:
            return group_id
        seen.add(group_id)
    return None


def digest_lines(path: Path) -> str:
    """sha256 of a file."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_lines(source: str | Path, name: str, summary: str, option: str = "input") -> Path:
    """The file of group lines at `source`, or in the finished stage folder `source`.

    Args:
        source: a .jsonl file, or a stage's output folder
        name: the stage's file, for example `samples.jsonl`
        summary: the file that appears when the stage is complete
        option: name of the option that names the source, for messages
    Raises:
        DataError: neither exists, or the stage is not finished.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{option} = {source}; no such file or folder.")
    if not (path / name).is_file():
        raise DataError(f"{option} = {source}; it holds no {name}; name the previous stage's folder, or a .jsonl file.")
    if not (path / summary).is_file():
        raise DataError(
            f"{option} = {source}; {name} is not complete: {summary} is missing; run the command that writes it again."
        )
    return path / name


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write a stage's JSON file and rename it into place."""
    replace_file(path, [seal(summary)])


def read_summary(path: Path) -> dict[str, Any]:
    """The dictionary that `write_summary` wrote.

    Raises:
        DataError: the file cannot be read.
        DamagedError: the content differs from what was written.
    """
    try:
        return unseal(path, "remove it and run the command that writes it again")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error


def check_started(folder: Path, name: str, identity: dict[str, Any], lines: str) -> None:
    """Record in a folder what its lines depend on, or compare with the existing record.

    Args:
        folder: the stage's output
        name: the file of the record
        identity: what the lines depend on; runs with the same identity continue each other
        lines: file pattern of the lines
    Raises:
        ConfigError: the folder's lines depend on something else.
    """
    path = folder / name
    has_lines = any(folder.glob(lines))  # checked before the record: another shard may be writing both now, the record first
    if not path.is_file():
        require(
            not has_lines,
            f"output = {folder}; it holds {lines} of unknown origin ({name} is missing); choose another folder.",
        )
        write_summary(path, identity)
        return
    before = read_summary(path)
    changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
    require(
        not changed,
        f"output = {folder}; its content was made with another {' and '.join(changed)} ({name}); choose another folder, or "
        "remove this one.",
    )


def join_lines(sources: Sequence[Path], target: Path, order: Sequence[str]) -> int:
    """Write the lines of several files to one file, in the order of these ids; the number of lines.

    Skips ids that no file holds, and takes a repeated id once. Memory holds positions, not lines.
    """
    numbers = {group_id: number for number, group_id in enumerate(order)}
    sources_of, positions = array("q", [-1]) * len(order), array("q", [0]) * len(order)
    with contextlib.ExitStack() as stack:
        for path in sources:
            check_lines(path)
        files = [stack.enter_context(_open(path)) for path in sources]
        for index, (path, file) in enumerate(zip(sources, files, strict=True)):
            position = 0
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and line.strip():
                    place = numbers.get(_decode(line, f"{path}:{number}")["group_id"])
                    if place is not None and sources_of[place] < 0:
                        sources_of[place], positions[place] = index, position
                position += len(line)

        def lines() -> Iterator[bytes]:
            for index, position in zip(sources_of, positions, strict=True):
                if index >= 0:
                    files[index].seek(position)
                    yield files[index].readline()

        replace_file(target, lines())
    return sum(index >= 0 for index in sources_of)
