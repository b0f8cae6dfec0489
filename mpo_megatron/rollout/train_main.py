"""`torchrun … -m mpo_megatron.rollout.train_main --config FILE --key value`: a rank of a run that samples (`online`).

Exit codes are those of `mpo_megatron.train`.
"""

from __future__ import annotations

import gc

from mpo_megatron.train.rank import be_rank, parse_train

# Megatron's checkpoint writer starts helper processes that import this module again: keep it light and guarded.


def work() -> str | None:
    """Parse the command line and train, with the regulariser on samples of the policy if it is configured."""
    config = parse_train("mpo train")
    from mpo_megatron.rollout.live.regularizer import build_regularizer
    from mpo_megatron.train.loop import train

    gc.freeze()  # as in `mpo_megatron.train`
    return train(config, build_regularizer if config.online.kl_weight > 0 else None)


if __name__ == "__main__":
    be_rank("mpo train", work)
