"""Versions, GPUs, imports, what a run would use, and fixes for problems."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, ModelConfig, TrainConfig, load_yaml
from mpo_megatron.doctor import abilities, peers
from mpo_megatron.doctor.machine import describe_machine
from mpo_megatron.doctor.page import render
from mpo_megatron.doctor.software import ABSENT, BROKEN, describe_software
from mpo_megatron.stack.cuda import gpu_files
from mpo_megatron.stack.problem import Problem


def doctor(config: str | None, *, as_json: bool) -> int:
    """Examine this machine and print the findings; the exit code: 1 if a run would fail, 0 otherwise.

    Args:
        config: file with a configuration of `mpo train`
    """
    found = examine(config)
    if peers.count_peers() > 1:
        store, rank, size = peers.open_store()
        found["peers"] = peers.exchange(store, rank, size, _comparable(found))
        if rank:
            return 0
        found["problems"] += map(asdict, peers.compare(found["peers"]))
    print(json.dumps(found, indent=1) if as_json else render(found))
    return int(any(problem["severity"] == "error" for problem in found["problems"]))


def examine(config: str | None) -> dict[str, Any]:
    """Everything about this machine, as JSON values: software, machine, abilities, run, problems."""
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(abilities.ask, config)
        software, software_problems = describe_software(has_gpus=bool(gpu_files()))
        machine, machine_problems = describe_machine(*_output_and_precision(config))
        able = asked.result()
    problems = [*machine_problems, *software_problems]
    if "error" in able:
        problems.append(Problem(what=f"Megatron-Core's model does not load: {able['error']}", cure="see the problems above"))
    run = able.pop("run", None)
    if run and run["refused"]:
        problems.append(Problem(what=f"mpo train refuses {run['config']}: {run['refused'].rstrip('.')}", cure="as it says"))
    return {
        "software": software,
        "machine": machine,
        "abilities": able,
        "run": run,
        "problems": [asdict(problem) for problem in dict.fromkeys(problems)],
    }


def _output_and_precision(config: str | None) -> tuple[Path, str]:
    """The folder that a run would write to, and its model.precision; without a run, the current folder and the default."""
    try:
        run = load_yaml(TrainConfig, config) if config else None
    except ConfigError:  # reported with the run
        run = None
    return (Path.cwd(), ModelConfig.precision) if run is None else (Path(run.output), run.model.precision)


def _comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Values that must be equal on all machines, and the host's name."""
    machine = found["machine"]
    return {
        "host": machine["host"],
        "python": machine["python"],
        "driver": machine["driver"],
        "nccl": machine["nccl"],
        "cudnn": machine["cudnn"],
        "gpus": [gpu["name"] for gpu in machine["gpus"]],
        **{row["package"]: row["state"] if row["state"] in (ABSENT, BROKEN) else row["version"] for row in found["software"]},
    }
