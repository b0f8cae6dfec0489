"""Check every claim by eye: run all examples, print their tables and draw their pictures.

python -m examples.theory.run_all --output theory-out
"""

from __future__ import annotations

import time
from pathlib import Path

from examples.theory import (
    convergence_rate,
    nca_likelihood,
    nca_optimum,
    normalizer_gradient,
    partition_reliability,
    spo_minimizer,
    vanishing_negatives,
)
from examples.theory.report import parse_output

EXAMPLES = (
    partition_reliability,
    convergence_rate,
    vanishing_negatives,
    spo_minimizer,
    nca_optimum,
    nca_likelihood,
    normalizer_gradient,
)


def run(output: Path) -> list[Path]:
    """The pictures of all examples, in the README's order."""
    pictures = []
    for example in EXAMPLES:
        start = time.perf_counter()
        print(f"\n== {example.__name__}")
        pictures.append(example.run(output))
        print(f"  {time.perf_counter() - start:.1f} s")
    return pictures


if __name__ == "__main__":
    run(parse_output(__doc__))
