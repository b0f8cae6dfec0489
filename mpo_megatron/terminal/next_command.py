"""Suggestions at a command's end: the usual next command, with known paths filled in."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpo_megatron.terminal.visible import visible


@dataclass(frozen=True)
class NextCommand:
    """A command to type; words in capitals are placeholders."""

    words: tuple[str, ...]
    purpose: str


def describe_next(commands: Sequence[NextCommand]) -> str:
    """The commands, one per line, with their purpose; empty without any."""
    lines = [f"  {visible(shlex.join(command.words))}    # {command.purpose}" for command in commands]
    return "\n".join(["next:", *lines]) if lines else ""


def say_next(commands: Sequence[NextCommand]) -> None:
    """Print the commands, one per line, with their purpose."""
    if commands:
        print(describe_next(commands), flush=True)


def _command(purpose: str, *words: object) -> NextCommand:
    return NextCommand(tuple(map(str, words)), purpose)


def after_align(model: str, folder: Path) -> list[NextCommand]:
    """After training on groups."""
    return [
        _command("talk to both", "mpo", "chat", folder, "--beside", model),
        _command("curves, and changes of log-probs", "open", folder / "report.html"),
        _command("a row as the model saw it", "mpo", "inspect", "--run", folder / "run"),
    ]


def after_aligned_rounds(model: str, folder: Path, number: int) -> list[NextCommand]:
    """After on-policy rounds.

    Args:
        number: of rounds
    """
    run = folder / "rounds" / "rounds" / f"{number:02d}" / "run"
    return [
        _command("talk to both", "mpo", "chat", folder, "--beside", model),
        _command("what each round changed; report.md has the numbers", "open", folder / "rounds" / "report.png"),
        _command("curves of the last round's training", "mpo", "report", run),
    ]


def after_convert(output: str) -> list[NextCommand]:
    """After a conversion: to Megatron's format, to an adapter, or to a Hugging Face model."""
    if (Path(output) / "conversion.json").is_file():
        return [
            _command("rated responses → groups", *_words("mpo prepare --input DATA --tokenizer {} --output GROUPS", output)),
            _command("train on them", *_words("mpo train --model.checkpoint {} --data.train GROUPS --output RUN", output)),
        ]
    return [
        _command("talk to it", "mpo", "chat", output),
        _command("sample it", *_words("mpo generate --model {} --prompts PROMPTS --output SAMPLES", output)),
    ]


def after_prepare(output: str, tokenizer: str) -> list[NextCommand]:
    """After `mpo prepare`: training, with the held-out groups if any."""
    is_model = any((Path(tokenizer) / name).is_file() for name in ("config.json", "conversion.json"))
    model = tokenizer if is_model else "MODEL"
    held_out = f"{output}-eval"
    evaluated = ["--data.eval", held_out] if Path(held_out).is_dir() else []
    return [
        _command("what the model sees", *_words("mpo inspect --data {} --group 0", output)),
        _command(
            "train on these groups",
            *_words("mpo train --model.checkpoint {} --data.train {}", model, output),
            *evaluated,
            *("--output", "RUN"),
        ),
    ]


def after_generate(output: str) -> list[NextCommand]:
    """After `mpo generate`: scores."""
    return [_command("score the responses", *_words("mpo score --config SCORE.yaml --input {} --output SCORED", output))]


def after_score(output: str) -> list[NextCommand]:
    """After `mpo score`: the groups to train on."""
    return [_command("choose groups to train on", *_words("mpo select --input {} --output SELECTED", output))]


def after_select(output: str) -> list[NextCommand]:
    """After `mpo select`: token ids."""
    return [_command("tokenize them", *_words("mpo prepare --input {} --tokenizer MODEL --output GROUPS", output))]


def after_train(output: str) -> list[NextCommand]:
    """After a complete training run: its report, and its model for other programs."""
    return [
        _command("curves and held-out groups", *_words("mpo report {} --output {}", output, Path(output) / "report.html")),
        _command("the model for transformers and vLLM", *_words("mpo convert --input {} --output ALIGNED", output)),
    ]


def after_reference(arguments: Sequence[str]) -> list[NextCommand]:
    """After the reference's log-probs: training with the same options."""
    return [_command("train with the same options", "mpo", "train", *arguments)]


def after_iterate(output: str, rounds: int) -> list[NextCommand]:
    """After the last round: chat with the last policy beside the first."""
    first, last = (Path(output) / "policies" / f"{number:02d}" / "hf" for number in (0, rounds))
    return [_command("talk to the last policy and the first", *_words("mpo chat {} --beside {}", last, first))]


def after_evaluate(output: str) -> list[NextCommand]:
    """After an evaluation: its plot."""
    picture = Path(output) / "evaluation.png"
    return [_command("intervals, margins and lengths", "open", picture)] if picture.is_file() else []


def after_report(page: str, runs: Sequence[str]) -> list[NextCommand]:
    """After a report: view it; for a single run, also export its model."""
    export = [_command("the model for transformers and vLLM", *_words("mpo convert --input {} --output ALIGNED", runs[0]))]
    return [_command("in a browser", "open", page), *(export if len(runs) == 1 else [])]


def after_plan(train: str | None, gpus: int, gpus_per_node: int | None) -> list[NextCommand]:
    """After a plan: the run, on this machine or as a cluster job.

    Args:
        gpus_per_node: None means 8
    """
    gpus_per_node = gpus_per_node or 8
    if train is None:
        words = _words("mpo train --model.checkpoint MODEL --data.train GROUPS --output RUN --print_config")
        return [_command("a run's options, to save, change, and plan with --train", *words)]
    if gpus <= gpus_per_node:
        return [_command("run it here", *_words("mpo train --nproc {} --config {}", gpus, train))]
    each = math.gcd(gpus, gpus_per_node)  # 12 GPUs of machines with 8: three with 4
    words = _words("mpo launch slurm --train {} --nodes {} --gpus_per_node {}", train, gpus // each, each)
    return [_command("submit it", *words)]


def _words(template: str, *values: object) -> list[str]:
    """The template's words, with values in place of its `{}`."""
    rest = iter(values)
    return [str(next(rest)) if word == "{}" else word for word in template.split()]
