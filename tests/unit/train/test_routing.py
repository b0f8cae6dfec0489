"""Replayed choices are the reference's whatever the router and the packing; terms are Megatron-Core's own on one unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from transformers import MixtralConfig

from mpo_megatron import device
from mpo_megatron.config import ExpertsConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, StepBatch, build_step
from mpo_megatron.families import read_family
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.routing import RowRouter
from mpo_megatron.train import optimizer
from mpo_megatron.train.objective import build_objective
from mpo_megatron.train.reference import select_all
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.routing import Choices, StepRouting, gather_choices, record_rows, unmeasured_drift
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules, run_rows, two_phase_step
from tests.tiny import random_groups

CONFIG = MixtralConfig(
    **{"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97},
    **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
)
FAMILY = read_family(CONFIG)
GROUPS: Any = random_groups(6, seed=3, vocab_size=97, tied_share=0.0)
OBJECTIVE = build_objective(LossConfig(name="mpo", params={"beta": 0.1}))
assert FAMILY.experts is not None
EXPERTS = FAMILY.experts


def batch_of(layout: Any = "shared", row_tokens: int = 256, select: Any = select_all) -> tuple[StepBatch, RowShape]:
    shape = RowShape(row_tokens=row_tokens, layout=layout, multiple=16, num_replicas=1, replica=0, pair_weight=1e-3)
    return build_step(0, GROUPS, np.arange(len(GROUPS)), select, shape), shape


def build(ranks: Ranks, **options: Any) -> list[Any]:
    """A random model in which experts 0 and 1 have the same router weights, and so have 2 and 3: each token goes to a pair."""
    model = ModelConfig(checkpoint="", precision="fp32", **options)
    parts = build_policy(FAMILY, model, ParallelConfig(), ranks, 128)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(parts[0].named_parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("router.weight"):
                parameter[1], parameter[3] = parameter[0].clone(), parameter[2].clone()
    return parts


def swap_pairs(parts: list[Any]) -> None:
    """Change the routers alone: each token prefers the other pair now, and weighs the two of any pair as before."""
    with torch.no_grad():
        for name, parameter in parts[0].named_parameters():
            if name.endswith("router.weight"):
                parameter.copy_(parameter.roll(2, dims=0))


def record(parts: list[Any], batch: StepBatch, ranks: Ranks) -> Choices:
    routings = record_rows(batch.rows, ranks)
    run_rows(parts, batch.rows, ranks, None, routings=routings)
    return gather_choices(routings, batch.rows, batch.table, EXPERTS, ranks)


def test_replay_gives_the_references_log_probs_after_the_routers_alone_changed(ranks: Ranks) -> None:
    parts = build(ranks)
    batch, _ = batch_of()
    before = forward_step(parts, batch, OBJECTIVE, ranks)
    choices = record(parts, batch_of("unshared", row_tokens=64)[0], ranks)  # packed otherwise
    assert ((choices.ids.cpu() == torch.tensor([0, 1])) | (choices.ids.cpu() == torch.tensor([2, 3]))).all()
    swap_pairs(parts)
    found = {}
    for name, config in {"free": ExpertsConfig(measure_drift=True), "replay": ExpertsConfig(routing="replay")}.items():
        routing = StepRouting(config, EXPERTS, batch, ranks, choices)
        found[name] = forward_step(parts, batch, OBJECTIVE, ranks, routing=routing).response
        assert routing.measured["router_drift"].value == 1  # every token prefers the other pair
    assert torch.equal(found["replay"], before.response)
    assert (found["free"] - before.response).abs().max() > 1e-3


def test_a_resident_reference_routes_the_policy(ranks: Ranks) -> None:
    parts = build(ranks)
    batch, _ = batch_of(row_tokens=64)
    before = forward_step(parts, batch, OBJECTIVE, ranks)
    resident = Resident(build(ranks), replay=True)
    swap_pairs(parts)
    routing = StepRouting(ExpertsConfig(routing="replay"), EXPERTS, batch, ranks)
    after = forward_step(parts, batch, OBJECTIVE, ranks, resident, routing)
    assert torch.equal(after.response, before.response)
    assert routing.measured["router_drift"].value == 1
    assert after.kl is not None
    assert after.kl.abs().max() < 1e-5  # float32 rounding of the same distribution, twice


@pytest.mark.parametrize("over", ["group", "step"])
def test_values_on_known_probabilities(ranks: Ranks, over: Any) -> None:
    """Logits of 0: every probability is 1 / E, so the balance is 1 whatever goes where, and z is (log E)² of each token."""
    parts = build(ranks)
    with torch.no_grad():
        for name, parameter in parts[0].named_parameters():
            if name.endswith("router.weight"):
                parameter.zero_()
    model = optimizer.wrap_data_parallel(parts, OptimizerConfig(), ranks)
    prepare_schedules(model)
    batch, shape = batch_of("unshared", row_tokens=64, select=OBJECTIVE.select)
    reference = forward_step(model, batch, OBJECTIVE, ranks)
    config = ExpertsConfig(balance_coeff=0.1, balance_over=over, z_coeff=0.1)
    routing = StepRouting(config, EXPERTS, batch, ranks)
    two_phase_step(model, batch, reference, OBJECTIVE, ranks, shape, torch.Generator(), routing=routing)
    measured = {name: mean.value for name, mean in routing.measured.items()}
    assert measured == pytest.approx({"load_balancing_loss": 1.0, "router_z_loss": np.log(4) ** 2}, rel=1e-5)


def test_one_unit_is_megatron_cores_loss() -> None:
    """What `_add_balance` spells out for several units is `switch_load_balancing_loss_func` for one."""
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(12, 4, generator=generator).softmax(dim=1)
    loads = torch.zeros(4).index_add_(0, torch.randint(0, 4, (24,), generator=generator), torch.ones(24))
    theirs = switch_load_balancing_loss_func(probs, loads, 12, 2, 4, 1.0)
    assert (probs * (loads * (4 / 2 / 12**2))).sum().item() == pytest.approx(theirs.item(), rel=1e-6)


def gradients(ranks: Ranks, config: ExpertsConfig, *, two_phase: bool, row_tokens: int, **options: Any) -> dict[str, Tensor]:
    parts = build(ranks, **options)
    with torch.no_grad():  # no ties
        for name, parameter in parts[0].named_parameters():
            if name.endswith("router.weight"):
                parameter += device.upload(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    model = optimizer.wrap_data_parallel(parts, OptimizerConfig(), ranks)
    prepare_schedules(model)
    batch, shape = batch_of(row_tokens=row_tokens, select=OBJECTIVE.select)
    reference = forward_step(model, batch, OBJECTIVE, ranks)
    routing = StepRouting(config, EXPERTS, batch, ranks)
    for part in model:
        part.zero_grad_buffer()
    if two_phase:
        two_phase_step(model, batch, reference, OBJECTIVE, ranks, shape, torch.Generator(), routing=routing)
    else:
        fused_step(model, batch, reference, OBJECTIVE, ranks, routing=routing)
    return {name: parameter.main_grad.clone() for name, parameter in parts[0].named_parameters()}


@pytest.mark.parametrize("recompute", [{"recompute": "selective", "recompute_modules": ["moe"]}, {"recompute": "full"}])
def test_terms_are_independent_of_packing_phases_and_recomputation(ranks: Ranks, recompute: dict[str, Any]) -> None:
    config = ExpertsConfig(balance_coeff=0.3, z_coeff=0.1)
    expected = gradients(ranks, config, two_phase=False, row_tokens=256)
    without = gradients(ranks, ExpertsConfig(), two_phase=False, row_tokens=256)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert max((expected[name] - without[name]).abs().max() for name in expected) > 1e-2 * largest
    for found in (
        gradients(ranks, config, two_phase=False, row_tokens=256, **recompute),
        gradients(ranks, config, two_phase=True, row_tokens=64, **recompute),
    ):
        for name, gradient in expected.items():  # float32 sums of some hundreds of tokens in another order
            assert (found[name] - gradient).abs().max() < 1e-5 * largest, name


def test_terms_reach_responses_that_the_loss_does_not(ranks: Ranks) -> None:
    """MC-PO backpropagates the negatives that it draws; with a term of the routers every response that lies in rows."""
    objective = build_objective(LossConfig(name="mcpo", params={"beta": 0.1, "num_negatives": 1}))
    batch, shape = batch_of(select=objective.select)
    shares = {}
    for config in (ExpertsConfig(), ExpertsConfig(z_coeff=0.1)):
        parts = build(ranks)
        model = optimizer.wrap_data_parallel(parts, OptimizerConfig(), ranks)
        prepare_schedules(model)
        reference = forward_step(model, batch, objective, ranks)
        routing = StepRouting(config, EXPERTS, batch, ranks)
        shares[config] = two_phase_step(
            model, batch, reference, objective, ranks, shape, torch.Generator().manual_seed(0), routing=routing
        ).backward_share
    assert shares[ExpertsConfig()] < 1
    assert shares[ExpertsConfig(z_coeff=0.1)] == 1


def test_what_is_not_known_is_said() -> None:
    assert unmeasured_drift(ExpertsConfig(), None, resident=False) is None
    assert unmeasured_drift(ExpertsConfig(), EXPERTS, resident=True) is None
    assert unmeasured_drift(ExpertsConfig(routing="replay"), EXPERTS, resident=False) is None
    note = unmeasured_drift(ExpertsConfig(), EXPERTS, resident=False)
    assert note is not None
    assert "router_drift is not measured" in note


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_routers_compute_in_float32(ranks: Ranks, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are the exact products of hidden states and weights in the model's dtype, rounded to float32 and not before."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    original = RowRouter.routing

    def watch(self: RowRouter, logits: Tensor, padding_mask: None = None) -> Any:
        seen.append((self.input, self.weight, logits))
        return original(self, logits, padding_mask)

    def gating(self: RowRouter, hidden: Tensor) -> Tensor:
        self.input = hidden
        return TopKRouter.gating(self, hidden)

    monkeypatch.setattr(RowRouter, "routing", watch)
    monkeypatch.setattr(RowRouter, "gating", gating)
    model = ModelConfig(checkpoint="", precision=precision)
    parts = build_policy(FAMILY, model, ParallelConfig(), ranks, 128)
    with torch.no_grad():
        for _, parameter in parts[0].named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    forward_step(parts, batch_of()[0], OBJECTIVE, ranks)
    assert seen
    for hidden, weight, logits in seen:
        assert hidden.dtype == weight.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
        assert logits.dtype == torch.float32
        exact = hidden.double() @ weight.double().T
        assert (logits - exact).abs().max() < 32 * 2**-24 * exact.abs().max()  # sums of 32 products
