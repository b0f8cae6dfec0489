"""KL(π ‖ π_ref) estimated on samples of π; `divergence_main.py` runs it on one rank.

Reads a configuration of `mpo train`: π is `model.checkpoint`, π_ref is `model.reference`, and `data.train` holds prepared
samples of π. Writes `<output>/kl.json`. With samples y ∼ π, the mean of log π(y) − log π_ref(y) is an unbiased estimate.
"""

from __future__ import annotations

import functools

import numpy as np

from mpo_megatron.data.arrays import Float64, Int64
from mpo_megatron.rollout.records import write_summary
from mpo_megatron.train.faults.stopping import Deadline
from mpo_megatron.train.reference import reference_logps
from mpo_megatron.train.session import session
from mpo_megatron.train.setup import Setup

KL_FILE = "kl.json"


def measure(setup: Setup) -> None:
    """Compute log-probs of all samples under both models, one after the other in the same memory; every rank calls it.

    Raises:
        Stopped: a stop was requested; results so far are on disk.
    """
    data, logps = setup.train, list[Float64]()
    with session(setup) as place:
        for name, folder in (("policy", setup.model_folder), ("reference", setup.reference_folder)):
            values = reference_logps(
                data,
                setup.folder / name,
                functools.partial(place.load, folder),
                place.ranks,
                place.shape,
                groups_per_pass=setup.config.data.groups_per_step,
                tokens=False,
                deadline=Deadline(setup.config.faults),
            )
            logps.append(values.response)
        if place.ranks.is_main:
            ours, theirs = logps
            write_summary(setup.folder / KL_FILE, summarize(ours, theirs, data.response_offsets(), data.all_response_lengths()))


def summarize(policy: Float64, reference: Float64, offsets: Int64, lengths: Int64) -> dict[str, float]:
    """The estimate in nats per response, with a standard error over prompts, and in nats per token.

    Args:
        policy: [ΣK] log-prob of each response under π, in nats
        reference: [ΣK] log-prob of each response under π_ref, in nats
        offsets: [G + 1] start of each group
        lengths: [ΣK] tokens of each response
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
