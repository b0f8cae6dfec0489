"""Delayed scales belong to the optimizer step: the reference sees those the policy starts with, and only steps move them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mpo_megatron.config import ConvertConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, StepBatch, build_step
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.hf.config import load_hf_config
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.convert import convert
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.precision import hold_scales
from mpo_megatron.rollout import divergence
from mpo_megatron.train import checkpoint, optimizer
from mpo_megatron.train.calibration import calibrate
from mpo_megatron.train.objective import Logps, build_objective, group_batch
from mpo_megatron.train.reference import cache_key
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules, two_phase_step
from tests.fp8_emulation import HISTORY, Emulation
from tests.tiny import random_groups, save_groups, save_model

SHAPE = RowShape(row_tokens=128, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=1e-3)
OBJECTIVE = build_objective(LossConfig(name="mpo", params={"beta": 0.1}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("delayed")
    hf = save_model(folder / "hf", num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(hf), output=str(folder / "model")))
    save_groups(folder / "groups", random_groups(12, seed=5), folder / "hf")
    return folder


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with model_parallel(ParallelConfig(), seed=1) as ranks:
        yield ranks


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    return Emulation(monkeypatch)


def build(folder: Path, ranks: Ranks, emulation: Emulation) -> list[torch.nn.Module]:
    """The model without weights."""
    config = ModelConfig(checkpoint=str(folder / "model"), fp8="delayed")
    padded = load_conversion(folder / "model").padded_vocab_size
    return emulation.convert(build_policy(load_hf_config(folder / "model" / "hf"), config, ParallelConfig(), ranks, padded))


def load(folder: Path, ranks: Ranks, emulation: Emulation) -> list[torch.nn.Module]:
    """The model fresh from its checkpoint, with the first scales."""
    parts = build(folder, ranks, emulation)
    checkpoint.load_weights(parts, folder / "model", ranks)
    calibrate(parts, groups(folder), ranks, SHAPE)
    return parts


def groups(folder: Path) -> PreparedGroups:
    return load_groups(folder / "groups")


def batch_of(folder: Path) -> StepBatch:
    data = groups(folder)
    batch = build_step(0, data, np.arange(len(data)), OBJECTIVE.select, SHAPE)
    assert len(batch.rows) > 2
    return batch


def wrap(parts: list[torch.nn.Module], ranks: Ranks) -> tuple[list[torch.nn.Module], Any]:
    model = optimizer.wrap_data_parallel(parts, OptimizerConfig(lr=1e-3), ranks)
    prepare_schedules(model)
    return model, optimizer.build_optimizer(OptimizerConfig(lr=1e-3), model, ranks)


def mean_loss(batch: StepBatch, policy: Logps, reference: Logps) -> float:
    losses = OBJECTIVE.compute(group_batch(batch.table, policy, reference))
    return float(losses.sum() / int(batch.contributes.sum()))


def first_loss(batch: StepBatch) -> float:
    """ln(K / |Y+|), averaged over the groups with a contrast."""
    assert batch.table.rewards is not None
    values = []
    for rewards, valid, counts in zip(batch.table.rewards, batch.table.valid, batch.contributes, strict=True):
        if counts:
            values.append(math.log(valid.sum() / (rewards[valid] > rewards[valid].mean()).sum()))
    return float(np.mean(values))


def states(emulation: Emulation) -> list[torch.Tensor]:
    return [module.get_extra_state() for module in emulation.modules]


@pytest.mark.parametrize("two_phase", [False, True])
def test_the_first_loss_is_exact_and_scales_change_once_a_step(
    folder: Path, ranks: Ranks, emulation: Emulation, two_phase: bool
) -> None:
    batch = batch_of(folder)
    reference = forward_step(load(folder, ranks, emulation), batch, OBJECTIVE, ranks)
    emulation.modules.clear()
    parts = load(folder, ranks, emulation)
    assert all(module.scale[0] != 1 for module in emulation.modules)
    model, _ = wrap(parts, ranks)
    before, updates, gradient_updates = states(emulation), emulation.num_updates, emulation.num_gradient_updates
    if two_phase:
        policy, _ = two_phase_step(model, batch, reference, OBJECTIVE, ranks, SHAPE, torch.Generator())
    else:
        policy = fused_step(model, batch, reference, OBJECTIVE, ranks)
    assert torch.equal(policy.response, reference.response)
    assert mean_loss(batch, policy, reference) == pytest.approx(first_loss(batch), abs=1e-12)
    assert emulation.num_updates == updates + 1
    assert emulation.num_gradient_updates == gradient_updates + 1
    assert any(not torch.equal(a, b) for a, b in zip(before, states(emulation), strict=True))


def test_forward_passes_leave_no_trace(folder: Path, ranks: Ranks, emulation: Emulation) -> None:
    batch = batch_of(folder)
    parts = load(folder, ranks, emulation)
    before = states(emulation)
    once = forward_step(parts, batch, OBJECTIVE, ranks)
    assert all(torch.equal(a, b) for a, b in zip(before, states(emulation), strict=True))
    assert torch.equal(once.response, forward_step(parts, batch, OBJECTIVE, ranks).response)


def test_samples_of_a_round_are_scored_under_measured_scales(folder: Path, ranks: Ranks, emulation: Emulation) -> None:
    load(folder, ranks, emulation)
    expected = states(emulation)
    emulation.modules.clear()
    parts = build(folder, ranks, emulation)
    divergence.load(parts, str(folder / "model"), ranks, groups(folder), SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(expected, states(emulation), strict=True))


def test_scales_of_a_resident_reference_stay(folder: Path, ranks: Ranks, emulation: Emulation) -> None:
    """Although the policy's updates reach all modules of the process, also when measured values leave the history."""
    batch = batch_of(folder)
    reference = load(folder, ranks, emulation)
    hold_scales(reference)
    scales = [module.scale.clone() for module in emulation.modules]
    number = len(scales)
    model, adam = wrap(load(folder, ranks, emulation), ranks)
    logps = forward_step(model, batch, OBJECTIVE, ranks)
    for _ in range(HISTORY + 1):
        optimizer.zero_gradients(model, adam)
        fused_step(model, batch, logps, OBJECTIVE, ranks)
    assert len(emulation.modules) == 2 * number
    assert all(torch.equal(module.scale, scale) for module, scale in zip(emulation.modules, scales, strict=False))


def test_weights_that_are_gathered_early_are_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core leaves it out where a gather overlaps with the forward pass, and was forced before it."""
    events: list[object] = []
    in_8_bits, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(optimizer, "is_float8tensor", lambda tensor: tensor is in_8_bits)
    monkeypatch.setattr(optimizer, "post_all_gather_processing", lambda tensors: events.append([id(each) for each in tensors]))

    class Wrapped(torch.nn.Module):
        ddp_config = SimpleNamespace(overlap_param_gather=True)

        def start_param_sync(self, *, force_sync: bool) -> None:
            events.append(force_sync)

    part = Wrapped()
    part.in_8_bits, part.other = in_8_bits, other
    optimizer.gather_weights([part])
    assert events == [True, [id(in_8_bits)]]


def test_scales_matter(folder: Path, ranks: Ranks, emulation: Emulation) -> None:
    """Else the tests above would hold without what they test."""
    batch = batch_of(folder)
    parts = load(folder, ranks, emulation)
    calibrated = forward_step(parts, batch, OBJECTIVE, ranks)
    for module in emulation.modules:
        module.reset_fp8_meta_tensors()
    assert (forward_step(parts, batch, OBJECTIVE, ranks).response - calibrated.response).abs().max() > 0.1


def test_calibration_leaves_nothing_but_scales(folder: Path, ranks: Ranks, emulation: Emulation) -> None:
    parts = load(folder, ranks, emulation)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())
    before = states(emulation)
    calibrate(parts, groups(folder), ranks, SHAPE)  # whatever was there before is forgotten
    assert all(torch.equal(a, b) for a, b in zip(before, states(emulation), strict=True))


def test_scales_are_saved_and_restored(folder: Path, ranks: Ranks, emulation: Emulation, tmp_path: Path) -> None:
    batch = batch_of(folder)
    model, adam = wrap(load(folder, ranks, emulation), ranks)
    reference = forward_step(model, batch, OBJECTIVE, ranks)
    for _ in range(2):
        optimizer.zero_gradients(model, adam)
        fused_step(model, batch, reference, OBJECTIVE, ranks)
        optimizer.update(model, adam)
    (tmp_path / "megatron").mkdir()
    checkpoint.prepare_save(tmp_path, model, adam, ranks).execute_sync()
    expected, logps = states(emulation), forward_step(model, batch, OBJECTIVE, ranks)

    emulation.modules.clear()
    resumed, adam = wrap(load(folder, ranks, emulation), ranks)
    assert not all(torch.equal(a, b) for a, b in zip(expected, states(emulation), strict=True))
    checkpoint.load(tmp_path, resumed, adam, ranks)
    assert all(torch.equal(a, b) for a, b in zip(expected, states(emulation), strict=True))
    assert torch.equal(logps.response, forward_step(resumed, batch, OBJECTIVE, ranks).response)
    # As a model to start from it is weights alone: the new run measures scales on its own data.
    checkpoint.load_weights(resumed, tmp_path, ranks)


def test_the_cache_of_reference_log_probs_knows_the_recipe(folder: Path) -> None:
    data = groups(folder)
    options: list[dict[str, Any]] = [
        {},
        {"precision": "fp32"},
        {"fp8": "delayed"},
        {"fp8": "current"},
        {"fp8": "current", "fp8_bf16_layers": 1},
        {"fp8": "current", "fp8_params": True},
        {"fp8": "blockwise"},
    ]
    keys = [
        cache_key("digest", data, ModelConfig(checkpoint="", **each), transformer_engine=True, attention="flex", calibration=data)
        for each in options
    ]
    assert len(set(keys)) == len(options)
