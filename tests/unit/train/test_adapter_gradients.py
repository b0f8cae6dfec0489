"""Gradients of A and B for every loss, against PEFT on `transformers` in float64, the reference being the adapter switched off.

Each response alone, after its own copy of the prompt, gives the oracle's log-probs; the loss is the same pure function, which
tests/unit/losses holds against its own oracles. One pass of PEFT's model serves all losses.

Float32 has rounding errors of its own, in PEFT's gradients as in ours: 0.7e-6 to 1.5e-6 and 0.9e-6 to 2.1e-6 here. So both are
held against float64, and the tolerance is `RATIO` times PEFT's own error. An error is relative to the largest value of its
tensor, or to `FLOOR` of the model's largest: that of a small gradient, a difference of large terms, is the terms'.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConvertConfig, LoraConfig, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, StepBatch, build_step
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.losses import list_losses
from mpo_megatron.model.adapter_weights import fill_adapters
from mpo_megatron.model.adapters import adapters_off, clear_adapters, linear_adapters_of
from mpo_megatron.model.convert import convert
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import optimizer
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.objective import Logps, build_objective, group_batch
from mpo_megatron.train.resident import AdapterOff
from mpo_megatron.train.step import forward_step, prepare_schedules, two_phase_step
from tests.distributed.adapters import attach_adapters, start_matrix
from tests.tiny import random_groups, save_groups, save_model

FLOOR = 1e-2
RATIO = 4.0
"""Ours sums in another order: in packed rows, over heads at once, and up to the group's shared prompt."""
LOSSES = [(loss.name, {}) for loss in list_losses() if ":" not in loss.name] + [
    ("spo", {"alpha": 0.1, "gamma": 0.01, "form": "ranked", "regularizer": "token_kl"}),
    ("mcpo", {"beta": 0.1, "num_negatives": 2, "sampling": "random"}),
]


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """PEFT's model in one precision: its log-probs of every response, with their graph."""

    model: Any
    copy_of: Any
    """Copies the adapter's gradients under PEFT's names."""
    policy: Logps
    reference: Logps

    def gradients(self, objective: Any, batch: StepBatch) -> dict[str, Tensor]:
        """For the mean loss over the groups that contribute."""
        self.model.zero_grad()
        taken = Logps(
            response=self.policy.response,
            token=self.policy.token if objective.needs.tokens else None,
            kl=self.policy.kl if objective.needs.token_kl else None,
        )
        losses = objective.compute(group_batch(batch.table, taken, self.reference, generator=torch.Generator().manual_seed(3)))
        (losses.sum() / int(batch.contributes.sum())).backward(retain_graph=True)
        found: dict[str, Tensor] = {
            name: gradient.double() for name, gradient in self.copy_of(self.model, gradients=True).items()
        }
        return found


def token_distributions(model: Any, data: PreparedGroups, index: int, k: int) -> tuple[Tensor, Tensor]:
    """[T, V] log-probs of the next token where response k is predicted, and [T] the response's tokens."""
    group = data[index]
    prompt, response = (torch.from_numpy(part.astype("int64")) for part in (group.prompt_tokens, group.response_tokens[k]))
    logits = model(torch.cat((prompt, response))[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1), response


def build_oracle(folder: Path, data: PreparedGroups, batch: StepBatch, dtype: torch.dtype) -> Oracle:
    base = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype)
    policy = copy.deepcopy(base)
    copy_of = attach_adapters(
        policy, choose_adapter(load_family(folder / "hf"), LoraConfig(rank=4, target_modules=["all-linear", "lm_head"]))
    )
    policy.to(dtype)
    shape = batch.table.valid.shape
    width = int(batch.table.lengths.max())
    tokens = {name: torch.zeros(*shape, width, dtype=torch.float64) for name in ("policy", "reference")}
    kl = torch.zeros(shape, dtype=torch.float64)
    for slot, index in enumerate(batch.table.indices):
        for k in range(len(data[int(index)].response_tokens)):
            ours, response = token_distributions(policy, data, int(index), k)
            with torch.no_grad():
                theirs, _ = token_distributions(base, data, int(index), k)
            for name, found in (("policy", ours), ("reference", theirs)):
                tokens[name][slot, k, : len(response)] = found.gather(1, response[:, None])[:, 0].double()
            kl[slot, k] = (ours.exp() * (ours - theirs)).sum().double()
    policy_logps, reference = (Logps(response=found.sum(-1), token=found) for found in tokens.values())
    return Oracle(
        model=policy,
        copy_of=copy_of,
        policy=Logps(response=policy_logps.response, token=policy_logps.token, kl=kl),
        reference=reference,
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """Our model and the oracles, on the same groups."""

    folder: Path
    ranks: Ranks
    model: list[Any]
    live: LiveWeights
    data: PreparedGroups
    shape: RowShape
    exact: Oracle
    rounded: Oracle

    def step(self, objective: Any) -> tuple[dict[str, Tensor], StepBatch]:
        """Our gradients under PEFT's names."""
        batch = self.batch(objective)
        with adapters_off(self.model):
            reference = forward_step(self.model, batch, objective, self.ranks)
        for part in self.model:
            part.zero_grad_buffer()
        resident = AdapterOff(self.model) if objective.needs.token_kl else None
        generator = torch.Generator().manual_seed(3)
        two_phase_step(self.model, batch, reference, objective, self.ranks, self.shape, generator, resident)
        trained = [parameter for parameter in self.model[0].parameters() if parameter.requires_grad]
        weights = [parameter.data for parameter in trained]
        for parameter in trained:  # in the place of the weights, gradients have the weights' names
            parameter.data = parameter.main_grad
        found = {name: tensor.double() for name, tensor in self.live.stream()}
        for parameter, weight in zip(trained, weights, strict=True):
            parameter.data = weight
        return found, batch

    def batch(self, objective: Any) -> StepBatch:
        return build_step(0, self.data, np.arange(len(self.data)), objective.select, self.shape)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("gradients")
    save_model(folder / "hf", model_type="qwen2", num_hidden_layers=2)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "megatron")))
    groups = random_groups(4, seed=4, max_responses=5, prompt_tokens=(3, 12), response_tokens=(2, 9), tied_share=0.0)
    data = save_groups(folder / "groups", groups, folder / "hf")
    family = load_family(folder / "hf")
    adapter = choose_adapter(family, LoraConfig(rank=4, target_modules=["all-linear", "lm_head"]))
    assert adapter is not None
    shape = RowShape(row_tokens=256, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=1e-3)
    with model_parallel(ParallelConfig(), seed=1) as ranks:
        padded = load_conversion(folder / "megatron").padded_vocab_size
        settings = ModelConfig(checkpoint="", precision="fp32")
        parts = build_policy(family, settings, ParallelConfig(), ranks, padded, adapter)
        checkpoint.load_weights(parts, folder / "megatron", ranks)
        fill_adapters(parts, family, adapter, ranks, start_matrix)
        model: list[Any] = optimizer.wrap_data_parallel(parts, OptimizerConfig(), ranks)
        prepare_schedules(model)
        batch = build_step(0, data, np.arange(len(data)), build_objective(LossConfig(name="mpo")).select, shape)
        exact, rounded = (build_oracle(folder, data, batch, dtype) for dtype in (torch.float64, torch.float32))
        live = LiveWeights.of_adapter(parts, family, adapter, ranks)
        yield World(folder=folder, ranks=ranks, model=model, live=live, data=data, shape=shape, exact=exact, rounded=rounded)


def test_with_b_zero_it_is_the_base_model_to_the_last_bit(world: World) -> None:
    """Log-probs of a model with adapters, switched off or with B = 0, and of one without."""
    objective = build_objective(LossConfig(name="mpo"))
    batch, ranks = world.batch(objective), world.ranks

    def logps(model: list[Any]) -> Tensor:
        return forward_step(model, batch, objective, ranks).response

    padded = load_conversion(world.folder / "megatron").padded_vocab_size
    settings, family = ModelConfig(checkpoint="", precision="fp32"), load_family(world.folder / "hf")
    plain = build_policy(family, settings, ParallelConfig(), ranks, padded)
    checkpoint.load_weights(plain, world.folder / "megatron", ranks)
    base = logps(plain)
    assert not torch.equal(logps(world.model), base)
    with adapters_off(world.model):
        assert torch.equal(logps(world.model), base)
    ups = [pair.lora_B for layer in linear_adapters_of(world.model[0]) for pair in layer.pairs]
    kept = [up.detach().clone() for up in ups]
    clear_adapters(world.model)
    assert torch.equal(logps(world.model), base)
    for up, before in zip(ups, kept, strict=True):
        up.data.copy_(before)


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest difference from float64 in any tensor, relative to that tensor's largest value, or to FLOOR of all."""
    assert found.keys() == exact.keys()
    largest = max(float(tensor.abs().max()) for tensor in exact.values())
    assert largest > 0  # a loss without a gradient would match anything
    return max(
        float((found[name] - tensor).abs().max()) / max(float(tensor.abs().max()), FLOOR * largest)
        for name, tensor in exact.items()
    )


@pytest.mark.parametrize(("name", "params"), LOSSES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_every_loss_has_the_gradients_of_peft(world: World, name: str, params: dict[str, Any]) -> None:
    objective = build_objective(LossConfig(name=name, params=params))
    found, batch = world.step(objective)
    exact = world.exact.gradients(objective, batch)
    ours, theirs = error(found, exact), error(world.rounded.gradients(objective, batch), exact)
    assert ours <= RATIO * theirs, (ours, theirs)
    assert theirs <= 1e-5  # float32 sums of a few hundred products, 2⁻²⁴ · √n of their largest terms, layers deep
