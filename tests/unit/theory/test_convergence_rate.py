"""MPO, Theorem 1 and SWEPO, Theorem 1."""

import math

import pytest
import torch

from examples.theory import convergence_rate as example

REPLICATES = 150


@pytest.fixture(scope="module")
def result():
    return example.compute_convergence(num_replicates=REPLICATES, num_set_replicates=10)


@pytest.mark.parametrize("name", ["likelihood", "choices"])
def test_slope_is_minus_one_half(result, name):
    fit = getattr(result, name).fit()
    # Resolved well: 4 standard errors stay within 0.04 of the truth.
    assert fit.standard_error < 0.01
    # 4 standard errors, and 0.01 for terms of order 1/n, which are 1/32 of the error at the smallest n.
    assert abs(fit.slope + 0.5) < 4 * fit.standard_error + 0.01


@pytest.mark.parametrize("name", ["likelihood", "choices"])
def test_error_follows_the_asymptotic_law_without_a_fitted_constant(result, name):
    errors, law = getattr(result, name), getattr(result, f"{name}_law")
    sizes = torch.tensor(example.SAMPLE_SIZES, dtype=torch.float64)
    late = sizes >= 512  # corrections of order 1/√n and 1/n are below 2 % from there
    deviation = (errors.total_variation - law / sizes.sqrt()).abs()
    assert (deviation <= 4 * errors.total_variation_error + 0.02 * law / sizes.sqrt())[late].all()


def test_bias_is_below_the_bound_and_has_its_exact_size(result):
    bias, error = result.likelihood.bias, result.likelihood.bias_error
    bound = result.attribute_deviation / torch.tensor(example.SAMPLE_SIZES, dtype=torch.float64).sqrt()
    assert (bias + 2 * error < bound).all()
    # The mean of |N(0, σ²/n)|; 4 standard errors, and 2 % for the binomial's distance from the normal at n = 32.
    exact = bound * math.sqrt(2 / math.pi)
    assert ((bias - exact).abs() <= 4 * error + 0.02 * exact).all()
    fit = result.likelihood.fit_bias()
    assert abs(fit.slope + 0.5) < 4 * fit.standard_error


def test_set_loss_does_not_converge(result):
    # It ends on one response: TV = 1 − max p, at every large n.
    plateau = 1 - example.build_family().true_probabilities.max()
    assert torch.allclose(result.set_loss.total_variation[-3:], plateau, atol=1e-3)
    assert result.set_loss.total_variation[-1] > 20 * result.likelihood.total_variation[-1]


def test_report_and_picture(result, tmp_path, capsys):
    example.report(result)
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(result, tmp_path).read_bytes().startswith(b"\x89PNG")
