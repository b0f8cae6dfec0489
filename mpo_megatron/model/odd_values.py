"""Report NaN and infinite values of weights while a conversion copies them.

They are copied all the same: a conversion changes no bit. Training from such weights stops at its first step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from mpo_megatron.terminal.visible import visible

_BLOCK = 1 << 20
"""Values checked at once: a mask of a whole piece would take up to half its memory."""
_NAMED = 3
"""Weights that a warning names."""


class OddValues:
    """Counts of NaN and infinite values, by the name of their weight."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, name: str, values: Tensor) -> None:
        """Add some of a weight's values."""
        odd = sum(len(block) - int(torch.isfinite(block).sum()) for block in values.flatten().split(_BLOCK))
        if odd:
            self.counts[name] = self.counts.get(name, 0) + odd

    def warn(self, source: Path) -> None:
        """Print how many values of which weights in `source` are odd, if any."""
        if not self.counts:
            return
        names, total = list(self.counts), sum(self.counts.values())
        some = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
        number = f"{total:,} values are" if total > 1 else "1 value is"
        text = f"{source}: {number} NaN or infinite, in {some}; use an undamaged checkpoint."
        print(visible(f"WARNING: {text}"), file=sys.stderr)
