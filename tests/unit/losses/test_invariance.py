"""The order of responses, padding, other groups and ignored fields must not change a loss."""

import dataclasses

import pytest
import torch

from mpo_megatron.losses import build_params, get_loss

from .groups import CASES, index_responses, make_batch, name_case

# 1e-12: the same float64 sums in another order.
close = {"rtol": 1e-11, "atol": 1e-13}


def compute(case, batch):
    batch = dataclasses.replace(batch, generator=torch.Generator().manual_seed(0))
    return get_loss(case[0]).compute(batch, build_params(*case))


def cuts_ties_by_index(case):
    """Methods that select one of several equal rewards, as documented."""
    name, p = case[0], build_params(*case)
    if getattr(p, "partition", "mean") in ("top_bottom", "one_vs_rest"):
        return True
    if (
        name in ("plackett_luce", "sdpo", "mpo_bins", "mcpo", "rnce", "sft", "nca_reference_free")
        or getattr(p, "form", "pairs") != "pairs"
    ):
        return True
    return getattr(p, "pairing", "all_pairs") in ("best_worst", "best_vs_each")


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_order_of_responses(case):
    rewards = "distinct" if cuts_ties_by_index(case) else "ties"
    batch = make_batch(seed=31, rewards=rewards)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = index_responses(batch, order)
    torch.testing.assert_close(compute(case, shuffled), compute(case, batch), **close)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_padding(case):
    """Three more columns of padding full of NaN, in front and behind."""
    batch = make_batch(seed=32)
    index = torch.tensor([0, 0, 1, 2, 3, 4, 5, 5, 5])
    padded = index_responses(batch, index)
    extra = torch.tensor([True, False, False, False, False, False, False, True, True])
    padded = dataclasses.replace(
        padded,
        valid=padded.valid & ~extra,
        **{
            name: getattr(padded, name).masked_fill(extra if getattr(padded, name).dim() == 2 else extra[:, None], torch.nan)
            for name in ("policy_logps", "reference_logps", "rewards", "token_logps", "reference_token_logps")
        },
    )
    torch.testing.assert_close(compute(case, padded), compute(case, batch), **close)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_other_groups_matter_only_to_batch_statistics(case):
    batch = make_batch(seed=33, logps="near")
    part = dataclasses.replace(
        batch,
        **{
            field.name: getattr(batch, field.name)[[0, 3]]
            for field in dataclasses.fields(batch)
            if isinstance(getattr(batch, field.name), torch.Tensor)
        },
    )
    alone, together = compute(case, part), compute(case, batch)[[0, 3]]
    if get_loss(case[0]).needs(build_params(*case)).batch_statistics:
        assert not torch.allclose(alone, together, rtol=1e-9, atol=0)
    else:
        torch.testing.assert_close(alone, together, **close)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_needs_are_exact(case):
    """Without fields that a method does not need, its value is the same; without a needed field, it raises."""
    loss, params = get_loss(case[0]), build_params(*case)
    needs = loss.needs(params)
    batch = make_batch(seed=34)
    expected = compute(case, batch)
    fields = {
        "reference_logps": needs.reference and not needs.tokens,
        "rewards": needs.rewards,
        "labels": needs.labels,
        "lengths": needs.lengths,
        "token_logps": needs.tokens,
        "reference_token_logps": needs.tokens and needs.reference,
        "generator": needs.sampled,
    }
    ordered_by_rewards = needs.preferences or getattr(params, "targets", None) == "best"
    unneeded = [name for name, needed in fields.items() if not needed]
    if ordered_by_rewards:
        unneeded.remove("rewards")
    fresh = dataclasses.replace(batch, generator=torch.Generator().manual_seed(0))
    bare = dataclasses.replace(fresh, **dict.fromkeys(unneeded))
    torch.testing.assert_close(loss.compute(bare, params), expected, rtol=0, atol=0)
    for name in (name for name, needed in fields.items() if needed):
        with pytest.raises(ValueError, match=" = None; "):
            loss.compute(dataclasses.replace(batch, **{name: None}), params)
    if needs.preferences:
        with pytest.raises(ValueError, match="rewards = None, labels = None"):
            loss.compute(dataclasses.replace(batch, rewards=None, labels=None), params)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_scored_without_log_probabilities(case):
    """`scored` and `contributes` read neither log-probabilities nor the generator."""
    loss, params = get_loss(case[0]), build_params(*case)
    batch = make_batch(seed=35)
    blind = dataclasses.replace(
        batch,
        policy_logps=torch.full_like(batch.policy_logps, torch.nan),
        reference_logps=None,
        token_logps=None,
        reference_token_logps=None,
        generator=None,
    )
    assert torch.equal(loss.scored(blind, params), loss.scored(batch, params))
    assert torch.equal(loss.contributes(blind, params), loss.scored(batch, params).any(-1))


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_unscored_responses_need_no_log_probabilities(case):
    """Responses that a trainer skips in the forward pass may hold any number."""
    loss, params = get_loss(case[0]), build_params(*case)
    batch = make_batch(seed=36)
    scored = loss.scored(batch, params)
    filled = dataclasses.replace(
        batch,
        policy_logps=torch.where(scored, batch.policy_logps, -77.0),
        reference_logps=torch.where(scored, batch.reference_logps, 0.0),
        token_logps=torch.where(scored.unsqueeze(-1), batch.token_logps, -7.0),
    )
    torch.testing.assert_close(compute(case, filled), compute(case, batch), rtol=0, atol=0)
