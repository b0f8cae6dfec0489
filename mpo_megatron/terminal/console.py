"""Where commands print: a console on which text of others can neither command the terminal nor be taken for markup."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from mpo_megatron.terminal.visible import visible


class Console(RichConsole):
    """rich's console, with the characters that a terminal obeys shown as escapes, and `[…]` as it stands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces that are printed: rich's own commands, and texts without any."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, lines=True), segment.style)
