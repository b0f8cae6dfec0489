"""Training on one rank, in this process."""

from __future__ import annotations

from collections.abc import Callable

from mpo_megatron.config import TrainConfig
from mpo_megatron.train import loop
from mpo_megatron.train.run import Run
from mpo_megatron.train.setup import build_setup
from mpo_megatron.train.term import GradientTerm


def train(config: TrainConfig, build_term: Callable[[Run], GradientTerm] | None = None) -> str | None:
    """Trains like a rank of `mpo train`; returns why it stopped early, or None."""
    return loop.train(build_setup(config, 1), build_term)
