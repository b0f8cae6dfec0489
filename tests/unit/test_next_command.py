"""A finished command names the next one, and that one has the given options."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_megatron import config as configs
from mpo_megatron.cli import COMMANDS
from mpo_megatron.config.names import options_of
from mpo_megatron.launch.launch import TARGETS
from mpo_megatron.terminal.next_command import (
    NextCommand,
    after_align,
    after_aligned_rounds,
    after_convert,
    after_evaluate,
    after_generate,
    after_iterate,
    after_plan,
    after_prepare,
    after_reference,
    after_report,
    after_score,
    after_select,
    after_train,
    say_next,
)

NAMED = [
    *after_align("model", Path("aligned")),
    *after_aligned_rounds("model", Path("aligned"), 2),
    *after_convert("my model"),
    *after_prepare("groups", "model"),
    *after_generate("samples"),
    *after_score("scored"),
    *after_select("selected"),
    *after_train("run"),
    *after_reference(["--config", "run.yaml"]),
    *after_iterate("rounds", 3),
    *after_report("report.html", ["run"]),
    *after_plan(None, 8, 8),
    *after_plan("run.yaml", 8, None),
    *after_plan("run.yaml", 64, 8),
]


@pytest.mark.parametrize("command", [command for command in NAMED if command.words[0] == "mpo"], ids=lambda item: item.purpose)
def test_options_exist(command: NextCommand) -> None:
    _, name, *rest = command.words
    assert name in COMMANDS
    assert rest[0].startswith("--") or name in ("chat", "report", "launch")  # which take a word without an option
    kind = TARGETS[rest[0]] if name == "launch" else getattr(configs, f"{name.capitalize()}Config")
    known = {*options_of(kind), "config", "print_config", "nproc"}
    assert {word[2:] for word in rest if word.startswith("--")} <= known
    assert not any("{" in word for word in rest)


def test_what_is_there_is_named(tmp_path: Path) -> None:
    assert after_evaluate(str(tmp_path)) == []
    (tmp_path / "evaluation.png").touch()
    assert after_evaluate(str(tmp_path))[0].words == ("open", str(tmp_path / "evaluation.png"))
    (tmp_path / "conversion.json").touch()
    assert after_convert(str(tmp_path))[0].words[:6] == ("mpo", "prepare", "--input", "DATA", "--tokenizer", str(tmp_path))
    (tmp_path / "groups-eval").mkdir()
    *_, train = after_prepare(str(tmp_path / "groups"), str(tmp_path))
    assert train.words[2:4] == ("--model.checkpoint", str(tmp_path))
    assert train.words[6:8] == ("--data.eval", str(tmp_path / "groups-eval"))


@pytest.mark.parametrize(("gpus", "nodes", "each"), [(64, "8", "8"), (12, "3", "4")])
def test_all_planned_gpus_are_submitted(gpus: int, nodes: str, each: str) -> None:
    (command,) = after_plan("run.yaml", gpus, 8)
    assert command.words[-4:] == ("--nodes", nodes, "--gpus_per_node", each)


def test_paths_are_quoted_and_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    say_next([])
    assert capsys.readouterr().out == ""
    say_next(after_score("my \x1b scores"))
    assert capsys.readouterr().out == (
        "next:\n  mpo select --input 'my \\x1b scores' --output SELECTED    # choose groups to train on\n"
    )
