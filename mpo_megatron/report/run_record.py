"""The records in a run's folder; the run may be active, or have ended at any point."""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from mpo_megatron.config import ConfigError, require
from mpo_megatron.config.run_paths import candidates
from mpo_megatron.config.sealed import check_seal
from mpo_megatron.config.values import check_value, show
from mpo_megatron.data.outcomes import GroupOutcome, outcome_files, read_digest, read_outcomes
from mpo_megatron.data.store import INFO_FILE, PreparedGroups, load_groups
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError, is_unfinished, unseal, unseal_line, unseal_lines

QUIET_STEPS = 20
"""A run without output for this many of its steps, plus a minute, counts as stopped."""

MOST_EVALUATIONS = 16
"""Maximum evaluations whose groups are read and shown."""

REMOVE = "copy it again, or remove it to continue without it"
"""The fix for a file that a report does not need."""

Status = Literal["finished", "running", "stopped"]
Line = dict[str, Any]
Curve = tuple[list[int], list[float]]
"""Steps, and a metric's finite values at them."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run in its current state."""

    folder: Path
    training: tuple[Line, ...]
    """Training lines of metrics.jsonl, in order, one per step."""
    held_out: tuple[Line, ...]
    """Evaluation lines; names without `eval/`."""
    facts: dict[str, Any]
    """Content of run.json; empty without one."""
    config: dict[str, Any]
    """Content of config.yaml; empty without one."""
    outcomes: dict[int, list[GroupOutcome]]
    """Held-out groups by step, for at most `MOST_EVALUATIONS` evaluations on the newest held-out data: the first, the last, and
    others spread evenly between them."""
    incidents: tuple[Line, ...]
    """Lines of incidents/*.jsonl: groups of suspicious steps."""
    hangs: tuple[str, ...]
    """Names of the files with stacks of hung ranks."""
    train_data: PreparedGroups | None
    """None if the data is missing, damaged, or changed."""
    held_out_data: PreparedGroups | None
    """The same for the held-out groups."""
    missing: tuple[str, ...]
    """Missing data: option, path, reason."""
    age: float
    """Seconds since the run last wrote metrics."""

    @property
    def step(self) -> int:
        """Steps done."""
        return max((line["step"] for line in (*self.training, *self.held_out)), default=0)

    @property
    def total_steps(self) -> int | None:
        """Planned steps of the run; None if unknown."""
        total: int | None = self.facts.get("total_steps") or self.config.get("max_steps")
        return total

    @property
    def status(self) -> Status:
        """Whether the run has finished, continues, or stopped writing."""
        if self.total_steps is not None and self.step >= self.total_steps:
            return "finished"
        _, seconds = self.values("seconds")
        quiet = 60 + QUIET_STEPS * float(np.median(seconds)) if seconds else 3600.0
        return "running" if self.age < quiet else "stopped"

    def values(self, name: str, *, held_out: bool = False) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric."""
        steps, values = (self._held_out_curves if held_out else self._training_curves).get(name, ([], []))
        return list(steps), list(values)

    @functools.cached_property
    def _training_curves(self) -> dict[str, Curve]:
        return _curves(self.training)

    @functools.cached_property
    def _held_out_curves(self) -> dict[str, Curve]:
        return _curves(self.held_out)


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ConfigError: the folder holds no run, or a file of it is damaged.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"runs: {folder} has no metrics.jsonl; name the --output folder of an `mpo train`.")
    lines = _metrics(metrics)
    config = _read_yaml(folder / "config.yaml")
    facts = unseal(folder / "run.json", REMOVE) if (folder / "run.json").is_file() else {}
    digests = facts["starts"][-1]["digests"] if facts.get("starts") else {}
    everything = outcome_files(folder)
    files = outcome_files(folder, read_digest(everything[max(everything)])) if everything else {}
    # A resumed run may evaluate the same step again: a step's last line counts.
    training = {line["step"]: line for line in lines if not _is_evaluation(line)}
    held_out = {line["step"]: _strip(line) for line in lines if _is_evaluation(line)}
    incidents = folder / "incidents"
    train_data, no_training = _open(folder, config, "train", digests.get("train"))
    held_out_data, no_held_out = _open(folder, config, "eval", digests.get("eval"))
    return RunRecord(
        folder=folder,
        training=tuple(training[step] for step in sorted(training)),
        held_out=tuple(held_out[step] for step in sorted(held_out)),
        facts=facts,
        config=config,
        outcomes={step: read_outcomes(files[step]) for step in evenly(list(files), MOST_EVALUATIONS)},
        incidents=tuple(line for path in sorted(incidents.glob("*.jsonl")) for line in unseal_lines(path, REMOVE)),
        hangs=tuple(path.name for path in sorted(incidents.glob("hang_*"))),
        train_data=train_data,
        held_out_data=held_out_data,
        missing=tuple(reason for reason in (no_training, no_held_out) if reason is not None),
        age=time.time() - metrics.stat().st_mtime,
    )


def evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps: the first, the last, and others spread evenly between them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place)] for place in np.linspace(0, len(steps) - 1, most)]


def _curves(lines: Sequence[Line]) -> dict[str, Curve]:
    """Every metric's finite values."""
    found: dict[str, Curve] = defaultdict(lambda: ([], []))
    for line in lines:
        for name, value in line.items():
            if type(value) in (int, float) and math.isfinite(value):
                steps, values = found[name]
                steps.append(line["step"])
                values.append(float(value))
    return dict(found)


def read_lines(path: Path) -> list[Line]:
    """The complete lines of a JSONL file: the last one may be incomplete, and texts may contain Unicode line separators.

    Raises:
        DamagedError: a line differs from what was written.
    """
    lines: list[Line] = []
    *whole, end = path.read_bytes().split(b"\n")
    if not is_unfinished(end):
        raise DamagedError(f"{path}:{len(whole) + 1}: damaged; remove the line.")
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(unseal_line(line))
        except ValueError as error:
            raise DamagedError(f"{path}:{number}: damaged or changed ({error}); remove the line.") from error
    return lines


def _metrics(path: Path) -> list[Line]:
    """The lines of a run's metrics.jsonl.

    Raises:
        DamagedError: a line differs from what was written, or has no step.
    """
    lines = read_lines(path)
    for number, line in enumerate(lines, start=1):
        step = line.get("step") if isinstance(line, dict) else None
        if type(step) is not int or not 0 <= step < 2**53:
            raise DamagedError(f"{path}:{number}: not a line of a run's metrics: it has no step; remove the line.")
    return lines


def _is_evaluation(line: Line) -> bool:
    return any(name.startswith("eval/") for name in line)


def _strip(line: Line) -> Line:
    return {name.removeprefix("eval/"): value for name, value in line.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    """A run's config.yaml, as it is or as its user changed it; empty without one.

    Raises:
        ConfigError: it is damaged, or a value that the report uses has another type.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        check_seal(path, text)
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged, it does not parse ({' '.join(str(error).split())}); {REMOVE}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: damaged: it holds no options; {REMOVE}.")
    data = config.get("data", {})
    require(isinstance(data, dict), f"{path}: data = {show(data)}; it must hold options; {REMOVE}.")
    for name, value in (("max_steps", config.get("max_steps")), ("data.groups_per_step", data.get("groups_per_step"))):
        check_value(int | None, value, f"{path}: {name}")
    return config


def _open(run: Path, config: dict[str, Any], name: str, digest: str | None) -> tuple[PreparedGroups | None, str | None]:
    """The run's data if it exists unchanged, otherwise the problem: a report without texts is better than none."""
    places = candidates(run, config, "data", name)
    problem: str | None = None
    for place in places:
        if not (place / INFO_FILE).is_file():
            continue
        try:
            data = load_groups(place)
            if name == "eval":  # the page shows its texts
                data.check_texts()
        except DataError as error:
            problem = f"data.{name}: {str(error).rstrip('.')}"
            continue
        if digest in (None, data.info.data_digest):
            return data, None
        problem = f"data.{name} = {place}: these groups differ from those that the run used"
    if not places:
        return None, None
    return None, problem or f"data.{name} = {' or '.join(map(str, dict.fromkeys(places)))}: no prepared groups there"
