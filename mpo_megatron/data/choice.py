"""Choice of held-out and training groups, by hashes: neither order nor the number of workers changes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mpo_megatron.config import PrepareConfig, require
from mpo_megatron.data.arrays import Bools, Int64
from mpo_megatron.data.rewards import hash_unit, in_fraction

Keys = npt.NDArray[np.uint64]
"""[G, 2] a hash of each group's prompt."""


def read_keys(keys: bytes | bytearray) -> Keys:
    """Hashes of 16 bytes each, as two integers."""
    return np.frombuffer(bytes(keys), dtype=">u8").reshape(-1, 2)


def choose_held_out(keys: Keys, wanted: int, seed: int) -> Bools:
    """[G] whether a group is held out: whole prompts, until at least `wanted` groups are held out."""
    held = np.zeros(len(keys), dtype=bool)
    if not wanted:
        return held
    prompts, of_group, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    names = [f"{high:016x}{low:016x}" for high, low in prompts.tolist()]
    chosen = np.zeros(len(prompts), dtype=bool)
    number = 0
    for place in sorted(range(len(prompts)), key=lambda place: hash_unit(seed, "held_out", names[place])):
        if number >= wanted:
            break
        chosen[place] = True
        number += int(counts[place])
    return chosen[of_group.ravel()]


def count_prompts(keys: Keys) -> int:
    """Different prompts."""
    return len(np.unique(keys, axis=0))


def choose_mixture(inputs: npt.NDArray[np.uint16], ids: Sequence[str], weights: Sequence[float], seed: int) -> Bools:
    """[G] whether a group is kept, so that the inputs' shares match `weights`; as many as possible, none twice.

    Args:
        inputs: [G] index of each group's input
        ids: [G] the groups' ids
    """
    counts = np.bincount(inputs, minlength=len(weights))
    scale = min(count / weight for count, weight in zip(counts, weights, strict=True))
    kept = np.zeros(len(inputs), dtype=bool)
    for number, weight in enumerate(weights):
        members = np.flatnonzero(inputs == number)
        draws = np.array([hash_unit(seed, "mixture", ids[index]) for index in members])
        kept[members[np.argsort(draws, kind="stable")[: round(scale * weight)]]] = True
    return kept


def choose_groups(
    usable: Int64, keys: Keys, inputs: npt.NDArray[np.uint16], ids: Sequence[str], config: PrepareConfig
) -> tuple[Int64, Int64, int, int]:
    """Indices of the training and of the held-out groups, in order, and the numbers that `weights` and `fraction` dropped.

    Args:
        usable: indices of the groups to choose from
        keys: keys of all groups
        inputs: input indices of all groups
        ids: ids of all groups

    Raises:
        ConfigError: no training group would remain.
    """
    held = choose_held_out(keys[usable], config.held_out, config.seed)
    rest = usable[~held]
    require(
        len(rest) > 0,
        f"held_out = {config.held_out}; only {len(usable)} groups are usable, so none would remain for training; lower it.",
    )
    mixed = rest
    if config.weights:
        mixed = rest[choose_mixture(inputs[rest], [ids[index] for index in rest], config.weights, config.seed)]
        require(len(mixed) > 0, f"weights = {config.weights}; an input has no group left beside the held-out ones; remove it.")
    train = mixed
    if config.fraction < 1:
        kept = [in_fraction(ids[index], config.fraction, seed=config.seed) for index in mixed]
        train = mixed[np.array(kept, dtype=bool)]
        require(len(train) > 0, f"fraction = {config.fraction}; none of {len(mixed)} groups would remain; raise it.")
    return train, usable[held], len(rest) - len(mixed), len(mixed) - len(train)
