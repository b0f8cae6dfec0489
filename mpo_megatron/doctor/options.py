"""Options of `mpo doctor`, parsed before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpo_megatron.config import ConfigError, require

DESCRIPTION = "Report versions, GPUs, what imports and works here, what a run would use, and how to fix problems."


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options `config` and `json` of the command line.

    Raises:
        ConfigError: an unknown option, or a file that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="mpo doctor",
        description=DESCRIPTION,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="A configuration of `mpo train`: report what its run would use here, and why."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    try:
        options, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}.") from error
    require(not unknown, f"{' '.join(unknown)}: `mpo doctor` has the options --config FILE and --json.")
    require(options.config is None or Path(options.config).is_file(), f"--config {options.config}: there is no such file.")
    return options
