"""Why a run does not fit its GPUs, and what would make it fit."""

from __future__ import annotations

import dataclasses

from mpo_megatron.config import ConfigError, ParallelConfig
from mpo_megatron.data.packing import PackingError
from mpo_megatron.plan.memory_layout import GIB
from mpo_megatron.plan.search import Candidate, Workload, search
from mpo_megatron.plan.tables import PARTS

MOST_GPUS = 4096
"""Largest number of GPUs that the search tries."""


def explain(problem: Workload, candidate: Candidate) -> str:
    """Why a layout does not fit, and what would make it fit."""
    worst = candidate.worst
    name = max((name for name in PARTS if name != "overhead"), key=lambda name: getattr(worst, name))
    ways = remedies(problem, candidate)
    return (
        f"{candidate.describe()}: stage {worst.stage} needs {worst.total / GIB:.1f} GiB, but only {problem.limit / GIB:.1f} of "
        f"the {problem.hardware.memory_gib} GiB of {problem.hardware.name} are available; the largest part is {PARTS[name][1]}, "
        f"{getattr(worst, name) / GIB:.1f} GiB. "
        + (f"It would fit with {'; or '.join(ways)}." if ways else explain_nothing_fits(problem))
    )


def remedies(problem: Workload, candidate: Candidate) -> list[str]:
    """Single changes that make a layout fit, and the best layout overall."""
    parallel, ways = candidate.parallel, []

    def works(
        name: str,
        tried: Workload = problem,
        layout: ParallelConfig = parallel,
        recompute: str = candidate.model.recompute,
        row_tokens: int = candidate.row_tokens,
        gpus: int = problem.gpus,
    ) -> None:
        try:
            if tried.fits(tried.evaluate(layout, recompute, row_tokens, gpus)):
                ways.append(name)
        except (ConfigError, PackingError):
            return

    if candidate.model.recompute != "full":
        works("model.recompute = full", recompute="full")
    half = candidate.row_tokens // 2
    if half >= problem.sequences.longest:
        works(f"data.row_tokens = {half}", row_tokens=half)
    if candidate.model.logprob_chunk is None or candidate.model.logprob_chunk > 256:
        small = dataclasses.replace(problem, model=dataclasses.replace(problem.model, logprob_chunk=256))
        works("model.logprob_chunk = 256", tried=small)
    for field in ("tensor", "pipeline", "context"):
        size = 2 * getattr(parallel, field)
        if field != "tensor" or size <= problem.hardware.gpus_per_node:
            works(f"parallel.{field} = {size}", layout=dataclasses.replace(parallel, **{field: size}))
    works(f"{2 * problem.gpus} GPUs", gpus=2 * problem.gpus)
    found = search(problem)
    return [*ways, f"another layout, the fastest of which is {found[0].describe()}"] if found else ways


def explain_nothing_fits(problem: Workload) -> str:
    """A message that no layout fits, with the number of GPUs that would suffice."""
    gpus = problem.gpus
    while gpus < MOST_GPUS:
        gpus *= 2
        found = search(problem, gpus)
        if found:
            return (
                f"No layout of this model fits {problem.gpus} × {problem.hardware.name} ({problem.hardware.memory_gib} GiB); "
                f"with {gpus} GPUs it does: {found[0].describe()}."
            )
    return f"No layout of this model fits {problem.hardware.name} GPUs, up to {MOST_GPUS} of them; use shorter responses or rows."
