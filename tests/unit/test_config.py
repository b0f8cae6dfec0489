"""The configuration: YAML and command line agree, and every rule's message names field and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_megatron.cli import main
from mpo_megatron.config import (
    AlignConfig,
    ChatConfig,
    ConfigError,
    GenerateConfig,
    IterateConfig,
    ParallelConfig,
    PrepareConfig,
    TrainConfig,
    from_dict,
    load_yaml,
    parse,
    to_dict,
)

REQUIRED = ["--output", "run", "--model.checkpoint", "model", "--data.train", "groups"]


def test_command_line_overrides_yaml_and_the_result_loads_again(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: {lr: 1e-6}\nloss: {name: wmpo, params: {beta: 0.05}}\n")
    config = parse(TrainConfig, ["--config", str(file), *REQUIRED, "--loss.params.alpha", "2", "--parallel.tensor", "4"])
    assert config.optimizer.lr == 1e-6
    assert config.loss.params == {"beta": 0.05, "alpha": 2}
    assert config.parallel.sequence_parallel
    assert not ParallelConfig().sequence_parallel
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(to_dict(config)))
    assert load_yaml(TrainConfig, saved) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.lr", "0"], "optimizer.lr = 0.0; it must be positive"),
        (["--optimizer.min_lr", "1"], "optimizer.min_lr = 1.0; it must be between 0 and optimizer.lr"),
        (["--optimizer.warmup_fraction", "1"], "optimizer.warmup_fraction = 1.0"),
        (["--optimizer.beta2", "1"], "optimizer.beta2 = 1.0"),
        (["--parallel.tensor", "0"], "parallel.tensor = 0; it must be at least 1"),
        (["--parallel.sequence", "true"], "parallel.sequence = true needs parallel.tensor > 1"),
        (["--data.groups_per_step", "0"], "data.groups_per_step = 0"),
        (["--epochs", "0"], "epochs = 0.0; it must be positive"),
        (["--epochs", ".inf"], "epochs = .inf; it must be a number"),
        (["--optimizer.lr", ".inf"], "optimizer.lr = .inf; it must be a number"),
        (["--online.kl_weight", ".inf"], "online.kl_weight = .inf; it must be a number"),
        (["--parallel.timeout_minutes", "0"], "parallel.timeout_minutes = 0.0; it must be positive, and finite"),
        (["--checkpoint.keep", "0"], "checkpoint.keep = 0"),
        (["--model.logprob_chunk", "0"], "model.logprob_chunk = 0"),
    ],
)
def test_each_rule_names_field_and_value(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse(TrainConfig, [*REQUIRED, *options])


def test_command_line_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("convert", "prepare", "train", "losses"))
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "Peak learning rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"tensor": 3},
            "parallel.tensor = 3 does not divide the model's num_attention_heads = 40; choose one of 1, 2, 4, 5, 8, 10, 20, 40",
        ),
        ({"tensor": 10}, "parallel.tensor = 10 does not divide the model's num_key_value_heads = 8; choose one of 1, 2, 4, 8"),
        ({"pipeline": 5}, "parallel.pipeline = 5 does not divide the model's num_hidden_layers = 48"),
    ],
)
def test_layouts_that_do_not_divide_the_model(layout: dict[str, Any], message: str) -> None:
    from transformers import Qwen2Config

    from mpo_megatron.families import read_family
    from mpo_megatron.hf.layout import validate_layout

    config = Qwen2Config(num_attention_heads=40, num_key_value_heads=8, intermediate_size=13824, num_hidden_layers=48)
    family = read_family(config)

    validate_layout(family, ParallelConfig(tensor=8, pipeline=4), 152064)
    with pytest.raises(ConfigError, match=message):
        validate_layout(family, ParallelConfig(**layout), 152064)
    with pytest.raises(ConfigError, match="padded vocabulary = 151937"):
        validate_layout(family, ParallelConfig(tensor=2), 151937)


# --------------------------------------------------------------------------------------------------- options of stages


def test_options_of_stages_stand_on_the_command_line_as_those_of_their_commands(tmp_path: Path) -> None:
    """Typed like the options of the stage's command, and they override those of a file."""
    (tmp_path / "i.yaml").write_text("train: {optimizer: {lr: 1e-5, schedule: linear}}\nprepare: {columns: {prompt: question}}\n")
    arguments = ["--config", str(tmp_path / "i.yaml"), "--output", "o", "--model", "m", "--prompts", "p"]
    arguments += ["--train.loss.params.beta", "0.2", "--train.loss.params.p=2", "--train.loss.name", "swepo"]
    arguments += ["--train.optimizer.lr", "1e-6", "--generate.temperatures", "0.6", "0.8", "--prepare.system_prompt", "[a-z]"]
    arguments += ["--generate.stop", "a", "--rounds", "2"]
    config = parse(IterateConfig, arguments)
    train = from_dict(TrainConfig, {**config.train, "output": "o", "model": {"checkpoint": "m"}, "data": {"train": "d"}}, "train")
    assert (train.optimizer.lr, train.optimizer.schedule) == (1e-6, "linear")
    assert (train.loss.name, train.loss.params) == ("swepo", {"beta": 0.2, "p": 2})
    assert config.generate == {"temperatures": [0.6, 0.8], "stop": ["a"]}
    assert config.prepare == {"columns": {"prompt": "question"}, "system_prompt": "[a-z]"}
    assert config.rounds == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.optimizer.lr"], "--train.optimizer.lr: a value is missing"),
        (["--train.loss.name", "--rounds", "2"], "--train.loss.name: a value is missing"),
        (["--train.seed", "1", "--train.seed.x", "2"], "--train.seed.x: seed holds no options"),
        (["--train.loss.params.beta", "1_000"], "beta = 1_000; it must be a finite number"),
    ],
)
def test_options_of_stages_that_cannot_be(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(IterateConfig, ["--output", "o", "--model", "m", "--prompts", "p", *arguments])


@pytest.mark.parametrize("arguments", [["--plan"], ["--plan", "--seed", "1"], ["--plan", "true"], ["--plan=true"]])
def test_an_option_that_is_true_or_false_needs_no_value_to_be_true(arguments: list[str]) -> None:
    assert parse(AlignConfig, ["--output", "o", "--model", "m", "--data", "d", *arguments]).plan
    assert not parse(AlignConfig, ["--output", "o", "--model", "m", "--data", "d", "--plan", "false"]).plan


TEXTS = [
    *("Human:", "a: b", "-", "- x", "---", "-1", "null", "1.5", "{x}", "#", "'q'", "\n\nHuman:", "é"),
    *("2024-01-01", "2024-31-12", "0x_"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_a_list_is_not_read_as_yaml(text: str) -> None:
    align = ["--output", "o", "--model", "m", "--data", "d", "--generate.stop"]
    generate = ["--output", "o", "--model", "m", "--prompts", "p", "--stop"]
    for given in ([text], [text, "b"], ["b", text]):
        assert parse(AlignConfig, [*align, *given]).generate == {"stop": given}
        assert parse(GenerateConfig, [*generate, *given]).stop == given
        assert parse(PrepareConfig, ["--tokenizer", "t", "--output", "o", "--input", *given]).inputs == given


@pytest.mark.parametrize("given", [["--input", "-"], ["--input=-"], ["--input", "-", "b.jsonl"], ["--input", "b.jsonl", "-"]])
def test_a_dash_is_standard_input(given: list[str]) -> None:
    """YAML reads it as a list of null."""
    wanted = [part for part in [*given[0].split("=")[1:], *given[1:]] if part]
    assert parse(PrepareConfig, [*given, "--tokenizer", "t", "--output", "o"]).inputs == wanted


@pytest.mark.parametrize("given", [["a=x", "b=y"], ["{a: x, b: y}"]])
def test_a_mapping_is_written_alike_for_a_command_and_its_stages(given: list[str]) -> None:
    stage = parse(AlignConfig, ["--output", "o", "--model", "m", "--data", "d", "--prepare.columns", *given]).prepare
    assert stage == {"columns": {"a": "x", "b": "y"}}
    own = parse(PrepareConfig, ["--output", "o", "--tokenizer", "t", "--input", "i", "--columns", *given])
    assert own.columns == stage["columns"]


@pytest.mark.parametrize("name", ["tools", "messages", "add_generation_prompt", "tokenize", "continue_final_message"])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (PrepareConfig, ["--input", "i", "--output", "o", "--tokenizer", "t"]),
        (GenerateConfig, ["--prompts", "p", "--output", "o", "--model", "m"]),
        (ChatConfig, ["--model", "m"]),
    ],
)
def test_template_variables_replace_nothing_of_a_row(kind: Any, arguments: list[str], name: str) -> None:
    """They win over the rows' tools, and over the generation prompt."""
    with pytest.raises(ConfigError, match=f"chat_template_kwargs: {name} is no variable of the template"):
        parse(kind, [*arguments, "--chat_template_kwargs", f"{name}=false"])
