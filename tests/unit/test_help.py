"""`--help` explains the important options and lists the rest; `--help-all` explains everything."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mpo_megatron import config as configs
from mpo_megatron.config import ConfigError, help, parse
from mpo_megatron.config.names import options_of
from mpo_megatron.launch.launch import TARGETS

KINDS: dict[str, type[Any]] = {
    **{
        name: getattr(configs, f"{name.capitalize()}Config")
        for name in ("align", "chat", "convert", "prepare", "generate", "score", "select", "train", "iterate", "evaluate")
    },
    **{name: getattr(configs, f"{name.capitalize()}Config") for name in ("inspect", "report", "plan")},
    **{f"launch {name}": kind for name, kind in TARGETS.items()},
}
MOST_EXPLAINED = 11
"""Number of options that a short help may explain; a command with few more explains all."""


def shown(kind: type[Any], option: str, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(kind, [option], "mpo name", **options)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_short_help(name: str, kind: type[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    text, options, main = shown(kind, "--help", capsys), options_of(kind), kind.MAIN_OPTIONS
    assert shown(kind, "-h", capsys) == text
    assert main or len(options) <= MOST_EXPLAINED + 1, name
    assert len(main) <= MOST_EXPLAINED
    assert set(main) <= set(options)
    for option in options:
        assert re.search(rf"\b{option.rpartition('.')[2]}\b", text), option
    if main:
        assert set(help.required_options(kind)) <= set(main)
        assert len(text.splitlines()) <= 60
        assert "--help-all" in text


def test_full_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(configs.TrainConfig, "--help-all", capsys, launcher={"--nproc": "Ranks to start."})
    for option in options_of(configs.TrainConfig):
        assert f"--{option} " in text
    assert "Ranks to start." in text
    assert "Peak learning rate" in text


def test_help_comes_before_faults_of_the_other_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        parse(configs.TrainConfig, ["--optimizer.lr", "x"], "mpo train")
    with pytest.raises(SystemExit):
        parse(configs.TrainConfig, ["--optimizer.lr", "x", "--help"], "mpo train")
    assert capsys.readouterr().out.startswith("usage: mpo train --output OUTPUT")
