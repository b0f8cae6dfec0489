"""`torchrun … -m mpo_megatron.train.reference_main --config FILE --key value`: one rank of `mpo reference`."""

from __future__ import annotations

import os
from collections.abc import Callable

from mpo_megatron.config import ConfigError, TrainConfig, parse
from mpo_megatron.data import DataError
from mpo_megatron.data.packing import PackingError
from mpo_megatron.hf.flops import build_flop_model
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.ending import complain, end
from mpo_megatron.train.environment import set_environment
from mpo_megatron.train.inputs import check_inputs
from mpo_megatron.train.run import build_row_shape, compute_references


def main() -> int:
    """Parse the command line and compute."""
    return run(compute, "mpo reference")


def run(work: Callable[[TrainConfig], None], program: str) -> int:
    """Parse the command line and work; a message instead of a traceback for what a user can mend. Returns the exit code."""
    try:
        config = parse(TrainConfig, program=program)
        set_environment(config)
        work(config)
    except (ConfigError, DataError, PackingError) as error:
        complain(program, error)
        return 2
    return 0


def compute(config: TrainConfig) -> None:
    """Compute the reference log-probs that `mpo train` with this configuration will look for, and write them beside the groups.

    Raises:
        ConfigError: the configuration, its files and the layout do not fit together; raised before weights are loaded.
        DataError: the cache cannot be written.
    """
    inputs = check_inputs(config, int(os.environ.get("WORLD_SIZE", "1")))
    with model_parallel(config.parallel, config.seed) as ranks:
        shape = build_row_shape(config, ranks, build_flop_model(inputs.family))
        policy = build_policy(inputs.family, config.model, config.parallel, ranks, inputs.padded_vocab_size)
        references = compute_references(config, inputs, policy, ranks, shape)
        if ranks.is_main:
            for path, logps in references.items():
                print(f"{path}: reference log-probs of {len(logps.groups) - 1:,} groups, {len(logps.response):,} responses")


if __name__ == "__main__":
    end(main)
