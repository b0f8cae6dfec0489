"""Options of `mpo prepare` that change single groups: noise, the choice of responses, the scale of rewards, negatives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpo_megatron.config import PrepareConfig
from mpo_megatron.data.arrays import Float64
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.rewards import RewardScale, add_noise, choose_responses, normalize, swap_two_tokens


def changes_nothing(config: PrepareConfig) -> bool:
    """Whether `finish_group` leaves groups unchanged, except for labels."""
    keeps_rewards = config.reward_noise == 0 and config.reward_normalization == "none"
    return keeps_rewards and config.responses_per_prompt is None and not config.keep_best and not config.swapped_negatives


def finish_group(
    group: TokenizedGroup, config: PrepareConfig, *, chat: Chat, scale: RewardScale | None, labels: bool
) -> TokenizedGroup:
    """Apply the options for single groups: noise on all rewards, the choice of responses, the scale, added negatives.

    Args:
        scale: statistics of all accepted groups' rewards, before noise and choice; None with labels only
        labels: whether to keep labels
    """
    rewards = group.rewards
    if rewards is not None and config.reward_noise > 0:
        rewards = add_noise(rewards, config.reward_noise, group.group_id, seed=config.seed)
    best = int(np.argmax(_preference(group, rewards))) if config.keep_best else None
    keep = choose_responses(group.num_responses, config.responses_per_prompt, group.group_id, seed=config.seed, best=best)
    if rewards is not None:
        rewards = normalize(rewards[keep], config.reward_normalization, scale)
    masks = None if group.scored is None else tuple(group.scored[index] for index in keep)
    chosen = replace(
        group,
        response_tokens=tuple(group.response_tokens[index] for index in keep),
        scored=None if masks is None or all(mask.all() for mask in masks) else masks,
        response_texts=tuple(group.response_texts[index] for index in keep),
        rewards=rewards,
        labels=None if group.labels is None or not labels else group.labels[keep],
    )
    return _add_negatives(chosen, config, chat) if config.swapped_negatives else chosen


def _preference(group: TokenizedGroup, rewards: Float64 | None) -> Float64:
    """[K] values that identify the best response: rewards, or labels without rewards."""
    if rewards is not None:
        return rewards
    assert group.labels is not None
    return group.labels.astype(np.float64)


def _add_negatives(group: TokenizedGroup, config: PrepareConfig, chat: Chat) -> TokenizedGroup:
    """The group with copies of its best response with two tokens swapped; unchanged if no response is better than another."""
    preference = _preference(group, group.rewards)
    best = int(np.argmax(preference))
    if preference.min() == preference.max():
        return group
    tokens = group.response_tokens[best]
    movable = np.ones(len(tokens), np.bool_) if group.scored is None else group.scored[best].copy()
    movable[-1] &= tokens[-1] != chat.end_token_id
    swapped = swap_two_tokens(tokens, movable, config.swapped_negatives, group.group_id, seed=config.seed)
    number = len(swapped)
    texts = tuple(chat.tokenizer.decode(copy.tolist(), skip_special=True) for copy in swapped)
    lowest = None if group.rewards is None else np.concatenate([group.rewards, np.full(number, group.rewards.min())])
    return replace(
        group,
        response_tokens=(*group.response_tokens, *swapped),
        scored=None if group.scored is None else (*group.scored, *(group.scored[best],) * number),
        response_texts=(*group.response_texts, *texts),
        rewards=lowest,
        labels=None if group.labels is None else np.concatenate([group.labels, np.zeros(number, np.int8)]),
    )
