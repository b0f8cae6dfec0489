"""Functions and templates that never end, or exhaust memory: each call ends with a reason, and the next one works."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from mpo_megatron.config import ConfigError
from mpo_megatron.data import templates
from mpo_megatron.data.bounded import Bounded, FailedError, LimitError
from mpo_megatron.data.templates import Renderer, fill

SECONDS = 0.3
"""CPU time of a call that never ends."""
ENOUGH = 30.0
"""CPU time of a call that ends for another reason, on a slow machine, too."""


def run(what: str) -> Any:
    if what == "raise":
        raise KeyError("name")
    if what == "loop":
        while True:
            pass
    if what == "power":  # one call into C, which Python's signal handlers cannot interrupt
        return 10**10**9
    if what == "memory":
        return len(bytearray(2**40))
    if what == "long":
        return "x" * (2**24 + 1)  # no longer than needed: encoding it takes CPU time, too
    if what == "exit":
        os._exit(3)
    if what == "pid":
        return os.getpid()
    return [what, "\ud800é"]


@pytest.fixture(scope="module")
def bounded() -> Bounded:
    return Bounded(run, ENOUGH)


def test_a_result_comes_back_as_it_is(bounded: Bounded) -> None:
    assert bounded("text") == ["text", "\ud800é"]
    assert bounded("pid") == bounded("pid") != os.getpid(), "one process answers all calls"


@pytest.mark.parametrize(
    "what, reason",
    {
        "memory": "takes more than 512 MiB of memory",
        "long": "its result has more than 16,777,216 characters",
        "exit": "it ended its process .exit code 3.",
    }.items(),
)
def test_limits(bounded: Bounded, what: str, reason: str) -> None:
    with pytest.raises(LimitError, match=reason):
        bounded(what)
    assert bounded("text")[0] == "text", "the next call works"


@pytest.mark.parametrize("what", ["loop", "power"])
def test_a_call_that_never_ends(what: str) -> None:
    bounded = Bounded(run, SECONDS)
    with pytest.raises(LimitError, match=r"takes more than 0\.3 seconds of CPU time"):
        bounded(what)


def test_a_heap_with_room_does_not_lift_the_limit() -> None:
    """A training rank on a CPU keeps the memory that it frees, and reserves addresses."""
    code = """if True:
        from mpo_megatron import device
        from mpo_megatron.data.bounded import Bounded, LimitError
        device.keep_freed_memory()
        try:
            Bounded(lambda: len("x" * 10**9), 30.0)()
        except LimitError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "it takes more than 512 MiB of memory\n"


def test_an_exception_is_reported(bounded: Bounded) -> None:
    before = bounded("pid")
    with pytest.raises(FailedError, match="KeyError: 'name'"):
        bounded("raise")
    assert bounded("pid") == before, "the process stays"


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_and_a_copy_have_processes_of_their_own(bounded: Bounded) -> None:
    first = bounded("pid")
    assert pickle.loads(pickle.dumps(bounded))("pid") != first
    if (child := os.fork()) == 0:
        os._exit(0 if bounded("pid") not in (first, os.getpid()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert bounded("pid") == first


def test_a_process_that_was_killed_is_replaced(bounded: Bounded) -> None:
    os.kill(bounded("pid"), signal.SIGKILL)
    with pytest.raises(LimitError, match="SIGKILL"):
        bounded("text")
    assert bounded("text")[0] == "text"


def text_of(source: str, cpu_seconds: float = ENOUGH, **variables: Any) -> str:
    return Renderer(fill, "template", cpu_seconds)(source, variables)


def test_a_template_is_filled() -> None:
    assert text_of("{{ a }}: {% for m in b %}{{ m.c }}{% endfor %}\n", a="1", b=[{"c": "é"}, {"c": "<&>"}]) == "1: é<&>\n"


COMMAND = "().__class__.__base__.__subclasses__()"
IMPORT = "cycler.__init__.__globals__.os.system('touch {mark}')"


@pytest.mark.parametrize("expression", [COMMAND, IMPORT, "''.format.__globals__", "'{0.__class__}'.format(1)", "a.append(1)"])
def test_a_template_reaches_no_command(expression: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(TemplateError, match=r"unsafe|not safely callable"):
        text_of("{{ " + expression.replace("{mark}", str(mark)) + " }}", a=[])
    assert not mark.exists()


NEVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ 'x' * 10 ** 9 }}", "MiB of memory"),
        ("{{ 'x' * 10 ** 8 }}", "characters"),
        ("{{ '%099999999d' % 1 }}", "characters"),
        ("{{ 'x'.ljust(10 ** 12) }}", "MiB of memory"),
        ("{% for a in range(10 ** 12) %}{% endfor %}", "[Rr]ange too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ missing }}", "'missing' is undefined"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_does_not_end_well(source: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        text_of(source)


COMPILED = "{{ 10 ** (10 ** 9) }}"
"""Jinja evaluates it at compile time."""


@pytest.mark.parametrize("source", [NEVER, COMPILED, "{{ n ** (n ** 9) }}"])
def test_a_template_that_does_not_end(source: str) -> None:
    with pytest.raises(TemplateError, match=r"more than 0\.3 seconds of CPU time"):
        text_of(source, SECONDS, n=10)


def test_a_template_that_breaks_its_bounds_again_and_again_ends_the_command() -> None:
    render = Renderer(fill, "chat_template = bad.jinja", 0.05)
    for _ in range(templates.MAX_LIMITS - 1):
        with pytest.raises(TemplateError):
            render(NEVER, {})
    with pytest.raises(ConfigError, match=r"chat_template = bad.jinja: the template exceeds its limits: .*CPU time"):
        render(NEVER, {})
