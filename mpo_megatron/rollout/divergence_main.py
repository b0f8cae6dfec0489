"""`torchrun … -m mpo_megatron.rollout.divergence_main --config FILE`: measure KL(π ‖ π_ref) on one rank for `mpo iterate`."""

from __future__ import annotations

from mpo_megatron.train.rank import be_rank, read_setup


def work() -> None:
    """Run the measurement that the command line describes."""
    setup = read_setup("mpo iterate")
    from mpo_megatron.rollout.divergence import measure

    measure(setup)


if __name__ == "__main__":
    be_rank("mpo iterate", work)
