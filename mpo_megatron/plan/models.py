"""The model of `mpo plan`: a published one, or one in a folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from mpo_megatron.config import ConfigError
from mpo_megatron.families import Family, load_family, read_family
from mpo_megatron.families.published import MODELS, build_config


def find_model(name: str) -> Family:
    """A model of `MODELS`, or the one in a Hugging Face or Megatron checkpoint folder.

    Raises:
        ConfigError: it is neither, or not supported.
    """
    by_name = {known.lower(): known for known in MODELS}
    if name.lower() in by_name:
        return read_family(build_config(by_name[name.lower()]))
    folder = Path(name)
    if (folder / "hf" / "config.json").is_file():
        return load_family(folder / "hf")
    if folder.is_dir():
        return load_family(folder)
    nearest = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4)
    choices = ", ".join(by_name[key] for key in nearest or by_name)
    fix = f"did you mean {choices}?" if nearest else f"give a folder with a config.json, or one of {choices}."
    raise ConfigError(f"model = {name}; neither a checkpoint folder nor a known model; {fix}")
