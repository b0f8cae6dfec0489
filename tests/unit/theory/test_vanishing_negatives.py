"""MPO, Lemma 1."""

import pytest
import torch

from examples.theory import vanishing_negatives as example


@pytest.fixture(scope="module")
def result():
    return example.compute_vanishing()


@pytest.mark.parametrize("beta", example.BETAS)
def test_negatives_vanish_with_the_predicted_exponent(result, beta):
    flow = result.set_loss[beta]
    # Falls at every recorded time after the first steps, down to the law τ^(−1/β).
    late = flow.log_negative[flow.times > 1e2]
    assert (late.diff() < 0).all()
    # 1 %: the leading positive's takeover still changes the prefactor a little over the fitted decades.
    assert flow.fit_exponent() == pytest.approx(-1 / beta, rel=0.01)


@pytest.mark.parametrize("beta", example.BETAS)
def test_gradient_on_negatives_is_their_share_and_vanishes(result, beta):
    flow = result.set_loss[beta]
    shares = example.compute_shares(flow.log_probabilities, beta)
    torch.testing.assert_close(flow.gradients[:, example.NEGATIVES], beta * shares[:, example.NEGATIVES], rtol=1e-9, atol=0.0)
    assert (flow.gradients[:, example.NEGATIVES] > 0).all()  # no stationary point at finite logits
    assert flow.gradients[-1].abs().max() < 1e-11  # 1/τ at τ = 2e12, and a factor below 10


def test_infonca_keeps_the_negatives_alive(result):
    group = example.GROUP[0]
    within = torch.softmax(result.infonca.log_probabilities[-1, group], dim=-1)
    optimum = example.REWARDS[0].exp() * example.REFERENCE[group].exp()  # e^{S/(αβ)} π_ref, but for its normalizer; α = β = 1
    # The flow is within e^(−λ τ) of its limit; λ τ ≈ 15 at τ = 300.
    torch.testing.assert_close(within, optimum / optimum.sum(), rtol=0.0, atol=1e-4)
    assert within[example.NEGATIVES].min() > 0.02


def test_tied_negative_survives(result):
    probability = result.tied.log_probabilities[-1, example.NEGATIVES[0]].exp()
    assert probability == pytest.approx(0.5, abs=1e-6)


def test_report_and_picture(result, tmp_path, capsys):
    example.report(result)
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(result, tmp_path).read_bytes().startswith(b"\x89PNG")
