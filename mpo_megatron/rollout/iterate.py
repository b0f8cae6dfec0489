"""`mpo iterate`: on-policy rounds, each generate → score → select → prepare → train, as one resumable command.

    mpo iterate --config iterate.yaml

The folders are the state: a stage with complete output is skipped; any other stage starts or resumes with its own command. A kill
anywhere costs at most what its stage cannot resume; the same command resumes. Training computes the reference log-probs on its
way, and caches them in parts like `mpo reference`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpo_megatron.config import (
    ConvertConfig,
    DataConfig,
    GenerateConfig,
    IterateConfig,
    PrepareConfig,
    SelectConfig,
    TrainConfig,
)
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import INFO_FILE
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import write_list
from mpo_megatron.files.lock import hold
from mpo_megatron.hf.identity import PEFT_CONFIG, is_adapter_folder
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_adapter import export_adapter
from mpo_megatron.model.convert_folder import find_megatron_checkpoint
from mpo_megatron.rollout.divergence import KL_FILE
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.records import (
    GENERATE_FILE,
    SCORE_FILE,
    SELECT_FILE,
    encode_line,
    read_summary,
    write_summary,
)
from mpo_megatron.rollout.round_report import REPORT_FILE, report_round, write_report
from mpo_megatron.rollout.rounds import (
    PROMPT_OPTIONS,
    STATE_FILE,
    Round,
    RoundPolicy,
    RoundsPlan,
    build_plan,
    check_folder,
    start_training,
    started_with,
)
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.select import NothingLeftError, select
from mpo_megatron.rollout.stages import run_command, run_ranks, save_config
from mpo_megatron.terminal.console import Console
from mpo_megatron.train.checkpoints.resumption import check_resumption
from mpo_megatron.train.setup import build_setup

TRAIN_FILE = "train.json"
TRAIN_MODULE, KL_MODULE = "mpo_megatron.train", "mpo_megatron.rollout.divergence_main"


def iterate(config: IterateConfig, console: Console | None = None) -> None:
    """Run all rounds, or the remaining ones, and write the reports.

    Raises:
        ConfigError: the configuration cannot work, or differs from the one this folder was started with; nothing has started.
        DataError: a stage's input is unusable, or another `mpo iterate` runs in the folder.
        StageError: training failed.
    """
    console = console or Console(highlight=False)
    plan = build_plan(config)
    with hold(plan.folder / ".lock", plan.folder):
        open_folder(plan)
        write_prompts(plan, console)
        start = Path(plan.config.model)
        console.rule("policy 0: the start of the first round")
        measure_policy(plan.policies[0], start, console)
        reports = []
        for item, num_ranks in zip(plan.rounds, plan.num_ranks, strict=True):
            console.rule(f"round {item.number} of {config.rounds}")
            trained = run_round(plan, item, start, num_ranks, console)
            measure_policy(plan.policies[item.number], trained, console)
            kl = measure_kl(plan, item, trained, start, num_ranks, console) if config.measure_kl else None
            reports.append(write_round_report(plan, item, kl, console))
            start = trained
        write_report(plan.folder, reports)
        console.print(
            f"{plan.folder / 'report.md'}, {plan.folder / 'report.png'}; the last policy: {plan.policies[-1].hf}", soft_wrap=True
        )


# --------------------------------------------------------------------------------------------------- the folder


def open_folder(plan: RoundsPlan) -> None:
    """Record in a new folder what must not change; compare it in an existing one.

    Raises:
        ConfigError: names the first value that changed.
    """
    state = started_with(plan.config, plan.prompts) | {"model_digest": plan.model_digest}
    check_folder(plan.folder, state)
    if not (plan.folder / STATE_FILE).is_file():
        write_summary(plan.folder / STATE_FILE, state)


def write_prompts(plan: RoundsPlan, console: Console) -> None:
    """Write the prompts of each round and the held-out ones; if they exist, check that they are the same."""
    split = plan.prompts
    files = {"held-out.jsonl": split.held_out} | {f"round-{n:02d}.jsonl": rows for n, rows in enumerate(split.rounds, start=1)}
    for name, rows in files.items():
        replace_file(plan.folder / "prompts" / name, map(encode_line, rows))
    write_list(plan.folder / "prompts")
    sizes = ", ".join(str(len(rows)) for rows in split.rounds)
    duplicates = f"; {split.num_duplicates} duplicates left out" if split.num_duplicates else ""
    console.print(f"prompts: {sizes} in the rounds, {len(split.held_out)} held out{duplicates}", soft_wrap=True)


# --------------------------------------------------------------------------------------------------- stages


def stage(name: str, done: Path, run: Callable[[], object], console: Console) -> None:
    """Run a stage unless the file that marks its completion exists."""
    if done.exists():
        console.print(f"{name}: already complete")
        return
    console.print(f"{name} …")
    started = time.monotonic()
    run()
    console.print(f"{name}: {time.monotonic() - started:.0f} s")


def run_round(plan: RoundsPlan, item: Round, start: Path, num_ranks: int, console: Console) -> Path:
    """Run all stages of a round; the checkpoint at its end."""
    folder, sampling = item.folder, for_policy(item.generate, start)
    stage("generate", folder / "samples" / GENERATE_FILE, lambda: run_command("generate", generate, sampling), console)
    stage("score", folder / "scored" / SCORE_FILE, lambda: run_command("score", score, item.score), console)
    stage("select", folder / "selected" / SELECT_FILE, lambda: select(item.select, console), console)
    stage("prepare", folder / "groups" / INFO_FILE, lambda: prepare(item.prepare, console), console)
    config = start_training(plan, item, start)
    stage("train", folder / TRAIN_FILE, lambda: run_training(folder, config, num_ranks), console)
    return read_trained(folder)


def measure_policy(policy: RoundPolicy, start: Path, console: Console) -> None:
    """Export a policy, generate answers to the held-out prompts, and score the answers."""
    folder = policy.folder
    if is_adapter_folder(start):  # a small file: engines already hold the base model
        stage("export", policy.hf / PEFT_CONFIG, lambda: export_adapter(start, policy.hf, base_of_rounds(policy.hf)), console)
    else:
        export = ConvertConfig(input=str(start), output=str(policy.hf))
        stage("export", policy.hf / "config.json", lambda: convert(export), console)
    done, sampling = folder / "samples" / GENERATE_FILE, for_policy(policy.generate, start)
    stage("generate held-out", done, lambda: run_command("generate", generate, sampling), console)
    stage("score held-out", folder / "scored" / SCORE_FILE, lambda: run_command("score", score, policy.score), console)


def for_policy(config: GenerateConfig, policy: Path) -> GenerateConfig:
    """The stage's configuration for a policy in this folder: a server loads an adapter unless it serves the whole policy."""
    return replace(config, load_adapter=config.load_adapter and is_adapter_folder(policy))


def base_of_rounds(hf: Path) -> str | None:
    """Base model named by an adapter exported to a policy's folder: the first policy, if that is a whole model."""
    first = hf.parents[1] / "00" / hf.name
    return str(first.absolute()) if (first / "config.json").is_file() else None


def run_training(folder: Path, config: TrainConfig, num_ranks: int) -> None:
    """Train, or resume training; the round's `train.json` names the resulting checkpoint."""
    check_resumption(build_setup(config, num_ranks))  # the ranks check too; here one message appears before any rank starts
    run_ranks("train", TRAIN_MODULE, save_config(folder / "train.yaml", config), num_ranks)
    trained = find_megatron_checkpoint(Path(config.output))
    assert trained is not None
    write_summary(folder / TRAIN_FILE, {"checkpoint": os.path.relpath(trained, folder)})


def read_trained(folder: Path) -> Path:
    """The checkpoint of a finished round; recorded relative to the round's folder, so that both can be moved together."""
    recorded = read_summary(folder / TRAIN_FILE)["checkpoint"]
    found = Path(os.path.normpath(folder / recorded))
    return found if found.exists() else Path(recorded)


def measure_kl(
    plan: RoundsPlan, item: Round, trained: Path, start: Path, num_ranks: int, console: Console
) -> dict[str, Any] | None:
    """KL(π ‖ π_ref) on the new policy's held-out answers; None if all of them were truncated."""
    policy = plan.policies[item.number]
    folder = policy.folder / "kl"
    answers = SelectConfig(
        input=str(policy.folder / "scored"),
        output=str(folder / "selected"),
        duplicates="keep",
        truncated=item.select.truncated,
    )
    quiet = Console(quiet=True)
    try:
        stage("select held-out", folder / "selected" / SELECT_FILE, lambda: select(answers, quiet), console)
    except NothingLeftError as error:
        console.print(f"no KL: {error}", style="yellow", markup=False, soft_wrap=True)
        return None
    prepared = PrepareConfig(
        input=str(folder / "selected" / "groups.jsonl"),
        output=str(folder / "groups"),
        tokenizer=str(policy.hf),
        **{name: getattr(item.prepare, name) for name in PROMPT_OPTIONS},
        **{name: getattr(item.prepare, name) for name in ("max_prompt_tokens", "max_response_tokens", "num_workers")},
    )
    stage("prepare held-out", folder / "groups" / INFO_FILE, lambda: prepare(prepared, quiet), console)
    training = start_training(plan, item, start)
    config = replace(
        training,
        output=str(folder),
        model=replace(training.model, checkpoint=str(trained), reference=training.model.reference or training.model.checkpoint),
        data=DataConfig(train=str(folder / "groups"), row_tokens=training.data.row_tokens, groups_per_step=256),
    )
    file = folder / "kl.yaml"
    stage("KL", folder / KL_FILE, lambda: run_ranks("KL", KL_MODULE, save_config(file, config), num_ranks), console)
    return read_summary(folder / KL_FILE)


def write_round_report(plan: RoundsPlan, item: Round, kl: dict[str, Any] | None, console: Console) -> dict[str, Any]:
    """Write the round's report from its folders, and print its main numbers."""
    before, after = plan.policies[item.number - 1].folder, plan.policies[item.number].folder
    report = report_round(item.number, item.folder, before, after, kl, item.train)
    write_summary(item.folder / REPORT_FILE, report)
    reward = (
        f"held-out reward {report['before']['reward']:.4g} → {report['after']['reward']:.4g} ± {report['after']['error']:.2g}"
    )
    wins = f"wins {report['win_rate']['value']:.1%} ± {report['win_rate']['error']:.1%} against the previous policy"
    console.print(f"round {item.number}: {reward}; {wins}", soft_wrap=True)
    return report
