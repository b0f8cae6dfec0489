"""`torchrun … -m mpo_megatron.rollout.divergence_main --config FILE`: one rank that measures KL(π ‖ π_ref) for `mpo iterate`."""

from __future__ import annotations

from mpo_megatron.train.rank import be_rank, parse_train


def work() -> str | None:
    """Parse the command line and measure; why it stopped early, or None."""
    config = parse_train("mpo iterate")
    from mpo_megatron.rollout.divergence import measure

    return measure(config)


if __name__ == "__main__":
    be_rank("mpo iterate", work)
