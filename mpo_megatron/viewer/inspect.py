"""`mpo inspect`."""

from __future__ import annotations

from pathlib import Path

from mpo_megatron.config import InspectConfig
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.terminal.console import Console
from mpo_megatron.viewer.blocks import blocks_of
from mpo_megatron.viewer.page import draw_mask, write_page
from mpo_megatron.viewer.source import look
from mpo_megatron.viewer.terminal import show


def inspect(config: InspectConfig, console: Console | None = None) -> None:
    """Show a group or a row on the terminal; write the page and the picture if requested.

    Raises:
        ConfigError: no such group, step or row.
        DataError: the data is missing or damaged.
    """
    sight = look(config)
    blocks = blocks_of(sight.row, sight.groups, sight.tokenizer, sight.left_out)
    if config.html is not None:
        write_page(sight, blocks, Path(config.html))
    if config.png is not None:
        replace_file(Path(config.png), [draw_mask(sight)])
    show(sight, blocks, console or Console(), config.max_tokens)
