"""Where one method must equal another, and the values that follow from the definitions alone."""

import dataclasses
import math

import pytest
import torch

from mpo_megatron.losses import build_params, get_loss, group_loss

from .groups import make_batch


def compute(name, batch, **hyperparameters):
    return get_loss(name).compute(batch, build_params(name, hyperparameters))


def make_pairs(**options):
    """Groups of two responses with different rewards (group 1 has one response)."""
    return make_batch(8, 2, rewards="distinct", **options)


PAIR_IDENTITIES = [
    (("mpo", {"beta": 0.1}), ("dpo", {"beta": 0.1})),
    (("mpo", {"beta": 0.1, "partition": "one_vs_rest"}), ("dpo", {"beta": 0.1})),
    (("infonca", {"beta": 0.1, "alpha": 1e-9}), ("dpo", {"beta": 0.1})),
    (("nca", {"beta": 0.1, "alpha": 1e-9}), ("nca_pair", {"beta": 0.1})),
    (("mcpo", {"beta": 0.1, "sampling": "max"}), ("dpo", {"beta": 0.1})),
    (("mcpo", {"beta": 0.1}), ("dpo", {"beta": 0.1})),
    (("rnce", {"beta": 0.1}), ("dpo", {"beta": 0.1})),
    (("sdpo", {"beta": 0.1}), ("dpo", {"beta": 0.1})),
    (("sdpo", {"beta": 0.1, "form": "ranked"}), ("dpo", {"beta": 0.1})),
    (("mpo_bins", {"beta": 0.1}), ("dpo", {"beta": 0.1})),
    (("dpo_positive", {"beta": 0.1, "penalty": 0.0}), ("dpo", {"beta": 0.1})),
    (("plackett_luce", {"beta": 0.1}), ("dpo", {"beta": 0.1})),
    (("rdpo", {"beta": 0.1, "alpha": 0.0}), ("dpo", {"beta": 0.1})),
    (("rpo", {"beta": 0.1, "sft_weight": 0.3}), ("dpo", {"beta": 0.1, "sft_weight": 0.3})),
    (("mpo_reference_free", {"beta": 2.0, "gamma": 0.5}), ("simpo", {"beta": 2.0, "gamma": 0.5})),
    (("spo", {"form": "best_of_n"}), ("spo", {})),
    (("spo", {"form": "ranked", "eta": 0.3}), ("spo", {})),
    (("spo", {"form": "best_of_n", "alpha": 0.0}), ("spo", {"alpha": 0.0})),
    (("spo", {"alpha": 1.0, "gamma": 0.0}), ("cpo", {"beta": 1.0, "sft_weight": 0.0})),
]


@pytest.mark.parametrize(("left", "right"), PAIR_IDENTITIES, ids=lambda side: side[0])
def test_two_responses(left, right):
    batch = make_pairs(seed=21, logps="near")
    infonca = 1e-6 if "alpha" in left[1] and left[1]["alpha"] == 1e-9 else 1e-12  # α → 0, not = 0
    torch.testing.assert_close(compute(left[0], batch, **left[1]), compute(right[0], batch, **right[1]), rtol=infonca, atol=0)


GROUP_IDENTITIES = [
    (("wmpo", {"alpha": 0.0}), ("mpo", {})),
    (("wmpo", {"alpha": 0.0, "deviation": "signed"}), ("mpo", {})),
    (("swepo", {"p": 0, "weighting": "exp", "beta": 0.01}), ("mpo", {})),
    (("swepo", {"p": 0, "weighting": "power", "beta": 0.01}), ("mpo", {})),
    (("swepo", {"p": 0, "weighting": "listing", "beta": 0.01}), ("mpo", {})),
    (("swepo", {"p": 1, "alpha": 10.0, "beta": 0.01}), ("wmpo", {})),
    (("spo", {"form": "ranked", "eta": 0.0}), ("spo", {"form": "best_of_n"})),
    (("sdpo", {"beta": 0.01}), ("mpo", {"partition": "one_vs_rest"})),
    (("mpo_bins", {"num_bins": 99}), ("plackett_luce", {})),
    (("mcpo", {"num_negatives": 99}), ("mpo", {"partition": "one_vs_rest"})),
    (("dpo", {"pairing": "cross_pairs", "partition": "one_vs_rest"}), ("dpo", {"pairing": "best_vs_each"})),
]


@pytest.mark.parametrize(("left", "right"), GROUP_IDENTITIES, ids=lambda side: side[0])
def test_any_number_of_responses(left, right):
    batch = make_batch(seed=22, rewards="distinct", logps="near")
    torch.testing.assert_close(compute(left[0], batch, **left[1]), compute(right[0], batch, **right[1]), rtol=1e-12, atol=1e-14)


def test_rnce_with_one_negative_is_dpo_best_vs_random():
    """The same generator state draws the same negative."""
    batch = make_batch(seed=23, rewards="distinct")

    def reseed():
        return dataclasses.replace(batch, generator=torch.Generator().manual_seed(5))

    left = compute("rnce", reseed(), beta=0.1)
    right = compute("dpo", reseed(), beta=0.1, pairing="best_random")
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


def test_soft_limit_has_the_gradient_of_small_alpha():
    """SPO: the gradient at α → 0 is the one of Eq. 10 (the values differ by a constant / α)."""
    for form in ("pairs", "best_of_n", "ranked"):
        gradients = []
        for alpha in (1e-9, 0.0):
            batch = make_batch(seed=24, rewards="distinct", logps="near")
            source = batch.policy_logps.clone().requires_grad_()
            batch = dataclasses.replace(batch, policy_logps=source)
            compute("spo", batch, form=form, alpha=alpha).sum().backward()
            gradients.append(source.grad)
        # α·logp / α: the small-α side has 1e-16 / 1e-9 of rounding, and the limit itself is O(α).
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)


def test_policy_equal_to_reference():
    """Step 1 of training: DPO's loss is ln 2, MPO's ln((|Y+| + |Y−|) / |Y+|), Plackett–Luce's ln K!."""
    batch = make_batch(seed=25, rewards="distinct")
    batch = dataclasses.replace(batch, policy_logps=batch.reference_logps)
    counts = batch.valid.sum(-1)
    above = torch.where(batch.valid, batch.rewards, 0.0).sum(-1) / counts
    positive = (batch.valid & (batch.rewards > above.unsqueeze(-1))).sum(-1)
    for g, count in enumerate(counts.tolist()):
        if count == 1:
            continue
        assert math.isclose(compute("dpo", batch)[g], math.log(2), rel_tol=1e-12)
        assert math.isclose(compute("mpo", batch)[g], math.log(count / int(positive[g])), rel_tol=1e-12)
        assert math.isclose(compute("plackett_luce", batch)[g], math.lgamma(count + 1), rel_tol=1e-12)


def test_sum_over_pairs_is_mean_times_count():
    batch = make_batch(seed=26, rewards="distinct")
    counts = batch.valid.sum(-1)
    mean = compute("dpo", batch, pairing="all_pairs")
    total = compute("dpo", batch, pairing="all_pairs", reduction="sum")
    torch.testing.assert_close(total, mean * counts * (counts - 1) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["pairs", "best_of_n", "ranked"])
def test_spo_adds_the_mean_divergence_of_the_scored_responses(form):
    policy = torch.tensor([[-3.0, -5.0, -4.0], [-2.0, -6.0, -1.0]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 0.0]])
    kl = torch.tensor([[0.5, 0.25, 4.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    settings = {"form": form, "alpha": 0.1, "gamma": 0.0, "valid": valid}
    plain = group_loss("spo", policy, None, rewards, **settings)
    with_kl = group_loss("spo", policy, None, rewards, token_kl=kl, regularizer="token_kl", regularizer_weight=0.2, **settings)
    # Best and worst of the first group are 0 and 1; a ranking scores all three. The second group has two responses.
    expected = [0.2 * (0.375 if form == "pairs" else 4.75 / 3), 0.2 * 1.5]
    assert (with_kl - plain).tolist() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(with_kl.sum(), kl)
    assert gradient.sum(dim=1).tolist() == pytest.approx([0.2, 0.2])
    assert gradient[1, 2] == 0
    with pytest.raises(ValueError, match="token_kl = None; spo regularises"):
        group_loss("spo", policy, None, rewards, regularizer="token_kl", **settings)
