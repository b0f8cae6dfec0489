"""One trial: train a method on the shared samples, generate answers to the held-out prompts, record the numbers."""

from __future__ import annotations

import json
import resource
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from examples.compare.run import load_methods
from examples.instructions.task import build_prompts, write_prompts
from examples.papers.samples import (
    SAMPLE_SEED,
    SCORERS,
    SELECTION,
    GroupSet,
    Samples,
    Sizes,
    answer,
    count_tokens,
    read_rewards,
    sampling_options,
)
from mpo_megatron.config import ConvertConfig, IterateConfig, TrainConfig, from_dict
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout.iterate import TRAIN_FILE, iterate, run_training, stage
from mpo_megatron.rollout.round_report import read_metrics
from mpo_megatron.terminal.console import Console

METHODS = Path(__file__).with_name("methods.yaml")
NUM_ANSWERS = 4
"""Answers per held-out prompt."""
START = "start"
"""Name of the initial policy among the trials."""
RUNS = ("run", "rounds")
"""Folders of a trial's training."""
NUM_UNUSED = 2
"""Prompts that `mpo iterate` holds out of a run in segments; no number comes from them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of methods.yaml."""

    name: str
    loss: str
    params: dict[str, Any] = field(default_factory=dict)
    """Hyper-parameters of the loss that differ from its defaults."""
    groups: GroupSet
    train: dict[str, Any] = field(default_factory=dict)
    """Other options of `mpo train`."""
    segments: int = 0
    """Number of the run's segments, each with new samples from the current policy; 0 trains on the shared samples."""

    def settings(self) -> dict[str, Any]:
        """What a trial's numbers depend on: options that differ from the defaults are left out."""
        other = {name: value for name, value in (("train", self.train), ("segments", self.segments)) if value}
        return {"loss": self.loss, "params": self.params, **self.groups.options(), **other}


def load_entries(path: Path = METHODS) -> dict[str, Entry]:
    """The methods by name."""
    methods = load_methods()
    entries = {}
    for name, row in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        groups = GroupSet(responses=row.pop("responses"), **row.pop("prepare", {}))
        if "method" in row:
            method = methods[row.pop("method")]
            row |= {"loss": method.loss, "params": method.params}
        entries[name] = Entry(name=name, groups=groups, **row)
    return entries


def run_trial(folder: Path, entry: Entry | None, seed: int, samples: Samples, console: Console) -> dict[str, Any]:
    """The numbers of a trial; runs it unless it is complete. With `entry` = None, measure only the initial policy.

    A killed trial resumes. A trial with other settings is repeated.
    """
    settings = describe_trial(entry, seed, samples.sizes)
    found = read_trial(folder, settings)
    if found is not None:
        return found
    if (folder / "settings.json").is_file() and json.loads((folder / "settings.json").read_text()) != settings:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "settings.json", settings)
    result: dict[str, Any] = {"settings": settings}
    model = samples.model
    if entry is not None:
        whole = not any((folder / name).exists() for name in RUNS)  # otherwise an interrupted earlier call did part of it
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = (train_in_segments if entry.segments else train)(folder, entry, seed, samples, console)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Excludes the reference's log-probs in later trials with the same groups, because these are cached beside the groups.
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        result |= {"cpu_seconds": seconds if whole else None, **read_steps(run)}
        model = folder / "hf"
        export = ConvertConfig(input=str(run), output=str(model))
        stage("export", model, lambda: convert(export), console)
    answer(model, samples.held_out, folder, NUM_ANSWERS, 1000 + seed, samples.sizes, console)
    result |= {"reward": read_rewards(folder), "answer_tokens": count_tokens(folder)}
    write(folder / "result.json", result)
    for name in ("hf", *RUNS):  # gigabytes
        shutil.rmtree(folder / name, ignore_errors=True)
    return result


def describe_trial(entry: Entry | None, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The settings that a trial's numbers depend on."""
    settings: dict[str, Any] = {"seed": seed, "sizes": sizes.as_dict()}
    if entry is not None:
        settings |= entry.settings()
    return settings


def read_trial(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a finished trial with these settings; None without one."""
    path = folder / "result.json"
    result: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return result if result is not None and result["settings"] == settings else None


def train(folder: Path, entry: Entry, seed: int, samples: Samples, console: Console) -> Path:
    """Train on the shared samples; the run's folder."""
    run, options = folder / "run", train_options(entry, seed, samples.sizes)
    options["output"] = str(run)
    options["model"]["checkpoint"] = str(samples.checkpoint)
    options["data"]["train"] = str(samples.groups(entry.groups))
    config = from_dict(TrainConfig, options, "train")
    stage("train", folder / TRAIN_FILE, lambda: run_training(folder, config, 1), console)
    return run


def train_in_segments(folder: Path, entry: Entry, seed: int, samples: Samples, console: Console) -> Path:
    """Train on samples that the policy draws at the start of each segment, for the same prompts; the run's folder."""
    rounds, sizes = folder / "rounds", samples.sizes
    prompts = build_prompts(sizes.held_out + sizes.prompts + NUM_UNUSED, SAMPLE_SEED)
    write_prompts(folder / "prompts.jsonl", prompts[sizes.held_out :])
    options = {
        "output": str(rounds),
        "model": str(samples.model),
        "prompts": str(folder / "prompts.jsonl"),
        "rounds": entry.segments,
        "held_out": NUM_UNUSED,
        "optimizer": "continued",
        "reference": "initial",
        "measure_kl": False,
        "nproc": 1,
        "seed": seed,
        "generate": {"num_responses": entry.groups.responses, **sampling_options(sizes)},
        "score": {"scorers": SCORERS},
        "select": SELECTION,
        "train": train_options(entry, seed, sizes),
    }
    iterate(from_dict(IterateConfig, options, "iterate"), console)
    return rounds / "run"


def train_options(entry: Entry, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Options of `mpo train`, without paths."""
    return {
        "model": {"precision": "fp32"},
        "data": {"groups_per_step": sizes.groups_per_step, "row_tokens": 1024},
        "loss": {"name": entry.loss, "params": entry.params},
        "optimizer": {"lr": sizes.lr},
        "epochs": sizes.epochs,
        "eval_every": 0,
        "checkpoint": {"every": 0, "asynchronous": False},  # a save in the background needs a copy of all states
        "logging": {"reference_metrics": True},  # also log-ratios of losses that read no reference
        "seed": seed,
        **entry.train,
    }


def read_steps(run: Path) -> dict[str, Any]:
    """A run's tokens, and the mean change of log-probs over the second half of its steps."""
    steps = [row for row in read_metrics(run / "metrics.jsonl") if "seconds" in row]
    tokens = [row["tokens_per_second"] * row["seconds"] for row in steps]
    return {
        "tokens": sum(tokens),
        "backward_tokens": sum(row.get("backward_share", 1.0) * count for row, count in zip(steps, tokens, strict=True)),
        "steps": len(steps),
        **{name: mean_late(steps, name) for name in ("chosen_log_ratio", "rejected_log_ratio", "margin", "accuracy")},
    }


def mean_late(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """A metric's mean over the second half of the steps; None if no group there has two different rewards."""
    values = [row[name] for row in steps[len(steps) // 2 :] if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    replace_file(path, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])
