"""The main methods with the same budget on the quickstart's task: one command, one table, one picture.

    python -m examples.compare.run                                      # all of methods.yaml, one seed
    python -m examples.compare.run --methods mpo dpo_best_worst --steps 80
    python -m examples.compare.run --seeds 0 1 2                        # mean and spread

Model and groups are made, converted and prepared once; log-probs of the reference are cached beside the groups by the
first run that needs them. Each method is one `mpo train` on one rank; all are measured alike on the same held-out groups
(measure.py). A finished run is skipped and an interrupted one goes on where it stood, so that the command may be repeated,
with more methods or seeds, in the same --output. Results: comparison.json, comparison.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.compare.measure import HeldOut, load_held_out, measure_run
from examples.compare.plot import plot_comparison
from examples.compare.report import build_comparison, print_table
from examples.quickstart.model import write_model
from examples.quickstart.run import CONFIG, MARKER, TASK_SIZES, clear_output, mpo, read_texts
from examples.quickstart.task import build_groups, write_groups

METHODS = Path(__file__).with_name("methods.yaml")
NUM_MEASUREMENTS = 4
"""Checkpoints of a run that are measured, the last one included."""
LOG_TAIL = 3000
"""Characters of a failed run's log that are shown."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the comparison, from methods.yaml."""

    name: str
    family: str
    """Its colour in the picture."""
    loss: str
    params: dict[str, Any]
    """Hyper-parameters that are not the paper's defaults."""
    reason: str
    """Why they are not."""


def load_methods(path: Path = METHODS) -> dict[str, Method]:
    """The methods by name; an entry with other fields than `Method` has is an error."""
    return {name: Method(name=name, **fields) for name, fields in yaml.safe_load(path.read_text(encoding="utf-8")).items()}


def parse_arguments(methods: Sequence[str], arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("compare-out"), help="folder for everything")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="NAME", help=", ".join(methods))
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of every run (40)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the data order and of what losses draw (0)")
    parser.add_argument("--groups", type=int, default=1000, help="groups made by the task (1000)")
    parser.add_argument("--held-out", type=int, default=100, help="groups kept for measuring (100)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, train, measure, report; the exit status."""
    methods = load_methods()
    options, started = parse_arguments(list(methods), arguments), time.monotonic()
    output: Path = options.output
    data = prepare_data(output / "data", num_groups=options.groups, held_out=options.held_out)
    held_out = None  # loaded when there is something to measure
    results: dict[str, dict[int, Any]] = {name: {} for name in options.methods}
    # Seeds outside: an interrupted comparison has every method for the first seeds.
    for seed in options.seeds:
        for name in options.methods:
            run, settings = output / "runs" / name / f"seed_{seed}", describe_run(methods[name], options, seed)
            finished = read_result(run, settings)
            if finished is not None:
                print(f"{name}, seed {seed}: finished before, {run / 'result.json'}", flush=True)
            else:
                print(f"{name}, seed {seed}: {options.steps} steps … ", end="", flush=True)
                train(run, settings, data)
                held_out = held_out or load_held_out(data, TASK_SIZES.max_response_tokens)
                finished = finish(run, held_out)
                print(f"held-out accuracy {finished['curve'][-1]['accuracy']:.1%}", flush=True)
            results[name][seed] = finished
    comparison = build_comparison([methods[name] for name in options.methods], results, options.steps)
    print_table(comparison)
    write(output / "comparison.json", comparison)
    plot_comparison(comparison, output / "comparison.png")
    print(f"{output / 'comparison.json'}, {output / 'comparison.png'}; this call took {time.monotonic() - started:.0f} s")
    return 0


def prepare_data(folder: Path, *, num_groups: int, held_out: int) -> Path:
    """The quickstart's model and groups in `folder`, unless they are there."""
    wanted = {"groups": num_groups, "held_out": held_out}
    found = json.loads((folder / MARKER).read_text()) if (folder / MARKER).is_file() else {}
    if found == wanted:
        return folder
    if found:
        sys.exit(f"compare: {folder} holds {found}, wanted are {wanted}; choose another --output, or the same numbers.")
    clear_output(folder)
    write_groups(folder / "task.jsonl", build_groups(num_groups))
    write_model(folder / "start", read_texts(folder / "task.jsonl", num_groups), vocab_size=TASK_SIZES.vocab_size)
    mpo("convert", input=folder / "start", output=folder / "start-megatron")
    mpo(
        "prepare",
        input=folder / "task.jsonl",
        tokenizer=folder / "start-megatron",
        output=folder / "groups",
        held_out=held_out,
        max_prompt_tokens=TASK_SIZES.max_prompt_tokens,
        max_response_tokens=TASK_SIZES.max_response_tokens,
    )
    write(folder / MARKER, wanted)
    return folder


def describe_run(method: Method, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What a run's numbers depend on; a run with other settings is made again."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return {
        "loss": method.loss,
        "params": method.params,
        "steps": options.steps,
        "seed": seed,
        "groups": options.groups,
        "held_out": options.held_out,
        "optimizer": config["optimizer"],
    }


def read_result(run: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run; None if there is none. A run with other settings is removed."""
    if not (run / "settings.json").is_file():
        return None
    if json.loads((run / "settings.json").read_text()) != settings:
        print(f"{run}: its settings have changed since, so it is made again")
        shutil.rmtree(run)
        return None
    return json.loads((run / "result.json").read_text()) if (run / "result.json").is_file() else None


def train(run: Path, settings: dict[str, Any], data: Path) -> None:
    """One `mpo train` on one rank, its output in run/train.log; ends the program if it fails."""
    run.mkdir(parents=True, exist_ok=True)
    write(run / "settings.json", settings)
    options = {
        "config": CONFIG,
        "output": run,
        "seed": settings["seed"],
        "model.checkpoint": data / "start-megatron",
        "data.train": data / "groups",
        "data.eval": "null",  # measured from the checkpoints instead
        "parallel.tensor": 1,
        "loss.name": settings["loss"],
        "loss.params": json.dumps(settings["params"]),
        "max_steps": settings["steps"],
        "eval_every": 0,
        "checkpoint.every": -(-settings["steps"] // NUM_MEASUREMENTS),
        "checkpoint.keep": NUM_MEASUREMENTS,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with (run / "train.log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "mpo_megatron.cli", "train", "--nproc", "1", *arguments]
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        sys.exit(f"mpo train failed with exit status {status}; the end of {run / 'train.log'}:\n{tail(run / 'train.log')}")


def tail(path: Path) -> str:
    """The last characters of a log."""
    return path.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]


def finish(run: Path, held_out: HeldOut) -> dict[str, Any]:
    """Measure a run, and mark it as finished."""
    result = measure_run(run, held_out, TASK_SIZES.max_response_tokens)
    write(run / "result.json", result)
    return result


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is complete or not there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
