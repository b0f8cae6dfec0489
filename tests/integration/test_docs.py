"""The documentation's commands: all options exist, and the commands of a new user's first day run, at small size."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.quickstart.task import build_groups
from mpo_megatron import config as configs
from mpo_megatron.cli import main
from mpo_megatron.config import build_parser
from mpo_megatron.config.parsing import fill_flags, join_lists, take_stage_options
from mpo_megatron.doctor.options import read_options
from mpo_megatron.launch.launch import TARGETS
from mpo_megatron.losses import group_loss, registry
from mpo_megatron.train import launcher
from tests.distributed.launch import launch_ranks
from tests.guide import code_block
from tests.tiny import save_model

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    {ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), ROOT / "tools" / "README.md"}
)
KINDS: dict[str, type[Any]] = {
    "align": configs.AlignConfig,
    "chat": configs.ChatConfig,
    "convert": configs.ConvertConfig,
    "prepare": configs.PrepareConfig,
    "generate": configs.GenerateConfig,
    "score": configs.ScoreConfig,
    "select": configs.SelectConfig,
    "reference": configs.TrainConfig,
    "train": configs.TrainConfig,
    "iterate": configs.IterateConfig,
    "evaluate": configs.EvaluateConfig,
    "inspect": configs.InspectConfig,
    "plan": configs.PlanConfig,
}
LAUNCHER_OPTIONS = ("--nproc", "--max_restarts")
"""Options of `mpo train` that belong to the launcher."""
GUIDES = ("conversion", "data", "launching", "planning", "watching", "on_policy", "extending")
"""Pages of docs/ whose commands run after the README's."""
RUN_ELSEWHERE = ("mpo iterate", "mpo train")
"""Commands of these pages that have separate tests: tests/integration/test_on_policy.py, tests/distributed/test_live.py."""
SMALLER_GUIDES = {
    "--held_out 500": "--held_out 8",
    "--num_workers 8": "--num_workers 1",
    "--step 12 --row 3": "--step 1 --row 0",
    "--replica 1": "--replica 0",
    "--max_tokens 1024": "--max_tokens 8",
    "mpo select ": "mpo select --truncated keep ",  # a random model rarely ends its answers,
    "--min_spread 0.1": "--min_spread 0",  # and all have the same length
    "--gpus 8 --data": "--gpus 8 --groups_per_step 8 --data",
}
"""The same for the guides."""
SMALLER = {
    "--nproc 8": "--nproc 2",
    "--parallel.tensor 4": "--parallel.tensor 2",
    "--held_out 500": "--held_out 8",
    "--num_workers 8": "--num_workers 1",
    "mpo train ": "mpo train --model.precision fp32 --data.groups_per_step 8 --data.row_tokens 512 --max_steps 2 ",
}
"""Replacements that fit a documented command to two CPU cores and a tiny model."""


def commands(page: Path) -> list[str]:
    """The `mpo …` commands of a page's code blocks, without comments, one line each."""
    text = page.read_text(encoding="utf-8")
    fenced = [match[1] for match in re.finditer(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    indented = re.findall(
        r"^ {4}(mpo (?:.*\\\n)*.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#\s.*$", "", line).strip() for line in lines if line.strip().startswith("mpo ")]


DOCUMENTED = [(page.relative_to(ROOT), command) for page in PAGES for command in commands(page) if "→" not in command]


def test_there_are_commands() -> None:
    assert len(DOCUMENTED) > 20
    assert {shlex.split(command)[1] for _, command in DOCUMENTED} >= {
        "convert",
        "prepare",
        "train",
        "generate",
        "score",
        "iterate",
    }


@pytest.mark.parametrize(("page", "command"), DOCUMENTED, ids=[f"{page}-{command[4:44]}" for page, command in DOCUMENTED])
def test_options_exist(page: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, name, *arguments = shlex.split(command.replace("…", ""))
    if name in ("losses", "report"):
        return  # their arguments are names of losses and folders; the README's pipeline runs `report`
    if name == "doctor":
        assert read_options([argument for argument in arguments if argument != "--config" and "." not in argument])
        return
    arguments = ["--model", *arguments] if name == "chat" else arguments
    kind = TARGETS[arguments.pop(0)] if name == "launch" else KINDS[name]
    options = {item.split("=")[0].removeprefix("--").split(".")[0] for item in arguments if re.match(r"--[a-z]", item)}
    known = set(kind.__dataclass_fields__) | {"config", "print_config", "help"} | {item[2:] for item in LAUNCHER_OPTIONS}
    assert options <= known
    if "config" in options or not arguments:
        return  # the file has the other options
    monkeypatch.chdir(tmp_path)
    for option in LAUNCHER_OPTIONS:
        if option in arguments:
            del arguments[arguments.index(option) : arguments.index(option) + 2]
    parser = build_parser(kind, f"mpo {name}")
    parser.exit_on_error = False
    others, _ = take_stage_options(kind, arguments)
    parser.parse_args(join_lists(kind, fill_flags(kind, others)))


def test_quoted_messages_exist() -> None:
    """Messages in the first columns of the tables are the package's own words; those of conversion have examples' numbers."""
    messages = (ROOT / "docs" / "reference" / "messages.md").read_text(encoding="utf-8").partition("## Conversion")[0]
    rows = [*messages.splitlines(), *(ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()]
    quoted = [match[1] for row in rows if (match := re.match(r"\| `([^`]+)` \|", row))]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mpo_megatron").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # messages are literals over several lines
    assert len(quoted) > 12
    missing = [text for text in quoted if any(part.strip() not in joined for part in re.split("…|N:", text))]
    assert not missing


def test_the_new_loss_of_the_guide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file of docs/extending.md is a complete loss."""
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    (tmp_path / "hinge.py").write_text(code_block("extending", "@register"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("hinge")
    policy, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.2]])
    value = group_loss("hinge", policy, reference, torch.tensor([[1.0, 0.0]]), margin=2.0)
    assert value.tolist() == pytest.approx([2 - (0.5 - 0.2)])


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's inputs, in which every line of its pipeline has run, unchanged except for sizes."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "Qwen" / "Qwen3-14B", seed=3)  # instead of the model on the hub
    with (folder / "groups.jsonl").open("w") as file:
        file.writelines(json.dumps(group) + "\n" for group in build_groups(64, seed=5))
    script = re.sub(r" +", " ", "\n".join(commands(ROOT / "README.md")))
    for written, smaller in SMALLER.items():
        assert written in script, f"the README no longer says {written!r}"
        script = script.replace(written, smaller)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(launcher, "launch", launch_ranks)
        for command in script.splitlines():  # in this process, which has already imported everything
            assert main(shlex.split(command)[1:]) == 0, command
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_the_readme_runs(readme: Path) -> None:
    assert (readme / "report.html").stat().st_size > 10_000
    assert (readme / "qwen3-aligned" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def guides(readme: Path) -> Path:
    """The README's folder with the guides' additional inputs."""
    (readme / "runs").mkdir()
    (readme / "checkpoints").mkdir()
    (readme / "path" / "to").mkdir(parents=True)
    (readme / "data").mkdir()
    links = {
        "run": ("runs/mpo", "RUN", "OTHER", "THIRD"),
        "Qwen/Qwen3-14B": ("Qwen3-14B", "checkpoints/Qwen2.5-14B-Instruct", "path/to/checkpoint"),
        "groups": ("data/groups",),
        "groups.jsonl": ("pairs.jsonl",),
    }
    for target, names in links.items():
        for name in names:
            (readme / name).symlink_to(readme / target)
    with (readme / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": group["prompt"]}) + "\n" for group in build_groups(6, seed=8))
    (readme / "rewards.py").write_text(code_block("extending", "def brevity"))
    (readme / "score.yaml").write_text(code_block("extending", "scorers:"))
    (readme / "train.yaml").write_text((ROOT / "examples" / "launch" / "train.yaml").read_text())
    return readme


@pytest.mark.slow
@pytest.mark.distributed
def test_the_guides_run(guides: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of the guides, unchanged except for sizes, in the folder of the README's commands."""
    script = "\n".join(command for page in GUIDES for command in commands(ROOT / "docs" / f"{page}.md") if "→" not in command)
    script = re.sub(r" +", " ", script)
    for written, smaller in SMALLER_GUIDES.items():
        assert written in script, f"the guides no longer say {written!r}"
        script = script.replace(written, smaller)
    monkeypatch.chdir(guides)
    for command in script.splitlines():
        if "--input selected.jsonl" in command:
            exec(code_block("extending", "scored.jsonl"), {})
        if not command.startswith(RUN_ELSEWHERE):
            assert main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err[-3000:]}"
    assert (guides / "round" / "selected" / "groups.jsonl").is_file()
    assert json.loads((guides / "plan.json").read_text())
