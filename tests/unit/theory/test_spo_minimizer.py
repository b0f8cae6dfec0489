"""SPO, Theorems 1–4."""

import pytest
import torch

from examples.theory import spo_minimizer as example
from examples.theory.tabular import compute_total_variation


@pytest.fixture(scope="module")
def result():
    return example.compute_minimizers()


@pytest.mark.parametrize("alpha", example.ALPHAS)
def test_every_start_ends_at_softmax_of_rewards(result, alpha):
    # 1e-6: L-BFGS stops at a gradient of 1e-9, and curvatures are above 1e-3.
    assert compute_total_variation(result.learned[alpha], example.compute_optimum(alpha)).max() < 1e-6
    # Plain descent converges linearly, here down to rounding.
    assert result.distances[alpha][-1].max() < 1e-12


@pytest.mark.parametrize("alpha", example.ALPHAS)
def test_gradient_is_zero_there_and_nowhere_else(alpha):
    pairs = example.build_pairs(example.draw_pair_frequencies())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(50, example.NUM_RESPONSES, dtype=torch.float64, generator=generator)
    logits = torch.cat([torch.zeros_like(noise[:1]), noise]) + example.REWARDS / alpha
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(example.compute_objective(logits, pairs, alpha).sum(), logits)
    assert gradient[0].abs().max() < 1e-15
    assert gradient[1:].norm(dim=-1).min() > 1e-3


def test_optimum_does_not_depend_on_form_or_weight(result):
    for form, distance in result.forms.items():
        assert distance < 1e-6, form
    assert result.weighted < 1e-12


def test_without_bradley_terry_data_the_policy_becomes_deterministic(result):
    for alpha, entropy in result.deterministic.items():
        assert (entropy[5:].diff() < 0).all(), alpha
        optimum = example.compute_optimum(alpha)
        assert entropy[-1] < -0.5 * torch.special.xlogy(optimum, optimum).sum()


def test_alpha_zero_goes_to_most_net_wins_not_to_the_best(result):
    assert example.REWARDS.argmax() == 0
    for name, winner in (("uniform", 0), ("skewed", 1)):
        assert result.net_wins[name].argmax() == winner
        assert result.greedy[name][winner] > 0.99


def test_report_and_picture(result, tmp_path, capsys):
    example.report(result)
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(result, tmp_path).read_bytes().startswith(b"\x89PNG")
