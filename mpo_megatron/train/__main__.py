"""`torchrun … -m mpo_megatron.train --config FILE --key value`: one rank of a training run; exit codes are in rank.py."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from mpo_megatron.train.rank import be_rank, read_setup

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpo_megatron.train.run import Run
    from mpo_megatron.train.term import GradientTerm

# Megatron's checkpoint writer may start processes that import this module: keep it light and guarded.


def work() -> str | None:
    """Train as the command line says, with a term on live samples if configured; return why the run stopped early, or None."""
    setup = read_setup("mpo train")
    from mpo_megatron.config import validate_unused
    from mpo_megatron.train.loop import train

    validate_unused(setup.given)  # as `mpo train` does: a job may start ranks directly

    build_term: Callable[[Run], GradientTerm] | None = None
    if setup.config.online.kl_weight > 0:
        from mpo_megatron.rollout.live.regularizer import build_regularizer as build_term
    gc.freeze()  # Megatron collects garbage in every save: a quarter of a second if it scans all imports
    return train(setup, build_term)


if __name__ == "__main__":
    be_rank("mpo train", work)
