"""KL(π ‖ π_ref) on samples of π; divergence_main.py is one rank of it.

Takes the configuration of `mpo train`, with π as model.checkpoint, π_ref as model.reference and samples of π, prepared, as
data.train; writes `<output>/kl.json`. With samples y ~ π the mean of log π(y) − log π_ref(y) is an unbiased estimate.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import torch

from mpo_megatron.config import TrainConfig
from mpo_megatron.data.group import Float64, Int64
from mpo_megatron.hf.flops import build_flop_model
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.rollout.records import write_summary
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.faults.spreading import spreading_requests
from mpo_megatron.train.faults.stopping import Deadline, Stopped
from mpo_megatron.train.inputs import check_inputs
from mpo_megatron.train.reference import reference_logps
from mpo_megatron.train.run import build_row_shape

KL_FILE = "kl.json"


def measure(config: TrainConfig) -> str | None:
    """Log-probs of all samples under both models, one after the other in the same memory; every rank calls it.

    Returns:
        None when all is measured; why it stopped if it was asked to.
    """
    inputs = check_inputs(config, int(os.environ.get("WORLD_SIZE", "1")))
    output, logps = Path(config.output), list[Float64]()
    with model_parallel(config.parallel, config.seed) as ranks, spreading_requests():
        shape = build_row_shape(config, ranks, build_flop_model(inputs.family))
        model = build_policy(inputs.family, config.model, config.parallel, ranks, inputs.padded_vocab_size)
        for name, folder in (
            ("policy", config.model.checkpoint),
            ("reference", config.model.reference or config.model.checkpoint),
        ):
            try:
                values = reference_logps(
                    inputs.train,
                    output / name,
                    functools.partial(load, model, folder, ranks),
                    ranks,
                    shape,
                    groups_per_part=config.data.groups_per_step,
                    tokens=False,
                    deadline=Deadline(config.faults),
                )
            except Stopped as request:
                return str(request)
            logps.append(values.response)
        if ranks.is_main:
            ours, theirs = logps
            offsets, lengths = inputs.train.response_offsets(), inputs.train.all_response_lengths()
            write_summary(output / KL_FILE, summarize(ours, theirs, offsets, lengths))
    return None


def load(model: list[torch.nn.Module], folder: str, ranks: Ranks) -> list[torch.nn.Module]:
    """The model with the weights in `folder`."""
    checkpoint.load_weights(model, folder, ranks)
    return model


def summarize(policy: Float64, reference: Float64, offsets: Int64, lengths: Int64) -> dict[str, float]:
    """The estimate in nats per response, with a standard error over prompts, and per token.

    Args:
        policy, reference: [ΣK] log-probs of every response
        offsets: [G + 1] where each group begins
        lengths: [ΣK] tokens of every response
    """
    ratios = policy - reference
    by_prompt = np.add.reduceat(ratios, offsets[:-1]) / np.diff(offsets)
    return {
        "kl": float(by_prompt.mean()),
        "kl_error": float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))) if len(by_prompt) > 1 else 0.0,
        "kl_per_token": float(ratios.sum() / lengths.sum()),
        "prompts": len(by_prompt),
        "responses": len(ratios),
    }
