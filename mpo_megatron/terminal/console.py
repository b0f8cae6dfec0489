"""The console for commands' output: foreign text can neither control the terminal nor act as markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from mpo_megatron.terminal.visible import visible


class Console(RichConsole):
    """rich's console; control characters are shown as escapes, and `[…]` is printed literally."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The printed segments: rich's own control codes, and texts without any."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, lines=True), segment.style)
