"""`torchrun … -m mpo_megatron.doctor`: run `mpo doctor` on several machines, and compare them."""

from __future__ import annotations

import sys

from mpo_megatron.config import ConfigError
from mpo_megatron.doctor.doctor import doctor
from mpo_megatron.doctor.options import read_options
from mpo_megatron.terminal.visible import visible


def main() -> int:
    """Examine this machine; a message instead of a traceback for a wrong option."""
    try:
        options = read_options(sys.argv[1:])
    except ConfigError as error:
        text = visible(f"mpo doctor: {error}", lines=True)
        print(text, file=sys.stderr)
        return 2
    return doctor(options.config, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
