"""`mpo select`: scored groups → the groups, responses and sets to train on.

    mpo select --input round/scored --output round/selected --sets top_bottom --min_spread 0.1

Groups pass one by one: optional noise on the rewards, the rules of `filters.py`, the spread, then the split into sets. Kept
responses keep their rewards. With sets, they get labels, so that `mpo train` with `partition: labels` trains on exactly these
sets. `select.json` counts everything dropped, by reason.

Legend: K responses of a group.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from mpo_megatron.config import SelectConfig, check_writable, require, to_dict
from mpo_megatron.data.arrays import Float64, Int8, Int64
from mpo_megatron.data.rewards import add_noise, summarize_spacing
from mpo_megatron.data.spill import Spill
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import AtomicFolder, is_free, writing
from mpo_megatron.files.digests import list_files
from mpo_megatron.files.partial import clear_leftovers
from mpo_megatron.losses import GroupBatch, PartitionParams, compute_partition
from mpo_megatron.rollout.filters import apply_rules
from mpo_megatron.rollout.records import (
    GROUPS_FILE,
    SCORE_FILE,
    SCORED_FILE,
    SELECT_FILE,
    Record,
    encode_line,
    find_lines,
    is_reward,
    read_answered,
    write_summary,
)
from mpo_megatron.rollout.spacing_plot import plot_spacing
from mpo_megatron.terminal.console import Console

PLOT_FILE = "reward_spacing.png"
_CHUNK = 512
"""Groups split together: the split works on a rectangle of rewards."""


REMEDIES = {
    "no_reward": "score the responses with `mpo score`, and read its warnings",
    "empty": "the model answers with white space only; check its chat template",
    "truncated": "answers ended at the token limit: raise max_tokens of `mpo generate`, or set truncated = keep",
    "repeating": "the engine stopped answers that repeat themselves; sample at another temperature, or set truncated = keep",
    "aborted": "the engine or server stopped early; generate again",
    "filtered": "the server's content filter cut answers; use other prompts, or another server",
    "too_short": "lower min_length",
    "too_long": "raise max_length",
    "unlike_length": "raise max_length_ratio",
    "duplicate": "answers are equal: raise the temperature of `mpo generate`, or set duplicates = keep",
    "too_few_responses": "generate more responses to a prompt (num_responses), or lower min_responses",
    "small_spread": "the rewards of a group are too similar: lower min_spread, or use a scorer that tells answers apart",
    "no_contrast": "all rewards of a group are equal; use a scorer that tells answers apart, or sets = all",
}
"""What to do if a rule drops everything."""


class NothingLeftError(DataError):
    """No group met the rules."""


@dataclass(kw_only=True)
class Selection:
    """Kept and dropped groups and responses, counted."""

    groups_read: int = 0
    responses_read: int = 0
    dropped_groups: Counter[str] = field(default_factory=Counter)
    """Number of dropped groups, by reason."""
    dropped_responses: Counter[str] = field(default_factory=Counter)
    """By reason, including `with_its_group`, so that the counts add up."""
    examples: dict[str, str] = field(default_factory=dict)
    """By reason, the first group dropped for it."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    """Number of responses of each kept group."""
    rewards: array[float] = field(default_factory=lambda: array("d"))
    """Rewards of all kept groups, one after the other."""
    labels: array[int] = field(default_factory=lambda: array("b"))
    """Their labels; empty without sets."""
    characters: Counter[int] = field(default_factory=Counter)
    """Characters of all kept responses, by label."""

    def drop_group(self, record: Record, reason: str) -> None:
        """Count a dropped group, with its remaining responses."""
        self.dropped_groups[reason] += 1
        self.dropped_responses["with_its_group"] += len(record["responses"])
        self.examples.setdefault(reason, str(record.get("group_id", "")))


def select(config: SelectConfig, console: Console | None = None) -> dict[str, Any]:
    """Write the selected groups to `config.output` and print a summary; returns the content of `select.json`.

    Raises:
        ConfigError: the output cannot be written.
        NothingLeftError: no group met the rules.
        DataError: the input is missing or incomplete, or a line is no scored group.
    """
    source, output = find_lines(config.input, SCORED_FILE, SCORE_FILE), Path(config.output.rstrip("/"))
    check_writable(output, "output")
    clear_leftovers(output.resolve())  # even if the output is refused because it is complete
    require(is_free(output), f"output = {output}; exists and is not an empty folder; remove it, or choose another output.")
    selection, digest = Selection(), hashlib.sha256()
    with AtomicFolder(output) as partial, writing(output):
        with (partial.path / GROUPS_FILE).open("wb") as lines:
            for record in split_groups(filter_groups(read_groups(source), config, selection), config, selection):
                line = encode_line(record)
                digest.update(line)
                lines.write(line)
        if not selection.sizes:
            raise NothingLeftError(explain_nothing_left(source, selection))
        files = list_files(partial.path, [GROUPS_FILE])
        info = {"config": to_dict(config), "groups_digest": digest.hexdigest(), "files": files, **summarize(selection)}
        write_summary(partial.path / SELECT_FILE, info)
        plot_spacing(*_as_arrays(selection), partial.path / PLOT_FILE)
        partial.commit()
    print_selection(console or Console(), output, info)
    return info


def read_groups(path: Path) -> Iterator[Record]:
    """The groups of a file.

    Raises:
        DataError: a line is damaged or no group, or a group appears twice.
    """
    seen = Spill()
    for record in read_answered(path):
        if seen.first_place(record["group_id"], "") is not None:
            raise DataError(f"{path}: group {record['group_id']} appears twice; give each group a unique id.")
        yield record


def filter_groups(records: Iterable[Record], config: SelectConfig, selection: Selection) -> Iterator[Record]:
    """The kept groups, with the responses that pass all rules.

    Raises:
        DataError: a response lacks what a rule needs; names the group.
    """
    for record in records:
        selection.groups_read += 1
        selection.responses_read += len(record["responses"])
        if config.reward_noise > 0:
            record = {**record, "responses": disturb(record, config)}
        try:
            responses, dropped = apply_rules(record["responses"], config)
        except DataError as error:
            raise DataError(f"{config.input}: group {record['group_id']}: {error}") from error
        selection.dropped_responses.update(dropped)
        for reason in dropped:
            selection.examples.setdefault(reason, record["group_id"])
        record = {**record, "responses": responses}
        rewards = [response["reward"] for response in responses]
        if len(responses) < config.min_responses:
            selection.drop_group(record, "too_few_responses")
        elif max(rewards) - min(rewards) < config.min_spread:
            selection.drop_group(record, "small_spread")
        else:
            yield record


def disturb(record: Record, config: SelectConfig) -> list[Record]:
    """The responses with noise on their rewards, each beside its original reward.

    The noise depends on group and position only, not on other groups or missing rewards.
    """
    responses = record["responses"]
    noise = add_noise(np.zeros(len(responses)), config.reward_noise, record["group_id"], seed=config.seed)
    return [
        {**response, "reward": response["reward"] + float(shift), "reward_before_noise": response["reward"]}
        if is_reward(response.get("reward"))
        else response
        for response, shift in zip(responses, noise, strict=True)
    ]


def split_groups(records: Iterable[Record], config: SelectConfig, selection: Selection) -> Iterator[Record]:
    """The groups with labels 1 and 0 as `config.sets` splits them, without responses in neither set."""
    records = iter(records)
    while chunk := list(itertools.islice(records, _CHUNK)):
        for record, labels in zip(chunk, label_groups(chunk, config), strict=True):
            if labels is not None:
                pairs = zip(record["responses"], labels, strict=True)
                kept = [{**response, "label": label} for response, label in pairs if label >= 0]
                if not kept:
                    selection.drop_group(record, "no_contrast")
                    continue
                selection.dropped_responses["in_neither_set"] += len(labels) - len(kept)
                selection.labels.extend(response["label"] for response in kept)
                for response in kept:
                    selection.characters[response["label"]] += len(response["text"])
                record = {**record, "responses": kept}
            selection.sizes.append(len(record["responses"]))
            selection.rewards.extend(response["reward"] for response in record["responses"])
            yield record


def label_groups(records: Sequence[Record], config: SelectConfig) -> list[list[int] | None]:
    """For each group, 1 for Y+, 0 for Y− and −1 for neither, by the rule that training uses; None if sets = all."""
    if config.sets == "all":
        return [None] * len(records)
    sizes = [len(record["responses"]) for record in records]
    rewards, valid = torch.zeros(len(records), max(sizes), dtype=torch.float64), torch.zeros(len(records), max(sizes)).bool()
    for index, (record, size) in enumerate(zip(records, sizes, strict=True)):
        rewards[index, :size] = torch.tensor([response["reward"] for response in record["responses"]], dtype=torch.float64)
        valid[index, :size] = True
    batch = GroupBatch(policy_logps=torch.zeros_like(rewards), rewards=rewards, valid=valid)
    positive, negative = compute_partition(batch, build_partition(config))
    labels = torch.where(positive, 1, torch.where(negative, 0, -1)).tolist()
    return [row[:size] for row, size in zip(labels, sizes, strict=True)]


def build_partition(config: SelectConfig) -> PartitionParams:
    """The loss's hyper-parameters for these sets."""
    if config.sets == "best_worst":
        return PartitionParams(partition="top_bottom", num_top=1, num_bottom=1)
    if config.sets == "top_bottom":
        return PartitionParams(partition="top_bottom", num_top=config.num_top, num_bottom=config.num_bottom)
    assert config.sets != "all"
    return PartitionParams(partition=config.sets)


# --------------------------------------------------------------------------------------------------- summary


def summarize(selection: Selection) -> dict[str, Any]:
    """Counts and statistics of kept groups; rewards in their own unit, lengths in characters."""
    rewards, sizes, labels = _as_arrays(selection)
    starts = np.cumsum(sizes) - sizes
    spreads = np.maximum.reduceat(rewards, starts) - np.minimum.reduceat(rewards, starts)
    summary: dict[str, Any] = {
        "groups_read": selection.groups_read,
        "groups_written": len(sizes),
        "responses_read": selection.responses_read,
        "responses_written": len(rewards),
        "dropped_groups": dict(sorted(selection.dropped_groups.items())),
        "dropped_responses": {name: count for name, count in sorted(selection.dropped_responses.items()) if count},
        "examples": selection.examples,
        "num_responses": {str(size): count for size, count in sorted(Counter(selection.sizes).items())},
        "reward": describe(rewards),
        "reward_spread": describe(spreads),
        "reward_spacing": summarize_spacing(rewards, sizes),
        "without_contrast": int((spreads == 0).sum()),
    }
    if len(labels):
        summary["sets"] = {
            name: {
                "responses": int((labels == label).sum()),
                "mean_reward": float(rewards[labels == label].mean()),
                "mean_characters": selection.characters[label] / int((labels == label).sum()),
            }
            for name, label in (("positive", 1), ("negative", 0))
        }
    return summary


def _as_arrays(selection: Selection) -> tuple[Float64, Int64, Int8]:
    """Rewards [ΣK], sizes [G] and labels [ΣK] of the kept groups; labels are empty without sets."""
    return np.array(selection.rewards, np.float64), np.array(selection.sizes, np.int64), np.array(selection.labels, np.int8)


def describe(values: Float64) -> dict[str, float]:
    """Mean, spread and extremes of numbers."""
    low, median, high = np.percentile(values, [0, 50, 100])
    return {
        "min": float(low),
        "median": float(median),
        "mean": float(values.mean()),
        "max": float(high),
        "std": float(values.std()),
    }


def explain_nothing_left(source: Path, selection: Selection) -> str:
    """The error message: why no group is left."""
    if not selection.groups_read:
        return f"{source}: holds no group; did `mpo score` write it?"
    reasons = selection.dropped_groups + selection.dropped_responses
    listed = "; ".join(f"{count} × {name}" for name, count in reasons.most_common())
    causes = [name for name, _ in reasons.most_common() if name in REMEDIES] or ["no_reward"]
    return f"{source}: none of {selection.groups_read} groups is left ({listed}). {causes[0]}: {REMEDIES[causes[0]]}."


def print_selection(console: Console, output: Path, info: dict[str, Any]) -> None:
    """The summary as a table."""
    table = Table(title=escape(str(output)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name in ("groups", "responses"):
        table.add_row(name, f"{info[f'{name}_written']:,} of {info[f'{name}_read']:,}")
        for reason, count in info[f"dropped_{name}"].items():
            example = f", for example group {escape(info['examples'][reason])}" if reason in info["examples"] else ""
            table.add_row(f"  {reason}", f"{count:,}{example}")
    table.add_row("responses per group", ", ".join(f"K = {size}: {count:,}" for size, count in info["num_responses"].items()))
    reward, gaps = info["reward"], info["reward_spacing"]
    table.add_row("reward", ", ".join(f"{name} {value:.4g}" for name, value in reward.items()))
    table.add_row("gap between neighbouring rewards", f"mean {gaps['mean']:.4g}, {gaps['tied_share']:.1%} tied")
    table.add_row("groups without contrast", f"{info['without_contrast']:,}")
    for name, values in info.get("sets", {}).items():
        numbers = f"{values['responses']:,} responses, mean reward {values['mean_reward']:.4g}"
        table.add_row(f"{name} set", f"{numbers}, {values['mean_characters']:.0f} characters")
    console.print(table)
