"""What people get wrong, and what they are told: one short message that names the option, and ends the command before any import
that takes seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.cli import COMMANDS, main
from mpo_megatron.config import (
    ConfigError,
    GenerateConfig,
    LossConfig,
    PrepareConfig,
    ScoreConfig,
    TrainConfig,
    check_writable,
    from_dict,
    load_yaml,
    parse,
)
from mpo_megatron.config.names import options_of
from mpo_megatron.config.other_names import OTHER_NAMES
from mpo_megatron.mcore.preparation import prepare
from mpo_megatron.rollout.models import choose_device
from mpo_megatron.train.objective import build_objective

TRAIN = ["--output", "run", "--model.checkpoint", "model", "--data.train", "groups"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", "mpo: there is no command 'trian'; did you mean train? `mpo --help` lists them."),
        ("xyz", "mpo: there is no command 'xyz'; `mpo --help` lists them."),
        ("prepare", "mpo prepare: --input, --output, --tokenizer: required, but not given; `mpo prepare --help` explains them."),
        (
            "train --output run",
            "mpo train: --model.checkpoint, --data.train: required, but not given; `mpo train --help` explains them.",
        ),
        ("convert in out", "mpo convert: in: write options as --name value."),
        ("convert --input i --output o --max_shard 3", "--max_shard: there is no such option; did you mean --max_shard_gib?"),
        ("train --lr 1", "mpo train: --lr: there is no such option; did you mean --optimizer.lr?"),
        ("train --paralel.tensor=2", "--paralel.tensor: there is no such option; did you mean --parallel.tensor?"),
        ("train --optimizer.warmup 1", "there is no such option; did you mean --optimizer.warmup_fraction?"),
        ("train --loss.paramz.beta 1", "--loss.paramz.beta: there is no such option; did you mean --loss.params.beta?"),
        ("train --logging.x 1", "there is no such option; there are --logging.tensorboard, --logging.wandb_project,"),
        ("train --learning_rate 1e-6", "--learning_rate: there is no such option; did you mean --optimizer.lr?"),
        ("train --lora.r 8", "--lora.r: there is no such option; did you mean --lora.rank?"),
        ("train --r 8", "--r: there is no such option; did you mean --lora.rank?"),
        ("train --lora.lora_dropout 0.1", "--lora.lora_dropout: there is no such option: adapters train without dropout."),
        ("train --num-train-epochs 3", "--num-train-epochs: there is no such option; did you mean --epochs?"),
        ("train --trainer.total_epochs 3", "--trainer.total_epochs: there is no such option; did you mean --epochs?"),
        ("train --data.train_files x", "--data.train_files: there is no such option; did you mean --data.train?"),
        ("train --beta 0.1", "--beta: there is no such option; did you mean --loss.params.beta?"),
        ("train --pipelin 2", "--pipelin: there is no such option; did you mean --parallel.pipeline?"),
        (
            "train --max_length 512",
            "did you mean --max_prompt_tokens and --max_response_tokens of `mpo prepare`?",
        ),
        ("iterate --learning_rate 1", "--learning_rate: there is no such option; did you mean --train.optimizer.lr?"),
        ("train --max_steps", "mpo train: argument --max_steps: expected one argument"),
        ("train --max_steps many", "mpo train: max_steps = many; it must be a whole number, or null."),
        ("train --seed 1.0", "mpo train: seed = 1.0; it must be a whole number."),
        ("train --optimizer.lr fast", "mpo train: optimizer.lr = fast; it must be a number."),
        ("train --optimizer.lr nan", "mpo train: optimizer.lr = nan; it must be a number."),
        ("train --data.shuffle maybe", "mpo train: data.shuffle = maybe; it must be true or false."),
        ("train --model.fp8 e4m3", "model.fp8 = e4m3; it must be one of none, current, blockwise, mxfp8."),
        ("plan --gpus 8 --model m --fp8 x", "fp8 = x; it must be one of none, current, blockwise, mxfp8, or null."),
        ("train --loss.params beta", "mpo train: --loss.params beta: write name=value, or several: --loss.params a=1 b=2."),
        ("prepare --weights a", "mpo prepare: weights = ['a']; its entry a: it must be a number."),
        ("train --model qwen", "mpo train: --model is a section; give its options individually, such as --model.checkpoint."),
        ("train --nproc two", "mpo train: --nproc: two; it must be a whole number."),
        ("train --nproc 0", "mpo train: --nproc = 0; it must be at least 1."),
        ("evaluate --nproc -2", "mpo evaluate: --nproc = -2; it must be at least 1."),
        ("train --max_restarts -1", "mpo train: --max_restarts = -1; it must be at least 0."),
        ("train --seed -1", "mpo train: seed = -1; it must be 0 or more, and below 2^63."),
        ("train --optimizer.eps 0", "mpo train: optimizer.eps = 0.0; it must be positive."),
        ("train --config nofile.yaml", "mpo train: config = nofile.yaml; no such file."),
        ("train --config=.", "mpo train: config = .; not a file; name a YAML file."),
    ],
)
def test_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Required options are given, unless the message is about them."""
    given = arguments.split()
    assert main(given + (TRAIN if given[0] == "train" and "required" not in message else [])) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mmodel: {checkpoint: a}", ":1: mmodel: there is no such option; did you mean model?"),
        ("output: r\n\nlr: 1\n", ":3: lr: there is no such option; did you mean optimizer.lr?"),
        ("model:\n  checkpoynt: a\n", ":2: model.checkpoynt: there is no such option; did you mean model.checkpoint?"),
        (
            "per_device_train_batch_size: 8\n",
            ":1: per_device_train_batch_size: there is no such option; did you mean data.",
        ),
        ("model:\n  lora_rank: 8\n", ":2: model.lora_rank: there is no such option; did you mean lora.rank?"),
        ("lora: {r: 8, lora_alpha: 16}", ":1: lora.r: there is no such option; did you mean lora.rank?"),
        ("trainer:\n  total_epochs: 3\n", ":1: trainer: there is no such option: it is a section of another trainer"),
        ("optimizer: {lr: 1e-6}\noptimizer: {eps: 1e-6}\n", ":2: optimizer is given twice"),
        ("loss:\n  params:\n    beta: 1\n    beta: 2\n", ":4: loss.params.beta is given twice"),
        ("optimizer:\n#  lr: 1\n", ":1: optimizer is a section; give options under it, or remove it."),
        ("model: qwen\n", ":1: model is a section; give options under it, or remove it."),
        ("optimizer: {lr: 5e-7x}\n", "optimizer.lr = 5e-7x; it must be a number."),
        ("optimizer: {lr: -1}\n", "optimizer.lr = -1.0; it must be positive, and finite."),
        ("input: [a\n", ":2: not valid YAML: expected ',' or ']', but got '<stream end>'; fix the line."),
        ("model:\n\tcheckpoint: a\n", ":2: not valid YAML: found character '\\t' that cannot start any token; fix the line."),
        ("- a\n- b\n", ": holds no options; write one per line, as `name: value`."),
        ("", ": holds no options; write one per line, as `name: value`."),
        ("\x00", ": cannot be read ("),
    ],
)
def test_files(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(text)
    assert main(["train", *TRAIN, "--config", "run.yaml"]) == 2
    printed = capsys.readouterr().err
    assert message.replace("\\t", "\t") in printed or message in printed
    assert "run.yaml" in printed or "optimizer.lr" in printed
    with pytest.raises(ConfigError, match=r"^run.yaml"):  # as in other commands' messages
        load_yaml(TrainConfig, "run.yaml")


def test_a_sections_values_may_be_shared() -> None:
    Path("run.yaml").write_text("optimizer: &same {lr: 1e-6}\nloss:\n  params: {<<: *same, beta: 1}\n")
    assert parse(TrainConfig, [*TRAIN, "--config", "run.yaml"]).loss.params == {"lr": 1e-6, "beta": 1}


def test_options_within_options() -> None:
    with pytest.raises(ConfigError, match=r"^train: optimizer is a section"):
        from_dict(TrainConfig, {"output": "r", "optimizer": None}, "train")
    with pytest.raises(ConfigError, match=r"^train: model.checkpoint = 3; it must be a text"):
        from_dict(TrainConfig, {"output": "r", "model": {"checkpoint": 3}}, "train")
    with pytest.raises(ConfigError, match=r"^scorers.a: pattern = 3; it must be a text"):
        ScoreConfig(input="i", output="o", scorers={"a": {"kind": "regex", "pattern": 3}})
    with pytest.raises(ConfigError, match=r"^scorers.a: patterm: there is no such option; did you mean pattern\?"):
        ScoreConfig(input="i", output="o", scorers={"a": {"kind": "regex", "patterm": "x"}})


@pytest.mark.parametrize("command", ["train", "reference"])
def test_a_runs_folder_is_answered_with_its_newest_step(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("run")
    for name in ("step_00000002", "step_00000010", "step_00000020.partial-x"):
        (run / "checkpoints" / name / "megatron").mkdir(parents=True)
        (run / "checkpoints" / name / "megatron" / "metadata.json").touch()
    (run / "checkpoints" / "step_00000030" / "megatron").mkdir(parents=True)  # incomplete
    for folder in (run, run / "checkpoints"):
        arguments = ["--output", "out", "--model.checkpoint", str(folder), "--data.train", "groups"]
        assert main([command, *arguments]) == 2
        newest = run / "checkpoints" / "step_00000010"
        assert capsys.readouterr().err == (
            f"mpo {command}: model.checkpoint = {folder} is the folder of a run; name one of its checkpoints; "
            f"the newest is {newest}.\n"
        )
    Path("early/checkpoints").mkdir(parents=True)
    for folder, message in (
        ("early", "is the folder of a run without a complete checkpoint"),
        ("out/..", "is neither"),
    ):
        Path("out").mkdir(exist_ok=True)
        assert main([command, "--output", "out", "--model.checkpoint", folder, "--data.train", "groups"]) == 2
        assert message in capsys.readouterr().err


def test_help_tells_of_ranks_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "reference", "evaluate"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "--nproc" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mpo_megatron 0")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "mpoo"}, "loss.name = 'mpoo'; there is no such method; did you mean mpo"),
        (
            {"params": {"betta": 1}},
            "loss.params.betta; mpo has no such hyper-parameter; it has partition, num_top, num_bottom, beta",
        ),
        ({"params": {"beta": -1}}, "loss.params.beta = -1; it must be positive"),
    ],
)
def test_losses(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_objective(LossConfig(**loss))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            KeyboardInterrupt(),
            130,
            "mpo convert: stopped (SIGINT); completed work is kept: run the same command again to resume.\n",
        ),
        (
            PermissionError(13, "Permission denied", "model/a.safetensors"),
            2,
            "mpo convert: model/a.safetensors: Permission denied; give this user the right to use it, or name another path.\n",
        ),
        (
            OSError(28, "No space left on device"),
            2,
            "mpo convert: a file: No space left on device; free space, and run the same command again.\n",
        ),
    ],
)
def test_what_no_check_foresees(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "convert", fail)
    assert main(["convert"]) == code
    assert capsys.readouterr().err == message


LONG, DEEP = "a" * 300, "a/" * 2500 + "b"
ARRAY, EVALUATE = ["launch", "slurm-array", "--generate", "g.yaml"], ["evaluate", "--candidate", ".", "--mt_bench", "q"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARRAY, "--output", LONG], "output = aaa.*…: a name in it is too long: 332 bytes with the endings"),
        ([*ARRAY, "--output", f"{LONG}/job.sh"], "output = aaa.*…: a name in it is too long"),
        (
            [*ARRAY, "--output", DEEP],
            "output = a/a/.*…: the path is too long: .* choose a shorter one",
        ),
        ([*ARRAY, "--logs", LONG], "logs = aaa.*…: a name in it is too long"),
        ([*ARRAY[:-1], LONG], "aaa.*…: File name too long; shorten it: most file systems allow 255 bytes a name"),
        (
            ["prepare", "--input", "i", "--tokenizer", "t", "--output", "é" * 120],
            "output = éé.*…: a name .* 272 bytes",
        ),
        ([*EVALUATE, "--output", "o", "--name", LONG], "name = o/model_answer/aaa.*…: a name in it is too long"),
    ],
)
def test_long_names_are_told_by_their_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("g.yaml").write_text("prompts: p\nmodel: m\noutput: o\n")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["g.yaml"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_file_system_that_knows_no_limit_has_none(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pathconf", lambda path, name: limit)
    Path("old").mkdir()
    for name in ("old", "new"):
        check_writable(Path(name), "output")


def test_names_of_almost_any_length_are_allowed() -> None:
    check_writable(Path("a" * 223), "output")
    with pytest.raises(ConfigError, match="too long"):
        check_writable(Path("a" * 224), "output")
    Path("a" * 250).mkdir()
    check_writable(Path("a" * 250), "output")  # it was started by an earlier version


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    """Also where `mpo_megatron.mcore` redirects Megatron's tensors on "cuda" to the CPU."""
    prepare()
    with pytest.raises(ConfigError, match="device = cuda:0; torch cannot use it"):
        choose_device("cuda:0")


SLOW_IMPORTS = ("torch", "transformers", "megatron", "datasets", "sklearn", "matplotlib")


QUICK = [
    *(f"{name} --help" for name in COMMANDS if name != "losses"),
    "convert --input nowhere --output out",
    "prepare --input . --tokenizer nowhere --output out",
    "generate --prompts p --model nowhere --output out",
    "launch slurm --train nowhere",
    "report nowhere",
    f"train {' '.join(TRAIN)}",
    f"reference {' '.join(TRAIN)}",
]
"""Commands that end before packages with slow imports are needed."""
PROGRAM = f"""
import contextlib, io, sys
from mpo_megatron.cli import main

for command in {QUICK!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(command.split())
        except SystemExit as stop:
            code = stop.code
    slow = [name for name in {SLOW_IMPORTS!r} if name in sys.modules]
    if slow or code != (0 if "--help" in command else 2):
        sys.exit(f"{{command}}: exit code {{code}}, imported {{slow}}")
"""


def test_refusals_do_not_wait_for_imports() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_other_trainers_names_lead_to_options_that_exist() -> None:
    for ours in OTHER_NAMES:
        command, _, option = ours.partition(":")
        options = options_of({"train": TrainConfig, "prepare": PrepareConfig, "generate": GenerateConfig}[command])
        assert option in options or option.startswith("loss.params."), ours
