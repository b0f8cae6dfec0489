"""`torchrun … -m mpo_megatron.train.reference_main --config FILE --key value`: one rank of `mpo reference`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mpo_megatron.train.rank import be_rank, parse_train

if TYPE_CHECKING:
    from mpo_megatron.config import TrainConfig


def work() -> str | None:
    """Parse the command line and compute; why it stopped early, or None."""
    return compute(parse_train("mpo reference"))


def compute(config: TrainConfig) -> str | None:
    """Compute the reference log-probs that `mpo train` with this configuration will look for, and write them beside the groups.

    Returns:
        None when all are there; why it stopped if it was asked to.
    Raises:
        ConfigError: the configuration, its files and the layout do not fit together; raised before weights are loaded.
        DataError: the cache cannot be written.
    """
    # Imported here: requests to stop are heard while this takes its seconds.
    from mpo_megatron.hf.flops import build_flop_model
    from mpo_megatron.model.parallel import model_parallel
    from mpo_megatron.model.policy import build_policy
    from mpo_megatron.train.faults.spreading import spreading_requests
    from mpo_megatron.train.faults.stopping import Stopped
    from mpo_megatron.train.inputs import check_inputs
    from mpo_megatron.train.run import build_row_shape, compute_references

    inputs = check_inputs(config, int(os.environ.get("WORLD_SIZE", "1")))
    with model_parallel(config.parallel, config.seed) as ranks, spreading_requests():
        shape = build_row_shape(config, ranks, build_flop_model(inputs.family))
        policy = build_policy(inputs.family, config.model, config.parallel, ranks, inputs.padded_vocab_size)
        try:
            references = compute_references(config, inputs, policy, ranks, shape)
        except Stopped as request:
            return str(request)
        if ranks.is_main:
            for path, logps in references.items():
                print(f"{path}: reference log-probs of {len(logps.groups) - 1:,} groups, {len(logps.response):,} responses")
    return None


if __name__ == "__main__":
    be_rank("mpo reference", work)
