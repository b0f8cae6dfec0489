"""`torchrun … -m mpo_megatron.train --config FILE --key value`: one rank of a training run; exit codes are in rank.py."""

from __future__ import annotations

import gc

from mpo_megatron.train.rank import be_rank, parse_train, run


def main() -> int:
    """One rank, in a process that goes on; the exit code."""
    return run("mpo train", work)


def work() -> str | None:
    """Parse the command line and train; why it stopped early, or None."""
    config = parse_train("mpo train")
    from mpo_megatron.train.loop import train

    gc.freeze()  # Megatron collects garbage in every save: a quarter of a second if it looks at all that was imported
    return train(config)


if __name__ == "__main__":
    be_rank("mpo train", work)
