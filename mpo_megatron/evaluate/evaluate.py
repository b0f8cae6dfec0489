"""`mpo evaluate`: measure a policy on held-out groups and samples, and write files for the judges of public benchmarks.

    mpo evaluate --config evaluate.yaml --output evaluation

Each part writes its results to the output folder; generating and scoring resume where they stopped. evaluation.json is written
last and contains all measurements; evaluation.png plots them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np

from mpo_megatron.config import EvaluateConfig, HeldOutConfig, to_dict, validate_evaluate
from mpo_megatron.config.parallel import check_ranks
from mpo_megatron.evaluate import held_out
from mpo_megatron.evaluate.answering import answer_questions
from mpo_megatron.evaluate.benchmarks import Benchmark, read_questions, write_answers
from mpo_megatron.evaluate.plot import plot_evaluation
from mpo_megatron.evaluate.samples import SampleSet, check_sides, compare_samples, find_scored, read_samples, summarize_samples
from mpo_megatron.rollout.records import write_summary
from mpo_megatron.rollout.stages import run_ranks, save_config
from mpo_megatron.terminal.console import Console
from mpo_megatron.train.launcher import count_ranks
from mpo_megatron.train.setup import build_setup

EVALUATION_FILE, PICTURE_FILE, CONFIG_FILE = "evaluation.json", "evaluation.png", "evaluate.yaml"
HELD_OUT_MODULE = "mpo_megatron.evaluate.held_out_main"


def evaluate(config: EvaluateConfig, num_ranks: int | None = None, console: Console | None = None) -> Path:
    """Run the configured measurements; return the path of evaluation.json.

    Args:
        num_ranks: for held-out groups; by default one per GPU, or what the layout needs
    Raises:
        ConfigError: the configuration cannot work; raised before anything loads where possible.
        DataError: an input is unusable.
        StageError: ranks or a stage in a separate process failed, and have printed the error.
    """
    console = console or Console(highlight=False)
    validate_evaluate(config)
    output = Path(config.output)
    files = config.benchmarks
    questions = {name: read_questions(name, Path(files[name])) for name in get_args(Benchmark) if name in files}
    # A candidate that only answers benchmark questions needs no rewards.
    measured = config.candidate is not None and (config.baseline is not None or bool(config.score) or not questions)
    check_sides(config, measured=measured)
    if config.held_out is not None:
        # Every rank checks too; here one message appears instead of one per rank.
        num_ranks = num_ranks or count_ranks(config.held_out.parallel)
        check_ranks(config.held_out.parallel, num_ranks)
        num_ranks = build_setup(held_out.as_training(config), num_ranks).num_ranks
        if overlap := held_out.describe_training(config.held_out):
            console.print(f"WARNING: {overlap}", style="bold red", markup=False, soft_wrap=True)
    save_config(output / CONFIG_FILE, config)
    results: dict[str, Any] = {"config": to_dict(config)}
    pictures: dict[str, Any] = {}
    if config.held_out is not None:
        groups = run_held_out(config.held_out, output, num_ranks or 1)
        results["held_out"] = held_out.summarize(groups, num_resamples=config.num_resamples, seed=config.seed)
        pictures["margins"] = np.array([group.totals["margin"] for group in groups if group.counts["margin"]])
        _print_estimates(console, "held out", results["held_out"], ("accuracy", "margin"))
    if measured:
        pictures |= measure_samples(config, results, console)
    for benchmark, asked in questions.items():
        answers = answer_questions(config, benchmark, asked)
        path = write_answers(benchmark, output / benchmark, config.name, asked, answers)
        results.setdefault("benchmarks", {})[benchmark] = {"questions": len(asked), "file": str(path)}
        console.print(f"{benchmark}: answers to {len(asked)} questions in {path}", soft_wrap=True)
    if pictures:
        plot_evaluation(results, pictures, config, output / PICTURE_FILE)
    write_summary(output / EVALUATION_FILE, results)
    console.print(f"{output / EVALUATION_FILE}", soft_wrap=True)
    return output / EVALUATION_FILE


def run_held_out(config: HeldOutConfig, output: Path, num_ranks: int) -> list[held_out.GroupMetrics]:
    """Start the ranks that evaluate policy and reference; every group's metrics.

    Raises:
        StageError: they failed.
    """
    run_ranks("held_out", HELD_OUT_MODULE, output / CONFIG_FILE, num_ranks)
    return held_out.read_groups(output / held_out.GROUPS_FILE)


def measure_samples(config: EvaluateConfig, results: dict[str, Any], console: Console) -> dict[str, Any]:
    """Rewards of the candidate's and the baseline's samples, and their comparison; the values to plot."""
    pictures: dict[str, Any] = {}
    found: dict[str, SampleSet] = {}
    for role, path in (("candidate", config.candidate), ("baseline", config.baseline)):
        if path is not None:
            found[role] = read_samples(find_scored(config, role, path))
            results[role] = summarize_samples(found[role], config)
            pictures[role] = np.array([samples.rewards.mean() for samples in found[role].samples.values()])
            _print_estimates(console, role, results[role], ("reward",))
    if "baseline" in found:
        results["comparison"] = compare_samples(found["candidate"], found["baseline"], config)
        _print_estimates(console, "against baseline", results["comparison"], ("win_rate", "length_controlled_win_rate"))
    return pictures


def _print_estimates(console: Console, title: str, summary: dict[str, Any], names: tuple[str, ...]) -> None:
    parts = []
    for name in names:
        estimate = summary[name]
        parts.append(f"{name.replace('_', ' ')} {estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]")
    notes = (
        f"; {count:,} {what}"
        for name, what in (
            ("without_reward", "without reward among the responses"),
            ("only_candidate", "of the candidate's prompts left out: not in the baseline's file"),
            ("only_baseline", "of the baseline's prompts left out: not in the candidate's file"),
        )
        if (count := summary.get(name))
    )
    console.print(f"{title}: {', '.join(parts)}{''.join(notes)}", markup=False, soft_wrap=True)
