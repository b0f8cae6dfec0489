"""The papers' claims on a pretrained model: one set of samples, every method, one page.

    python -m examples.papers                                  # everything; hours on two cores
    python -m examples.papers --methods mpo dpo --seeds 0      # a part; the next call adds to it
    python -m examples.papers --page docs/experiments/papers.md --record examples/results/cpu-2cores/papers.json

SmolLM2-135M-Instruct answers prompts with verifiable instructions, once. Every method of methods.yaml trains on those samples,
and its policy answers held-out prompts. Each trial writes its result at its end. Repeat the command to resume: finished trials
are skipped. The page gives a verdict on each claim: holds here, does not, inconclusive, not run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import describe_machine
from examples.papers.page import as_record, format_page
from examples.papers.samples import Samples, Sizes, make_samples, read_examples, read_spacing
from examples.papers.trial import START, describe_trial, load_entries, read_trial, run_trial, write
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.terminal.console import Console

NUM_EXAMPLES = 3
"""Held-out prompts whose answers the page shows."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = list(load_entries())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("papers-out"), help="folder for all results")
    parser.add_argument("--methods", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of data order, losses' draws and answers (0 1 2)"
    )
    parser.add_argument("--prompts", type=int, default=Sizes.prompts, help=f"training prompts ({Sizes.prompts})")
    parser.add_argument("--held-out", type=int, default=Sizes.held_out, help=f"held-out prompts ({Sizes.held_out})")
    parser.add_argument(
        "--max-tokens", type=int, default=Sizes.max_tokens, help=f"maximum tokens of an answer ({Sizes.max_tokens})"
    )
    parser.add_argument("--page", type=Path, help="path of the page (default: papers.md in the output folder)")
    parser.add_argument("--record", type=Path, help="path of its numbers (default: papers.json in the output folder)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Samples, trials, page; the exit status."""
    options, started, console = parse_arguments(arguments), time.monotonic(), Console(highlight=False)
    entries = load_entries()
    sizes = Sizes(prompts=options.prompts, held_out=options.held_out, max_tokens=options.max_tokens)
    samples = make_samples(options.output / "samples", sizes, [entries[name].groups for name in options.methods], console)
    # Seeds in the outer loop: an interrupted call has every method for the first seeds.
    for seed in options.seeds:
        for name in (START, *options.methods):
            console.rule(f"{name}, seed {seed}")
            run_trial(trial_folder(options.output, name, seed), entries.get(name), seed, samples, console)
            write_page(options, samples)
    write_page(options, samples)
    console.print(f"{page_of(options)}; this call took {time.monotonic() - started:.0f} s", soft_wrap=True)
    return 0


def trial_folder(output: Path, name: str, seed: int) -> Path:
    """Folder of a trial's files."""
    return output / "trials" / name / f"seed_{seed}"


def page_of(options: argparse.Namespace) -> Path:
    """Path of the page."""
    return Path(options.page or options.output / "papers.md")


def write_page(options: argparse.Namespace, samples: Samples) -> None:
    """Write the page and its numbers from all finished trials, whichever call ran them."""
    entries = load_entries()
    results: dict[str, dict[int, Any]] = {}
    for name in (START, *entries):
        for folder in sorted((options.output / "trials" / name).glob("seed_*")):
            seed = int(folder.name.removeprefix("seed_"))
            found = read_trial(folder, describe_trial(entries.get(name), seed, samples.sizes))
            if found is not None:
                results.setdefault(name, {})[seed] = found
    examples = {
        name: read_examples(trial_folder(options.output, name, min(trials)), NUM_EXAMPLES) for name, trials in results.items()
    }
    spacing = read_spacing(samples)
    numbers = as_record(entries, results, samples.sizes)
    record = {"machine": describe_machine(), **numbers, "reward_spacing": spacing, "examples": examples}
    write(options.record or options.output / "papers.json", record)
    replace_file(page_of(options), [format_page(entries, results, samples.sizes, spacing, examples).encode()])
