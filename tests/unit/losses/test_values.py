"""Every method against an independent evaluation of its formula (oracle.py)."""

import math

import pytest
import torch

from mpo_megatron.losses import build_params, get_loss, list_losses

from . import oracle
from .groups import CASES, as_lists, make_batch, name_case


def compare(name, hyperparameters, batch, relative):
    params, loss = build_params(name, hyperparameters), get_loss(name)
    values = loss.compute(batch, params)
    expected = oracle.evaluate(name, as_lists(batch), params)
    assert loss.contributes(batch, params).tolist() == [value is not None for value in expected]
    assert any(value is not None for value in expected)
    for group, (value, wanted) in enumerate(zip(values.tolist(), expected, strict=True)):
        if wanted is None:
            assert value == 0.0, group
        else:
            # 1e-90: the oracle's own rounding (120 digits) of −log(1 − tiny).
            assert math.isclose(value, float(wanted), rel_tol=relative, abs_tol=1e-90), (group, value, wanted)


def test_cases_cover_every_method():
    assert {name for name, _ in CASES} == {loss.name for loss in list_losses()}


@pytest.mark.parametrize("rewards", ["ties", "spread"])
@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_formula_float64(case, rewards):
    # 1e-9, beyond the required 1e-6: only float64 rounding (1e-16) times the conditioning of the formulas
    # separates them.
    compare(*case, make_batch(seed=1, rewards=rewards), relative=1e-9)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_formula_near_reference(case):
    compare(*case, make_batch(seed=2, logps="near"), relative=1e-9)


@pytest.mark.parametrize("num_responses", [2, 64])
@pytest.mark.parametrize("name", ["mpo", "wmpo", "infonca", "nca", "spo", "mcpo", "plackett_luce", "sdpo"])
def test_formula_group_sizes(name, num_responses):
    hyperparameters = {"num_negatives": 99} if name == "mcpo" else {}
    compare(name, hyperparameters, make_batch(4, num_responses, seed=3), relative=1e-9)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_formula_float32(case):
    # The oracle reads the same float32 numbers. 1e-5: a hundred roundings (6e-8) in the sums of 15 pairs or
    # 48 tokens.
    batch = make_batch(seed=4, logps="near", dtype=torch.float32)
    compare(*case, batch, relative=1e-5)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_half_precision_is_upcast(case):
    name, hyperparameters = case
    batch = make_batch(seed=5, logps="near", dtype=torch.bfloat16)
    values = get_loss(name).compute(batch, build_params(name, hyperparameters))
    assert values.dtype == torch.float32
    compare(name, hyperparameters, batch, relative=1e-5)


@pytest.mark.parametrize("rewards", ["ties", "spread"])
@pytest.mark.parametrize("num_responses", [2, 5, 64])
@pytest.mark.parametrize("name", [loss.name for loss in list_losses()])
def test_finite_in_float32(name, num_responses, rewards):
    """Log-probabilities of −5 … −5000 and rewards over nine decades: values and gradients stay finite."""
    batch = make_batch(6, num_responses, seed=6, rewards=rewards, dtype=torch.float32)
    for tensor in (batch.policy_logps, batch.token_logps):
        tensor.requires_grad_()
    values = get_loss(name).compute(batch, build_params(name, {}))
    values.sum().backward()
    assert values.isfinite().all()
    for tensor in (batch.policy_logps, batch.token_logps):
        assert tensor.grad is None or tensor.grad.isfinite().all()
