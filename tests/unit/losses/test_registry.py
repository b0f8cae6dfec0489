"""The registry: complete, documented, fast to import, and extensible."""

import ast
import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import mpo_megatron.losses
from mpo_megatron.config import ConfigError, LossConfig
from mpo_megatron.config.loss_names import HYPERPARAMETERS, check_loss_names
from mpo_megatron.losses import GroupBatch, build_params, get_loss, group_loss, list_losses, register, registry
from mpo_megatron.losses.batch import compute_log_ratios
from mpo_megatron.losses.pairing import (
    PairParams,
    compute_pairs,
    find_paired,
    needs_reference_pairs,
)
from tests.largest_tensor import LargestTensor

from .groups import CASES, get_input, make_batch, name_case

PACKAGE = Path(mpo_megatron.losses.__file__).parent


def test_import_pulls_in_torch_only():
    heavy = ("megatron", "transformers", "datasets", "accelerate", "yaml")
    code = f"import sys, mpo_megatron.losses; print(*[m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_package_imports_torch_and_the_standard_library_only():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root = name.split(".")[0]
                inside = name.startswith("mpo_megatron.losses")
                assert inside or root == "torch" or root in sys.stdlib_module_names, (path.name, name)


def test_issue_list_is_complete():
    wanted = """mpo wmpo swepo mpo_reference_free infonca nca nca_pair spo mcpo rnce dpo plackett_luce sdpo ipo kto bco rpo
        exo simpo cpo orpo rdpo slic apo_zero sppo grpo_offline sft nca_reference_free mpo_bins dpo_positive"""
    assert {loss.name for loss in list_losses()} >= set(wanted.split())


def test_names_that_are_refused_early_are_those_that_there_are():
    own = [loss for loss in list_losses() if loss.function.__module__.startswith("mpo_megatron.losses.")]
    there = {loss.name: " ".join(field.name for field in dataclasses.fields(loss.params)) for loss in own}
    assert there == HYPERPARAMETERS
    check_loss_names(LossConfig(name="mpo", params={"beta": 0.1}))
    with pytest.raises(ConfigError, match=r"loss.params.betta; mpo has no such hyper-parameter; it has partition, num_top"):
        check_loss_names(LossConfig(name="mpo", params={"betta": 0.1}))
    with pytest.raises(ConfigError, match=r"loss.name = 'mpoo'; there is no such method; did you mean mpo"):
        check_loss_names(LossConfig(name="mpoo"))


@pytest.mark.parametrize("loss", list_losses(), ids=lambda loss: loss.name)
def test_every_method_is_documented(loss):
    assert loss.source
    assert loss.summary
    assert "\n" not in loss.summary
    params = loss.params()  # the defaults are valid
    assert params.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(params))


def test_every_field_has_a_docstring():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for item, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{path.name}: {node.name}.{ast.unparse(item.target)}"


def test_adding_a_method_takes_a_few_lines(monkeypatch):
    """The example of registry.py's docstring."""
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))

    @dataclass(frozen=True, kw_only=True)
    class MarginParams(PairParams):
        margin: float = 1.0

    @register(
        "margin",
        params=MarginParams,
        scored=find_paired,
        needs=needs_reference_pairs,
        source="Someone 2030, Eq. 1",
    )
    def compute_margin(batch: GroupBatch, params: MarginParams) -> torch.Tensor:
        """max(0, margin − (s_w − s_l))."""
        pairs = compute_pairs(batch, params)
        return pairs.reduce(torch.relu(params.margin - pairs.margins(compute_log_ratios(batch))))

    policy, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.2]])
    value = group_loss("margin", policy, reference, torch.tensor([[1.0, 0.0]]), margin=2.0)
    assert torch.allclose(value, torch.tensor([1.7]))
    assert get_loss("margin").summary == "max(0, margin − (s_w − s_l))."
    with pytest.raises(ValueError, match="loss = 'margin'; it is already registered"):
        register("margin", params=MarginParams, scored=find_paired, needs=needs_reference_pairs, source="")(compute_margin)


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_never_waits_for_the_device(case):
    """On the meta device, tensors have no values: anything that reads one (and so would stall a GPU) raises."""
    loss, params = get_loss(case[0]), build_params(*case)
    batch = make_batch(seed=41)
    moved = {
        field.name: getattr(batch, field.name).to("meta")
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), torch.Tensor)
    }
    batch = dataclasses.replace(batch, **moved)
    assert loss.compute(batch, params).shape == loss.contributes(batch, params).shape == (8,)


FEW_PAIRS = [case for case in CASES if case[1].get("pairing") not in ("all_pairs", "cross_pairs")]


@pytest.mark.parametrize("case", FEW_PAIRS, ids=name_case)
def test_memory_is_linear_in_responses(case):
    """No tensor has K × K elements, forward or backward; the two pairings left out have that many pairs."""
    loss, params = get_loss(case[0]), build_params(*case)
    batch = make_batch(3, 128)
    tokens = batch.token_logps.shape[-1]
    leaf = getattr(batch, get_input(batch, case[0])).requires_grad_()
    with LargestTensor() as largest:
        loss.contributes(batch, params)
        losses = loss.compute(batch, params)
        torch.autograd.grad(losses.sum(), leaf)
    assert 3 * 128 <= largest.elements <= 3 * 128 * tokens
