"""Terminal control characters: shown as escapes wherever a command prints foreign text."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import mpo_megatron
from mpo_megatron.cli import main
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.visible import message, visible

PACKAGE = Path(mpo_megatron.__file__).parent
OBEYED = [
    *(chr(code) for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))),
    "\u200f",
    "\ud800",
]
EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\b\r\u202etxt.exe\u2066\x00"


def test_what_a_terminal_obeys_is_shown() -> None:
    assert visible("a\x1b[31mb\r\n\x85\u202e\ud800\U000e0041") == r"a\x1b[31mb\r\n\x85\u202e\ud800\U000e0041"
    assert visible("two\n\tlines\r", lines=True) == "two\n\tlines\\r"
    assert visible("日本語 é 🙂‍↔️ العربية – \\x1b [x]") == "日本語 é 🙂‍↔️ العربية – \\x1b [x]"
    for character in OBEYED:
        assert visible(character).isprintable()
        assert character in "\n\t" or visible(character, lines=True).isprintable()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_console_prints_no_commands_of_others(is_terminal: bool) -> None:
    def printed(text: str) -> str:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=is_terminal, width=300)
        table = Table(text, title=text)
        table.add_row(text)
        table.add_row(Text(text, style="bold"))
        for shown in (text, Text(text), table, Panel(text, title=text)):
            console.print(shown)
        console.print(text, soft_wrap=True)
        return stream.getvalue()

    rest = re.sub(r"\x1b\[[0-9;]*m" if is_terminal else "$", "", printed(EVIL))  # colours are rich's own
    assert not [character for character in rest if character != "\n" and not character.isprintable()]
    assert rest.count(r"\x1b[2J\x1b]0;owned") >= 8  # rich drops bells and carriage returns


def test_text_of_others_is_no_markup() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100).print("[red]x[/red] [/nothing] [link=file:///etc]")
    assert stream.getvalue() == "[red]x[/red] [/nothing] [link=file:///etc]\n"


def test_an_error_that_quotes_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--input", f"folder{EVIL[:-1]}", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.rstrip("\n").isprintable()
    assert r"folder\x1b[2J" in error
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"group_id": EVIL, "prompt": "p", "responses": ["only one"], "rewards": [1]}) + "\n")
    assert main(["select", "--input", str(samples), "--output", str(tmp_path / "selected")]) == 2
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_every_console_is_ours() -> None:
    users = [path for path in PACKAGE.rglob("*.py") if "from rich.console import Console" in path.read_text(encoding="utf-8")]
    assert users == [PACKAGE / "terminal" / "console.py"]


def test_errors_are_printed_visibly() -> None:
    bare = re.compile(r"(?<![._])print\([^)]*\{(error|message|problem|reason)[}!:]")
    found = [path.name for path in PACKAGE.rglob("*.py") if bare.search(path.read_text(encoding="utf-8"))]
    assert set(found) <= {"ending.py", "supervisor.py", "incidents.py"}, "their texts are made visible before, or are numbers"


def test_an_error_that_quotes_something_long_keeps_its_start_and_its_fix() -> None:
    assert message(f"model = m; {'9' * 100_000}; copy it again.") == f"model = m; {'9' * 60}…; copy it again."
    text = f"model = m; {'9 ' * 100_000}; copy it again."
    shown = message(text)
    assert len(shown) < 2000
    assert (shown[:10], shown[-16:]) == (text[:10], text[-16:])
    assert message("short") == "short"
