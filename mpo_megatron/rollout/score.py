"""`mpo score`: generated responses → one score per scorer, combined into the reward.

    mpo score --config score.yaml --input rounds/1/samples --output rounds/1/scored

Groups are scored in chunks, each written at once; a resumed run continues after the last one. Groups can be split into shards.
The reward is Σ w_s · x_s over scorers s. x_s is the raw score, or the score standardised within the group:
(x − mean) / standard deviation, 0 where all are equal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpo_megatron.config import ScoreConfig, require
from mpo_megatron.config.score import build_scorer_config, read_weight
from mpo_megatron.config.values import LARGEST_REWARD
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import list_files
from mpo_megatron.files.lock import hold
from mpo_megatron.rollout.records import (
    GENERATE_FILE,
    SAMPLES_FILE,
    SCORE_FILE,
    SCORED_FILE,
    LineWriter,
    Record,
    check_started,
    digest_lines,
    find_lines,
    find_repeated,
    is_reward,
    join_lines,
    read_answered,
    read_ids,
    read_lines,
    read_summary,
    write_summary,
)
from mpo_megatron.rollout.score_summary import TOLD, print_summary, summarize
from mpo_megatron.rollout.scorers import Scorer, build_scorer
from mpo_megatron.rollout.shards import Shard, choose_shard, join_shards
from mpo_megatron.rollout.validation import check_score
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.progress import show_progress

STARTED_FILE = "score.started.json"
"""What the folder's lines were scored with; a run with other settings is refused."""


def score(config: ScoreConfig, console: Console | None = None) -> Path:
    """Write `<output>/scored.jsonl` and `score.json`; the path of the former.

    Raises:
        ConfigError: a scorer cannot be built, or the folder holds other scorers' scores.
        DataError: the input cannot be read, or scores are missing and `missing = error`; finished scores stay.
    """
    console = console or Console()
    check_score(config)
    source, output, shard = find_lines(config.input, SAMPLES_FILE, GENERATE_FILE), Path(config.output), choose_shard(config.shard)
    scored, own = output / SCORED_FILE, output / shard.name(SCORED_FILE)
    require(scored.resolve() != source.resolve(), f"output = {output}; this would overwrite the input; choose another folder.")
    kinds = {name: build_scorer_config(name, options) for name, options in config.scorers.items()}
    with contextlib.ExitStack() as stack:
        scorers: list[Scorer] = []
        for name, kind in kinds.items():
            scorers.append(build_scorer(name, kind))
            stack.callback(scorers[-1].close)
        identity = _identity(config, source, scorers)
        check_started(output, STARTED_FILE, identity, "scored*.jsonl")
        if not (output / shard.name(SCORE_FILE)).is_file():
            stack.enter_context(hold(output / f".{own.name}.lock", own))
            _score_groups(config, source, own, scorers, shard)
            for scorer in scorers:
                report = scorer.report()
                if report is not None:
                    console.print(f"{scorer.name}: {report}.", highlight=False, markup=False, soft_wrap=True)
            if shard.total > 1:
                write_summary(output / shard.name(SCORE_FILE), {**identity, "files": list_files(output, [own.name])})
            else:
                _join(config, source, output, shard, identity)
    if not join_shards(output, shard, SCORE_FILE, lambda: _join(config, source, output, shard, identity), console):
        return own
    print_summary(console, scored, read_summary(output / SCORE_FILE))
    return scored


def _identity(config: ScoreConfig, source: Path, scorers: Sequence[Scorer]) -> dict[str, Any]:
    """All settings that determine the rewards; runs with equal identities continue each other."""
    return {
        "input": digest_lines(source),
        "scorers": {
            scorer.name: {
                "kind": config.scorers[scorer.name]["kind"],
                "digest": scorer.digest(),
                "weight": read_weight(scorer.name, config.scorers[scorer.name]),
            }
            for scorer in scorers
        },
        "combine": config.combine,
        "missing": config.missing,
    }


# --------------------------------------------------------------------------------------------------- groups


def _score_groups(config: ScoreConfig, source: Path, scored: Path, scorers: Sequence[Scorer], shard: Shard) -> None:
    """Score the shard's groups that have no line yet.

    Raises:
        DataError: scores are missing and `missing = error`; all other groups are written first.
    """
    lacking: Counter[str] = Counter()
    first = ""
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(LineWriter(scored))  # drops an incomplete line, whose group is then scored again
        done = read_ids(scored)
        num_groups = sum(group_id not in done for group_id in _read_order(source)[shard.part :: shard.total])
        advance = stack.enter_context(show_progress("scoring", num_groups, "groups", "responses"))
        records = itertools.islice(read_answered(source), shard.part, None, shard.total)
        pending = (record for record in records if record["group_id"] not in done)
        while chunk := list(itertools.islice(pending, config.chunk_groups)):
            for record in chunk:
                _read_prompt(record, source)
            for record, missing in zip(chunk, _score_chunk(chunk, scorers), strict=True):
                if missing and config.missing == "error":
                    first = first or f"group {record['group_id']} from {', '.join(missing)}{_quote_notes(record)}"
                    lacking.update(missing.keys())
                    continue
                _drop_missing(record, missing, config)
                _combine(record, config)
                lines.write(record)
                advance(1, len(record["responses"]))
    if lacking:
        counts = ", ".join(f"{count} groups from {name}" for name, count in lacking.items())
        raise DataError(
            f"{source}: scores are missing: {counts}; the first: {first}. All other groups are kept: run the same command again "
            "to retry, or set missing = drop_response or drop_group (in a new output)."
        )


def _read_order(source: Path) -> list[str]:
    """Ids of the input's groups, in its order.

    Raises:
        DataError: two groups share an id.
    """
    order = [record["group_id"] for record in read_answered(source)]
    repeated = find_repeated(order)
    if repeated is not None:
        raise DataError(f"{source}: group {repeated} appears twice; give each group a unique id.")
    return order


def _read_prompt(record: Record, source: Path) -> None:
    """Convert a group line's prompt into messages: a text becomes a user message.

    Raises:
        DataError: the prompt is neither a text nor messages.
    """
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        record["prompt"] = [{"role": "user", "content": prompt}]
    elif (
        not isinstance(prompt, list)
        or not prompt
        or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in prompt)
    ):
        raise DataError(
            f"{source}: group {record['group_id']}: prompt is neither a text nor messages, "
            '[{"role": "user", "content": …}, …]; write one of them.'
        )


def _score_chunk(chunk: Sequence[Record], scorers: Sequence[Scorer]) -> list[Counter[str]]:
    """Add scores and notes to group lines; for each group, the number of missing scores by scorer."""
    missing: list[Counter[str]] = [Counter() for _ in chunk]
    for scorer in scorers:
        for record, gone, values in zip(chunk, missing, scorer.score(chunk), strict=True):
            for response, value in zip(record["responses"], values, strict=True):
                usable = is_reward(value)
                response.setdefault("scores", {})[scorer.name] = value if usable else None
                gone[scorer.name] += not usable
                if not usable and value is not None and math.isfinite(value):
                    scorer.note(record["group_id"], "too_large")
            notes = scorer.notes.pop(record["group_id"], None)
            if notes:
                record.setdefault("notes", {})[scorer.name] = dict(sorted(notes.items()))
    return [+counts for counts in missing]


def _quote_notes(record: Record) -> str:
    """A group's notes from its scorers, in brackets."""
    found = {name: [what for what in notes if what not in TOLD] for name, notes in record.get("notes", {}).items()}
    notes = "; ".join(f"{name}: {', '.join(what)}" for name, what in found.items() if what)
    return f" ({notes})" if notes else ""


def _drop_missing(record: Record, missing: Counter[str], config: ScoreConfig) -> None:
    """Remove responses without a score, or all of them, and count them."""
    if not missing:
        return
    record["missing"] = dict(missing)
    complete = [
        response for response in record["responses"] if all(response["scores"][name] is not None for name in config.scorers)
    ]
    record["responses"] = complete if config.missing == "drop_response" else []


def _combine(record: Record, config: ScoreConfig) -> None:
    """Add the reward to each response of a group.

    Raises:
        DataError: a reward is too large, because of the weights.
    """
    rewards = [0.0] * len(record["responses"])
    for name, options in config.scorers.items():
        values = [response["scores"][name] for response in record["responses"]]
        if config.combine == "zscore":
            values = standardize(values)
        rewards = [reward + read_weight(name, options) * value for reward, value in zip(rewards, values, strict=True)]
    for response, reward in zip(record["responses"], rewards, strict=True):
        if not is_reward(reward):
            raise DataError(
                f"group {record['group_id']}: the weighted sum of its scores is {reward:g}; a reward must be within "
                f"±{LARGEST_REWARD:g}; lower the weights."
            )
        response["reward"] = reward


def standardize(values: Sequence[float]) -> list[float]:
    """(x − mean) / population standard deviation; zeros if all are equal."""
    if not values or min(values) == max(values):
        return [0.0] * len(values)
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / deviation for value in values]


# --------------------------------------------------------------------------------------------------- completion


def _join(config: ScoreConfig, source: Path, output: Path, shard: Shard, identity: Mapping[str, Any]) -> None:
    """Write the lines in the input's order, without groups that lost all responses; then mark them complete."""
    sources = [output / name for name in shard.all_names(SCORED_FILE)]
    order = _read_order(source)
    records = itertools.chain.from_iterable(map(read_lines, sources))
    summary = summarize(records, replace(config, shard=None))
    if not summary["counts"].get("responses"):
        if not order:
            raise DataError(f"input = {source}: it holds no group; check the stage that wrote it.")
        notes = [f"{count} × {what} ({name})" for name, found in summary["notes"].items() for what, count in found.items()]
        missing = [f"{count} scores from {name} are missing" for name, count in summary["missing_scores"].items()]
        raise DataError(f"{sources[0]}: no response has a reward: {'; '.join([*missing, *notes]) or 'there are no responses'}.")
    summary = {"identity": dict(identity), **summary, "groups_read": len(order)}
    gone = {record["group_id"] for path in sources for record in read_lines(path) if not record["responses"]}
    join_lines(sources, output / SCORED_FILE, [group_id for group_id in order if group_id not in gone])
    write_summary(output / SCORE_FILE, {**summary, "files": list_files(output, [SCORED_FILE])})
