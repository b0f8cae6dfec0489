"""Print one group exactly as the model sees it, with scored tokens marked."""

from __future__ import annotations

import itertools

from rich.rule import Rule
from rich.text import Text

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.visible import visible

SCORED = ("⟦", "⟧")
"""Marks around scored tokens; readable without colours."""
_SHOWN = 2000
"""Maximum characters shown of a prompt or response; the middle of a longer one is omitted."""
_RESPONSES = 4


def print_group(console: Console, group: TokenizedGroup, tokenizer: Tokenizer) -> None:
    """Print the prompt and the responses, decoded from their tokens."""
    console.print(Rule(Text(f"One group as the model sees it: {group.group_id}; ⟦ scored ⟧", style="bold"), align="left"))
    console.print(Text(_shorten(tokenizer.decode(group.prompt_tokens.tolist())), style="dim"), soft_wrap=True)
    for index, tokens in enumerate(group.response_tokens[:_RESPONSES]):
        said = [] if group.rewards is None else [f"reward {group.rewards[index]:g}"]
        if group.labels is not None:
            said.append("chosen" if group.labels[index] else "rejected")
        console.print(Text(f"── response {index}: {', '.join(said)}", style="bold cyan"))
        mask = [True] * len(tokens) if group.scored is None else group.scored[index].tolist()
        text = Text()
        place = 0
        for scored, run in itertools.groupby(mask):
            length = len(list(run))
            part = _shorten(tokenizer.decode(tokens[place : place + length].tolist()))
            place += length
            text.append(f"{SCORED[0]}{part}{SCORED[1]}" if scored else part, style="green" if scored else "dim")
        console.print(text, soft_wrap=True)
    if group.num_responses > _RESPONSES:
        console.print(Text(f"── and {group.num_responses - _RESPONSES} more; `mpo inspect` shows all", style="bold cyan"))


def _shorten(text: str) -> str:
    """Text made safe for a terminal, and without its middle if it is long."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} … {len(text) - _SHOWN:,} characters … {text[-_SHOWN // 2 :]}"
    return visible(text, lines=True)
