"""`mpo align`: convert, prepare, train, export, compare, report; on-policy rounds if prompts are given instead of groups.

The folders are the state, as in `mpo iterate`: a stage whose last file exists is skipped; any other is started or resumed.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mpo_megatron.align.estimate import estimate, estimate_rounds
from mpo_megatron.align.outcome import (
    OUTCOME_FILE,
    describe_outcome,
    describe_rounds,
    print_outcome,
)
from mpo_megatron.align.plan import Stages, build_rounds, build_stages, data_digest, find_folder
from mpo_megatron.align.precision import describe_precision
from mpo_megatron.config import AlignConfig, ReportConfig, TrainConfig, require, to_dict
from mpo_megatron.config.checks import find_change
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import INFO_FILE
from mpo_megatron.files.atomic import AtomicFolder, replace_file
from mpo_megatron.files.lock import hold
from mpo_megatron.hf.fingerprint import model_digest
from mpo_megatron.model.convert import convert
from mpo_megatron.report.report import report
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.iterate import TRAIN_FILE, iterate, run_training, stage
from mpo_megatron.rollout.records import GENERATE_FILE, read_summary, write_summary
from mpo_megatron.rollout.rounds import check_rounds
from mpo_megatron.rollout.stages import run_command
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.next_command import after_align, after_aligned_rounds
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.launcher import count_ranks

STATE_FILE = "align.json"
FREE = ("model", "output", "data", "prompts", "plan", "nproc")
"""Options that a later run may change: paths (digests cover their content), and options without effect on the result."""


def align(config: AlignConfig, console: Console | None = None) -> None:
    """Run all stages, or the remaining ones.

    Raises:
        ConfigError: the configuration cannot work, or differs from the one this folder was started with.
        DataError: a stage's input is unusable, or another `mpo align` runs in the folder.
        StageError: training failed, or was asked to stop.
    """
    console = console or Console(highlight=False)
    model = find_folder(config.model)
    if config.prompts is not None:
        run_rounds(config, model, console)
        return
    stages = build_stages(config, model)
    if config.plan:
        print_plan(config, stages, console)
        return
    with hold(stages.folder / ".lock", stages.folder):
        open_folder(config, stages)
        groups = stages.folder / "groups"
        stage("prepare", groups / INFO_FILE, lambda: prepare(stages.prepare, console), console)
        stages = build_stages(config, model)  # again: the number of groups determines training options
        num_ranks = config.nproc or count_ranks(stages.train.parallel)
        if not (stages.folder / TRAIN_FILE).is_file():
            for name, value in stages.chosen.items():
                console.print(f"train.{name} = {value}: chosen by mpo align", soft_wrap=True)
            say_precision(config, console)
        stage(
            "train", stages.folder / TRAIN_FILE, functools.partial(run_training, stages.folder, stages.train, num_ranks), console
        )
        stage("export", stages.exported, functools.partial(convert, stages.export), console)
        if config.answers:
            for name, answers in (("before", stages.before), ("after", stages.after)):
                done = Path(answers.output) / GENERATE_FILE
                stage(f"answers {name}", done, functools.partial(run_command, "generate", generate, answers), console)
        page = stages.folder / "report.html"
        stage("report", page, lambda: report(ReportConfig(runs=[str(stages.folder / "run")], output=str(page))), console)
        outcome = describe_outcome(stages, config.answers)
        replace_file(stages.folder / OUTCOME_FILE, [outcome.as_markdown().encode()])
        print_outcome(console, outcome, stages.folder / "aligned", after_align(config.model, stages.folder))


def say_precision(config: AlignConfig, console: Console) -> None:
    """Print that training keeps a precision which is not the faster one here, if it does."""
    kept = describe_precision(config.train, Path(config.output))
    if kept is not None:
        console.print(kept, soft_wrap=True, markup=False)


def open_folder(config: AlignConfig, stages: Stages) -> None:
    """Record the options in a new folder. In an existing one, compare those of finished stages, and record the others again.

    Raises:
        ConfigError: names the first option of a finished stage that changed.
    """
    kept = {name: value for name, value in to_dict(config).items() if name not in FREE}
    state: dict[str, Any] = {"config": kept, "model": model_digest(stages.model), "data": data_digest(config.data)}
    path = stages.folder / STATE_FILE
    if not path.is_file():
        others = [entry.name for entry in stages.folder.iterdir() if not entry.name.startswith(".")]
        require(not others, f"output = {stages.folder} holds {others[:1]}, but no {STATE_FILE}; choose a new folder.")
        write_summary(path, state)
        return
    recorded = read_summary(path)
    free = changeable(stages)
    changed = find_change(without(recorded, free), without(state, free))
    if changed is not None:
        name, before, now = changed
        raise_changed(stages.folder, name.removeprefix("config."), before, now)
    if find_change(recorded, state) is not None:
        write_summary(path, state)


def changeable(stages: Stages) -> set[str]:
    """Options of unfinished stages: a failed one may need another value. Training itself compares what it resumes."""
    done = {
        ("model", "data", "prepare", "held_out", "seed"): stages.folder / "groups" / INFO_FILE,
        ("train",): stages.folder / TRAIN_FILE,
        ("generate", "answers"): Path(stages.before.output) / GENERATE_FILE,
    }
    return {name for names, file in done.items() if not file.is_file() for name in names}


def without(state: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """A folder's state without some of its options."""
    config = {name: value for name, value in state["config"].items() if name not in names}
    return {**{name: value for name, value in state.items() if name not in names}, "config": config}


def raise_changed(folder: Path, name: str, before: object, now: object) -> None:
    """Refuse a change to a finished stage.

    Raises:
        ConfigError: always.
    """
    what = {"model": "another model", "data": "other data"}.get(name, f"{name} = {before}, now it is {now}")
    require(
        False,
        f"output = {folder} was started with {what}, and the stage that uses it is complete; use the old value, another output, "
        "or remove the files of that stage and of later ones (docs/align.md).",
    )


# ----------------------------------------------------------------------------------------------------- on-policy rounds


def run_rounds(config: AlignConfig, model: Path, console: Console) -> None:
    """Run `mpo iterate`, and make its last policy the result."""
    rounds = build_rounds(config, model)
    if config.plan:
        check_rounds(rounds)
        lines = [f"rounds: {config.rounds} × (generate → score → select → prepare → train), in {rounds.output}"]
        console.print("\n".join([*lines, estimate_rounds(rounds, model)]), soft_wrap=True, markup=False)
        return
    say_precision(config, console)
    iterate(rounds, console)
    last = Path(rounds.output) / "policies" / f"{config.rounds:02d}" / "hf"
    aligned = Path(config.output) / "aligned"
    if not aligned.is_dir():
        with AtomicFolder(aligned) as partial:
            for path in sorted(last.iterdir()):
                link_or_copy(path, partial.path / path.name)
            partial.commit()
    outcome = describe_rounds(Path(rounds.output), config.rounds, config.answers)
    replace_file(Path(config.output) / OUTCOME_FILE, [outcome.as_markdown().encode()])
    print_outcome(console, outcome, aligned, after_aligned_rounds(config.model, Path(config.output), config.rounds))


def link_or_copy(source: Path, target: Path) -> None:
    """Put the same file at another path, as a hard link if the file system supports it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ----------------------------------------------------------------------------------------------------- the plan


def describe_length(train: TrainConfig) -> str:
    """How long a run is, in words."""
    number, unit = (train.max_steps, "step") if train.max_steps else (train.epochs, "epoch")
    return f"{number:g} {unit}{'' if number == 1 else 's'}"


def print_plan(config: AlignConfig, stages: Stages, console: Console) -> None:
    """Print the stages and an estimated training time; write nothing."""
    train: TrainConfig = stages.train
    table = Table("stage", "what it does", "writes")
    prepare_inputs = visible(", ".join(config.data))
    rows = (
        ("prepare", f"tokenize {prepare_inputs}; hold out {stages.prepare.held_out} groups", "groups, groups-eval"),
        ("train", f"{train.loss.title}, lr {train.optimizer.lr:g}, {describe_length(train)}", "run"),
        ("export", "Megatron → Hugging Face", "aligned"),
        ("answers", f"{config.answers} held-out prompts, before and after", "answers"),
        ("report", "curves, held-out groups, changes", "report.html, align.md"),
    )
    for row in rows:
        table.add_row(*row)
    console.print(Text(f"{config.model} → {stages.folder / 'aligned'}"))
    console.print(table)
    console.print(f"{estimate(config, stages)} To run it, leave out --plan.", soft_wrap=True)
