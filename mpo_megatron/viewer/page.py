"""A row as an HTML file, and its attention mask as a picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from mpo_megatron.files.atomic import replace_file
from mpo_megatron.terminal.visible import visible
from mpo_megatron.viewer.blocks import PADDING, PROMPT, Block, attention_mask, owners
from mpo_megatron.viewer.source import Sight
from mpo_megatron.viewer.terminal import heading, mark_ends

COLOURS = ("#2f9e62", "#2a8fbd", "#a34ea6", "#b98a1e", "#3b6fd4", "#c9514b", "#7a8b2e", "#8a5a3c")
"""Colours of responses, in turn; as on the terminal."""
PROMPT_COLOUR, PADDING_COLOUR = "#6b7484", "#d5d9e0"


def write_page(sight: Sight, blocks: Sequence[Block], path: Path) -> None:
    """Write the page: one self-contained file."""
    environment = Environment(loader=PackageLoader("mpo_megatron.viewer", "page"), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("inspect.html.j2").render(
        title=visible(sight.title),
        num_tokens=len(sight.row.tokens),
        num_scored=len(sight.row.targets),
        num_padding=len(sight.row.tokens) - sight.row.num_tokens,
        blocks=[_block(block, sight) for block in blocks],
        mask=base64.b64encode(draw_mask(sight)).decode(),
        prompt_colour=PROMPT_COLOUR,
    )
    replace_file(path, [text.encode()])


def _block(block: Block, sight: Sight) -> dict[str, Any]:
    colour = {"prompt": PROMPT_COLOUR, "padding": PADDING_COLOUR, "left out": PADDING_COLOUR}.get(block.role)
    tokens = [
        {
            "text": mark_ends(token.text),
            "about": f"id {token.id}"
            + ("" if token.position is None else f", position {token.position}")
            + (", scored" if token.scored else "")
            + (", only predicted" if token.scored and token.position is None else ""),
            "classes": " ".join(
                name
                for name, given in (
                    ("special", token.special),
                    ("scored", token.scored),
                    ("predicted", token.scored and token.position is None),
                )
                if given
            ),
        }
        for token in block.tokens
    ]
    return {
        "heading": heading(block, sight),
        "role": block.role.replace(" ", "-"),
        "colour": colour or COLOURS[(block.response or 0) % len(COLOURS)],
        "tokens": [] if block.role == "padding" else tokens,
    }


def draw_mask(sight: Sight) -> bytes:
    """The attention mask as a PNG: a dot where a query (vertical) sees a key, in the colour of the query's response."""
    import matplotlib

    matplotlib.use("Agg")  # draws to memory, without a display
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_rgb

    row = sight.row
    mask, owner = attention_mask(row), owners(row)
    colours = np.empty((len(owner), 3))
    for number in np.unique(owner):
        name = {PROMPT: PROMPT_COLOUR, PADDING: PADDING_COLOUR}.get(int(number))
        colours[owner == number] = to_rgb(name or COLOURS[int(row.responses[number, 1]) % len(COLOURS)])
    image = np.where(mask[:, :, None], colours[:, None, :], 1.0)
    figure, axes = plt.subplots(figsize=(6.4, 6.4), dpi=110)
    axes.imshow(image, interpolation="nearest" if len(owner) <= 700 else "antialiased")
    for start in row.segments[:, 0]:
        axes.axhline(start - 0.5, color="#00000018", linewidth=0.6)
        axes.axvline(start - 0.5, color="#00000018", linewidth=0.6)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_title(f"Attention mask, {len(owner)} tokens", loc="left", fontsize=11)
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()
