"""A pretrained model learns to follow instructions that a program checks, with one command and in minutes on two cores.

    make example                                       # or: python -m examples.instructions.run
    python -m examples.instructions.run --seeds 0 1 2 3 4

SmolLM2-135M-Instruct (from a wheel: model.py) answers prompts with two instructions each, like "Use at most 12 words"
(task.py). A program counts the instructions that an answer follows. MPO trains on the 8 answers to each prompt:
`mpo align --prompts`, one on-policy round (align.yaml). It ends with the reward of held-out prompts, and with answers
before and after. To resume after a stop, run the same command again. Results: instructions.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.instructions.model import write_model
from examples.instructions.task import build_prompts, write_prompts
from mpo_megatron.cli import main as mpo
from mpo_megatron.files.atomic import replace_file

CONFIG = Path(__file__).with_name("align.yaml")
NUM_PROMPTS = 72
"""Number of prompts, including the held-out ones of align.yaml."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("instructions-out"), help="folder for all results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of prompts, split, sampling and data order (0)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Model, prompts, and `mpo align` for each seed; 1 if the held-out reward did not rise."""
    options, started = parse_arguments(arguments), time.monotonic()
    model = options.output / "model"
    if not (model / "tokenizer.json").is_file():  # written last
        print(f"SmolLM2-135M-Instruct → {model}", flush=True)
        write_model(model)
    results = {}
    for seed in options.seeds:
        folder = options.output / ("mpo" if seed == 0 else f"mpo-seed-{seed}")
        prompts = options.output / ("prompts.jsonl" if seed == 0 else f"prompts-seed-{seed}.jsonl")
        write_prompts(prompts, build_prompts(NUM_PROMPTS, seed))
        align(config=CONFIG, model=model, prompts=prompts, output=folder, seed=seed)
        results[str(seed)] = read_result(folder)
    summary = {"seeds": results, **summarize(results)}
    replace_file(options.output / "instructions.json", [(json.dumps(summary, indent=1) + "\n").encode()])
    print_summary(results, summary)
    print(f"{options.output / 'instructions.json'}; everything took {time.monotonic() - started:.0f} s")
    return 0 if all(result["after"]["reward"] > result["before"]["reward"] for result in results.values()) else 1


def align(**options: object) -> None:
    """Print and run `mpo align` with these options in this process; ends the program on failure."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    print(f"$ mpo align {shlex.join(arguments)}", flush=True)
    status = mpo(["align", *arguments])
    if status:
        sys.exit(status)


def read_result(folder: Path) -> dict[str, Any]:
    """The held-out numbers of the round's report: before, after, wins."""
    (report,) = json.loads((folder / "rounds" / "report.json").read_text())["rounds"]
    return {name: report[name] for name in ("before", "after", "win_rate", "selected")}


def summarize(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean held-out reward before and after, and mean gain, with standard errors over seeds if there are several."""
    before, after = ([result[side]["reward"] for result in results.values()] for side in ("before", "after"))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    values = {"before": before, "after": after, "gain": gains}
    errors = {name: statistics.stdev(row) / len(row) ** 0.5 if len(row) > 1 else None for name, row in values.items()}
    return {name: {"mean": statistics.fmean(row), "error": errors[name]} for name, row in values.items()}


def print_summary(results: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> None:
    """Print one line per seed, and the means."""
    print(
        "\nInstructions followed by answers to held-out prompts (± one standard error over prompts; in the last line, over seeds)"
    )
    for seed, result in results.items():
        sides = " → ".join(f"{result[side]['reward']:.3f} ± {result[side]['error']:.3f}" for side in ("before", "after"))
        print(f"seed {seed}: {sides}; wins {result['win_rate']['value']:.0%}")
    if len(results) > 1:
        print(f"mean gain: {summary['gain']['mean']:+.3f} ± {summary['gain']['error']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
