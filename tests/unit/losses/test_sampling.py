"""Random pairs and negatives: the right distribution, the same for the same generator, gradient only where drawn."""

import dataclasses
import math

import torch

from mpo_megatron.losses import GroupBatch, build_params, get_loss

NUM_GROUPS = 5_000
RATIOS = torch.tensor([0.3, -1.0, 0.5, 1.2], dtype=torch.float64)  # log-ratios; response 0 is the best


def make_copies(seed=0):
    """The same four responses in many groups: frequencies over groups estimate the probabilities of one draw."""
    policy = (RATIOS - 10.0).repeat(NUM_GROUPS, 1).requires_grad_()
    return GroupBatch(
        policy_logps=policy,
        valid=torch.ones(NUM_GROUPS, 4, dtype=torch.bool),
        reference_logps=torch.full((NUM_GROUPS, 4), -10.0, dtype=torch.float64),
        rewards=torch.tensor([5.0, 1.0, 2.0, 0.0]).repeat(NUM_GROUPS, 1),
        generator=torch.Generator().manual_seed(seed),
    )


def draw(name, **hyperparameters):
    """Losses, and the drawn responses, inferred from the gradient."""
    batch = make_copies()
    values = get_loss(name).compute(batch, build_params(name, hyperparameters))
    values.sum().backward()
    return values.detach(), batch.policy_logps.grad != 0


def assert_frequency(events, probability):
    # 5 standard errors: fails by chance once in two million runs, and the seed is fixed.
    error = math.sqrt(probability * (1 - probability) / NUM_GROUPS)
    assert abs(events.double().mean().item() - probability) < 5 * error


def test_kernel_draws_in_proportion_to_exp_beta_s():
    """mc-po Algorithm 1, over the negatives."""
    _, drawn = draw("mcpo", beta=1.0)
    probabilities = torch.softmax(RATIOS[1:], dim=0)
    assert (drawn[:, 1:].sum(-1) == 1).all()  # one negative each, zero gradient for the others
    for response, probability in enumerate(probabilities.tolist(), start=1):
        assert_frequency(drawn[:, response], probability)


def test_random_draws_uniformly():
    _, drawn = draw("mcpo", beta=1.0, sampling="random")
    for response in (1, 2, 3):
        assert_frequency(drawn[:, response], 1 / 3)


def test_best_random_pairing_draws_uniformly():
    _, drawn = draw("dpo", pairing="best_random")
    assert (drawn[:, 1:].sum(-1) == 1).all()
    for response in (1, 2, 3):
        assert_frequency(drawn[:, response], 1 / 3)


def test_several_negatives_are_drawn_without_replacement():
    """P(j left out) for two of three, drawn one after the other in proportion to their weights."""
    _, drawn = draw("mcpo", beta=1.0, num_negatives=2)
    assert (drawn[:, 1:].sum(-1) == 2).all()
    p = torch.softmax(RATIOS[1:], dim=0).tolist()
    for j in range(3):
        a, b = (i for i in range(3) if i != j)
        left_out = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
        assert_frequency(~drawn[:, j + 1], left_out)


def test_more_negatives_than_candidates_takes_all():
    _, drawn = draw("mcpo", beta=1.0, num_negatives=7)
    assert drawn.all()


def test_current_state_may_be_its_own_negative():
    """Algorithm 1 literally: the chain ends at y_0 with probability w_0; then the loss is ln 2, without gradient."""
    stay = torch.softmax(RATIOS, dim=0)[0].item()
    for steps in (1, 2, 5):
        values, drawn = draw("mcpo", beta=1.0, include_current=True, chain_steps=steps)
        stayed = ~drawn.any(dim=-1)
        assert_frequency(stayed, stay)
        assert (values[stayed] - math.log(2)).abs().max() < 1e-15


def test_chains_of_any_length_are_exact_on_fixed_candidates():
    """Chi-square test of the chain's last state against softmax(β s) over y_0 and all candidates."""
    expected = torch.softmax(RATIOS, dim=0) * NUM_GROUPS
    for steps in (1, 2, 3, 8):
        _, drawn = draw("mcpo", beta=1.0, include_current=True, chain_steps=steps)
        seen = drawn[:, 1:].sum(dim=0).double()
        seen = torch.cat([(NUM_GROUPS - seen.sum())[None], seen])
        statistic = ((seen - expected) ** 2 / expected).sum()
        # p > 1e-4 on 3 degrees of freedom; the seed is fixed. A chain that cannot return to y_0 gives 806 at two steps.
        assert torch.special.gammaincc(torch.tensor(1.5).double(), statistic / 2) > 1e-4


def test_max_and_min_take_the_extreme_weights():
    for sampling, expected in (("max", 3), ("min", 1)):
        _, drawn = draw("mcpo", beta=1.0, sampling=sampling)
        assert drawn[:, expected].all()
        assert drawn.sum() == 2 * NUM_GROUPS


def test_same_generator_state_same_draw():
    for name, hyperparameters in (("mcpo", {}), ("rnce", {}), ("dpo", {"pairing": "best_random"})):
        loss, params = get_loss(name), build_params(name, hyperparameters)
        batch = make_copies(seed=7)
        first = loss.compute(batch, params)
        assert not torch.equal(loss.compute(batch, params), first)  # the generator has moved on
        again = dataclasses.replace(batch, generator=torch.Generator().manual_seed(7))
        assert torch.equal(loss.compute(again, params), first)


def test_kernel_follows_the_current_policy():
    """A candidate that the policy now favours is drawn (almost) always."""
    batch = make_copies()
    moved = batch.policy_logps.detach() + torch.tensor([0.0, 50.0, 0.0, 0.0])
    source = moved.requires_grad_()
    batch = dataclasses.replace(batch, policy_logps=source)
    get_loss("mcpo").compute(batch, build_params("mcpo", {"beta": 1.0})).sum().backward()
    assert (source.grad[:, 1] != 0).all()
