"""MC-PO, Proposition 3.3."""

import pytest
import torch

from examples.theory import normalizer_gradient as example

DRAWS = 30_000
UNBIASED = 25.7  # the 99.99 % quantile of χ² with V − 1 = 5 degrees of freedom
BIASED = 200.0  # far beyond: 14 standard errors, and the smallest bias shown is resolved better than that


@pytest.fixture(scope="module")
def result():
    return example.compute_gradients(num_draws=DRAWS)


def test_unbiased_when_the_preferred_response_comes_from_the_model(result):
    for size, estimate in result.by_source["model p_θ"].items():
        assert estimate.chi_squared < UNBIASED, size
        # The test has power: errors are a twentieth of the gradient or less.
        assert estimate.standard_error.norm() < 0.05 * result.gradient.norm()
    for bias in result.exact["model p_θ"].values():
        assert bias.abs().max() < 1e-14


@pytest.mark.parametrize("source", ["policy π_θ", "best of 4 from π_θ", "data π*", "proposal μ"])
def test_biased_otherwise_by_what_enumeration_says(result, source):
    for size, estimate in result.by_source[source].items():
        assert estimate.chi_squared > BIASED, size
        exact = result.exact[source][size]
        # 4.5 standard errors in each of 6 coordinates of 16 estimates.
        assert ((estimate.bias - exact).abs() <= 4.5 * estimate.standard_error).all(), size
    sizes = [float(result.exact[source][size].norm()) for size in example.NUM_NEGATIVES]
    assert 1.5 < sizes[2] / sizes[3] < 2.1  # from M = 8 to 16: it falls as 1/M


def test_negatives_from_the_kernel(result):
    assert result.kernel["β ∇r(y_z), kernel with y_0"].chi_squared < UNBIASED
    for name in ("Eq. 7, kernel with y_0", "Eq. 7, kernel without y_0", "β ∇r(y_z), kernel without y_0"):
        assert result.kernel[name].chi_squared > BIASED, name


def test_pull_back_is_autograd():
    groups = torch.tensor([[0, 2, 2, 5]])
    logits = example.LOGITS.clone().requires_grad_(True)
    scores = example.BETA * (example.compute_logps(logits) - example.REFERENCE)[groups[0]]
    (expected,) = torch.autograd.grad(torch.logsumexp(scores, dim=-1), logits)
    gradients = example.compute_response_gradients("rnce", groups, num_negatives=3)
    torch.testing.assert_close(example.compute_normalizer_gradients(groups, gradients)[0], expected, rtol=1e-12, atol=1e-15)


def test_report_and_picture(result, tmp_path, capsys):
    example.report(result)
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(result, tmp_path).read_bytes().startswith(b"\x89PNG")
