"""Convert a Megatron checkpoint to a Hugging Face one: `python tools/convert_megatron_to_hf.py --input RUN --output NEW`.

The same as `mpo convert`, but refuses an input that is not a Megatron checkpoint, a step of a run, or a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mpo_megatron.config import ConfigError, ConvertConfig, parse, require


def main() -> None:
    """Parse, check the direction, convert."""
    try:
        config = parse(ConvertConfig, program="convert_megatron_to_hf.py")
        is_megatron = any((Path(config.input) / name).is_dir() for name in ("megatron", "checkpoints"))
        require(is_megatron, f"input = {config.input} is not a Megatron checkpoint: no megatron/ and no checkpoints/.")
        from mpo_megatron.model.convert import convert  # after parsing: importing Megatron is slow

        convert(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
