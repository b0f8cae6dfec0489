"""The configuration: YAML and command line agree, and every rule's message names field and fix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError, ParallelConfig, TrainConfig, load_yaml, parse, to_dict

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
        (["--optimizer.min_lr", "1"], "optimizer.min_lr = 1.0; it must lie between 0 and optimizer.lr"),
        (["--optimizer.warmup_fraction", "1"], "optimizer.warmup_fraction = 1.0"),
        (["--optimizer.beta2", "1"], "optimizer.beta2 = 1.0"),
        (["--parallel.tensor", "0"], "parallel.tensor = 0; it must be at least 1"),
        (["--parallel.sequence", "true"], "parallel.sequence = true needs parallel.tensor > 1"),
        (["--data.groups_per_step", "0"], "data.groups_per_step = 0"),
        (["--epochs", "0"], "epochs = 0.0; it must be positive"),
        (["--epochs", ".inf"], "epochs = inf; it must be positive, and finite"),
        (["--optimizer.lr", ".inf"], "optimizer.lr = inf; it must be positive, and finite"),
        (["--online.kl_weight", ".inf"], "online.kl_weight = inf; it must be 0"),
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


def qwen(**changes: object) -> SimpleNamespace:
    defaults = {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
    }
    return SimpleNamespace(**defaults | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "yarn"}}, "rope_type = 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"model_type": "llama"}, "model_type = 'llama' is not supported; supported are qwen2, qwen3"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, object], message: str) -> None:
    from mpo_megatron.hf.config import check_supported

    check_supported(qwen())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        check_supported(qwen(**changes))  # type: ignore[arg-type]


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
def test_layouts_that_do_not_divide_the_model(layout: dict[str, int], message: str) -> None:
    from mpo_megatron.hf.layout import validate_layout

    validate_layout(qwen(), ParallelConfig(tensor=8, pipeline=4), 152064)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        validate_layout(qwen(), ParallelConfig(**layout), 152064)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="padded vocabulary = 151937"):
        validate_layout(qwen(), ParallelConfig(tensor=2), 151937)  # type: ignore[arg-type]
