"""`python -m examples.papers`: see run.py."""

import sys

from examples.papers.run import main
from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from mpo_megatron.terminal.interruption import StageError

try:
    sys.exit(main())
except (ConfigError, DataError, StageError) as error:
    sys.exit(f"examples.papers: {error}")
