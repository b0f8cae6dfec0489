"""Gradients: numerically, by the papers' identities, and where they must be exactly zero (or must not be)."""

import dataclasses
import math

import pytest
import torch

from mpo_megatron.losses import build_params, compute_partition, get_loss, group_loss

from .groups import CASES, get_input, make_batch, name_case


def differentiate(name, hyperparameters, batch):
    """Per-group losses, and the gradient of their sum."""
    source = getattr(batch, get_input(batch, name)).clone().requires_grad_()
    batch = dataclasses.replace(batch, **{get_input(batch, name): source})
    values = get_loss(name).compute(batch, build_params(name, hyperparameters))
    values.sum().backward()
    return values.detach(), source.grad


def has_detached_statistic(name, hyperparameters):
    return get_loss(name).needs(build_params(name, hyperparameters)).batch_statistics


@pytest.mark.parametrize("case", [c for c in CASES if not has_detached_statistic(*c)], ids=name_case)
def test_gradcheck(case):
    name, hyperparameters = case
    batch = make_batch(4, 5, seed=11, logps="near")
    loss, params = get_loss(name), build_params(name, hyperparameters)
    field = get_input(batch, name)
    source = torch.nan_to_num(getattr(batch, field)).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: loss.compute(dataclasses.replace(batch, **{field: values}), params), (source,))


@pytest.mark.parametrize("case", [c for c in CASES if has_detached_statistic(*c)], ids=name_case)
def test_batch_statistics_carry_no_gradient(case):
    """The gradient of one group's loss does not reach the other groups through the baseline or μ."""
    name, hyperparameters = case
    batch = make_batch(seed=12, logps="near")
    source = batch.policy_logps.clone().requires_grad_()
    values = get_loss(name).compute(dataclasses.replace(batch, policy_logps=source), build_params(name, hyperparameters))
    (gradient,) = torch.autograd.grad(values[0], source)
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0


@pytest.mark.parametrize("form", ["pairs", "best_of_n"])
def test_soft_weight_scales_the_gradient(form):
    """SPO Eq. 14: μ multiplies the gradient of the unweighted loss, and is not differentiated."""
    batch = make_batch(seed=13, logps="near")
    plain, plain_gradient = differentiate("spo", {"form": form, "gamma": 0.0}, batch)
    weighted, gradient = differentiate("spo", {"form": form, "gamma": 0.5}, batch)
    weight = torch.where(plain > 0, weighted / torch.where(plain > 0, plain, 1.0), 1.0)
    assert (weight - 1).abs().max() > 1e-3
    torch.testing.assert_close(gradient, weight.unsqueeze(-1) * plain_gradient, rtol=1e-12, atol=1e-15)


def test_bco_shift_is_a_constant():
    batch = make_batch(seed=14, logps="near")
    positive, negative = compute_partition(batch, build_params("bco", {}))
    rewards = 0.1 * (batch.policy_logps - batch.reference_logps)
    shift = 0.5 * (rewards[positive].mean() + rewards[negative].mean())
    _, gradient = differentiate("bco", {"beta": 0.1}, batch)
    pull = -0.1 * torch.sigmoid(shift - rewards) / positive.sum(-1, keepdim=True)
    push = 0.1 * torch.sigmoid(rewards - shift) / negative.sum(-1, keepdim=True)
    expected = torch.where(positive, pull, torch.where(negative, push, 0.0))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("mpo", {"beta": 0.1}),
        ("wmpo", {"beta": 0.1, "alpha": 2.0}),
        ("wmpo", {"beta": 0.1, "alpha": 2.0, "deviation": "signed"}),
        ("swepo", {"beta": 0.1, "alpha": 2.0, "p": 2}),
    ],
)
def test_gradient_is_difference_of_softmaxes(name, hyperparameters):
    """mpo Lemma 6, swepo Lemma 2: ∂L/∂(β s_i) = p_i^weighted − p_i^pos, by loops over the responses."""
    batch = make_batch(seed=15, logps="near")
    _, gradient = differentiate(name, hyperparameters, batch)
    positive, negative = compute_partition(batch, build_params(name, hyperparameters))
    for g in range(batch.valid.shape[0]):
        members = [i for i in range(batch.valid.shape[1]) if positive[g, i] or negative[g, i]]
        if not members:
            assert gradient[g].abs().sum() == 0
            continue
        rewards = batch.rewards[g][batch.valid[g]]
        powers = {}
        for i in members:
            deviation = float(batch.rewards[g, i] - rewards.mean())
            if hyperparameters.get("deviation") != "signed":
                deviation = abs(deviation)
            log_weight = hyperparameters.get("alpha", 0.0) * deviation ** hyperparameters.get("p", 1)
            ratio = float(batch.policy_logps[g, i] - batch.reference_logps[g, i])
            powers[i] = math.exp(0.1 * ratio + log_weight)
        everything = sum(powers.values())
        preferred = sum(powers[i] for i in members if positive[g, i])
        for i in members:
            expected = powers[i] / everything - (powers[i] / preferred if positive[g, i] else 0.0)
            assert math.isclose(float(gradient[g, i]) / 0.1, expected, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_zero_gradient_where_nothing_counts(case):
    """Exactly zero, never NaN: at padding (which holds NaN), at unscored responses, in groups without contrast."""
    name, hyperparameters = case
    batch = make_batch(seed=16)
    loss, params = get_loss(name), build_params(name, hyperparameters)
    _, gradient = differentiate(name, hyperparameters, batch)
    scored = loss.scored(batch, params)
    assert gradient.isfinite().all()
    assert (gradient[~scored] == 0).all()
    assert (scored & ~batch.valid).sum() == 0
    if loss.needs(params).contrast:
        assert not loss.contributes(batch, params).all()  # the batch has such groups


@pytest.mark.parametrize("value", [-torch.inf, torch.inf])
@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_an_infinite_log_prob_makes_its_groups_loss_nan(case, value):
    """Never a finite number: the trainer reports a step whose loss is not finite, with the group."""
    name, hyperparameters = case
    batch = make_batch(seed=17, logps="near")
    loss, params = get_loss(name), build_params(name, hyperparameters)
    group = int(loss.contributes(batch, params).nonzero()[0])
    field = get_input(batch, name)
    values = getattr(batch, field).clone()
    values[group][loss.scored(batch, params)[group]] = value  # all, because some losses draw what they use
    losses = loss.compute(dataclasses.replace(batch, **{field: values}), params)
    assert losses[group].isnan()
    if not loss.needs(params).batch_statistics:
        assert losses.isfinite().sum() == len(losses) - 1


def listing_loss(policy_logps, reference_logps, rewards, beta):
    """MPO as the paper's listing (App. K, α = 0) computes it: softmax, sums clamped at 1e-10, log."""
    eps = 1e-10
    logits = (policy_logps - reference_logps) * beta
    probabilities = torch.softmax(logits - logits.max(dim=-1, keepdim=True)[0] + eps, dim=-1)
    above = rewards > rewards.mean(dim=-1, keepdim=True)
    positive = torch.clamp((probabilities * above).sum(dim=-1), min=eps)
    negative = torch.clamp((probabilities * ~above).sum(dim=-1), min=eps)
    return -torch.log(positive / (positive + negative + eps * 2))


def test_no_dead_gradient_where_the_listing_has_one():
    """A policy that ranks the group entirely wrong: the clamped listing cannot learn from it, ours can."""
    rewards = torch.tensor([[3.0, 1.0, 0.0]])
    reference = torch.tensor([[-100.0, -100.0, -100.0]])
    start = torch.tensor([[-500.0, -100.0, -50.0]])  # β s = −40, 0, 5: the best has probability e^−45
    theirs = start.clone().requires_grad_()
    listing_loss(theirs, reference, rewards, beta=0.1).sum().backward()
    ours = start.clone().requires_grad_()
    value = group_loss("mpo", ours, reference, rewards, beta=0.1)
    value.sum().backward()
    assert abs(float(theirs.grad[0, 0])) < 1e-18
    assert math.isclose(float(ours.grad[0, 0]), -0.1, rel_tol=1e-6)
    assert math.isclose(value.item(), 45.0 + math.log1p(math.exp(-5.0)), rel_tol=1e-6)


def test_small_losses_keep_their_digits():
    """A group already won by 60 nats: −log(pos / all) in float32 would be 0 with zero gradient."""
    policy = torch.tensor([[-10.0, -70.0]], requires_grad=True)
    value = group_loss("mpo", policy, torch.full((1, 2), -40.0), torch.tensor([[1.0, 0.0]]), beta=1.0)
    value.sum().backward()
    assert math.isclose(value.item(), math.exp(-60.0), rel_tol=1e-5)
    assert math.isclose(float(policy.grad[0, 0]), -math.exp(-60.0), rel_tol=1e-5)


@pytest.mark.parametrize("loser", [-1e-7, -3.0])
def test_orpo_at_probability_one(loser):
    """The winner's tokens all have probability one in float: log odds +∞ becomes a large finite number."""
    policy = torch.tensor([[0.0, loser]], requires_grad=True)
    lengths = torch.ones(1, 2, dtype=torch.int64)
    value = group_loss("orpo", policy, None, torch.tensor([[1.0, 0.0]]), lengths=lengths)
    value.sum().backward()
    assert value.isfinite().all()
    assert policy.grad.isfinite().all()


def test_exploding_ratios_stay_finite():
    """Policy far above the reference: e^s overflows; the tangent keeps value and gradient finite and nonzero."""
    rewards = torch.tensor([[1.0, 0.0]])
    policy = torch.tensor([[-5.0, -6.0]], requires_grad=True)
    reference = torch.full((1, 2), -5000.0)
    value = group_loss("spo", policy, reference, rewards, regularizer="importance")
    value.sum().backward()
    assert value.isfinite().all()
    assert policy.grad.isfinite().all()
    assert (policy.grad > 0).all()
    tokens = torch.tensor([[[-1.0], [-1.0]]], requires_grad=True)
    far = torch.tensor([[[-900.0], [-900.0]]])
    ones = torch.ones(1, 2, dtype=torch.int64)
    value = group_loss("grpo_offline", policy, None, rewards, lengths=ones, token_logps=tokens, reference_token_logps=far)
    value.sum().backward()
    assert value.isfinite().all()
    assert tokens.grad.isfinite().all()
