"""NCA paper, Theorems 3.2 and 4.2."""

import itertools

import pytest
import torch

from examples.theory import nca_optimum as example
from examples.theory.tabular import compute_total_variation

SOLVED = 2e-6  # L-BFGS stops at a gradient of 1e-9; the smallest curvatures are about 1e-3


@pytest.fixture(scope="module")
def result():
    return example.compute_optima()


def test_infonca_finds_rewards_up_to_a_constant_at_every_group_size(result):
    for size, found in result.infonca.items():
        offsets = example.compute_offsets(found)
        shape = found - example.REWARDS / example.ALPHA - offsets.unsqueeze(-1)
        assert shape.abs().max() < SOLVED, size
        assert offsets.max() - offsets.min() > 1  # the constant is the start's: nothing determines it
        policy = torch.softmax(example.REFERENCE + found, dim=-1)
        assert compute_total_variation(policy, example.compute_tilted_policy(1.0)).max() < SOLVED


def test_nca_finds_one_absolute_value(result):
    for size, found in result.nca.items():
        assert (found - example.compute_finite_rewards(size)).abs().max() < SOLVED, size
        assert ((example.REFERENCE + found).exp().sum(dim=-1) - 1).abs().max() < SOLVED


def test_nca_approaches_the_theorem_as_one_over_group_size(result):
    target = example.compute_target_rewards()
    errors = [float((result.nca[size] - target).abs().max()) for size in example.GROUP_SIZES]
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert all(1.8 < ratio < 2.1 for ratio in ratios), ratios  # halves with each doubling of K
    assert errors[0] > 0.5  # far off for pairs
    # With an error of a/K + b/K², 2 r(2K) − r(K) is off by −b/(2K²): the limit is the theorem's value.
    found = {size: result.nca[size].mean(dim=0) for size in (8, 16, 32)}
    second_order = [float((2 * found[2 * size] - found[size] - target).abs().max()) for size in (8, 16)]
    assert second_order[0] / second_order[1] == pytest.approx(4, rel=0.15)  # the next order, 1/K³, is 1/16 of it


def test_beta_other_than_one(result):
    for beta in example.BETAS:
        tilted = example.compute_tilted_policy(beta)
        assert compute_total_variation(result.infonca_scaled[beta], tilted) < SOLVED
        # Only at β = 1 is it the theorem's policy.
        distance = compute_total_variation(result.infonca_scaled[beta], example.compute_tilted_policy(1.0))
        assert (distance < SOLVED) == (beta == 1.0)
    finite_group_error = compute_total_variation(result.nca_scaled[1.0], example.compute_tilted_policy(1.0))
    for beta in (0.25, 0.5):
        assert compute_total_variation(result.nca_scaled[beta], example.compute_tilted_policy(beta)) > 4 * finite_group_error


def test_report_and_picture(result, tmp_path, capsys):
    example.report(result)
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(result, tmp_path).read_bytes().startswith(b"\x89PNG")
