"""The process that runs a user's reward function: it may hang, crash or write to standard output without harm.

    python -m mpo_megatron.rollout.scorers.function_worker IN OUT       # file descriptors of two open pipes

The first message says what to import; the answer describes the function. Every further message is a call, answered by its values.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mpo_megatron.files.functions import load_function


def describe(function: Callable[..., Any]) -> list[tuple[str, str, bool]]:
    """Name, kind and presence of a default, for every parameter."""
    parameters = inspect.signature(function).parameters.values()
    return [(item.name, item.kind.name, item.default is not inspect.Parameter.empty) for item in parameters]


def as_number(value: Any) -> float | str | None:
    """A number (finite or not), None, or a description of any other value."""
    if value is None:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return repr(value)[:200]


def main() -> None:
    """Serve calls until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    requests, answers = Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False)
    os.dup2(2, 1)  # what the function prints must not mix with the command's own output
    first = requests.recv()
    sys.path[:] = first["path"]
    try:
        function, source = load_function(first["function"])
        if not callable(function):
            raise TypeError(f"it is of type {type(function).__name__}, not a function")
        description = describe(function)
    except BaseException as error:  # noqa: BLE001 - anybody's code may raise anything
        answers.send(("error", f"{type(error).__name__}: {error}"))
        return
    answers.send(("ready", description, source, inspect.iscoroutinefunction(function)))
    while True:
        try:
            arguments, many, seconds = requests.recv()
        except EOFError:
            return
        signal.alarm(math.ceil(seconds) + 5)  # ends a call whose caller has given up
        try:
            value = function(**arguments)
            numbers = [as_number(item) for item in value] if many else [as_number(value)]
        except BaseException as error:  # noqa: BLE001 - anybody's code may raise anything
            answers.send(("error", f"{type(error).__name__}: {error}"))
        else:
            answers.send(("value", numbers))
        signal.alarm(0)


if __name__ == "__main__":
    main()
