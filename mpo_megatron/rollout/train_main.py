"""`torchrun … -m mpo_megatron.rollout.train_main --config FILE --key value`: a rank of a run that samples (`online`)."""

import os
import sys

# Megatron's checkpoint writer starts helper processes that import this module again: keep it light and guarded.


def main() -> int:
    """Parse the command line and train; a message instead of a traceback for what a user can mend."""
    from mpo_megatron.config import ConfigError, TrainConfig, parse

    try:
        config = parse(TrainConfig, program="mpo train")
        from mpo_megatron.data import DataError
        from mpo_megatron.rollout.regularizer import build_regularizer
        from mpo_megatron.train.loop import TrainingError, train
    except ConfigError as error:
        return _fail(error)
    try:
        train(config, build_regularizer if config.online.kl_weight > 0 else None)
    except (ConfigError, DataError, TrainingError) as error:
        return _fail(error)
    return 0


def _fail(error: Exception) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"mpo train: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
