"""`torchrun … -m mpo_megatron.evaluate.held_out_main --config FILE`: one rank of the held-out part of `mpo evaluate`."""

from __future__ import annotations

from mpo_megatron.train.rank import be_rank, prepare_rank


def work() -> None:
    """Run the held-out part of an `mpo evaluate` command line."""
    from mpo_megatron.config import EvaluateConfig, parse
    from mpo_megatron.evaluate.held_out import as_training, evaluate_held_out

    evaluate_held_out(prepare_rank(as_training(parse(EvaluateConfig, program="mpo evaluate"))))


if __name__ == "__main__":
    be_rank("mpo evaluate", work)
