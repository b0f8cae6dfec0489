"""Jinja templates from data or checkpoints: rendered in Jinja's sandbox, with limits.

The sandbox blocks commands and files, but not endless loops. Compilation is also limited, because Jinja evaluates constant
expressions then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpo_megatron.config import ConfigError
from mpo_megatron.data.bounded import Bounded, FailedError, LimitError

CPU_SECONDS = 10.0
"""CPU seconds for one text; a usual one takes a millisecond."""

MAX_LIMITS = 3
"""Texts that may exceed a limit before the command fails: each takes seconds, and a data set may have a million."""

_REFUSALS = {kind.__name__ for kind in (TemplateError, TemplateSyntaxError, TemplateRuntimeError, UndefinedError, SecurityError)}
"""Jinja's exceptions with self-explanatory messages."""


def _refusal(kind: str, message: str) -> TemplateError:
    return TemplateError(message if kind in _REFUSALS else str(FailedError(kind, message)))


class Renderer:
    """A rendering function with limits per text."""

    def __init__(
        self,
        render: Callable[..., str],
        name: str,
        cpu_seconds: float = CPU_SECONDS,
        *,
        render_all: Callable[[list[tuple[Any, ...]]], list[str]] | None = None,
    ) -> None:
        """Store the function; its process starts with the first text.

        Args:
            render: makes a text from its arguments
            name: the option with the template, for messages
            render_all: makes the texts of several calls, faster than one by one; raises if any of them fails
        """
        self._render, self._name, self._num_limits = Bounded(render, cpu_seconds), name, 0
        self._render_many = Bounded(functools.partial(_try_each, render, render_all), cpu_seconds)

    def many(self, calls: list[tuple[Any, ...]]) -> list[str | TemplateError]:
        """The texts of several calls, or the errors of `__call__`, in one request to the process.

        Raises:
            ConfigError: as in `__call__`.
        """
        try:
            found = self._render_many(calls)
        except (FailedError, LimitError):  # one of them exceeds a limit: find out which
            return [self._one(arguments) for arguments in calls]
        return [result[0] if len(result) == 1 else _refusal(*result) for result in found]

    def _one(self, arguments: tuple[Any, ...]) -> str | TemplateError:
        try:
            return self(*arguments)
        except TemplateError as error:
            return error

    def __call__(self, *arguments: Any) -> str:
        """The rendered text.

        Raises:
            TemplateError: the template refuses its input, fails, or exceeds a limit.
            ConfigError: it has exceeded limits too often.
        """
        try:
            return str(self._render(*arguments))
        except FailedError as error:
            raise _refusal(error.kind, error.message) from error
        except LimitError as error:
            self._num_limits += 1
            if self._num_limits >= MAX_LIMITS:
                raise ConfigError(f"{self._name}: the template exceeds its limits: {error}; fix it.") from error
            raise TemplateError(str(error)) from error


def _try_each(
    render: Callable[..., str], render_all: Callable[[list[tuple[Any, ...]]], list[str]] | None, calls: list[tuple[Any, ...]]
) -> list[list[str]]:
    """For each call its text, or the type and message of its exception."""
    if render_all is not None:
        with contextlib.suppress(Exception):  # then one by one, to find out which call fails
            return [[text] for text in render_all(calls)]
    results = []
    for arguments in calls:
        try:
            results.append([render(*arguments)])
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 as `Bounded` does with one call
            results.append([type(error).__name__, str(error)[:2000]])
    return results


@functools.lru_cache
def _compile(source: str) -> Template:
    # An undefined name would silently drop part of the text.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)


def fill(source: str, variables: Mapping[str, Any] | None) -> str:
    """The text of a template; "" without variables, which only compiles it. Call it through a `Renderer`."""
    template = _compile(source)
    return "" if variables is None else template.render(variables)
