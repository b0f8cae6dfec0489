"""Facts about every row, on disk: earlier ids, and the rows of one prompt until all have been read."""

from __future__ import annotations

import hashlib
import pickle
import sqlite3
import tempfile
from collections.abc import Iterator
from typing import Any

from mpo_megatron.files import DataError

_CACHE_KIB = 64 * 1024
"""Memory of the database, KiB; anything beyond goes to a temporary file."""


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
            raise DataError(
                f"cannot keep what was read in the temporary folder {tempfile.gettempdir()}: {error}; free some space, or set "
                "TMPDIR to a folder on a larger disk."
            ) from error

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
