"""`python -m examples.papers`: see run.py."""

import sys

from examples.papers.run import main

sys.exit(main())
