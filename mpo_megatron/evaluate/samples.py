"""Scored samples of a candidate and a baseline: created if missing, read, and compared prompt by prompt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.config import EvaluateConfig, GenerateConfig, ScoreConfig, from_dict, require
from mpo_megatron.config.checks import within
from mpo_megatron.evaluate.statistics import (
    Comparison,
    Estimate,
    Samples,
    bootstrap,
    bootstrap_mean,
    compare,
    compute_length_controlled_win_rate,
    compute_win_rate,
)
from mpo_megatron.files import DataError
from mpo_megatron.hf.identity import PEFT_CONFIG
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.records import (
    SAMPLES_FILE,
    SCORE_FILE,
    SCORED_FILE,
    Record,
    find_lines,
    is_reward,
    read_answered,
)
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.stages import run_command
from mpo_megatron.rollout.validation import check_generate, check_score

MODELS = ("config.json", PEFT_CONFIG, "megatron", "checkpoints")
"""Files and folders that exist only in the folder of a model, an adapter, a checkpoint or a run."""


@dataclass(kw_only=True)
class SampleSet:
    """The rewarded samples of one model."""

    path: Path
    samples: dict[str, Samples] = field(default_factory=dict)
    """By group id; prompts without any rewarded sample are dropped."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Group id → the prompt as in the file."""
    counts: Counter[str] = field(default_factory=Counter)
    """responses, without_reward, prompts_without_reward, truncated, tokens."""


def is_model(path: str) -> bool:
    """Whether a `candidate` or `baseline` is a model to sample from, rather than samples."""
    folder = Path(path)
    if any((folder / name).exists() for name in MODELS):  # a run's folder also has a samples.jsonl, for its held-out groups
        return True
    return folder.is_dir() and not any((folder / name).is_file() for name in (SCORED_FILE, SAMPLES_FILE))


def find_scored(config: EvaluateConfig, role: str, path: str) -> Path:
    """The file of scored samples for `candidate` or `baseline`; generates and scores them first if necessary.

    Raises:
        ConfigError: options needed for sampling or scoring are missing.
        DataError: a stage's input is unusable; completed work stays.
    """
    if is_scored(path):
        return Path(path) if Path(path).is_file() else find_lines(path, SCORED_FILE, SCORE_FILE, role)
    sampling, scoring = build_sampling(config, role, path), build_scoring(config, role, path)
    if sampling is not None:
        run_command("generate", generate, sampling)
    run_command("score", score, scoring)
    return find_lines(scoring.output, SCORED_FILE, SCORE_FILE)


WHOLE = {"shard": "0/1"}
"""The whole input, even in a task of a Slurm array."""


def build_sampling(config: EvaluateConfig, role: str, path: str) -> GenerateConfig | None:
    """How the `candidate` or `baseline` answers the prompts; None if its samples are given.

    Raises:
        ConfigError: there are no prompts, or an option is wrong.
    """
    if not is_model(path):
        return None
    require(config.prompts is not None, f"prompts = None; {role} = {path} is a model: set prompts for it to answer.")
    output = str(Path(config.output) / role / "samples")
    return from_dict(
        GenerateConfig, {**config.generate, "prompts": config.prompts, "model": path, "output": output} | WHOLE, "generate"
    )


def build_scoring(config: EvaluateConfig, role: str, path: str) -> ScoreConfig:
    """How the samples of the `candidate` or `baseline` are scored.

    Raises:
        ConfigError: there are no scorers, or an option is wrong.
    """
    require(bool(config.score), f"score = {{}}; the samples of {role} have no rewards yet: configure scorers (score.scorers).")
    folder = Path(config.output) / role
    source = str(folder / "samples") if is_model(path) else path
    return from_dict(ScoreConfig, {**config.score, "input": source, "output": str(folder / "scored")} | WHOLE, "score")


def check_sides(config: EvaluateConfig, *, measured: bool) -> None:
    """Check how models answer and how answers are scored, before anything runs.

    Args:
        measured: whether rewards are measured; if not, the candidate only answers questions
    Raises:
        ConfigError: names the option, the rule and the fix.
        DataError: a file of samples is unusable.
    """
    for role, path in (("candidate", config.candidate), ("baseline", config.baseline)):
        if path is None:
            continue
        if is_model(path):
            given = {**config.generate, "prompts": config.prompts or "", "model": path, "output": config.output}
            asked = from_dict(GenerateConfig, given | WHOLE, "generate")
            with within("generate"):
                check_generate(asked)
        if measured and not is_scored(path):
            build_sampling(config, role, path)
            scoring = build_scoring(config, role, path)
            with within("score"):
                check_score(scoring)


def is_scored(path: str) -> bool:
    """Whether a `candidate` or `baseline` has rewards already.

    Raises:
        DataError: a line is damaged, or there is none.
    """
    return (Path(path) / SCORED_FILE).is_file() or (Path(path).is_file() and has_rewards(Path(path)))


def has_rewards(path: Path) -> bool:
    """Whether a file of group lines contains any reward; missing ones are counted when it is read.

    Raises:
        DataError: a line is damaged, or there is none.
    """
    holds_groups = False
    for record in read_answered(path):
        if any(is_reward(response.get("reward")) for response in record["responses"]):
            return True
        holds_groups = True
    if not holds_groups:
        raise DataError(f"{path}: holds no group; name a file of samples.")
    return False


def read_samples(path: Path) -> SampleSet:
    """The rewards and lengths (in characters) of a file's samples.

    Raises:
        DataError: a line is damaged, no sample has a reward, or a group appears twice.
    """
    found = SampleSet(path=path)
    for record in read_answered(path):
        responses = record["responses"]
        scored = [response for response in responses if is_reward(response.get("reward"))]
        found.counts["responses"] += len(responses)
        found.counts["without_reward"] += len(responses) - len(scored)
        found.counts["truncated"] += sum(response.get("finish_reason") == "length" for response in responses)
        found.counts["tokens"] += sum(response.get("num_tokens") or 0 for response in responses)
        if record["group_id"] in found.prompts:
            raise DataError(f"{path}: group {record['group_id']} appears twice; give each prompt a unique id.")
        found.prompts[record["group_id"]] = prompt_key(record)
        if not scored:
            found.counts["prompts_without_reward"] += 1
            continue
        found.samples[record["group_id"]] = Samples(
            rewards=np.array([float(response["reward"]) for response in scored]),
            lengths=np.array([float(len(response["text"])) for response in scored]),
        )
    if not found.samples:
        raise DataError(f"{path}: none of {found.counts['responses']} responses has a reward; score them first.")
    return found


def prompt_key(record: Record) -> str:
    """A text that is equal for equal prompts, whether given as a string or as messages."""
    prompt = record.get("prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return json.dumps(messages, sort_keys=True)


def summarize_samples(found: SampleSet, config: EvaluateConfig) -> dict[str, Any]:
    """Mean reward with its interval over prompts, and statistics of the samples."""
    by_prompt = np.array([samples.rewards.mean() for samples in found.samples.values()])
    lengths = np.concatenate([samples.lengths for samples in found.samples.values()])
    number = found.counts["responses"]
    return {
        "file": str(found.path),
        "prompts": len(found.samples),
        "responses": number,
        "without_reward": found.counts["without_reward"],
        "prompts_without_reward": found.counts["prompts_without_reward"],
        "reward": vars(bootstrap_mean(by_prompt, num_resamples=config.num_resamples, seed=config.seed)),
        "characters": float(lengths.mean()),
        "tokens": found.counts["tokens"] / number,
        "truncated": found.counts["truncated"] / number,
    }


def compare_samples(candidate: SampleSet, baseline: SampleSet, config: EvaluateConfig) -> dict[str, Any]:
    """Win rate of the candidate over the prompts answered by both, plain and length-controlled.

    Raises:
        DataError: they share no prompt, or use one id for two prompts.
    """
    shared = [group_id for group_id in candidate.samples if group_id in baseline.samples]
    for group_id in shared:
        if candidate.prompts[group_id] != baseline.prompts[group_id]:
            raise DataError(
                f"group {group_id} has different prompts in {baseline.path} and {candidate.path}; sample both from one file."
            )
    if not shared:
        raise DataError(f"{candidate.path} and {baseline.path} have no prompt in common; sample both from one prompt file.")
    pairs = compare([candidate.samples[name] for name in shared], [baseline.samples[name] for name in shared])
    return {
        "prompts": len(shared),
        "only_candidate": len(candidate.samples) - len(shared),
        "only_baseline": len(baseline.samples) - len(shared),
        "pairs": len(pairs.preference),
        "ties": pairs.num_ties,
        "win_rate": vars(_estimate(pairs, compute_win_rate, config)),
        "length_controlled_win_rate": vars(_estimate(pairs, compute_length_controlled_win_rate, config)),
    }


def _estimate(pairs: Comparison, statistic: Any, config: EvaluateConfig) -> Estimate:
    return bootstrap(
        lambda weights: statistic(pairs, weights), pairs.num_prompts, num_resamples=config.num_resamples, seed=config.seed
    )


def read_texts(path: Path) -> Mapping[str, Record]:
    """The first response to every prompt, by prompt."""
    return {prompt_key(record): record["responses"][0] for record in read_answered(path) if record["responses"]}
