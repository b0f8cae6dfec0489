"""`mpo train` on a run's folder that it must refuse: no rank starts, and no file's code runs."""

from __future__ import annotations

import pathlib
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.cli import main
from mpo_megatron.config import ConvertConfig
from mpo_megatron.files import digests
from mpo_megatron.model.convert import convert
from mpo_megatron.train.checkpoints.step_folders import read_state, write_state
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model
from tests.waiting import TIMEOUT

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a further one, groups, other groups, and a run of one step."""
    folder = tmp_path_factory.mktemp("resume")
    for name, seed in (("model", 0), ("other", 1)):
        source = save_model(folder / f"{name}-hf", num_hidden_layers=1, seed=seed)
        convert(ConvertConfig(input=str(source), output=str(folder / name)))
    save_groups(folder / "train", random_groups(8, seed=1), folder / "model-hf")
    save_groups(folder / "changed", random_groups(8, seed=2), folder / "model-hf")
    run_ranks(1, "mpo_megatron.train", options(folder, "run", "--stop_after", "1"))
    return folder


def options(folder: Path, run: str, *more: str) -> list[str]:
    given = ("--data.groups_per_step", "4", "--data.row_tokens", "256", "--epochs", "1", "--eval_every", "0")
    loss = () if "--loss.name" in more else ("--loss.params.beta", "0.2")
    return [
        *("--output", str(folder / run), "--model.checkpoint", str(folder / "model"), "--data.train", str(folder / "train")),
        *(*given, *loss, "--model.precision", "fp32", *more),
    ]


@pytest.fixture
def no_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any, **kwargs: Any) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("mpo_megatron.train.launcher.launch", start)


CHANGES = [
    ("--seed 5", "seed = 1234, now it is 5"),
    ("--epochs 2", "number of steps = 2, now it is 4"),
    ("--data.groups_per_step 2 --epochs 0.5", "data.groups_per_step = 4, now it is 2"),
    ("--data.train changed", "groups of data.train = "),
    ("--data.first_step 2", "data.first_step = 2, but "),
    ("--model.reference other", "reference model = "),
    ("--model.precision bf16", "model.precision = fp32, now it is bf16"),
    ("--loss.params.beta 0.3", "loss.params.beta = 0.2, now it is 0.3"),
    ("--loss.name dpo", "loss.name = mpo, now it is dpo"),
    ("--optimizer.lr 1", "optimizer.lr = 5e-07, now it is 1.0"),
    ("--online.kl_weight 1", "online."),
]
PROGRAM = """
import sys
sys.modules["torch"] = sys.modules["megatron"] = sys.modules["transformers"] = None
from mpo_megatron.cli import main
for arguments in eval(sys.argv[1]):
    print(main(arguments), "end of", flush=True, file=sys.stderr)
"""


def test_other_options_data_and_models_are_refused_before_torch_is_imported(folder: Path) -> None:
    """In one process in which torch cannot be imported, so no rank can have started."""
    commands = []
    for change, _ in CHANGES:
        words = [str(folder / word) if word in ("changed", "other") else word for word in change.split()]
        commands.append(["train", *options(folder, "run", *words)])
    done = subprocess.run([sys.executable, "-c", PROGRAM, repr(commands)], capture_output=True, text=True, timeout=TIMEOUT)
    said = done.stderr.split("end of")
    assert len(said) == len(CHANGES) + 1, done.stderr
    for (_, message), text in zip(CHANGES, said, strict=False):
        lines = text.strip().splitlines()
        assert lines[-1] == "2", text
        assert message in lines[-2]
        assert len(lines) == 2, text


def test_a_hyper_parameter_left_to_its_default_is_refused_before_ranks_start(
    folder: Path, no_rank_starts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *options(folder, "run", "--loss.name", "mpo")]) == 2
    assert "loss.params.beta = 0.2, now it is " in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_model_is_refused_before_torch_is_imported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "hf" / "config.json").write_text("{}")
    command = ["train", *options(folder, "new", "--model.checkpoint", str(tmp_path / "model"))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, repr([command])], capture_output=True, text=True, timeout=TIMEOUT)
    assert "config.json: damaged: has 2 bytes" in done.stderr
    assert "2 end of" in done.stderr


class Command:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.mark,)


def poison(step: Path, name: str, mark: Path, *, sealed: bool) -> None:
    """Put a pickle that runs a command into a step; `sealed`: with new digests, as an attacker would write."""
    path = step / "megatron" / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(Command(mark)))
    else:
        torch.save({"args": Command(mark)}, path)
    if sealed:
        state, files = read_state(step)
        write_state(step, state, {**files, f"megatron/{name}": digests.digest_file(path)})


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_poisoned_step_is_refused_and_never_run(
    name: str, folder: Path, tmp_path: Path, no_rank_starts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(folder / "run", run)
    step = run / "checkpoints" / "step_00000001"
    poison(step, name, mark, sealed=True)
    command = [word if word != str(folder / "run") else str(run) for word in options(folder, "run")]
    assert main(["train", *command]) == 2
    assert f"{name}: refused" in capsys.readouterr().err.splitlines()[-1]
    ended = run_ranks(1, "mpo_megatron.train", command, check=False)  # as torchrun and srun start them
    assert ended.returncode == 2, ended.stderr
    assert f"{name}: refused" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert step.is_dir()
    assert not mark.exists()


def test_a_poisoned_step_that_differs_from_its_digests_is_put_aside_and_never_run(folder: Path, tmp_path: Path) -> None:
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(folder / "run", run)
    poison(run / "checkpoints" / "step_00000001", ".metadata", mark, sealed=False)
    command = [word if word != str(folder / "run") else str(run) for word in options(folder, "run")]
    ended = run_ranks(1, "mpo_megatron.train", command, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "no checkpoint is complete; damaged: step_00000001.damaged" in ended.stderr.splitlines()[-1]
    assert not mark.exists()
