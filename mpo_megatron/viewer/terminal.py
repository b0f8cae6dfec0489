"""A row in colours on a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from rich.rule import Rule
from rich.text import Text

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.visible import visible
from mpo_megatron.viewer.blocks import Block, Token, attention_mask
from mpo_megatron.viewer.source import Sight

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red", "bright_cyan", "bright_magenta")
"""Colours of responses, in turn."""
MASK_CELLS = 48
"""Maximum rows, and columns of two characters, of the mask drawn in text."""


def show(sight: Sight, blocks: Sequence[Block], console: Console, max_tokens: int) -> None:
    """Print the row's content in order, and its attention mask."""
    row = sight.row
    console.print(Rule(Text(sight.title, style="bold"), align="left"))
    console.print(
        f"groups: {len(set(row.responses[:, 0].tolist()))}  responses: {len(row.responses)}  tokens: {len(row.tokens)}  "
        f"scored: {len(row.targets)}  padding: {len(row.tokens) - row.num_tokens}",
        highlight=False,
    )
    console.print(legend())
    left = max_tokens
    for block in blocks:
        if left <= 0:
            console.print(f"… the rest is omitted: max_tokens = {max_tokens}", style="yellow")
            break
        console.print()
        console.print(Text(heading(block, sight), style=f"bold {colour(block)}"))
        if block.role != "padding":
            console.print(tokens_text(block.tokens[:left], colour(block), response=block.role == "response"), soft_wrap=False)
            left -= len(block.tokens)
    console.print()
    console.print(Rule(Text("attention mask: queries downwards, keys to the right", style="bold"), align="left"))
    console.print(mask_text(sight, min(MASK_CELLS, console.width // 2)))


def legend() -> Text:
    """Explain the colours."""
    styles = {
        "prompt": "white on grey23",
        "response, scored": f"bold {COLOURS[0]}",
        "response, not scored (tool results)": f"dim {COLOURS[0]}",
        "not used by the loss": "dim strike",
        "<special>": "reverse",
        "predicted only, not an input": "underline",
    }
    return Text("  ").join(Text(words, style=style) for words, style in styles.items())


def heading(block: Block, sight: Sight) -> str:
    """A block's description, as text."""
    if block.role == "padding":
        return f"padding · {len(block.tokens)} tokens that nothing attends to"
    group = sight.groups[block.slot] if block.slot is not None and block.slot >= 0 else None
    parts = [f"group {group.group_id}" if group is not None else "a group"]
    if block.role == "prompt":
        parts.append(f"prompt · {len(block.tokens)} tokens")
    else:
        parts.append(f"response {block.response} · {len(block.tokens)} tokens")
    if block.start is not None:
        parts.append(f"row {block.start}–{block.start + block.num_inputs - 1}")
    positions = [token.position for token in block.tokens if token.position is not None]
    if positions:
        parts.append(f"positions {positions[0]}–{positions[-1]}")
    if block.response is not None and group is not None and block.slot is not None:
        parts += judgement(group, block.response, None if sight.sets is None else int(sight.sets[block.slot, block.response]))
    if block.role == "left out":
        parts.append("in no row: the loss does not use it")
    return " · ".join(parts)


def judgement(group: TokenizedGroup, response: int, own: int | None) -> list[str]:
    """A response's reward, label and set, as text."""
    parts = []
    if group.rewards is not None:
        parts.append(f"reward {group.rewards[response]:g}")
    if group.labels is not None:
        parts.append({1: "chosen", 0: "rejected"}.get(int(group.labels[response]), "no label"))
    if own is not None:
        parts.append({1: "preferred (Y+)", 0: "other (Y−)"}.get(own, "in neither set"))
    return parts


def colour(block: Block) -> str:
    """The colour of a block's heading and tokens."""
    if block.role == "response":
        return COLOURS[(block.response or 0) % len(COLOURS)]
    return "dim strike" if block.role == "left out" else "dim" if block.role == "padding" else "white"


def tokens_text(tokens: Sequence[Token], style: str, *, response: bool) -> Text:
    """Tokens in a row; every second one is shaded to show boundaries, and a response's unscored ones are dim."""
    text = Text()
    for number, token in enumerate(tokens):
        parts = [style]
        if token.special:
            parts.append("reverse")
        elif number % 2:
            parts.append("on grey23")
        parts.append("bold" if token.scored else "dim" if response else "")
        if token.scored and token.position is None:
            parts.append("underline")
        text.append(mark_ends(token.text), style=" ".join(parts))
    return text


def mark_ends(text: str) -> str:
    """A token's text with visible line ends, and without control or reordering characters."""
    marked = text.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "→\t")
    return visible(marked, lines=True)


def mask_text(sight: Sight, most_cells: int) -> Text:
    """The attention mask in characters: full where all queries of a cell see all its keys, shaded where some do."""
    mask = attention_mask(sight.row)
    cells = min(most_cells, len(mask))
    edges = np.linspace(0, len(mask), cells + 1).round().astype(int)
    text = Text()
    for top, bottom in itertools.pairwise(edges):
        for left, right in itertools.pairwise(edges):
            share = mask[top:bottom, left:right].mean()
            text.append("██" if share == 1 else "▒▒" if share > 0 else "· ", style="cyan" if share else "dim")
        text.append("\n")
    return text
