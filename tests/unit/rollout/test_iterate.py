"""`mpo iterate` without running a stage: the plan of every round, refusals, the folder, and when there is no KL."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, IterateConfig
from mpo_megatron.config.checks import find_change
from mpo_megatron.files import DataError
from mpo_megatron.files.lock import hold
from mpo_megatron.rollout import rounds
from mpo_megatron.rollout.iterate import iterate, measure_kl, open_folder, stage, write_prompts
from mpo_megatron.rollout.records import write_summary
from mpo_megatron.rollout.round_report import REPORT_FILE
from mpo_megatron.rollout.rounds import RoundsPlan, build_plan, start_training
from mpo_megatron.rollout.select import NothingLeftError
from tests.tiny import CHATML
from tests.unit.rollout.conftest import write_prompt_file


@pytest.fixture
def options(model: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration that works."""
    return {
        "output": str(tmp_path / "out"),
        "model": str(model),
        "prompts": str(write_prompt_file(tmp_path / "prompts.jsonl", 20)),
        "rounds": 2,
        "held_out": 4,
        "score": {"scorers": {"short": {"kind": "regex", "pattern": "a"}}},
        "train": {"optimizer": {"lr": 1e-3}},
    }


# --------------------------------------------------------------------------------------------------- the plan


def test_options_change_by_round(options: dict[str, Any]) -> None:
    options["per_round"] = {
        "train.optimizer.lr": [2e-3, 1e-3],
        "train.loss.params.beta": [0.1, 0.5],
        "generate.top_p": [1.0, 0.9],
    }
    plan = build_plan(IterateConfig(**options))
    assert [item.train.optimizer.lr for item in plan.rounds] == [2e-3, 1e-3]
    assert [item.train.loss.params for item in plan.rounds] == [{"beta": 0.1}, {"beta": 0.5}]
    assert [item.generate.top_p for item in plan.rounds] == [1.0, 0.9]
    # Policies are measured the same way in all rounds.
    held_out = [policy.generate for policy in plan.policies]
    assert {(stage.top_p, stage.seed, stage.num_responses) for stage in held_out} == {(1.0, 1234, 2)}
    assert [item.train.seed for item in plan.rounds] == [1235, 1236]
    assert [Path(item.generate.model) for item in plan.rounds] == [policy.hf for policy in plan.policies[:2]]


@pytest.mark.parametrize(("choice", "expected"), [("previous", [None, None]), ("initial", [None, "initial"])])
def test_reference_of_a_round(options: dict[str, Any], choice: str, expected: list[str | None]) -> None:
    plan = build_plan(IterateConfig(**options, reference=choice))  # type: ignore[arg-type]
    starts = [Path(options["model"]), Path("round-1")]
    trainings = [start_training(plan, item, start) for item, start in zip(plan.rounds, starts, strict=True)]
    assert [training.model.checkpoint for training in trainings] == [str(start) for start in starts]
    references = [training.model.reference for training in trainings]
    assert references == [options["model"] if name == "initial" else name for name in expected]


SERVER = {"engine": "openai", "endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}}


def test_a_server_may_read_each_rounds_weights(options: dict[str, Any]) -> None:
    plan = build_plan(IterateConfig(**options | {"generate": SERVER | {"load_weights": True}}))
    assert all(item.generate.load_weights for item in plan.rounds)


def test_prompts_are_drawn_for_and_trained_on_alike(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{% if enable_thinking %}{% endif %}" + CHATML)
    template = {"chat_template": str(tmp_path / "template.jinja"), "chat_template_kwargs": {"enable_thinking": False}}
    alike = {"system_prompt": "S"} | template
    sections = {name: {**options.get(name, {}), **alike} for name in ("generate", "prepare")}
    sections["prepare"]["prompt_format"] = "chat"  # as auto, without the look at the first prompts
    build_plan(IterateConfig(**{**options, **sections}))


@pytest.mark.parametrize(
    ("changes", "package", "message"),
    [
        ({"generate": {"engine": "vllm"}}, "vllm", r"round 1: generate\.engine = vllm needs the package vllm, which is not inst"),
        ({"generate": SERVER | {"load_weights": True}}, "openai", r"round 1: generate\.engine = openai needs the package openai"),
        (
            {"score": {"scorers": {"x": {"kind": "judge", "template": "t", "endpoint": SERVER["endpoint"]}}}},
            "openai",
            r"round 1: score\.scorers\.x, which asks a server, needs the package openai",
        ),
        (
            {"score": {"scorers": {"x": {"kind": "reward_model", "model": "reward", "device": "balanced"}}}},
            "accelerate",
            r"round 1: score\.scorers\.x\.device = balanced needs the package accelerate",
        ),
        ({"train": {"logging": {"wandb_project": "p"}}}, "wandb", r"round 1: logging\.wandb_project is set, but wandb is not"),
        (
            {"train": {"lora": {"rank": 2, "quantize": "nf4"}}},
            "bitsandbytes",
            r"round 1: lora\.quantize = nf4 needs the package bitsandbytes",
        ),
    ],
)
def test_missing_packages_are_named_first(
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    package: str,
    message: str,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("{{ response }}")
    (tmp_path / "reward").mkdir()
    settings = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (tmp_path / "reward" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        build_plan(IterateConfig(**{**options, **changes}))
    assert not Path(options["output"]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": {"model": "x"}}, r"generate\.model is set by mpo iterate itself"),
        ({"train": {"model": {"reference": "x"}}}, r"train\.model\.reference is set by mpo iterate itself"),
        ({"per_round": {"select.input": ["a", "b"]}}, r"select\.input is set by mpo iterate itself"),
        ({"generate": {"num_response": 4}}, r"generate: .*num_response"),
        ({"generate": {"temperature": -1.0}}, r"generate\.temperature = -1\.0"),
        ({"score": {}}, r"score: .*scorers"),
        (
            {"generate": {"system_prompt": "S"}},
            r"generate\.system_prompt = S, prepare\.system_prompt = None",
        ),
        ({"prepare": {"prompt_format": "templated"}}, r"generate\.prompt_format = auto, prepare\.prompt_format = templated"),
        ({"score": {"scorers": {"x": {"kind": "magic"}}}}, r"scorers\.x\.kind = magic"),
        ({"select": {"sets": "best"}}, r"select: .*sets"),
        ({"train": {"loss": {"name": "mpoo"}}}, r"round 1: loss.*mpoo.*did you mean mpo"),
        ({"train": {"loss": {"params": {"partition": "labels"}}}}, r"round 1: .*select\.sets = all has none"),
        ({"train": {"parallel": {"tensor": 3}}, "nproc": 2}, r"round 1: parallel\.tensor .* does not divide"),
        ({"train": {"parallel": {"tensor": 8}}}, r"round 1: parallel\.tensor = 8 does not divide"),
        ({"train": {"checkpoint": {"resume": False}}}, r"round 1: train\.checkpoint\.resume = false"),
        ({"generate": SERVER}, r"round 1: generate\.engine = openai; a server keeps its weights"),
        (
            {"generate": SERVER | {"load_adapter": True}},
            r"round 1: generate\.engine = openai; .* whole models with generate\.load",
        ),
        (
            {"generate": SERVER | {"load_weights": True}, "train": {"lora": {"rank": 2}}},
            r"round 1: generate\.engine = openai; .* with generate\.load_adapter = true",
        ),
        ({"per_round": {"train.optimizer.lr": [1e-3, -1.0]}}, r"train\.optimizer\.lr = -1\.0"),
        ({"per_round": {"train.seed.x": [1, 2]}}, r"per_round\.train\.seed\.x: seed has no options of its own"),
        ({"model": "nowhere"}, r"model = nowhere; no such folder; .* write one with `mpo convert`"),
        ({"prompts": "nowhere.jsonl"}, r"prompts = nowhere\.jsonl; cannot be read"),
        (
            {"train": {"lora": {"rank": 2, "target_modules": "lm_head"}, "parallel": {"pipeline": 2}}},
            r"round 1: lora\.target_modules = lm_head with parallel\.pipeline = 2: only the last stage would train",
        ),
        ({"train": {"lora": {"quantize": "nf4"}}}, r"round 1: lora\.quantize = nf4, but all weights are trained"),
        ({"train": {"lora": {"rank": 2, "base": "b"}}}, r"round 1: lora\.base = b, but model\.checkpoint = .* is a whole model"),
        ({"train": {"model": {"fp8": "current"}}}, r"round 1: model\.fp8 = current"),
        ({"train": {"experts": {"balance_coeff": 0.1}}}, r"round 1: experts\.balance_coeff = 0\.1, but .* has no experts"),
        ({"train": {"online": {"kl_weight": 0.1, "engine": "vllm"}}}, r"round 1: online\.engine = vllm, but"),
        ({"train": {"model": {"resident_offload": True}}}, r"round 1: model\.resident_offload = true, but no reference"),
        ({"train": {"checkpoint": {"keep_best": 1}}}, r"round 1: checkpoint\.keep_best = 1 needs held-out groups"),
        ({"train": {"data": {"eval": "nowhere"}}}, r"round 1: data\.eval = nowhere; no prepared groups there"),
        (
            {"generate": {"chat_template": "none"}, "prepare": {"chat_template": "none"}},
            r"round 1: chat_template = none; no such file",
        ),
        (
            {"score": {"scorers": {"x": {"kind": "function", "function": "none.py:f"}}}},
            r"round 1: score\.scorers\.x\.function = none\.py:f; there is no file none\.py",
        ),
        ({"held_out": 99, "generate": {"num_response": 4}}, r"generate: .*num_response"),  # before prompts are counted
        ({"held_out": 99, "train": {"loss": {"name": "mpoo"}}}, r"round 1: loss.*mpoo"),
    ],
)
def test_what_cannot_work_is_refused_first(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plan(IterateConfig(**{**options, **changes}))
    assert not Path(options["output"]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds = 0; it must be at least 1"),
        ({"held_out": 1}, "at least 2 held-out prompts"),
        ({"held_out_responses": 1}, "at least 2 answers make a group"),
        ({"per_round": {"train.optimizer.lr": [1e-3]}}, r"per_round\.train\.optimizer\.lr = .*one value for each of rounds = 2"),
        ({"per_round": {"optimizer.lr": [1, 2]}}, r"per_round\.optimizer\.lr; it must name an option of a stage"),
    ],
)
def test_options(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IterateConfig(**{**options, **changes})


# --------------------------------------------------------------------------------------------------- the folder


def open_plan(plan: RoundsPlan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    open_folder(plan)
    write_prompts(plan, Console(quiet=True))


def test_it_starts_from_a_hugging_face_folder(options: dict[str, Any], model: Path) -> None:
    plan = build_plan(IterateConfig(**{**options, "model": str(model.parent / "hf")}))
    converted = Path(plan.config.model)
    assert converted.parent == plan.folder / "converted"
    assert {item.train.model.checkpoint for item in plan.rounds} == {str(converted)}
    open_plan(plan)
    open_plan(build_plan(IterateConfig(**options)))  # the same weights, converted by hand


def test_a_folder_goes_on_only_as_it_was_started(options: dict[str, Any]) -> None:
    plan = build_plan(IterateConfig(**options))
    open_plan(plan)
    before = {path.name: path.read_bytes() for path in (plan.folder / "prompts").iterdir()}
    assert set(before) == {"held-out.jsonl", "round-01.jsonl", "round-02.jsonl", "mpo_digests.json"}
    open_plan(plan)
    assert {path.name: path.read_bytes() for path in (plan.folder / "prompts").iterdir()} == before
    open_plan(build_plan(IterateConfig(**options, nproc=2)))  # on another machine
    for item in plan.rounds:  # finished
        write_summary(item.folder / REPORT_FILE, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "check_round", lambda *_: pytest.fail("a check of a round that was done"))
        build_plan(IterateConfig(**options))
    options["train"] = {"optimizer": {"lr": 2e-3}}
    with pytest.raises(ConfigError, match=r"was started with train\.optimizer\.lr = 0\.001, now it is 0\.002"):
        open_plan(build_plan(IterateConfig(**options)))


def test_changed_prompts_and_foreign_folders_are_refused(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    open_plan(build_plan(IterateConfig(**options)))
    write_prompt_file(tmp_path / "prompts.jsonl", 20, note="changed")
    options["model"] = str(model.parent / "hf")  # which is not converted before the refusal
    with pytest.raises(ConfigError, match="was started with prompts_digest"):
        open_plan(build_plan(IterateConfig(**options)))
    assert not (Path(options["output"]) / "converted").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds .*chapter\.tex.*choose a new folder"):
        open_plan(build_plan(IterateConfig(**{**options, "output": str(tmp_path / "thesis")})))
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_two_at_a_time_are_refused(options: dict[str, Any]) -> None:
    output = Path(options["output"])
    with hold(output / ".lock", output), pytest.raises(DataError, match="another run is writing it"):
        iterate(IterateConfig(**options), Console(quiet=True))


def test_first_change_is_named() -> None:
    assert find_change({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert find_change({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert find_change({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None


def test_a_stage_that_is_done_does_not_run(tmp_path: Path) -> None:
    ran = []
    for _ in range(2):
        stage("try", tmp_path / "done", lambda: (ran.append(1), (tmp_path / "done").touch()), Console(quiet=True))
    assert ran == [1]


def test_only_answers_that_are_all_cut_off_leave_out_the_kl(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = build_plan(IterateConfig(**options))

    def measured(error: DataError) -> None:
        monkeypatch.setattr("mpo_megatron.rollout.iterate.select", Mock(side_effect=error))
        assert measure_kl(plan, plan.rounds[0], Path(), Path(), 1, Console()) is None

    measured(NothingLeftError("all were cut off"))
    assert "no KL: all were cut off" in capsys.readouterr().out
    with pytest.raises(DataError, match="the disk is full"):
        measured(DataError("the disk is full"))
