"""Held-out groups that are also trained on are found: by digest, by id and prompt, and by prompt alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.overlap import describe_overlap
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.store_writing import write_groups


def store(folder: Path, prompts: dict[str, int], reward: float = 1.0) -> PreparedGroups:
    """Groups by id, each with its prompt's only token."""
    response = np.arange(3, dtype=np.int32)
    groups = [
        TokenizedGroup(
            group_id=group_id,
            prompt_tokens=np.array([prompt], np.int32),
            response_tokens=(response, response),
            rewards=np.array([reward, 0.0]),
        )
        for group_id, prompt in prompts.items()
    ]
    write_groups(folder, groups, tokenizer_digest="t", vocab_size=9999, end_token_ids=[], reward_kind="scores")
    return load_groups(folder)


@pytest.mark.parametrize(
    ("held_out", "found"),
    [
        ({"a": 1, "b": 2, "c": 3}, "holds the same groups as data.train = "),  # another folder with the same groups
        ({"b": 2, "x": 9}, "the prompts of at least 1 of the 2 held-out groups"),
        ({"x": 3, "y": 1}, "the prompts of at least 2 of the 2 held-out groups"),  # renumbered
        ({"a": 7, "b": 8}, None),  # numbered alike, other prompts
    ],
)
def test_held_out_prompts_that_are_trained_on(held_out: dict[str, int], found: str | None, tmp_path: Path) -> None:
    train = store(tmp_path / "train", {"a": 1, "b": 2, "c": 3})
    told = describe_overlap(train, store(tmp_path / "eval", held_out))
    assert told is None if found is None else found in str(told)


def test_an_id_leads_to_a_prompt_outside_the_sample(tmp_path: Path) -> None:
    train = store(tmp_path / "train", {f"g{index}": index for index in range(2000)})
    told = describe_overlap(train, store(tmp_path / "eval", {"g1001": 1001, "x": 5000}, reward=2.0))
    assert "at least 1 of the 2" in str(told)
