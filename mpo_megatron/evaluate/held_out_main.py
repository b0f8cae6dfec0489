"""`torchrun … -m mpo_megatron.evaluate.held_out_main --config FILE`: one rank of the held-out part of `mpo evaluate`."""

from __future__ import annotations

from pathlib import Path

from mpo_megatron.train.rank import be_rank


def work() -> str | None:
    """Parse the command line of `mpo evaluate` and do its held-out part; why it stopped early, or None."""
    from mpo_megatron.config import EvaluateConfig, parse, require

    config = parse(EvaluateConfig, program="mpo evaluate")
    require(config.held_out is not None, "held_out is not configured.")
    assert config.held_out is not None
    from mpo_megatron.evaluate.held_out import evaluate_held_out
    from mpo_megatron.train.faults.stopping import Stopped

    try:
        evaluate_held_out(config.held_out, Path(config.output))
    except Stopped as request:
        return str(request)
    return None


if __name__ == "__main__":
    be_rank("mpo evaluate", work)
