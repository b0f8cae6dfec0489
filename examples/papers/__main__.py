"""`python -m examples.papers`: see run.py."""

import sys

from examples.papers.run import main
from mpo_megatron.config import ConfigError

try:
    sys.exit(main())
except ConfigError as error:
    sys.exit(f"examples.papers: {error}")
