"""Shared by all examples: print a table, save a plot, parse `--output`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import torch
from PIL import Image

matplotlib.use("Agg")  # draws to files, without a display
import matplotlib.pyplot as plt

BLUE, ORANGE, GREEN, RED, GREY = "#1f6fb4", "#e07b1a", "#2a9150", "#c23b3b", "#777777"


def parse_output(docstring: str | None) -> Path:
    """The `--output` folder of the command line; the help shows the claim. Also sets PyTorch to one thread."""
    torch.set_num_threads(1)  # the tensors are tiny: more threads cost more than they save
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("theory-out"), help="folder for the picture")
    output: Path = parser.parse_args().output
    return output


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print right-aligned columns under a title."""
    widths = [max(len(row[column]) for row in [headers, *rows]) for column in range(len(headers))]
    print(f"\n{title}")
    for row in [headers, *rows]:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def build_figure(num_panels: int) -> tuple[Any, list[Any]]:
    """A figure with panels side by side, in the style shared by all plots."""
    figure, panels = plt.subplots(1, num_panels, figsize=(5.0 * num_panels, 3.9), squeeze=False)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, list(panels[0])


def label_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at these values, as plain numbers."""
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def save_figure(figure: Any, output: Path, name: str) -> Path:
    """Write `figure` to output/name.png and return that path."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.png"
    figure.tight_layout()
    # 110 dpi and 128 colours keep a committed plot far below 60 kB.
    figure.savefig(path, dpi=110)
    with Image.open(path) as image:
        image.convert("RGB").quantize(colors=128).save(path, optimize=True)
    plt.close(figure)
    print(f"  picture: {path}")
    return path
