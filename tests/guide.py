"""Code and configurations extracted from the guides."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def code_block(page: str, part: str) -> str:
    """The block of Python or YAML on a page of docs/ that contains `part`; there must be exactly one."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"^```(?:python|yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if part in block]
    return str(block)


def guide_loss(folder: Path) -> str:
    """`loss.function` of the guide's custom loss, written to a file in `folder`."""
    path = folder / "my_losses.py"
    path.write_text(code_block("extending", "def hinge("))
    return f"{path}:hinge"
