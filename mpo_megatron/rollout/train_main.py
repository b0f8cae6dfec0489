"""`torchrun … -m mpo_megatron.rollout.train_main --config FILE --key value`: a rank of a run that samples (`online`).

Exit codes are those of `mpo_megatron.train`.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from mpo_megatron.train import signals
from mpo_megatron.train.__main__ import run
from mpo_megatron.train.ending import end

if TYPE_CHECKING:
    from mpo_megatron.config import TrainConfig

# Megatron's checkpoint writer starts helper processes that import this module again: keep it light and guarded.


def main() -> int:
    """Parse the command line and train, with the regulariser on samples of the policy if it is configured."""
    signals.listen()  # before anything heavy is imported: a request to stop may come at any time

    def train(config: TrainConfig) -> str | None:
        from mpo_megatron.rollout.live.regularizer import build_regularizer
        from mpo_megatron.train.loop import train

        gc.freeze()  # as in `mpo_megatron.train`
        return train(config, build_regularizer if config.online.kl_weight > 0 else None)

    return run(train)


if __name__ == "__main__":
    end(main)
