"""Convert a Hugging Face checkpoint to a Megatron one: `python tools/convert_hf_to_megatron.py --input HF --output NEW`.

The same as `mpo convert`, but refuses an input that is not a Hugging Face checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mpo_megatron.config import ConfigError, ConvertConfig, parse, require


def main() -> None:
    """Parse, check the direction, convert."""
    try:
        config = parse(ConvertConfig, program="convert_hf_to_megatron.py")
        is_hf = (Path(config.input) / "config.json").is_file()
        require(is_hf, f"input = {config.input} is not a Hugging Face checkpoint: there is no config.json.")
        from mpo_megatron.model.convert import convert  # after parsing: importing Megatron is slow

        convert(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
