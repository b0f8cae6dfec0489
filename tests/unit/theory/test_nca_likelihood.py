"""NCA paper, §4.2: the chosen response's likelihood."""

import pytest
import torch

from examples.theory import nca_likelihood as example
from examples.theory.tabular import compute_mean_and_error
from mpo_megatron.losses import group_loss


@pytest.fixture(scope="module")
def runs():
    return example.compute_likelihoods()


@pytest.mark.parametrize("name", ["infonca", "dpo"])
def test_chosen_falls_under_relative_losses(runs, name):
    run = runs["shared"][name]
    mean, error = compute_mean_and_error(run.chosen[-1])
    assert mean < -4 * error  # below the reference, beyond chance
    assert (run.chosen[-1] < 0).double().mean() > 0.5
    assert mean < run.chosen.mean(dim=-1)[10] - 4 * error  # and it was higher at step 100
    assert run.final_margin.min() > 0  # although the loss did its work


def test_chosen_rises_under_nca(runs):
    run = runs["shared"]["nca"]
    mean, error = compute_mean_and_error(run.chosen[-1])
    assert mean > 4 * error
    assert (run.chosen[-1] > 0).all()
    assert run.final_margin.min() > 0


def test_chosen_rises_under_all_with_independent_logits(runs):
    for run in runs["independent"].values():
        assert (run.chosen[1:] > 0).all()


def test_first_gradients_are_parallel():
    rewards, gradients = example.draw_prompts().rewards, {}
    for name in ("infonca", "nca"):
        logps = torch.zeros_like(rewards, requires_grad=True)
        losses = group_loss(name, logps, torch.zeros_like(rewards), rewards, **example.HYPERPARAMETERS[name])
        (gradients[name],) = torch.autograd.grad(losses.sum(), logps)
    torch.testing.assert_close(gradients["nca"], 0.5 * gradients["infonca"], rtol=1e-9, atol=1e-12)


def test_report_and_picture(runs, tmp_path, capsys):
    example.report(runs)
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(runs, tmp_path).read_bytes().startswith(b"\x89PNG")
