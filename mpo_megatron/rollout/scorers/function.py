"""Rewards from a user's function: called by the names of its parameters, in a separate process, with a time limit."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, require
from mpo_megatron.config.score import FunctionScorer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import Record
from mpo_megatron.rollout.scorers import Scorer, Scores
from mpo_megatron.rollout.scorers.reading import Call, Parameter, find_reading, read_values

_START_SECONDS = 600.0
"""Longest import of a user's module, in seconds: it may load a model."""


class _Worker:
    """A process with the function in it."""

    def __init__(self, where: str, function: str) -> None:
        """Start the process and import the function.

        Raises:
            ConfigError: the function cannot be imported.
        """
        theirs_in, mine_out = os.pipe()
        mine_in, theirs_out = os.pipe()
        command = [sys.executable, "-m", "mpo_megatron.rollout.scorers.function_worker", str(theirs_in), str(theirs_out)]
        self.process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._requests, self._answers = Connection(mine_out, readable=False), Connection(mine_in, writable=False)
        self._requests.send({"function": function, "path": sys.path})
        answer = self._receive(_START_SECONDS)
        if answer[0] != "ready":
            self.close()
            raise ConfigError(f"{where}; importing it failed: {answer[1]}")
        _, described, self.source, self.is_coroutine = answer
        self.parameters = [Parameter(*item) for item in described]

    def call(self, arguments: dict[str, Any], many: bool, seconds: float) -> tuple[Any, ...]:
        """("value", numbers), ("error", the exception), or ("timed_out" or "crashed", the reason)."""
        with contextlib.suppress(OSError):  # the process has ended: reading its answer reports that
            self._requests.send((arguments, many, seconds))
        return self._receive(seconds)

    def _receive(self, seconds: float) -> tuple[Any, ...]:
        try:
            if self._answers.poll(seconds):
                answer: tuple[Any, ...] = self._answers.recv()
                return answer
        except (EOFError, OSError):
            return "crashed", "its process ended"
        return "timed_out", f"it took more than {seconds:g} s"

    def close(self) -> None:
        """End the process, even while it is busy."""
        self._requests.close()
        self._answers.close()
        self.process.kill()
        self.process.wait()


class Function(Scorer):
    """Scores with a user's function."""

    config: FunctionScorer

    def __init__(self, name: str, config: FunctionScorer) -> None:
        """Import the function in its process, and determine how to call it.

        Raises:
            ConfigError: no such module, file or function, or no supported signature fits.
        """
        super().__init__(name, config)
        place = config.function.rpartition(":")[0]
        where = f"scorers.{name}.function = {config.function}"
        require(not place.endswith(".py") or Path(place).is_file(), f"{where}; no such file.")
        self._where = where
        self._worker: _Worker | None = _Worker(where, config.function)
        self._source = self._worker.source
        try:
            require(not self._worker.is_coroutine, f"{where}; it is asynchronous; name a plain function.")
            self._reading = find_reading(where, self._worker.parameters, config.params)
        except ConfigError:
            self.close()
            raise

    def score(self, groups: Sequence[Record]) -> Scores:
        """The function's value for each response; None where it returned None or took too long.

        Raises:
            ConfigError: a parameter names no field of a group.
            DataError: the function raises, or returns something that is no number.
        """
        scores: Scores = [[None] * len(group["responses"]) for group in groups]
        for call in self._reading.calls(groups):
            for value, (index, number) in zip(self._call(call, groups), call.places, strict=True):
                scores[index][number] = value
                if value is not None and not math.isfinite(value):
                    self.note(groups[index]["group_id"], "not_finite")
        return scores

    def _call(self, call: Call, groups: Sequence[Record]) -> list[float | None]:
        if self._worker is None:
            self._worker = _Worker(self._where, self.config.function)
        answer = self._worker.call(call.arguments, self._reading.unit != "response", self.config.timeout)
        group_id, number = groups[call.places[0][0]]["group_id"], call.places[0][1]
        where = f"scorers.{self.name}: {self.config.function}"
        if answer[0] in ("timed_out", "crashed"):
            self.close()
            for index, _ in call.places:
                self.note(groups[index]["group_id"], answer[0])
            return [None] * len(call.places)
        if answer[0] == "error":
            which = f", response {number}" if self._reading.unit == "response" else ""
            raise DataError(f"{where}, group {group_id}{which}: raised {answer[1]}")
        return read_values(where, call, answer[1], groups)

    def settings(self) -> dict[str, Any]:
        """The function's file, and its parameters."""
        return {"source": self._source, "name": self.config.function.rpartition(":")[2], "params": self.config.params}

    def close(self) -> None:
        """End the function's process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
