"""Every option of every command with invalid values: each failure is a ConfigError that names the option, and fast."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron import config
from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError, DataConfig, ScoreConfig, TrainConfig, from_dict, load_yaml, parse
from mpo_megatron.config.names import options_of
from mpo_megatron.config.score import KINDS
from mpo_megatron.config.values import collection_of, field_types, is_single, section_of
from mpo_megatron.launch.launch import TARGETS

MODEL = {"checkpoint": "c"}
BASES: dict[type[Any], dict[str, Any]] = {
    config.TrainConfig: {"output": "o", "model": MODEL, "data": {"train": "t"}},
    config.ConvertConfig: {"input": "a", "output": "b"},
    config.PrepareConfig: {"input": "a", "output": "b", "tokenizer": "t"},
    config.GenerateConfig: {"prompts": "a", "model": "b", "output": "c"},
    config.ScoreConfig: {"input": "a", "output": "b", "scorers": {"x": {"kind": "match"}}},
    config.SelectConfig: {"input": "a", "output": "b"},
    config.IterateConfig: {"output": "o", "model": "m", "prompts": "p"},
    config.AlignConfig: {"output": "o", "model": "m", "data": ["d"]},
    config.ChatConfig: {"model": "m"},
    config.EvaluateConfig: {"output": "o", "held_out": {"groups": "g", "model": MODEL}},
    config.InspectConfig: {"data": "d"},
    config.ReportConfig: {"runs": ["r"]},
    config.PlanConfig: {"gpus": 8, "model": "m"},
    KINDS["reward_model"]: {"model": "m"},
    KINDS["pairwise"]: {"model": "m"},
    KINDS["match"]: {},
    KINDS["regex"]: {"pattern": "x"},
    KINDS["function"]: {"function": "module:name"},
    KINDS["served_reward_model"]: {"endpoint": {"base_url": "http://x", "model": "m"}, "tokenizer": "t"},
    KINDS["judge"]: {"template": "t", "endpoint": {"base_url": "http://x", "model": "m"}},
    TARGETS["torchrun"]: {"train": "t"},
    TARGETS["slurm"]: {"train": "t"},
    TARGETS["slurm-array"]: {"generate": "g"},
    TARGETS["kubernetes"]: {"train": "t", "image": "i"},
    TARGETS["skypilot"]: {"train": "t", "accelerators": "H100"},
}
"""The required options of every command, scorer and target."""

NO_NUMBERS = [
    *(True, "", "abc", "nan", "inf", "-inf", "1_000", "0x10", "0b1", "010x", "\uff11\uff12", "\u0661", "1e", "--", " 1", "null"),
    *([1], [], {"a": 1}, math.nan, math.inf, -math.inf, 10**400, -(10**400), 10**5000, 1e300, -1e300, "9" * 5000, "1e400"),
]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, 1.5, 1.0, "1.0", "1e5", "007", 10**19, "9223372036854775808"]
NO_TEXTS = [True, 1, 1.5, math.nan, 10**400, [1], [], {"a": 1}, "a\0b", "\ud800"]
NO_CHOICES = [True, 1, 1.5, [1], {}, "", "abc", "NONE"]
NO_TRUTHS = [1, 0, 1.5, "", "maybe", "1", [True], {}]
NO_LISTS = [True, 1, 1.5, "abc", {"a": 1}]
NO_MAPPINGS = [True, 1, 1.5, "abc", [1]]
ANYTHING = [
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**40),
    0.5,
    1e15,
    1e-320,
    -0.0,
    "1",
    "0.5",
    "",
    "true",
    "null",
    None,
    True,
    [],
    {},
    ["x"],
    {"x": "y"},
]


def every_option() -> list[tuple[type[Any], str]]:
    return [(kind, name) for kind in BASES for name in options_of(kind)]


def given(kind: type[Any], name: str, value: Any) -> dict[str, Any]:
    """A command's required options, and one more."""
    options = copy.deepcopy(BASES[kind])
    section, names = options, name.split(".")
    for part in names[:-1]:
        section = section.setdefault(part, {})
    section[names[-1]] = value
    return options


def wrong_values(expected: Any) -> list[Any]:
    kinds = [kind for kind in (typing.get_args(expected) or (expected,)) if kind is not type(None)] if is_single(expected) else []
    nothing = [] if type(None) in typing.get_args(expected) else [None]
    if typing.get_origin(expected) is typing.Literal:
        return [*nothing, *NO_CHOICES]
    if kinds == [int]:
        wrong = NO_WHOLE_NUMBERS
    elif kinds == [float]:
        wrong = NO_NUMBERS
    elif kinds == [bool]:
        wrong = NO_TRUTHS
    elif kinds == [str]:
        wrong = NO_TEXTS
    elif kinds:
        wrong = NO_CHOICES
    elif collection_of(expected) is list:
        wrong = [value for value in NO_LISTS if not isinstance(value, str) or str not in typing.get_args(expected)]
    else:
        wrong = NO_MAPPINGS
    return [*nothing, *(value for value in wrong if nothing or value != "null")]


def assert_names(error: ConfigError, name: str) -> None:
    assert name.split(".")[-1] in str(error)
    assert len(str(error)) < 1000


def test_every_command_is_here() -> None:
    sections = {section for kind in BASES for expected in field_types(kind).values() if (section := section_of(expected))}
    kinds = {
        kind for name in config.__all__ if name.endswith("Config") and dataclasses.is_dataclass(kind := getattr(config, name))
    }
    nested = {inner for kind in sections for expected in field_types(kind).values() if (inner := section_of(expected))}
    assert kinds - sections - nested - {config.JobConfig} <= set(BASES)
    assert {*KINDS.values(), *TARGETS.values()} <= set(BASES)
    assert all(from_dict(kind, options, "x") for kind, options in BASES.items())


def test_a_wrong_value_is_refused_by_name() -> None:
    for kind, name in every_option():
        for value in wrong_values(options_of(kind)[name]):
            try:
                from_dict(kind, given(kind, name, value), "where")
            except ConfigError as error:
                assert_names(error, name)
            else:
                raise AssertionError(f"{kind.__name__}: {name} took {value!r:.50}")


def test_no_value_ends_in_another_error() -> None:
    for kind, name in every_option():
        for value in ANYTHING:
            try:
                made = from_dict(kind, given(kind, name, value), "where")
            except ConfigError as error:
                assert_names(error, name)
                continue
            for part in name.split("."):
                made = getattr(made, part)
            assert not isinstance(made, float) or math.isfinite(made)


def test_a_dataclass_made_directly_checks_itself() -> None:
    for kind in BASES:
        made = from_dict(kind, BASES[kind], "x")
        for name, expected in field_types(kind).items():
            wrong: list[Any] = [3.5j, object()] if section_of(expected) or not is_single(expected) else wrong_values(expected)[:1]
            for value in wrong:
                with pytest.raises(ConfigError, match=name):
                    dataclasses.replace(made, **{name: value})
    with pytest.raises(ConfigError, match=r"^data.row_tokens = null; it must be a whole number\.$"):
        DataConfig(train="t", row_tokens=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1_000", "0x10", "\uff11\uff12", "010", "null", "1.0", "1e400", "true", "-", "9" * 5000])
def test_numbers_on_the_command_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output", "o", "--model.checkpoint", "c", "--data.train", "t", "--data.row_tokens", text]) == 2
    assert "data.row_tokens = " in capsys.readouterr().err
    assert main(["train", f"--data.row_tokens={text}"]) == 2
    assert "data.row_tokens = " in capsys.readouterr().err
    assert main(["train", "--nproc", text]) == 2
    assert "nproc" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["1_000", "0x10", "010", "1:30", ".inf", ".nan", "null", "0b11", "1_0.5", "'1_000'", "2024-01-01", "!!binary aGk="]
)
def test_numbers_in_a_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    for line in (f"epochs: {text}", f"loss: {{params: {{beta: {text}}}}}"):
        path.write_text(f"output: o\nmodel: {{checkpoint: c}}\ndata: {{train: t}}\n{line}\n")
        if "loss" in line and text in ("null", "'1_000'"):
            continue  # the loss checks its own parameters
        with pytest.raises(ConfigError, match=r"train.yaml:4: .*(epochs|beta) = "):
            load_yaml(TrainConfig, path)
        with pytest.raises(ConfigError, match=r"train.yaml:4: .*(epochs|beta) = "):
            parse(TrainConfig, ["--config", str(path)])


def test_numbers_that_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(
        "output: o\nmodel: {checkpoint: c}\ndata: {train: t, row_tokens: '512'}\noptimizer: {lr: 1e-6, eps: .5}\n"
        "loss: {params: {beta: 1e-2}}\nepochs: 3\nmax_steps: null\nlogging: {wandb_run: '5'}\n"
    )
    for made in (load_yaml(TrainConfig, path), parse(TrainConfig, ["--config", str(path)])):
        assert (made.data.row_tokens, made.optimizer.lr, made.optimizer.eps, made.epochs) == (512, 1e-6, 0.5, 3.0)
        assert type(made.loss.params) is dict
        assert (made.loss.params, made.max_steps, made.logging.wandb_run) == ({"beta": 0.01}, None, "5")


@pytest.mark.parametrize("content", ["a: &a [*a]", "loss: {params: &p {x: *p}}", "loss: {params: " + "[" * 1500 + "}", None])
def test_a_file_without_end(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    names = "abcdefghijklmnop"
    values = [", ".join([f"*{name}"] * 10) for name in names]
    bomb = "\n".join(f"    {name}: &{name} [{value}]" for value, name in zip(values, names[1:], strict=False))
    path.write_text(content or f"loss:\n  params:\n    a: &a [1]\n{bomb}\n")
    with pytest.raises(ConfigError, match=r"bomb.yaml"):
        load_yaml(TrainConfig, path)


def test_a_weight_of_a_scorer() -> None:
    for weight in (None, True, "1", 10**400, math.inf, math.nan, [1]):
        with pytest.raises(ConfigError, match=r"scorers.x.weight = "):
            ScoreConfig(input="a", output="b", scorers={"x": {"kind": "match", "weight": weight}})


WRONG_INSIDE = [
    ("launch slurm --train t --mounts [a:b,1]", "mounts = ['a:b', 1]; its entry 1: it must be a text"),
    ("launch slurm --train t --mounts [a:b]", "mounts = ['a:b'], but there is no container"),
    ("launch slurm --train t --container i --mounts [a]", "mounts: 'a'; write outside:inside"),
    ("launch slurm --train t --container=", "container is empty"),
    ("launch kubernetes --train t --image=", "image is empty"),
    ("launch skypilot --train t --accelerators=", "accelerators is empty"),
    ("launch slurm-array --generate t --shards 1_0", "--shards: there is no such option"),
    (
        "generate --prompts p --model m --output o --temperatures [1,x]",
        "temperatures = [1, 'x']; its entry x: it must be a number",
    ),
    ("generate --prompts p --model m --output o --temperatures [.nan]", "it must be a finite number"),
    ("report --runs [[a]]", "runs = [['a']]; its entry ['a']: it must be a text"),
    ("score --input a --output b --scorers {a:_3}", "scorers = {'a': 3}; of a, 3, it must be a mapping"),
    ("score --input a --output b --scorers {1:_{kind:_match}}", "its names must be texts"),
    ("evaluate --output o --held_out {}", "--held_out is a section; give its options individually, such as --held_out.groups"),
    ("evaluate --output o --held_out {groups:_[a]}", "groups = ['a']; it must be a text"),
    ("evaluate --output o --held_out {groups:_g,_model:_{checkpoint:_[a]}}", "model.checkpoint = ['a']; it must be a text"),
    ("evaluate --output o --held_out {nope:_1}", "nope: there is no such option"),
]
"""What is wrong inside a list, a mapping or a section in one text; `_` behind a colon or a comma stands for a blank."""


@pytest.mark.parametrize(("command", "message"), WRONG_INSIDE)
def test_values_inside_lists_mappings_and_sections(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([re.sub("(?<=[:,])_", " ", word) for word in command.split()]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert message in said
