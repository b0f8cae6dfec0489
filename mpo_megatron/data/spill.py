"""Facts about every row, on disk: earlier ids, the rows of one prompt until all have been read, and values in their order."""

from __future__ import annotations

import hashlib
import pickle
import sqlite3
import tempfile
from array import array
from collections.abc import Iterator
from typing import Any, cast

from mpo_megatron.files import DataError

_CACHE_KIB = 64 * 1024
"""Memory of the database, KiB; anything beyond goes to a temporary file."""
_LIST_BYTES = 8 * 2**20
"""Memory of a list; a larger one moves to a temporary file."""


def _disk_error(error: Exception) -> DataError:
    return DataError(
        f"cannot keep what was read in the temporary folder {tempfile.gettempdir()}: {error}; free some space, or set "
        "TMPDIR to a folder on a larger disk."
    )


class Spill:
    """An anonymous database: in memory while small, then in a file that disappears with it."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for setting in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
            self._run(f"PRAGMA {setting}")
        self._run("CREATE TABLE seen (key BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._run("CREATE TABLE prompts (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        self._run("CREATE TABLE parts (prompt INTEGER, row INTEGER, part BLOB, PRIMARY KEY (prompt, row)) WITHOUT ROWID")
        self._run("BEGIN")
        self._num_prompts = self._num_parts = 0

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Run a statement.

        Raises:
            DataError: the disk is full, or cannot be written.
        """
        try:
            return self._database.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise _disk_error(error) from error

    def first_place(self, key: str, place: str) -> str | None:
        """Where `key` appeared first; None if it is new, and then `place` is stored."""
        digest = hashlib.sha256(key.encode()).digest()[:16]
        if self._run("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, place)).rowcount:
            return None
        found: str = self._run("SELECT place FROM seen WHERE key = ?", (digest,)).fetchone()[0]
        return found

    def put(self, prompt: str, part: Any) -> None:
        """Store a part that belongs to a prompt."""
        digest = hashlib.sha256(prompt.encode()).digest()[:16]
        found = self._run("SELECT number FROM prompts WHERE key = ?", (digest,)).fetchone()
        number = found[0] if found else self._num_prompts
        if not found:
            self._run("INSERT INTO prompts VALUES (?, ?)", (digest, number))
            self._num_prompts += 1
        payload = pickle.dumps(part, pickle.HIGHEST_PROTOCOL)
        self._run("INSERT INTO parts VALUES (?, ?, ?)", (number, self._num_parts, payload))
        self._num_parts += 1

    def take(self) -> Iterator[list[Any]]:
        """The parts of each prompt, in order of first appearance; removes them all."""
        together: list[Any] = []
        current = -1
        for number, payload in self._run("SELECT prompt, part FROM parts ORDER BY prompt, row"):
            if number != current and together:
                yield together
                together = []
            current = number
            together.append(pickle.loads(payload))  # safe: written by this process
        if together:
            yield together
        self._run("DELETE FROM parts")
        self._run("DELETE FROM prompts")


class SpilledList[Item]:
    """Values in their order: in memory while small, then in a file that disappears with the list. Memory holds their places."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_LIST_BYTES)  # noqa: SIM115  closed with the list
        self._ends = array("Q", [0])

    def append(self, item: Item) -> None:
        """Add a value, which pickle can store.

        Raises:
            DataError: the disk is full, or cannot be written.
        """
        payload = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        try:
            self._file.seek(self._ends[-1])
            self._file.write(payload)
        except OSError as error:
            raise _disk_error(error) from error
        self._ends.append(self._ends[-1] + len(payload))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Item:
        number = range(len(self))[index]
        start, end = self._ends[number : number + 2]
        try:
            self._file.seek(start)  # also writes what the file object still holds
            payload = self._file.read(end - start)
        except OSError as error:
            raise _disk_error(error) from error
        return cast(Item, pickle.loads(payload))  # safe: written by this process

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))
