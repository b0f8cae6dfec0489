"""Every recipe parses, has a layout that fits, and is consistent with related recipes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_megatron.config import (
    ConfigError,
    GenerateConfig,
    IterateConfig,
    PlanConfig,
    PrepareConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    from_dict,
    load_yaml,
    to_dict,
)
from mpo_megatron.plan.plan import build_problem, num_groups, plan
from mpo_megatron.plan.remedies import explain

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"
PLANS: dict[str, dict[str, Any]] = yaml.safe_load((RECIPES / "plans.yaml").read_text(encoding="utf-8"))
RUNS = sorted(path for path in RECIPES.rglob("*.yaml") if path.name.startswith(("train", "iterate")))
FOLDERS = {"output": "out", "model": {"checkpoint": "model"}, "data": {"train": "data"}}


@functools.cache
def load_run(path: Path) -> TrainConfig:
    """The training run of a recipe; for a round on one machine, its last stage."""
    if path.name.startswith("train"):
        return load_yaml(TrainConfig, path)
    stage = load_yaml(IterateConfig, path).train
    sections = {name: {**FOLDERS.get(name, {}), **stage.get(name, {})} for name in ("model", "data")}  # type: ignore[dict-item]
    return from_dict(TrainConfig, {**stage, "output": "out", **sections}, "train")


def build_plan(path: Path, **options: Any) -> PlanConfig:
    return PlanConfig(**{**PLANS[str(path.relative_to(RECIPES))], "suggest": 0, **options})


def test_every_run_has_a_plan() -> None:
    assert sorted(str(path.relative_to(RECIPES)) for path in RUNS) == sorted(PLANS)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_runs_fit(path: Path) -> None:
    config, train = build_plan(path), load_run(path)
    problem = build_problem(config, train)
    candidate = problem.evaluate(train.parallel, train.model.recompute, train.data.row_tokens)
    assert problem.fits(candidate), explain(problem, candidate)
    assert candidate.time.seconds > 0
    assert num_groups(config, train, problem.sequences) >= config.groups  # type: ignore[operator]
    # No sampled group is split, so steps are fused where the loss allows it.
    assert candidate.packed.split_groups == 0


@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.name.startswith("train")], ids=lambda path: path.parent.name + path.stem
)
def test_rows_hold_the_longest_group(path: Path) -> None:
    """The prepared groups' limits must match the row budget."""
    train = load_run(path)
    [prepared] = [
        prepare
        for prepare in (load_yaml(PrepareConfig, file) for file in path.parent.glob("prepare*.yaml"))
        if prepare.output == train.data.train
    ]
    scored = {"mpo": 4, "wmpo": 4, "nca": 4, "spo": 2, "mcpo": 7}[train.loss.name]
    assert prepared.tokenizer == train.model.checkpoint
    assert train.data.row_tokens >= prepared.max_prompt_tokens + scored * (prepared.max_response_tokens - 1)
    assert prepared.held_out
    assert train.data.eval == f"{prepared.output}-eval"


@pytest.mark.parametrize("path", [path for path in RUNS if path.name == "train_fp8.yaml" or path.stem.endswith("_fp8")], ids=str)
def test_fp8_is_all_that_its_variant_changes(path: Path) -> None:
    plain = path.with_name(path.name.replace("_fp8", ""))
    if not plain.exists():
        pytest.skip("this recipe is FP8 only")
    ours, theirs = to_dict(load_run(path)), to_dict(load_run(plain))
    assert ours["model"].pop("fp8") != theirs["model"].pop("fp8")
    assert ours.pop("output") != theirs.pop("output")
    assert ours == theirs


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("iterate.yaml")), ids=lambda path: path.parent.name)
def test_rounds_hold_valid_stages_and_train_as_many_machines_do(path: Path) -> None:
    config = load_yaml(IterateConfig, path)
    from_dict(GenerateConfig, {**config.generate, "prompts": "p", "model": "m", "output": "o"}, "generate")
    from_dict(ScoreConfig, {**config.score, "input": "i", "output": "o"}, "score")
    from_dict(SelectConfig, {**config.select, "input": "i", "output": "o"}, "select")
    prepare = from_dict(PrepareConfig, {**config.prepare, "input": "i", "output": "o", "tokenizer": "t"}, "prepare")
    alone, many = load_run(path), load_run(path.with_name("train.yaml"))
    assert alone.loss == many.loss
    assert alone.optimizer == many.optimizer
    assert (alone.epochs, alone.data.groups_per_step, alone.data.row_tokens) == (1, 128, many.data.row_tokens)
    apart = load_yaml(PrepareConfig, path.with_name("prepare.yaml"))
    for name in ("max_prompt_tokens", "max_response_tokens", "chat_template_kwargs"):
        assert getattr(prepare, name) == getattr(apart, name)
    assert config.generate["num_responses"] == PLANS[str(path.relative_to(RECIPES))]["responses"] == 5


def test_the_readme_names_every_recipe() -> None:
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in RUNS:
        assert str(path.relative_to(RECIPES)) in text


def test_a_recipe_on_too_few_gpus_is_refused() -> None:
    path = RECIPES / "mpo_on_policy" / "qwen2.5-32b" / "train.yaml"
    with pytest.raises(ConfigError, match=r"the largest part is (gradients|optimizer states).*It would fit with"):
        plan(build_plan(path, gpus=8, train=str(path)))
