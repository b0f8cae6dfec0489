"""Held-out groups that are trained on: their numbers say nothing about new prompts."""

from __future__ import annotations

import numpy as np

from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.store import PreparedGroups

SAMPLED_GROUPS = 512
"""Training groups whose prompts are compared, besides those with a held-out group's id."""
COMPARED_GROUPS = 4096
"""Held-out groups that are compared."""


def describe_overlap(train: PreparedGroups, held_out: PreparedGroups) -> str | None:
    """A sentence if held-out prompts are also training prompts; None if none was found."""
    if train.info.data_digest == held_out.info.data_digest:
        same = f"data.eval = {held_out.path} holds the same groups as data.train = {train.path}"
    elif number := count_shared_prompts(train, held_out):
        some = f"at least {number:,} of the {len(held_out):,} held-out groups in data.eval = {held_out.path}"
        same = f"the prompts of {some} are also in data.train = {train.path}"
    else:
        return None
    return (
        f"{same}: held-out metrics then measure training, not new prompts. Split the groups once, with the option held_out of "
        "`mpo prepare`."
    )


def count_shared_prompts(train: PreparedGroups, held_out: PreparedGroups) -> int:
    """Number of held-out groups found whose prompt a training group has. Finds them by id, and in a sample."""
    prompts = _prompts(held_out, _spread(len(held_out), COMPARED_GROUPS))
    # Different files often number their groups alike, so an id says only where to look.
    held_ids = set(held_out.group_ids())
    of_same_id = [index for index, group_id in enumerate(train.group_ids()) if group_id in held_ids]
    candidates = np.union1d(_spread(len(train), SAMPLED_GROUPS), np.array(of_same_id[:COMPARED_GROUPS], np.int64))
    trained = set(_prompts(train, candidates))
    return sum(prompt in trained for prompt in prompts)


def _spread(size: int, most: int) -> Int64:
    """At most so many indices below `size`, evenly spaced."""
    indices: Int64 = np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
    return indices


def _prompts(groups: PreparedGroups, indices: Int64) -> list[bytes]:
    return [groups.prompt_tokens(int(index)).tobytes() for index in indices]
