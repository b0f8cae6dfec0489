"""Training on one rank, which is this process."""

from __future__ import annotations

from collections.abc import Callable

from mpo_megatron.config import TrainConfig
from mpo_megatron.train import loop
from mpo_megatron.train.run import Run
from mpo_megatron.train.setup import build_setup
from mpo_megatron.train.term import GradientTerm


def train(config: TrainConfig, build_term: Callable[[Run], GradientTerm] | None = None) -> str | None:
    """As a rank of `mpo train` does; why it stopped early, or None."""
    return loop.train(build_setup(config, 1), build_term)
