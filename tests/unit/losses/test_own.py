"""Users' losses: the guide's passes the tests of the package's losses; invalid ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.config import ConfigError, LossConfig
from mpo_megatron.losses import group_loss, registry
from mpo_megatron.train.checkpoints.course import loss_options
from mpo_megatron.train.objective import build_objective
from tests.guide import code_block, guide_loss

from . import test_gradients, test_invariance

IMPORTS = """
from dataclasses import dataclass
from typing import Literal
import torch
from mpo_megatron.losses import GroupBatch, Needs, register
from mpo_megatron.losses.batch import compute_log_ratios
from mpo_megatron.losses.hyperparameters import Hyperparameters
"""


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))


@pytest.fixture
def cases(tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The guides' losses, without `@register` and with it, in the form of the loss tests."""
    (tmp_path / "registered.py").write_text(code_block("extending", "@register").replace('"hinge"', '"registered_hinge"'))
    functions = (guide_loss(tmp_path), f"{tmp_path / 'registered.py'}:compute_hinge")
    return [(build_objective(LossConfig(function=function)).loss.name, {"margin": 0.7}) for function in functions]


def test_the_guides_losses_pass_the_tests_of_the_packages(cases: list[tuple[str, dict[str, Any]]]) -> None:
    assert [name for name, _ in cases] == ["my_losses.py:hinge", "registered_hinge"]
    for case in cases:
        test_invariance.test_order_of_responses(case)
        test_invariance.test_padding(case)
        test_invariance.test_other_groups_matter_only_to_batch_statistics(case)
        test_invariance.test_needs_are_exact(case)
        test_invariance.test_scored_without_log_probabilities(case)
        test_invariance.test_unscored_responses_need_no_log_probabilities(case)
        test_gradients.test_gradcheck(case)


def test_the_guides_loss_is_its_formula(tmp_path: Path) -> None:
    objective = build_objective(LossConfig(function=guide_loss(tmp_path), params={"margin": 2, "beta": 0.5}))
    assert objective.needs == registry.Needs(reference=True, preferences=True)
    policy, reference = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[-1.5, -2.2, -3.0]])
    value = group_loss("my_losses.py:hinge", policy, reference, torch.tensor([[1.0, 0.5, 0.0]]), margin=2, beta=0.5)
    ratios = [0.25, 0.1, -0.5]
    pairs = [2 - (ratios[winner] - ratios[loser]) for winner, loser in ((0, 1), (0, 2), (1, 2))]
    assert value.tolist() == pytest.approx([sum(pairs) / 3])


def test_hyper_parameters_follow_their_annotations(tmp_path: Path) -> None:
    function = guide_loss(tmp_path)
    for params, message in (
        ({"margin": -1.0}, r"loss\.params\.margin = -1.0; it must be positive"),
        ({"beta": "x"}, r"loss\.params\.beta = 'x'; it must be a finite number"),
        ({"temperature": 1}, r"loss\.params\.temperature; my_losses.py:hinge has no such hyper-parameter; it has margin, beta"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_objective(LossConfig(function=function, params=params))


def test_a_file_that_changes_is_another_loss(tmp_path: Path) -> None:
    config = LossConfig(function=guide_loss(tmp_path))
    before = loss_options(config, {})
    assert before["name"] == "my_losses.py:hinge"
    assert loss_options(config, {}) == before
    path = tmp_path / "my_losses.py"
    path.write_text(path.read_text().replace("margin - margins", "margin - 2 * margins"))
    assert loss_options(config, {})["digest of my_losses.py"] != before["digest of my_losses.py"]
    assert build_objective(config).compute is not None  # the changed one is imported


WRONG = {
    "def f(batch, x=1.0): return batch": "its parameter x needs a default, and a type",
    "def f(batch, *, x: float): return batch": "its parameter x needs a default, and a type",
    "def f(batch, **x): return batch": r"its parameter \*\*x accepts any number of arguments",
    "def f(): return 1": "its first parameter must be the batch",
    "f = 3": "it is of type int, not a function",
    "def g(batch): return 1": "has no function f",
    "import there_is_no_such_module": "importing it failed: ModuleNotFoundError",
    "def f(batch": "importing it failed: SyntaxError",
    "raise SystemExit(3)": "importing it failed: SystemExit",
    "def f(batch): return batch.policy_logps[0][9, 9]": r"it raises IndexError: .*own\.py, line \d+\)",
    "def f(batch): return 1.0": "it returns something of type float; return a tensor",
    "def f(batch): return compute_log_ratios(batch)": r"shape \[4, 5\] for a batch of 4 groups",
    "def f(batch): return compute_log_ratios(batch).sum()": r"shape \[\] for a batch of 4 groups",
    "def f(batch): return compute_log_ratios(batch).detach().sum(-1)": "its gradient is zero",
    "def f(batch): return (batch.policy_logps * batch.valid).sum(-1)": "its value is not finite. Entries where batch.valid",
    "def f(batch): return torch.where(batch.valid, batch.policy_logps * batch.policy_logps, 0.0).sum(-1)": (
        "its gradient in policy_logps is not finite"
    ),
    "def f(batch): return batch.policy_logps.nan_to_num(0.0).sum(-1)": "its value depends on padding",
    "def f(batch): return compute_log_ratios(batch).sum(-1) + compute_log_ratios(batch).mean()": "depends on the other groups",
}


@pytest.mark.parametrize("source", WRONG)
def test_what_cannot_work_is_refused_by_name(source: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(IMPORTS + source + "\n")
    with pytest.raises(ConfigError, match=rf"loss\.function = .*own\.py:f.*{WRONG[source]}"):
        build_objective(LossConfig(function=f"{path}:f"))


def test_refusals_before_any_import(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.function = hinge; write package\.module:function or path/to/file\.py:function"):
        LossConfig(function="hinge")
    with pytest.raises(ConfigError, match=r"loss\.name = dpo with loss\.function = a\.py:b, which replaces it"):
        LossConfig(name="dpo", function="a.py:b")
    with pytest.raises(ConfigError, match=r"there is no file .*none\.py; paths start where the command runs"):
        build_objective(LossConfig(function=f"{tmp_path / 'none.py'}:f"))
    with pytest.raises(ConfigError, match="there is no file no_such_module"):
        build_objective(LossConfig(function="no_such_module:f"))


def test_statistics_of_the_batch_take_two_phases(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        IMPORTS
        + """
@register("centred", params=Hyperparameters, scored=lambda batch, params: batch.valid,
          needs=Needs(reference=True, batch_statistics=True), source="here")
def centred(batch, params):
    ratios = compute_log_ratios(batch)
    return (ratios - ratios.mean()).square().sum(-1)
"""
    )
    objective = build_objective(LossConfig(function=f"{tmp_path / 'own.py'}:centred"))
    assert objective.needs_whole_batch
    assert objective.loss.name == "centred"
