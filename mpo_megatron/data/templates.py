"""Jinja templates that come with data or checkpoints: rendered in Jinja's sandbox, and within bounds.

The sandbox keeps a template from commands and files, and not from loops that never end. Compiling is inside the bounds, too:
Jinja computes constant expressions then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, TemplateRuntimeError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mpo_megatron.config import ConfigError
from mpo_megatron.data.bounded import Bounded, FailedError, LimitError

CPU_SECONDS = 10.0
"""What one text may take; a usual one takes a thousandth of a second."""

MAX_LIMITS = 3
"""Texts that may break a bound before the command ends: each takes seconds, and a data set has a million of them."""

_REFUSALS = {kind.__name__ for kind in (TemplateError, TemplateSyntaxError, TemplateRuntimeError, UndefinedError, SecurityError)}
"""Jinja's exceptions, whose messages stand for themselves."""


class Renderer:
    """A function that renders, whose texts are bounded."""

    def __init__(self, render: Callable[..., str], name: str, cpu_seconds: float = CPU_SECONDS) -> None:
        """Prepare; the process that renders starts with the first text.

        Args:
            render: makes a text of what it is given
            name: the option that gave the template, for messages
        """
        self._render, self._name, self._num_limits = Bounded(render, cpu_seconds), name, 0

    def __call__(self, *arguments: Any) -> str:
        """The text.

        Raises:
            TemplateError: the template refuses what it is given, fails at it, or breaks a bound.
            ConfigError: it has broken a bound again and again.
        """
        try:
            return str(self._render(*arguments))
        except FailedError as error:
            raise TemplateError(error.message if error.kind in _REFUSALS else str(error)) from error
        except LimitError as error:
            self._num_limits += 1
            if self._num_limits >= MAX_LIMITS:
                raise ConfigError(f"{self._name}: the template does not come to an end: {error}; mend it.") from error
            raise TemplateError(str(error)) from error


@functools.lru_cache
def _compile(source: str) -> Template:
    # A name that nothing fills would silently leave a part of the text out.
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)


def fill(source: str, variables: Mapping[str, Any] | None) -> str:
    """The text of a template; "" without variables, which only compiles it. Call it through a `Renderer`."""
    template = _compile(source)
    return "" if variables is None else template.render(variables)
