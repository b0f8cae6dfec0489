"""The whole way of a model, in a few minutes on two cores and with nothing downloaded.

    python -m examples.quickstart.run                          # a procedural task
    python -m examples.quickstart.run --data my_groups.jsonl   # any data that `mpo prepare` reads

A small random Qwen3 checkpoint in Hugging Face format → Megatron → trained with MPO on two tensor-parallel ranks → Hugging
Face again, reloaded and measured with plain `transformers`. The stages are the real commands; each is printed as it runs.
Exit status 1 if the policy did not learn the procedural task, or if the export does not compute what training computed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart import evaluate
from examples.quickstart.model import write_model
from examples.quickstart.plot import plot_curves
from examples.quickstart.task import build_groups, write_groups

CONFIG = Path(__file__).with_name("train.yaml")
MARKER = "quickstart.json"
"""Names an output folder as ours, so that the next run may clear it."""

LEARNED_ACCURACY, LEARNED_MARGIN = 0.75, 1.0
"""Held-out accuracy and margin (nats) of a policy that learned the procedural task; without learning they are 0.5 and 0."""
EXPORT_TOLERANCE = 0.005
"""Accuracies of trainer and export may differ by this: float32 sums in another order can swap a near-tie."""


@dataclass(frozen=True)
class Sizes:
    """What keeps a run on data of this kind within minutes."""

    vocab_size: int
    max_prompt_tokens: int
    max_response_tokens: int
    groups_per_step: int
    row_tokens: int


TASK_SIZES = Sizes(vocab_size=768, max_prompt_tokens=64, max_response_tokens=64, groups_per_step=32, row_tokens=1024)
DATA_SIZES = Sizes(vocab_size=2048, max_prompt_tokens=256, max_response_tokens=128, groups_per_step=8, row_tokens=1536)


@dataclass(frozen=True)
class Result:
    """Held-out numbers, `transformers` before and after, and the trainer's own after the last step."""

    num_groups: int
    ratio_accuracy: float
    margin: float
    plain_accuracy_before: float
    plain_accuracy_after: float
    trainer_accuracy: float
    trainer_margin: float


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="groups to train on instead of the procedural task's")
    output_help = "folder for everything; cleared if an earlier run wrote it"
    parser.add_argument("--output", type=Path, default=Path("quickstart-out"), help=output_help)
    parser.add_argument("--steps", type=int, help="optimizer steps (task: 60, data: 20)")
    parser.add_argument("--groups", type=int, help="groups made by the task (1000), or most rows read from the data (1500)")
    parser.add_argument("--held-out", type=int, help="groups kept for evaluation (task: 100, data: a tenth, at most 50)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every stage; the exit status."""
    options, started = parse_arguments(arguments), time.monotonic()
    output, sizes = options.output, DATA_SIZES if options.data else TASK_SIZES
    clear_output(output)
    num_groups = options.groups or (1500 if options.data else 1000)
    held_out = options.held_out or (min(50, max(1, num_groups // 10)) if options.data else 100)
    steps = options.steps or (20 if options.data else 60)

    say("A small random Qwen3 model in Hugging Face format, with a tokenizer trained on the data")
    source = options.data or output / "task.jsonl"
    if options.data is None:
        write_groups(source, build_groups(num_groups))
    num_parameters = write_model(output / "start", read_texts(source, num_groups), vocab_size=sizes.vocab_size)
    print(f"{output / 'start'}: {num_parameters:,} parameters; data: {source}", flush=True)

    say("Hugging Face → Megatron")
    mpo("convert", input=output / "start", output=output / "start-megatron")

    say("Text → tokenized groups, some of them held out by prompt")
    mpo(
        "prepare",
        input=source,
        tokenizer=output / "start-megatron",
        output=output / "groups",
        held_out=held_out,
        max_rows=num_groups,
        max_prompt_tokens=sizes.max_prompt_tokens,
        max_response_tokens=sizes.max_response_tokens,
        overlong="truncate",
    )

    say("Training with MPO on two tensor-parallel ranks (torchrun)")
    train_settings = {
        "config": CONFIG,
        "output": output / "run",
        "model.checkpoint": output / "start-megatron",
        "data.train": output / "groups",
        "data.eval": output / "groups-eval",
        "data.groups_per_step": sizes.groups_per_step,
        "data.row_tokens": sizes.row_tokens,
        "max_steps": steps,
    }
    if read_prepared(output / "groups")["reward_kind"] == "labels":
        train_settings["loss.params"] = json.dumps({"beta": 0.1, "partition": "labels"})
    mpo("train", **train_settings)

    say("Megatron → Hugging Face")
    mpo("convert", input=output / "run", output=output / "aligned")

    say("The exported checkpoint, reloaded with transformers")
    result = measure(output, sizes.max_response_tokens)
    print_result(result, output)
    plot_curves(output / "run" / "metrics.jsonl", output / "curves.png")
    (output / MARKER).write_text(json.dumps(vars(result), indent=2) + "\n")
    print(f"curves: {output / 'curves.png'}; everything took {time.monotonic() - started:.0f} s")
    return verdict(result, must_learn=options.data is None)


def clear_output(output: Path) -> None:
    """An empty folder of ours; one that holds something else is refused."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).is_file():
            sys.exit(f"quickstart: --output = {output}: the folder is not empty and not an earlier quickstart's; choose another.")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("{}\n")


def read_texts(source: Path, max_rows: int) -> list[str]:
    """All prompts and responses of a data file, to train a tokenizer on."""
    from mpo_megatron.data.group import Group
    from mpo_megatron.data.readers import read_groups

    groups = [item for item in read_groups(str(source), max_rows=max_rows).items if isinstance(item, Group)]
    return [text for group in groups for text in (*(message["content"] for message in group.prompt), *map(str, group.responses))]


def read_prepared(folder: Path) -> dict[str, Any]:
    """What `mpo prepare` says of a folder it wrote."""
    info: dict[str, Any] = json.loads((folder / "prepare.json").read_text())
    return info


def say(title: str) -> None:
    """A heading."""
    print(f"\n=== {title}", flush=True)


def mpo(command: str, **options: object) -> None:
    """Print and run `mpo <command>` with these options; ends the program if it fails."""
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    print(f"$ mpo {command} {shlex.join(arguments)}", flush=True)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", "1" if command == "train" else str(os.cpu_count() or 1))
    started = time.monotonic()
    status = subprocess.run(
        [sys.executable, "-m", "mpo_megatron.cli", command, *arguments], env=environment, check=False
    ).returncode
    if status:
        sys.exit(f"quickstart: mpo {command} failed with exit status {status}")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def measure(output: Path, max_response_tokens: int) -> Result:
    """Score the held-out groups with the first and with the exported checkpoint."""
    groups = evaluate.load_held_out(output / "groups-eval")
    before = evaluate.score_groups(output / "start", groups, max_response_tokens)
    after = evaluate.score_groups(output / "aligned", groups, max_response_tokens)
    ratios = evaluate.subtract(after, before)
    metrics = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in metrics if "eval/accuracy" in row][-1]
    return Result(
        num_groups=len(groups),
        ratio_accuracy=evaluate.compute_accuracy(ratios, groups),
        margin=evaluate.compute_margin(ratios, groups),
        plain_accuracy_before=evaluate.compute_accuracy(before.per_token, groups),
        plain_accuracy_after=evaluate.compute_accuracy(after.per_token, groups),
        trainer_accuracy=last["eval/accuracy"],
        trainer_margin=last["eval/margin"],
    )


def print_result(result: Result, output: Path) -> None:
    """The table before / after, and what was skipped."""
    infos = [read_prepared(output / name) for name in ("groups", "groups-eval")]
    without = " and ".join(
        f"{info['statistics']['without_contrast']} of {info['num_groups']} {kind}"
        for info, kind in zip(infos, ("training", "held-out"), strict=True)
    )
    print(f"Skipped: {without} groups have no contrast (all rewards equal), so there is nothing to learn from.\n")
    print(f"{result.num_groups} held-out groups, measured with transformers            before    after")
    print(f"accuracy of log π/π_ref (before: π = π_ref, so ½)         50.0 %   {result.ratio_accuracy:6.1%}")
    print(f"margin of log π/π_ref, nats (before: 0)                   +0.000  {result.margin:+7.3f}")
    before, after = result.plain_accuracy_before, result.plain_accuracy_after
    print(f"accuracy of log π per token (no reference)                {before:6.1%}   {after:6.1%}")
    print(f"the trainer's own last evaluation: accuracy {result.trainer_accuracy:.1%}, margin {result.trainer_margin:+.3f}\n")


def verdict(result: Result, *, must_learn: bool) -> int:
    """0, or 1 with a message."""
    margin_differs = abs(result.margin - result.trainer_margin) > 1e-3 * max(1.0, abs(result.trainer_margin))
    if margin_differs or abs(result.ratio_accuracy - result.trainer_accuracy) > EXPORT_TOLERANCE:
        print("quickstart: the exported checkpoint does not compute what the trainer computed", file=sys.stderr)
        return 1
    if must_learn and (result.ratio_accuracy < LEARNED_ACCURACY or result.margin < LEARNED_MARGIN):
        goal = f"accuracy of at least {LEARNED_ACCURACY:.0%} and a margin of at least {LEARNED_MARGIN}"
        print(f"quickstart: the policy did not learn: held-out {goal} expected; more --steps?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
