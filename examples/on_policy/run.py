"""On-policy rounds on a CPU with a verifiable reward: MPO on all K responses compared with DPO on the best and the worst.

    python -m examples.on_policy.run                       # one seed, both methods, a few minutes on two cores
    python -m examples.on_policy.run --seeds 0 1 2         # means and spread
    python -m examples.on_policy.run --tune                # the best learning rate and β of each method, on a separate seed

A small random Qwen3 model takes one supervised step (`sft`) on mediocre answers to the quickstart's task, "name 4 " "fruits".
From there each method runs `mpo iterate`: three rounds of sampling 8 responses per prompt, scoring them with reward.py, and
training on them. All methods start from the same policy and sample the same number of responses to the same prompts. Each has its
own learning rate and β, the best of one grid. Repeat the command to resume: finished parts are skipped. Results: on_policy.json,
on_policy.png; of --tune: on_policy_tuning.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.timing import describe_machine
from examples.on_policy.plot import plot_rounds
from examples.quickstart.model import write_model
from examples.quickstart.run import TASK_SIZES, mpo
from examples.quickstart.task import COUNTS, OCCASIONS, PEOPLE, TEMPLATES, WORDS, build_groups, write_groups
from mpo_megatron.files.atomic import replace_file

CONFIG = Path(__file__).with_name("iterate.yaml")
METHODS = Path(__file__).with_name("methods.yaml")
MARKER = "start.json"
"""Records the settings of a finished first policy."""

NUM_SFT_GROUPS = 1500
SFT_RESPONSES = 2
"""Random answers per prompt, of which the better one is imitated: the first policy should be mediocre."""
SFT_OPTIONS = {"loss.name": "sft", "optimizer.lr": 3e-3, "data.groups_per_step": 64, "max_steps": 120}

TUNING_SEED = 1000
TUNING_GRID = ((5e-4, 1.0), (5e-4, 4.0), (1e-3, 2.0), (2e-3, 4.0))
"""Learning rates and β, the same for every method."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("on-policy-out"), help="folder for all results")
    names = list(load_methods())
    parser.add_argument("--methods", nargs="+", default=["mpo", "dpo"], choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of prompt split, sampling and data order (0)")
    parser.add_argument("--prompts", type=int, default=1900, help="number of prompts, including held-out ones (1900)")
    parser.add_argument("--responses", type=int, help="responses sampled per prompt (default: iterate.yaml)")
    parser.add_argument("--epochs", type=float, help="passes over a round's groups (default: iterate.yaml)")
    parser.add_argument("--tune", action="store_true", help=f"try learning rates and β with seed {TUNING_SEED} instead")
    return parser.parse_args(arguments)


def load_methods(path: Path = METHODS) -> dict[str, dict[str, Any]]:
    """The methods by name."""
    methods: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return methods


def main(arguments: Sequence[str] | None = None) -> int:
    """First policy, rounds of every method and seed, table and plot; the exit status."""
    options, started = parse_arguments(arguments), time.monotonic()
    start, methods = build_start(options.output / "start", options.prompts), load_methods()
    config = load_rounds(options.responses, options.epochs)
    chosen = {name: methods[name] for name in options.methods}
    settings = {
        "prompts": options.prompts,
        "responses": config["generate"]["num_responses"],
        "epochs": config["train"]["epochs"],
        "other": CONFIG.name,
    }
    about = {"machine": describe_machine(), "settings": settings}
    if options.tune:
        rewards = tune(options.output / "tuning", start, config, chosen)
        write(options.output / "on_policy_tuning.json", {**about, "seed": TUNING_SEED, "methods": rewards})
        return 0
    results: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in chosen}
    # Seeds in the outer loop: an interrupted comparison has every method for the first seeds.
    for seed, name in itertools.product(options.seeds, chosen):
        output = options.output / "runs" / name / f"seed_{seed}"
        results[name][seed] = run_rounds(output, start, config, chosen[name], seed=seed)
    summary = {**about, **summarize(chosen, results)}
    write(options.output / "on_policy.json", summary)
    plot_rounds(summary, options.output / "on_policy.png")
    print_summary(summary)
    print(f"{options.output / 'on_policy.json'}, {options.output / 'on_policy.png'}; {time.monotonic() - started:.0f} s")
    return 0


# --------------------------------------------------------------------------------------------------- the first policy


def build_start(folder: Path, num_prompts: int) -> Path:
    """Create the first policy and the prompts of the rounds, unless they exist; the folder."""
    wanted = {"prompts": num_prompts, "sft_groups": NUM_SFT_GROUPS, "sft_responses": SFT_RESPONSES, "sft": SFT_OPTIONS}
    if (folder / MARKER).is_file():
        found = json.loads((folder / MARKER).read_text())
        if found != wanted:
            sys.exit(f"on_policy: {folder} holds {found}, but the options ask for {wanted}; choose another --output.")
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder of this example
    folder.mkdir(parents=True)
    groups = build_groups(NUM_SFT_GROUPS)
    write_groups(folder / "sft.jsonl", groups)
    write_groups(folder / "prompts.jsonl", build_prompts(num_prompts, taken={group["prompt"] for group in groups}))
    texts = [text for group in groups for text in (group["prompt"], *(item["text"] for item in group["responses"]))]
    write_model(folder / "random", texts, vocab_size=TASK_SIZES.vocab_size)
    mpo("convert", input=folder / "random", output=folder / "random-megatron")
    mpo(
        "prepare",
        input=folder / "sft.jsonl",
        tokenizer=folder / "random-megatron",
        output=folder / "sft",
        responses_per_prompt=SFT_RESPONSES,
        max_prompt_tokens=TASK_SIZES.max_prompt_tokens,
        max_response_tokens=TASK_SIZES.max_response_tokens,
    )
    mpo(
        "train",
        **{
            "output": folder / "sft-run",
            "model.checkpoint": folder / "random-megatron",
            "model.precision": "fp32",
            "data.train": folder / "sft",
            "data.row_tokens": TASK_SIZES.row_tokens,
            "checkpoint.every": 0,
            **SFT_OPTIONS,
        },
    )
    # Export and convert again: the rounds start from a checkpoint like any other.
    mpo("convert", input=folder / "sft-run", output=folder / "policy-hf")
    mpo("convert", input=folder / "policy-hf", output=folder / "policy")
    (folder / MARKER).write_text(json.dumps(wanted) + "\n")
    return folder


def build_prompts(number: int, taken: set[str], seed: int = 1) -> list[dict[str, Any]]:
    """Prompts of the task that are not `taken`, with the fields that the reward needs."""
    generator, prompts = random.Random(seed), list[dict[str, Any]]()
    choices = list(itertools.product(TEMPLATES, PEOPLE, OCCASIONS, COUNTS, WORDS))
    for template, person, occasion, count, kind in generator.sample(choices, len(choices)):
        prompt = template.format(person=person, occasion=occasion, count=count, kind=kind)
        if prompt not in taken and len(prompts) < number:
            prompts.append({"prompt": prompt, "kind": kind, "count": count})
    return prompts


# --------------------------------------------------------------------------------------------------- rounds


def load_rounds(num_responses: int | None, epochs: float | None, path: Path = CONFIG) -> dict[str, Any]:
    """The configuration shared by all runs, with overrides."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if num_responses is not None:
        config["generate"]["num_responses"] = num_responses
    if epochs is not None:
        config["train"]["epochs"] = epochs
    return config


def run_rounds(output: Path, start: Path, shared: dict[str, Any], method: dict[str, Any], *, seed: int) -> list[dict[str, Any]]:
    """Run `mpo iterate` with a method, unless it is complete; the reports of its rounds."""
    if not (output / "report.json").is_file():
        config = copy.deepcopy(shared)
        config |= {"output": str(output), "model": str(start / "policy"), "prompts": str(start / "prompts.jsonl"), "seed": seed}
        config["train"]["loss"] = {"name": method["loss"], "params": {"beta": method["beta"]}}
        config["train"]["optimizer"]["lr"] = method["lr"]
        output.parent.mkdir(parents=True, exist_ok=True)
        path = output.with_name(output.name + ".yaml")
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        mpo("iterate", config=path)
    reports: list[dict[str, Any]] = json.loads((output / "report.json").read_text())["rounds"]
    return reports


def tune(
    output: Path, start: Path, shared: dict[str, Any], methods: dict[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The held-out reward at the start and after each round, for each method at each learning rate and β."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for (name, method), (lr, beta) in itertools.product(methods.items(), TUNING_GRID):
        settings = {**method, "lr": lr, "beta": beta}
        reports = run_rounds(output / name / f"lr_{lr:g}_beta_{beta:g}", start, shared, settings, seed=TUNING_SEED)
        results[name].append({"lr": lr, "beta": beta, "reward": list_rewards(reports)})
        print(f"{name}, lr {lr:g}, β {beta:g}: " + " → ".join(f"{reward:.3f}" for reward in list_rewards(reports)), flush=True)
    return results


def list_rewards(reports: list[dict[str, Any]]) -> list[float]:
    """The held-out reward at the start and after each round."""
    return [reports[0]["before"]["reward"], *(report["after"]["reward"] for report in reports)]


def summarize(methods: dict[str, dict[str, Any]], results: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Held-out reward after each round by method and seed, with mean and standard error over seeds.

    `lead`: how far the first method leads over this one, seed by seed, with its standard error.
    """
    first, summaries = next(iter(results.values())), {}
    for name, runs in results.items():
        curves = {str(seed): list_rewards(reports) for seed, reports in runs.items()}
        points = list(zip(*curves.values(), strict=True))
        leads = [[a - b for a, b in zip(list_rewards(first[seed]), list_rewards(runs[seed]), strict=True)] for seed in runs]
        lead = list(zip(*leads, strict=True))
        summaries[name] = {
            **methods[name],
            "reward_by_seed": curves,
            "reward": [statistics.fmean(point) for point in points],
            "error": [standard_error(point) for point in points],
            "lead": [statistics.fmean(point) for point in lead],
            "lead_error": [standard_error(point) for point in lead],
            "win_rate": [statistics.fmean(r[n]["win_rate"]["value"] for r in runs.values()) for n in range(len(points) - 1)],
            "tokens": [statistics.fmean(r[n]["after"]["tokens"] for r in runs.values()) for n in range(len(points) - 1)],
        }
    return {"seeds": sorted(first), "methods": summaries}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    replace_file(path, [(json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()])


def print_summary(summary: dict[str, Any]) -> None:
    """Print one line per method."""
    print(f"\nSampled reward on held-out prompts, mean over seeds {summary['seeds']} ± standard error over them")
    for method in summary["methods"].values():
        rewards = zip(method["reward"], method["error"], strict=True)
        print(f"{method['label']:<28} " + " → ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in rewards))


if __name__ == "__main__":
    sys.exit(main())
