"""Shared by all trials: the model, one set of scored samples, their groups for every K, and the held-out prompts."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from examples.instructions.model import write_model
from examples.instructions.task import build_prompts, write_prompts
from mpo_megatron.config import ConvertConfig, GenerateConfig, PrepareConfig, ScoreConfig, SelectConfig, from_dict, require
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import INFO_FILE
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.iterate import stage
from mpo_megatron.rollout.records import GENERATE_FILE, SCORE_FILE, SCORED_FILE, SELECT_FILE, read_lines
from mpo_megatron.rollout.round_report import read_answers, rewards_of
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.select import select
from mpo_megatron.terminal.console import Console

NUM_RESPONSES = 8
SAMPLE_SEED = 100
"""Seed of the prompts and of the samples, which are the same for all trials."""
SCORERS: dict[str, Any] = {
    "instructions": {"kind": "function", "function": f"{Path(__file__).parents[1] / 'instructions' / 'task.py'}:reward"}
}
"""Scorers of `mpo score`: the share of a prompt's instructions that an answer follows."""
TEMPERATURE = 0.7
"""Sampling temperature; at 1, a model of this size rarely makes sense."""
SELECTION: dict[str, Any] = {"truncated": "keep", "duplicates": "keep"}
"""Options of `mpo select`. Truncated answers are judged unchanged: at this length there are many."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Amounts of sampling, training and measuring."""

    prompts: int = 20
    """Number of training prompts, with `NUM_RESPONSES` samples each."""
    held_out: int = 72
    """Number of prompts that the trained policies answer."""
    max_tokens: int = 24
    """Longest answer."""
    groups_per_step: int = 4
    epochs: float = 1.0
    lr: float = 6e-5
    """At 1e-4, MPO's answers get higher rewards but make less sense; at 4e-5, rewards rise half as much."""

    def as_dict(self) -> dict[str, Any]:
        """The sizes for the record of a trial."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GroupSet:
    """Which of the samples a method trains on, and what is done to them: options of `mpo prepare`."""

    responses: int
    """Of each prompt, the first ones."""
    reward_noise: float = 0.0
    swapped_negatives: int = 0
    fraction: float = 1.0

    def options(self) -> dict[str, Any]:
        """Its number of responses, and what is not the default."""
        chosen = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in chosen.items() if name == "responses" or value != getattr(GroupSet, name)}

    @property
    def name(self) -> str:
        """Of its folder: `groups-8`, `groups-8-fraction-0.5`."""
        options = self.options()
        return "-".join(["groups", str(options.pop("responses")), *(f"{name}-{value}" for name, value in options.items())])


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The shared folders."""

    folder: Path
    sizes: Sizes

    @property
    def model(self) -> Path:
        """The initial model, in Hugging Face format."""
        return self.folder / "model"

    @property
    def checkpoint(self) -> Path:
        """The initial model, in Megatron format."""
        return self.folder / "megatron"

    @property
    def held_out(self) -> Path:
        """Prompts that no trial trains on."""
        return self.folder / "held-out.jsonl"

    def groups(self, chosen: GroupSet) -> Path:
        """Prepared groups."""
        return self.folder / chosen.name


def make_samples(folder: Path, sizes: Sizes, group_sets: Iterable[GroupSet], console: Console) -> Samples:
    """Sample once, resuming if necessary; prepare the groups of each set.

    Raises:
        ConfigError: the folder's samples were made with other sizes.
    """
    samples = Samples(folder=folder, sizes=sizes)
    keep_sizes(folder / "sizes.json", sizes)
    stage("model", samples.model / "tokenizer.json", lambda: write_model(samples.model), console)
    export = ConvertConfig(input=str(samples.model), output=str(samples.checkpoint))
    stage("convert", samples.checkpoint, lambda: convert(export), console)
    prompts = build_prompts(sizes.held_out + sizes.prompts, SAMPLE_SEED)
    write_prompts(samples.held_out, prompts[: sizes.held_out])
    write_prompts(folder / "prompts.jsonl", prompts[sizes.held_out :])
    answer(samples.model, folder / "prompts.jsonl", folder / "train", NUM_RESPONSES, SAMPLE_SEED, sizes, console)
    selected = folder / "train" / "selected"
    chosen = SelectConfig(input=str(folder / "train" / "scored"), output=str(selected), **SELECTION)
    stage("select", selected / SELECT_FILE, lambda: select(chosen, console), console)
    for group_set in dict.fromkeys(group_sets):
        options = group_set.options()
        config = PrepareConfig(
            input=str(selected / "groups.jsonl"),
            tokenizer=str(samples.checkpoint),
            output=str(samples.groups(group_set)),
            responses_per_prompt=options.pop("responses"),
            **options,
        )
        run = functools.partial(prepare, config, console)
        stage(f"prepare {group_set.name}", samples.groups(group_set) / INFO_FILE, run, console)
    return samples


def keep_sizes(path: Path, sizes: Sizes) -> None:
    """Record the sizes of the samples; if already recorded, compare them, because finished samples are not repeated.

    Raises:
        ConfigError: names the first size that differs.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [json.dumps(sizes.as_dict()).encode()])
        return
    recorded = json.loads(path.read_bytes())
    for name in ("prompts", "held_out", "max_tokens"):
        before, now = recorded[name], getattr(sizes, name)
        option = f"--{name.replace('_', '-')}"
        require(before == now, f"{option} = {now}; {path.parent} was sampled with {before}; use that value, or another --output.")


def answer(model: Path, prompts: Path, output: Path, number: int, seed: int, sizes: Sizes, console: Console) -> None:
    """Sample `number` answers to each prompt and score them, in `samples` and `scored` of a folder."""
    options = {
        "prompts": str(prompts),
        "model": str(model),
        "output": str(output / "samples"),
        "num_responses": number,
        "seed": seed,
        **sampling_options(sizes),
    }
    sampling = from_dict(GenerateConfig, options, "generate")
    stage("generate", output / "samples" / GENERATE_FILE, lambda: generate(sampling, console), console)
    scoring = ScoreConfig(
        input=str(output / "samples"),
        output=str(output / "scored"),
        scorers=SCORERS,
    )
    stage("score", output / "scored" / SCORE_FILE, lambda: score(scoring, console), console)


def sampling_options(sizes: Sizes) -> dict[str, Any]:
    """Options of `mpo generate` that all samples share."""
    return {"max_tokens": sizes.max_tokens, "temperature": TEMPERATURE, "transformers": {"batch_size": 160}}


def read_rewards(folder: Path) -> dict[str, float]:
    """The mean reward of the answers to each prompt."""
    found = {group_id: rewards_of(responses) for group_id, responses in read_answers(folder).items()}
    return {group_id: sum(rewards) / len(rewards) for group_id, rewards in found.items() if rewards}


def read_examples(folder: Path, number: int) -> dict[str, str]:
    """The first answer to each of the first prompts, with its reward; nothing if the answers are gone."""
    path = folder / "scored" / SCORED_FILE
    if not path.is_file():
        return {}
    examples = {}
    for record in itertools.islice(read_lines(path), number):
        answer = record["responses"][0]
        examples[record["prompt"][-1]["content"]] = f"{' '.join(answer['text'].split())} *({answer['reward']:g})*"
    return examples


def read_spacing(samples: Samples) -> dict[int, float]:
    """Mean gap between neighbours of a prompt's sorted rewards, by number of responses (MPO, Fig. 10)."""
    folders = {number: samples.groups(GroupSet(responses=number)) for number in range(2, NUM_RESPONSES + 1)}
    return {
        number: json.loads((folder / INFO_FILE).read_bytes())["statistics"]["reward_spacing"]["mean"]
        for number, folder in folders.items()
        if (folder / INFO_FILE).is_file()
    }


def count_tokens(folder: Path) -> float:
    """Mean tokens per answer."""
    lengths = [response["num_tokens"] for responses in read_answers(folder).values() for response in responses]
    return sum(lengths) / len(lengths)
