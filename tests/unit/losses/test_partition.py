"""Y+ and Y− by hand, ties, and independence of order and padding."""

import itertools

import pytest
import torch

from mpo_megatron.losses import GroupBatch, PartitionParams, compute_partition


def split(rewards, valid=None, labels=None, dtype=torch.float32, **params):
    """One group's partition as a string over responses: + − or a dot for neither."""
    rewards = None if rewards is None else torch.tensor([rewards], dtype=dtype)
    shape = rewards.shape if rewards is not None else (1, len(labels))
    batch = GroupBatch(
        policy_logps=torch.zeros(shape),
        valid=torch.ones(shape, dtype=torch.bool) if valid is None else torch.tensor([valid]),
        rewards=rewards,
        labels=None if labels is None else torch.tensor([labels], dtype=torch.int8),
    )
    positive, negative = compute_partition(batch, PartitionParams(**params))
    assert not (positive & negative).any()
    return "".join("+" if p else "-" if n else "." for p, n in zip(positive[0], negative[0], strict=True))


@pytest.mark.parametrize(
    ("params", "rewards", "expected"),
    [
        ({}, [9.0, 1.0, 2.0, 3.0], "+---"),  # mean 3.75
        ({}, [4.0, 1.0, 2.0, 3.0], "+--+"),  # mean 2.5
        ({}, [3.0, 1.0, 2.0], "+--"),  # a reward equal to the mean is not above it
        ({}, [2.0, 2.0, 2.0], "..."),
        ({"partition": "median"}, [9.0, 1.0, 2.0, 3.0], "+--+"),  # median 2.5
        ({"partition": "median"}, [9.0, 1.0, 2.0], "+--"),  # median 2
        ({"partition": "median"}, [1.0, 1.0, 0.0], "..."),  # median 1: none above it
        ({"partition": "top_bottom"}, [5.0, 1.0, 3.0, 2.0, 4.0], "+-.-+"),  # the paper's 2 / 2 of 5
        ({"partition": "top_bottom", "num_top": 1, "num_bottom": 1}, [5.0, 1.0, 3.0], "+-."),
        ({"partition": "top_bottom"}, [5.0, 1.0, 3.0], "..."),  # fewer than 2 + 2
        ({"partition": "top_bottom"}, [1.0, 1.0, 1.0, 1.0], "...."),
        ({"partition": "top_bottom"}, [3.0, 1.0, 1.0, 1.0, 0.0], "++.--"),  # ties by index
        ({"partition": "one_vs_rest"}, [1.0, 7.0, 3.0], "-+-"),
        ({"partition": "one_vs_rest"}, [7.0, 7.0, 3.0], "+--"),  # ties by index
        ({"partition": "one_vs_rest"}, [7.0, 7.0], ".."),
    ],
)
def test_by_hand(params, rewards, expected):
    assert split(rewards, **params) == expected


def test_trimmed_mean_drops_a_tenth_at_each_end():
    rewards = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1000.0]  # trimmed mean 9/8; mean 100.9
    assert split(rewards, partition="trimmed_mean") == "--------++"
    assert split(rewards) == "---------+"
    assert split(rewards[1:], partition="trimmed_mean") == "--------+"  # a tenth of 9 is none


def test_labels():
    assert split(None, labels=[1, 0, -1, 1], partition="labels") == "+-.+"
    assert split(None, labels=[1, 1, -1, -1], partition="labels") == "...."


def test_padding_is_in_neither_set():
    nan = float("nan")
    assert split([nan, 4.0, 1.0, nan, 2.0], valid=[False, True, True, False, True]) == ".+-.-"
    assert split([nan, 4.0], valid=[False, True], partition="one_vs_rest") == ".."
    assert split(None, labels=[1, 0, 1], valid=[False, True, True], partition="labels") == ".-+"


def test_reward_at_the_mean_stays_on_its_side_in_every_order():
    """0.1 + 0.2 + 0.3 rounds differently by order of addition; the partition must not."""
    for dtype in (torch.float32, torch.float64):
        for rewards in ([0.1, 0.2, 0.3], [0.1, 0.7, 0.4, 0.4], [1e-3, 0.3, 0.7, 0.333666666]):
            sides = set()
            for order in itertools.permutations(range(len(rewards))):
                marks = split([rewards[i] for i in order], dtype=dtype)
                sides.add("".join(marks[order.index(i)] for i in range(len(rewards))))
                padded = split([0.0, *(rewards[i] for i in order)], valid=[False] + [True] * len(order), dtype=dtype)
                assert padded[1:] == marks
            assert len(sides) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e9])
def test_reward_equal_to_the_mean_on_paper_is_not_above_it(dtype, scale):
    rewards = [scale * reward for reward in (1.0, 0.4, 0.4, 0.0, 0.4, 0.4, 0.2, 0.4)]  # mean 0.4, and no 0.4 is exact
    assert split(rewards, dtype=dtype) == "+-------"
    assert split([scale * reward for reward in (0.4, 0.4001, 0.3999)], dtype=dtype) == "-+-"
