"""The plan of `mpo iterate`: every stage's configuration in every round, built and checked before anything starts.

<output>/iterate.json             configuration, digests of the model and the prompts: must not change
<output>/prompts/                 round-01.jsonl …, held-out.jsonl
<output>/policies/00 … NN         the policy before the first round, and after each: hf/ (for generating), samples/ and
                                  scored/ with its answers to the held-out prompts
<output>/rounds/01 … NN           samples/, scored/, selected/, groups/, run/ (training), report.json
<output>/run/                     one run in place of each round's, with optimizer = continued
<output>/report.json, .md, .png   all rounds
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpo_megatron.config import (
    ConfigError,
    GenerateConfig,
    IterateConfig,
    PrepareConfig,
    ScoreConfig,
    SelectConfig,
    TrainConfig,
    check_checkpoint,
    check_writable,
    from_dict,
    require,
    to_dict,
    validate_held_out,
    validate_unused,
)
from mpo_megatron.config.checks import find_change, within
from mpo_megatron.config.iterate import STAGES
from mpo_megatron.config.names import check_options
from mpo_megatron.config.sections import has_option
from mpo_megatron.data.tokenizing import load_chat
from mpo_megatron.hf.identity import weights_digest
from mpo_megatron.hf.layout import read_model
from mpo_megatron.model.checkpoint_folder import CONVERTED, megatron_checkpoint
from mpo_megatron.rollout.prompt_split import PromptSplit, split_prompts
from mpo_megatron.rollout.records import read_summary
from mpo_megatron.rollout.round_report import REPORT_FILE
from mpo_megatron.rollout.trained_policy import check_trained_policy
from mpo_megatron.rollout.validation import check_generate, check_score
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.inputs import check_training, open_some
from mpo_megatron.train.launcher import count_ranks
from mpo_megatron.train.objective import check_data

STATE_FILE = "iterate.json"
FREE = ("output", "model", "prompts", "nproc")
"""Options that a later run may change: paths, whose content is recorded as a digest, and the number of ranks."""
FILLED = {
    "generate": ("prompts", "model", "output", "shard"),
    "score": ("input", "output", "shard"),
    "select": ("input", "output"),
    "prepare": ("input", "output", "tokenizer", "held_out"),
    "train": ("output", "model.checkpoint", "model.reference", "data.train", "data.first_step", "stop_after"),
}
"""Options that only `mpo iterate` sets."""


@dataclass(frozen=True, kw_only=True)
class RoundPolicy:
    """A policy, and its answers to the held-out prompts."""

    folder: Path
    generate: GenerateConfig
    score: ScoreConfig

    @property
    def hf(self) -> Path:
        """Folder of its Hugging Face checkpoint."""
        return self.folder / "hf"


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round's stages; its starting checkpoint is known only after the rounds before it."""

    number: int
    folder: Path
    generate: GenerateConfig
    score: ScoreConfig
    select: SelectConfig
    prepare: PrepareConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class RoundsPlan:
    """The checked plan of all rounds."""

    config: IterateConfig
    prompts: PromptSplit
    model_digest: str
    num_ranks: list[int]
    """Number of ranks of each round's training."""
    policies: list[RoundPolicy]
    """The rounds + 1 policies."""
    rounds: list[Round]

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.config.output)


def build_plan(config: IterateConfig) -> RoundsPlan:
    """Build every stage's configuration, and check it as far as possible before the first round.

    Raises:
        ConfigError: names the option, the rule and the fix.
        DataError: a line of the prompt file holds no prompt.
    """
    policies, num_ranks = check_rounds(config)
    prompts = split_prompts(Path(config.prompts), rounds=config.rounds, held_out=config.held_out, seed=config.seed)
    check_folder(Path(config.output), started_with(config, prompts))  # before the conversion, which takes time and space
    config = replace(config, model=megatron_checkpoint(config.model, Path(config.output), "model"))
    checkpoint.verify(Path(config.model))
    rounds = [build_round(config, number) for number in range(1, config.rounds + 1)]
    if config.optimizer == "continued":
        rounds = join_runs(config, rounds, [len(rows) for rows in prompts.rounds])
    return RoundsPlan(
        config=config,
        prompts=prompts,
        model_digest=weights_digest(Path(config.model)),
        num_ranks=num_ranks,
        policies=policies,
        rounds=rounds,
    )


def check_rounds(config: IterateConfig) -> tuple[list[RoundPolicy], list[int]]:
    """Check every stage of every round as far as no prompt and no converted model is needed.

    Returns:
        the policies, and the number of ranks of each round's training
    Raises:
        ConfigError: names the option, the rule and the fix.
    """
    for stage, names in FILLED.items():
        for name in names:
            require(
                not has_option(getattr(config, stage), name) and f"{stage}.{name}" not in config.per_round,
                f"{stage}.{name} is set by mpo iterate itself; remove it.",
            )
    check_writable(Path(config.output), "output")
    check_checkpoint(Path(config.model), "model")
    policies = [build_policy_stages(config, number) for number in range(config.rounds + 1)]
    num_ranks = []
    for number in range(1, config.rounds + 1):
        item = build_round(config, number)
        num_ranks.append(config.nproc or count_ranks(item.train.parallel))
        if not (item.folder / REPORT_FILE).is_file():  # a finished round may be looked at on another machine
            check_round(item, policies[number].generate, Path(config.model), num_ranks[-1])
    return policies, num_ranks


def join_runs(config: IterateConfig, rounds: Sequence[Round], num_prompts: Sequence[int]) -> list[Round]:
    """The rounds as segments of one training run: each starts where the last one stopped (OnMC-PO, batched online).

    A segment's number of steps follows from its number of prompts (or its share of train.max_steps), so the schedule is known
    beforehand. If fewer groups than prompts remain to train on, the last steps repeat some of them.

    Args:
        num_prompts: prompts of each round
    """
    first = rounds[0].train
    if first.max_steps is not None:
        ends = [round(first.max_steps * number / len(rounds)) for number in range(1, len(rounds) + 1)]
        require(
            first.max_steps >= len(rounds), f"train.max_steps = {first.max_steps}; each of {len(rounds)} rounds needs a step."
        )
    else:
        steps = [max(1, round(first.epochs * math.ceil(size / first.data.groups_per_step))) for size in num_prompts]
        ends = list(itertools.accumulate(steps))
    joined = []
    for item, start, end in zip(rounds, [0, *ends], ends, strict=False):
        train = replace(
            item.train,
            output=str(Path(config.output) / "run"),
            seed=first.seed,
            max_steps=ends[-1],
            stop_after=end,
            data=replace(item.train.data, first_step=start),
        )
        joined.append(replace(item, train=train))
    return joined


def build_round(config: IterateConfig, number: int) -> Round:
    """The stages of round `number`, from 1."""
    output = Path(config.output)
    folder, policy = output / "rounds" / f"{number:02d}", output / "policies" / f"{number - 1:02d}"
    options = options_of_round(config, number)
    for stage, given in options.items():
        check_options(STAGES[stage], given, stage)
    fill(options["generate"], prompts=output / "prompts" / f"round-{number:02d}.jsonl", model=policy / "hf")
    fill(options["generate"], output=folder / "samples", shard="0/1")  # the whole input, even in a task of a Slurm array
    fill(options["score"], input=folder / "samples", output=folder / "scored", shard="0/1")
    fill(options["select"], input=folder / "scored", output=folder / "selected")
    fill(options["prepare"], input=folder / "selected" / "groups.jsonl", output=folder / "groups", tokenizer=policy / "hf")
    fill(options["train"], output=folder / "run")
    fill(options["train"].setdefault("model", {}), checkpoint=config.model, reference=reference_folder(config, config.model))
    fill(options["train"].setdefault("data", {}), train=folder / "groups")
    return Round(
        number=number,
        folder=folder,
        generate=from_dict(GenerateConfig, options["generate"], "generate"),
        score=from_dict(ScoreConfig, options["score"], "score"),
        select=from_dict(SelectConfig, options["select"], "select"),
        prepare=from_dict(PrepareConfig, options["prepare"], "prepare"),
        train=from_dict(TrainConfig, options["train"], "train"),
    )


def build_policy_stages(config: IterateConfig, number: int) -> RoundPolicy:
    """The stages that measure policy `number`, without `per_round`, so that all policies are measured in the same way."""
    folder = Path(config.output) / "policies" / f"{number:02d}"
    generate, score = copy.deepcopy(config.generate), copy.deepcopy(config.score)
    generate.setdefault("seed", config.seed)
    fill(generate, prompts=Path(config.output) / "prompts" / "held-out.jsonl", model=folder / "hf", output=folder / "samples")
    fill(generate, num_responses=config.held_out_responses, shard="0/1")
    fill(score, input=folder / "samples", output=folder / "scored", shard="0/1")
    return RoundPolicy(
        folder=folder,
        generate=from_dict(GenerateConfig, generate, "generate"),
        score=from_dict(ScoreConfig, score, "score"),
    )


def start_training(plan: RoundsPlan, item: Round, start: Path) -> TrainConfig:
    """The configuration that trains a round from the checkpoint `start`; a continued run already has it."""
    if plan.config.optimizer == "continued":
        return item.train
    reference = reference_folder(plan.config, str(start))
    return replace(item.train, model=replace(item.train.model, checkpoint=str(start), reference=reference))


def reference_folder(config: IterateConfig, start: str) -> str | None:
    """The reference of a round that starts from `start`; None for that same checkpoint."""
    return config.model if config.reference == "initial" and start != config.model else None


def options_of_round(config: IterateConfig, number: int) -> dict[str, dict[str, Any]]:
    """The sections with this round's `per_round` values, and a seed for stages without one."""
    options = {stage: copy.deepcopy(getattr(config, stage)) for stage in FILLED}
    for stage in ("generate", "select", "prepare", "train"):
        options[stage].setdefault("seed", config.seed + number)
    for name, values in config.per_round.items():
        *parents, last = name.split(".")
        section: Any = options
        for parent in parents:
            section = section.setdefault(parent, {})
            require(isinstance(section, dict), f"per_round.{name}: {parent} has no options of its own.")
        section[last] = copy.deepcopy(values[number - 1])
    return options


def fill(section: dict[str, Any], **values: object) -> None:
    """Set options that `mpo iterate` determines; paths become text."""
    section.update({name: str(value) if isinstance(value, Path) else value for name, value in values.items()})


def started_with(config: IterateConfig, prompts: PromptSplit) -> dict[str, Any]:
    """What must not change in a folder of rounds, except the model's digest."""
    return {
        "config": to_dict(config),
        "prompts_digest": prompts.digest,
        "duplicate_prompts": prompts.num_duplicates,
    }


def check_folder(folder: Path, state: dict[str, Any]) -> None:
    """Check that a folder is new, or holds rounds started with this state.

    Raises:
        ConfigError: names a file in it, or the first value that changed.
    """
    if not (folder / STATE_FILE).is_file():
        # Hidden files are the lock, and leftovers of a run killed while writing its first file.
        found = folder.iterdir() if folder.is_dir() else ()
        others = [entry.name for entry in found if not entry.name.startswith(".") and entry.name != CONVERTED]
        require(not others, f"output = {folder} holds {others[:1]}, but no {STATE_FILE}; choose a new folder.")
        return
    recorded = {name: value for name, value in read_summary(folder / STATE_FILE).items() if name in state}
    changed = find_change(_without_free(recorded), _without_free(state))
    if changed is not None:
        name, before, now = changed
        name = name.removeprefix("config.")
        raise ConfigError(
            f"output = {folder} was started with {name} = {before}, now it is {now}; use the old value, or another output."
        )


def _without_free(state: dict[str, Any]) -> dict[str, Any]:
    """The state without options that a later run may change."""
    return {**state, "config": {name: value for name, value in state["config"].items() if name not in FREE}}


PROMPT_OPTIONS = ("system_prompt", "chat_template", "chat_template_kwargs", "prompt_format")
"""Options that affect the prompt tokens."""


def check_same_prompts(generate: GenerateConfig, prepare: PrepareConfig) -> None:
    """Refuse options with which training would use other prompts than sampling.

    Raises:
        ConfigError: naming the option.
    """
    if prepare.other_prompts == "allow":
        return
    for name in PROMPT_OPTIONS:
        drawn, trained = getattr(generate, name), getattr(prepare, name)
        require(
            drawn == trained or (name == "prompt_format" and "templated" not in (drawn, trained)),
            f"generate.{name} = {drawn}, prepare.{name} = {trained}; training and sampling would use different "
            "prompts; set both to the same value.",
        )


def check_round(item: Round, answers: GenerateConfig, model: Path, num_ranks: int) -> None:
    """Check what a round's stages would refuse later, as far as it does not depend on data.

    Args:
        answers: the stage in which the round's policy answers the held-out prompts
    Raises:
        ConfigError: names the round, the option, the rule and the fix.
    """
    try:
        with within("generate"):
            check_generate(item.generate)
        with within("score"):
            check_score(item.score)
        check_same_prompts(item.generate, item.prepare)
        chat = load_chat(replace(item.prepare, tokenizer=str(model)))
        train = item.train
        with within("train"):
            validate_unused(train)
        family, _ = read_model(model, train.parallel)
        for generate in (item.generate, answers):
            check_trained_policy(generate, train.lora, family, model)
        objective = check_training(train, num_ranks, family)
        labelled = item.select.sets != "all"
        check_data(objective, has_rewards=True, has_labels=labelled, where=f"select.sets = {item.select.sets}")
        validate_held_out(train)
        if train.data.eval is not None:
            open_some("data.eval", train.data.eval, train, chat.tokenizer, family, objective)
        require(train.checkpoint.resume, "train.checkpoint.resume = false; a killed round could not resume; remove it.")
    except ConfigError as error:
        raise ConfigError(f"round {item.number}: {error}") from error
