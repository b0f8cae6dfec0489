"""Pictures of a few panels in a row, in one style."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpo_megatron.files.atomic import replace_file

BLUE, ORANGE, GREEN, RED = "#1f6fb4", "#e07b1a", "#2a9150", "#c23b3b"


@contextlib.contextmanager
def draw_panels(picture: Path, number: int, width: float, height: float = 3.6) -> Iterator[list[Any]]:
    """Yield this many panels to draw on; then write them to a PNG file.

    Args:
        width: of the whole picture, in inches
        height: of the whole picture, in inches
    """
    import matplotlib

    matplotlib.use("Agg")  # draws to memory, with no display
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, number, figsize=(width, height), squeeze=False)
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
    yield list(panels[0])
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=90)
    plt.close(figure)
    replace_file(picture, [content.getvalue()])
