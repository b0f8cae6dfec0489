"""MPO, Theorem 2."""

import itertools
import math

import pytest

from examples.theory import partition_reliability as example

TRIALS = 10_000


@pytest.fixture(scope="module")
def points():
    return example.compute_reliability(num_trials=TRIALS)


def test_halves_stay_above_the_bounds(points):
    for point in points:
        assert point.halves_exact >= point.union_bound
        assert point.halves_exact >= point.product_bound
        # 4 standard errors: one false alarm in 30,000 per point.
        assert point.halves >= point.product_bound - 4 * point.compute_error(point.product_bound)


def test_union_bound_is_positive_up_to_beta_one_and_empty_at_two():
    assert 1 - example.compute_union_bound(1.0) > 0.5
    assert 1 - example.compute_union_bound(2.0) < 0 < example.compute_product_bound(2.0)


def test_halves_do_not_depend_on_the_number_of_responses(points):
    for beta in example.BETAS:
        exact = {p.num_responses: p.halves_exact for p in points if p.beta == beta}
        # Pairs 16 ranks apart flip with probability Φ(−16/(√2 · 2)) < 1e-7: nothing is left to lose beyond k = 32.
        assert math.isclose(exact[32], exact[64], abs_tol=1e-6)


def test_simulation_agrees_with_the_integrals(points):
    for point in points:
        for simulated, exact in ((point.halves, point.halves_exact), (point.order, point.order_exact)):
            # 4 standard errors and half a count, for probabilities too small to occur.
            assert abs(simulated - exact) <= 4 * point.compute_error(exact) + 0.5 / TRIALS, point


def test_full_order_decays_exponentially_below_its_bound(points):
    for beta in example.BETAS:
        chosen = [p for p in points if p.beta == beta]
        for point in chosen:
            assert point.order_exact <= point.ranking_bound
        rates = [
            -math.log(after.order_exact / before.order_exact) / (after.num_responses - before.num_responses)
            for before, after in itertools.pairwise(chosen[2:])
        ]
        # Exponential: the same rate per response from 8 to 16, 16 to 32, 32 to 64, but for the two ends of the scale.
        assert max(rates) / min(rates) < 1.05
        assert min(rates) > -0.5 * math.log(1 - 0.5 * math.erfc(1 / (2 * beta)))  # the paper's γ(β)


def test_ranking_bound_fails_below_the_noise_it_assumes():
    for point in example.compute_small_noise(num_trials=100):
        if point.num_responses > 2:
            assert point.order_exact > point.ranking_bound
        assert point.halves_exact >= point.union_bound


def test_report_and_picture(points, tmp_path, capsys):
    example.report(points, points[:6])
    assert capsys.readouterr().out.count("\n") > 5
    assert example.plot(points, tmp_path).read_bytes().startswith(b"\x89PNG")
