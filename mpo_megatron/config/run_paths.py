"""Paths of a run's inputs, from any working directory, and after a move.

A run's config.yaml stores absolute paths of its folder and inputs. If a run is moved together with its inputs, their paths
relative to the run's folder stay the same.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpo_megatron.config.checks import require
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.config.train import TrainConfig
from mpo_megatron.config.values import show


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same configuration, with paths independent of the working directory."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else os.path.abspath(path)

    model, data, loss = config.model, config.data, config.loss
    place, _, name = (loss.function or "").rpartition(":")
    reference = model.reference if model.reference == ADAPTER_OFF else absolute(model.reference)
    return replace(
        config,
        output=os.path.abspath(config.output),
        model=replace(model, checkpoint=os.path.abspath(model.checkpoint), reference=reference),
        lora=replace(config.lora, base=absolute(config.lora.base)),
        data=replace(data, train=os.path.abspath(data.train), eval=absolute(data.eval)),
        loss=replace(loss, function=f"{os.path.abspath(place)}:{name}") if place.endswith(".py") else loss,
    )


def candidates(run: Path, config: dict[str, Any], section: str, name: str) -> list[Path]:
    """Possible current paths of a run's input, the likeliest first; empty if the run has no such input.

    Args:
        run: the run's current folder
        config: the content of its config.yaml
        section: section of the option for the input, such as `data`
        name: name of that option, such as `train`
    Raises:
        ConfigError: the option is not a text.
    """
    options = config.get(section)
    path = options.get(name) if isinstance(options, dict) else None
    if path is None:
        return []
    require(isinstance(path, str), f"{run / 'config.yaml'}: {section}.{name} = {show(path)}; it must be a path; correct it.")
    found = [Path(path)]
    output = config.get("output")
    if isinstance(output, str):
        found.append(Path(os.path.normpath(run.absolute() / os.path.relpath(path, output))))
    if not os.path.isabs(
        path
    ):  # written by an older version: relative to the start directory, derived from the run's recorded folder
        found.reverse()
    return found


def find_input(run: Path, config: dict[str, Any], section: str, name: str) -> str:
    """The current path of a run's input; the recorded one if it is not found."""
    places = candidates(run, config, section, name)
    return str(next((place for place in places if place.exists()), places[0]))
