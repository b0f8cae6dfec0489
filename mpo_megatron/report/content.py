"""Everything that the page shows, as one JSON value."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.report.curves import CHARTS, curves
from mpo_megatron.report.health import findings
from mpo_megatron.report.held_out import (
    Limits,
    cut,
    data_histograms,
    drift,
    group_rows,
    lengths_and_ratios,
    shown_evaluations,
    spread,
)
from mpo_megatron.report.run_record import RunRecord

TILES = (
    ("accuracy", "Accuracy", True, "largest"),
    ("margin", "Margin", True, "largest"),
    ("loss", "Loss", True, "smallest"),
    ("kl", "KL", True, None),
    ("tokens_per_second", "Tokens / s", False, "largest"),
    ("mfu", "MFU", False, "largest"),
    ("peak_memory_gib", "Peak memory, GiB", False, "smallest"),
)
"""Numbers at the top, and in the comparison: metric, name, held out or training, which value is better."""
MOST_INCIDENTS = 200


def content(runs: Sequence[RunRecord], limits: Limits) -> dict[str, Any]:
    """The content of a page for these runs."""
    names = run_names([run.folder for run in runs])
    return {
        "made": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "charts": [dataclasses.asdict(chart) for chart in CHARTS],
        "runs": [describe(run, name, limits) for run, name in zip(runs, names, strict=True)],
        "differences": differences([run.config for run in runs]),
    }


def run_names(folders: Sequence[Path]) -> list[str]:
    """Names that distinguish runs: their folders', with as many parents as necessary."""
    parts = [folder.absolute().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


def describe(run: RunRecord, name: str, limits: Limits) -> dict[str, Any]:
    """One run."""
    return {
        "name": name,
        "folder": str(run.folder),
        "status": run.status,
        "step": run.step,
        "total_steps": run.total_steps,
        "tiles": tiles(run),
        "findings": [dataclasses.asdict(finding) for finding in findings(run)],
        "curves": curves(run),
        "starts": [start["step"] for start in run.facts.get("starts", [])[1:]],
        "drift": drift(run),
        "lengths": lengths_and_ratios(run),
        "data": data_histograms(run),
        "evaluations": shown_evaluations(run),
        "groups": group_rows(run, limits),
        "num_groups": len(run.outcomes[max(run.outcomes)]) if run.outcomes else 0,
        "incidents": [incident(line, limits) for line in run.incidents[:MOST_INCIDENTS]],
        "facts": facts(run),
        "config": flat(run.config),
    }


def tiles(run: RunRecord) -> list[dict[str, Any]]:
    """The latest value of each number at the top; for a rate, the median over the last fifty steps."""
    found = []
    for metric, name, held_out, better in TILES:
        steps, values = run.values(metric, held_out=held_out)
        if values:
            recent = sorted(values[-50:])
            value = values[-1] if held_out or metric == "peak_memory_gib" else recent[len(recent) // 2]
            tile = {"metric": metric, "name": name, "held_out": held_out, "better": better, "value": value}
            found.append(tile | {"step": steps[-1], "first": values[0] if held_out and len(values) > 1 else None})
    return found


def incident(line: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """One group of a suspicious step."""
    found = line.get("responses", [])
    by_reward = sorted(range(len(found)), key=lambda k: found[k].get("reward", found[k].get("label")) or 0.0, reverse=True)
    responses = [
        {
            "text": cut(str(response.get("text", "")), limits.characters),
            "reward": response.get("reward", response.get("label")),
            "tokens": response.get("num_tokens"),
            "logp": response.get("logp"),
            "reference_logp": response.get("reference_logp"),
        }
        for response in (found[k] for k in sorted(spread(by_reward, limits.responses)))
    ]
    kept = {name: line.get(name) for name in ("step", "wrong", "grad_norm", "group_id", "loss")}
    return kept | {"prompt": cut(str(line.get("prompt", "")), limits.characters), "k": len(found), "responses": responses}


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """What ran, as pairs of name and text; from the last start."""
    starts = run.facts.get("starts", [])
    if not starts:
        return []
    last = starts[-1]
    machine, revision = last["hardware"], last["git"]
    code = (
        "not in a repository" if revision is None else revision["revision"][:12] + (" (modified)" if revision["modified"] else "")
    )
    processor = f"{machine['gpus_per_host']} × {machine['gpu']}" if machine["gpu"] else f"{machine['cpu_cores']} CPU cores"
    sizes = ", ".join(f"{name} {size}" for name, size in last["layout"].items() if size > 1 or name == "world_size")
    rows = [
        ("Started", "; ".join(f"{start['time'].replace('T', ' ')} at step {start['step']}" for start in starts)),
        ("Code", code),
        ("Machine", f"{machine['host']}: {processor}, {machine['memory_gib']} GiB, {machine['system']}"),
        ("Layout", sizes.replace("_", " ")),
        *((f"Digest, {name}", digest) for name, digest in last["digests"].items() if digest),
        ("Packages", ", ".join(f"{name} {version}" for name, version in last["packages"].items())),
    ]
    if last["job"]:
        rows.append(("Job", ", ".join(f"{name} = {value}" for name, value in last["job"].items())))
    return rows


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration's options by dotted name, as text."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def differences(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Options in which runs differ, except output folders: [{option, values: one per run}]."""
    options = [flat(config) for config in configs]
    names = sorted({name for option in options for name in option} - {"output"})
    rows = [{"option": name, "values": [option.get(name, "–") for option in options]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]
