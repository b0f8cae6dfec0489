"""The commands that are disturbed, each small, and what of their results must be the same again."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from mpo_megatron.cli import main
from mpo_megatron.config import AlignConfig, ConvertConfig, IterateConfig, to_dict
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.rollout import stages
from mpo_megatron.train import reference_main
from mpo_megatron.train.__main__ import work as train_work
from mpo_megatron.train.checkpoints import resumption
from mpo_megatron.train.checkpoints.step_folders import complete_steps
from mpo_megatron.train.rank import run as run_rank
from tests.tiny import random_groups, save_groups, save_model
from tools.trials.processes import Child

Result = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A command that writes below a folder, whose inputs are elsewhere."""

    name: str
    run: Callable[[Path], int]
    """Runs it with its output below the folder; the exit code."""
    result: Callable[[Path], Result]
    """What must be the same after any disturbance."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Puts into the folder what the command finds there."""
    refuses_what_is_there: bool = False
    """Whether a complete output is refused by the next run, instead of taken as it is."""
    parallel: bool = False
    """Whether two at a time on the same output are fine."""


def build_inputs(folder: Path) -> None:
    """A model, prepared groups, raw groups, scored samples, prompts."""
    folder.mkdir(parents=True)
    save_model(folder / "hf", num_hidden_layers=1, hidden_size=32)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(12, seed=1), folder / "hf")
    rows = [
        {"prompt": f"Question {index}?", "responses": [{"text": "a" * (k + 1), "reward": float(k)} for k in range(3)]}
        for index in range(30)
    ]
    (folder / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {index}."}) + "\n" for index in range(8)))
    (folder / "vowels.py").write_text("def vowels(response, group):\n    return sum(c in 'aeiou' for c in response) / 8\n")
    cli(*generate(folder, folder / "samples"))
    cli(*score(folder, folder / "samples", folder / "scored"))
    outcome = Child(lambda: be_rank(train_work, "mpo train", train_adapter(folder)), folder / "lora").outcome()
    if outcome.code:
        raise SystemExit(f"training an adapter ended with {outcome.code}:\n{outcome.output[-4000:]}")


def cli(*arguments: str) -> None:
    """A command that has to succeed."""
    if main(arguments):
        raise SystemExit(f"mpo {' '.join(arguments)} failed")


def generate(inputs: Path, output: Path) -> list[str]:
    """Arguments of `mpo generate`."""
    options = {"prompts": inputs / "prompts.jsonl", "model": inputs / "hf", "num_responses": 3, "max_tokens": 4, "empty": "keep"}
    return ["generate", "--output", str(output), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def score(inputs: Path, samples: Path, output: Path) -> list[str]:
    """Arguments of `mpo score`."""
    scorers = {"vowels": {"kind": "function", "function": f"{inputs / 'vowels.py'}:vowels"}}
    return ["score", "--input", str(samples), "--output", str(output), "--scorers", json.dumps(scorers), "--chunk_groups", "2"]


def training(inputs: Path, folder: Path, steps: int = 3, run: str = "run") -> list[str]:
    """Arguments of `mpo train`, or `mpo reference`, on data that lies in the folder."""
    options = {
        **{"output": folder / run, "model.checkpoint": inputs / "model", "data.train": folder / "train"},
        **{"data.eval": folder / "train", "data.groups_per_step": 4, "data.row_tokens": 256, "max_steps": steps, "eval_every": 2},
        **{"optimizer.lr": 1e-3, "loss.params.beta": 0.1, "model.precision": "fp32", "checkpoint.every": 1, "checkpoint.keep": 2},
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def train_adapter(inputs: Path) -> list[str]:
    """Arguments of `mpo train` for one step of an adapter, in the folder of the inputs."""
    options = {"lora.rank": 2, "data.eval": "null", "eval_every": 0}
    own = (part for name, value in options.items() for part in (f"--{name}", str(value)))
    return [*training(inputs, inputs, steps=1, run="lora"), *own]


def run_align(inputs: Path, folder: Path) -> int:
    """`mpo align` from groups, whose training is a rank in this process."""
    vars(stages)["launch"] = train_here
    train = {
        "model": {"precision": "fp32"},
        "data": {"groups_per_step": 9, "row_tokens": 256},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 1, "keep": 2},
    }
    config = AlignConfig(
        output=str(folder / "out"),
        model=str(inputs / "hf"),
        data=[str(inputs / "groups.jsonl")],
        answers=2,
        train=train,
        generate={"max_tokens": 4},
    )
    return run_config("align", config, folder)


def run_config(command: str, config: object, folder: Path) -> int:
    """Run a command with this configuration, in a file beside the folder whose file operations count."""
    path = folder.with_name(f"{folder.name}.yaml")
    path.write_text(yaml.safe_dump(to_dict(config)))
    return main([command, "--config", str(path)])


def train_here(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
    """In place of `launch`: the only rank of training, in this process."""
    return be_rank(train_work, "mpo train", list(arguments))


def rounds_config(inputs: Path, folder: Path) -> IterateConfig:
    """One on-policy round."""
    return IterateConfig(
        output=str(folder / "out"),
        model=str(inputs / "model"),
        prompts=str(inputs / "prompts.jsonl"),
        rounds=1,
        held_out=2,
        held_out_responses=2,
        measure_kl=False,
        generate={"num_responses": 3, "max_tokens": 4, "empty": "keep"},
        score={"scorers": {"vowels": {"kind": "function", "function": f"{inputs / 'vowels.py'}:vowels"}}},
        select={"truncated": "keep", "duplicates": "keep", "min_spread": 0.0},
        train={
            "model": {"precision": "fp32"},
            "data": {"groups_per_step": 2, "row_tokens": 256},
            "optimizer": {"lr": 1e-3},
            "loss": {"name": "mpo", "params": {"beta": 0.1}},
            "checkpoint": {"every": 1, "keep": 1},
            "max_steps": 2,
            "eval_every": 0,
        },
    )


def run_rounds(inputs: Path, folder: Path) -> int:
    """`mpo iterate`, whose training is a rank in this process."""
    vars(stages)["launch"] = train_here
    return run_config("iterate", rounds_config(inputs, folder), folder)


def be_rank(work: Callable[[], str | None], program: str, arguments: list[str]) -> int:
    """A rank of a command, in this process."""
    resumption.LOCK_SECONDS = 0.0  # another one is refused at once
    sys.argv = [program, *arguments]
    return run_rank(program, work)


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path, *names: str) -> Result:
    """Digests of the files that match."""
    return {str(path.relative_to(folder)): digest(path) for name in names for path in sorted(folder.glob(name))}


def weights(folder: Path) -> Result:
    """Digests of a Megatron checkpoint's tensors."""
    reader = CheckpointReader(folder / "megatron")
    tensors = {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}
    return {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}


def trained(run: Path) -> Result:
    """Weights, optimizer states and the steps that were logged."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = complete_steps(run)
    losses = [(line["step"], line["loss"]) for line in lines if "lr" in line]
    return weights(steps[-1]) | {"steps": [step.name for step in steps], "losses": losses}


def cache(folder: Path) -> Result:
    """Reference log-probs by group, whatever parts they came in."""
    found = {}
    for path in sorted((folder / "train" / "reference").glob("*/part-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found[row["group_id"]] = row["logps"]
    return found


def copy_data(inputs: Path) -> Callable[[Path], None]:
    """Puts the prepared groups into a folder: the cache is written beside them."""

    def copy(folder: Path) -> None:
        shutil.copytree(inputs / "train", folder / "train")

    return copy


def commands(inputs: Path) -> dict[str, Command]:
    """All of them, by name."""

    def call(*arguments: str) -> Callable[[Path], int]:
        return lambda folder: main([argument.replace("@", str(folder)) for argument in arguments])

    prepare = ("prepare", "--input", str(inputs / "groups.jsonl"), "--tokenizer", str(inputs / "hf"), "--output", "@/out")
    found = [
        Command(
            "prepare",
            call(*prepare, "--held_out", "5"),
            lambda folder: files(folder, "out*/*.arrow"),
            refuses_what_is_there=True,
        ),
        Command(
            "convert in",
            call("convert", "--input", str(inputs / "hf"), "--output", "@/out"),
            lambda folder: weights(folder / "out") | files(folder, "out/hf/*.json"),
            refuses_what_is_there=True,
        ),
        Command(
            "convert out",
            call("convert", "--input", str(inputs / "model"), "--output", "@/out"),
            lambda folder: files(folder, "out/*.safetensors", "out/*.json"),
            refuses_what_is_there=True,
        ),
        *(
            Command(
                name,
                call("convert", "--input", str(inputs / "lora"), "--output", "@/out", *options),
                lambda folder: files(folder, "out/*.safetensors", "out/*.json"),
                refuses_what_is_there=True,
            )
            for name, options in (("convert adapter", ()), ("convert merged", ("--merge", "true")))
        ),
        Command(
            "select",
            call("select", "--input", str(inputs / "scored"), "--output", "@/out", "--truncated", "keep", "--duplicates", "keep"),
            lambda folder: files(folder, "out/*.jsonl"),
            refuses_what_is_there=True,
        ),
        Command(
            "generate", lambda folder: main(generate(inputs, folder / "out")), lambda folder: files(folder, "out/samples.jsonl")
        ),
        Command(
            "score",
            lambda folder: main(score(inputs, inputs / "samples", folder / "out")),
            lambda folder: files(folder, "out/scored.jsonl"),
        ),
        Command(
            "reference",
            lambda folder: be_rank(reference_main.work, "mpo reference", training(inputs, folder)),
            cache,
            copy_data(inputs),
            parallel=True,
        ),
        Command(
            "train",
            lambda folder: be_rank(train_work, "mpo train", training(inputs, folder)),
            lambda folder: trained(folder / "run") | cache(folder),
            copy_data(inputs),
        ),
        Command(
            "iterate",
            lambda folder: run_rounds(inputs, folder),
            lambda folder: files(folder, "out/policies/01/hf/*.safetensors", "out/policies/*/scored/scored.jsonl"),
        ),
        Command(
            "align",
            lambda folder: run_align(inputs, folder),
            lambda folder: files(folder, "out/groups*/*.arrow", "out/aligned/*", "out/answers/*/samples.jsonl", "out/align.md"),
        ),
    ]
    return {command.name: command for command in found}
