"""Foreign text made visible: characters that control the terminal or reorder text become visible escapes."""

from __future__ import annotations

import re

_OBEYED = (
    "\x00-\x1f\x7f-\x9f"  # ESC, CSI, OSC, backspace, carriage return and similar, including C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of text direction
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff"  # halves of surrogate pairs, which cannot be encoded
    "\U000e0000-\U000e007f"  # tags: invisible
)
_ONE_LINE = re.compile(f"[{_OBEYED}]")
_LINES = re.compile(f"(?![\n\t])[{_OBEYED}]")
_NAMES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def visible(text: object, *, lines: bool = False) -> str:
    """The text with every such character as its escape, for example `\\x1b`; all other text is unchanged.

    Args:
        lines: keep line breaks and tabs, for text that may span several lines
    """
    return (_LINES if lines else _ONE_LINE).sub(_escape, str(text))


_LONG_WORD = re.compile(r"([^\s/]{60})[^\s/]{240,}(?<![;:.,])")
"""More than any file's name: a number, or nested lists, that a library quotes."""
_HEAD, _TAIL = 1200, 600
"""Characters kept of a long message: its start, and its end, which has the fix."""


def message(error: object) -> str:
    """An error's text for the terminal: visible, and shortened where it quotes something long."""
    text = _LONG_WORD.sub(r"\1…", visible(error, lines=True))
    return text if len(text) <= _HEAD + _TAIL else f"{text[:_HEAD]} … {text[-_TAIL:]}"


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return _NAMES.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
