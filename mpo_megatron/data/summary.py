"""Statistics of a prepared data set: `statistics` of `prepare.json`, and the table that `mpo prepare` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.rewards import summarize_spacing
from mpo_megatron.data.store import PreparedInfo, StoredGroups
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.counts import count_of
from mpo_megatron.terminal.visible import visible

_BAR = 24
"""Width of a histogram's longest bar, in characters."""


@dataclass(kw_only=True)
class Tally:
    """Counts of rows and responses by outcome."""

    rows: int = 0
    """Groups offered: accepted and rejected."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejections by field."""
    examples: dict[str, str] = field(default_factory=dict)
    """By field, the first rejection as text."""
    overlong_dropped: int = 0
    """Responses dropped because of their length."""
    overlong_truncated: int = 0
    """Truncated responses."""
    special_tokens: int = 0
    """Accepted groups whose texts spell out special tokens; kept, and encoded as these tokens."""
    templated_prompts: int = 0
    """Accepted groups whose prompt looks already templated."""
    repeated_thoughts: int = 0
    """Responses that opened a thought already opened by the prompt; the second opening was dropped."""
    open_thoughts: int = 0
    """Responses that never close the thought that the prompt opens; kept."""
    without_lead: int = 0
    """Responses without the template's text before an answer's words (an empty thought); kept unchanged."""
    rewritten_turns: int = 0
    """Responses of several turns whose earlier turns the template later renders differently; kept as generated."""
    labels_against_rewards: int = 0
    """Groups in which a chosen response has a lower reward than a rejected one; kept; rewards decide in most losses."""
    drawn_responses: int = 0
    """Responses trained on by the token ids that came with them, as sampled."""
    drawn_otherwise: int = 0
    """Of these, responses whose text would be encoded to other tokens."""
    drawn_of_another_text: int = 0
    """Responses whose token ids do not decode to their text; the text was encoded."""
    sampled_otherwise: int = 0
    """Groups whose responses were sampled with another prompt."""
    checked: int = 0
    """Groups compared with plain `apply_chat_template`."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Unusable responses, by field."""
    unused: Counter[str] = field(default_factory=Counter)
    """Unused columns and keys, with their number of rows."""
    not_written: Counter[str] = field(default_factory=Counter)
    """Parts of prompts that the chat template omits, with their number of groups."""
    notes: list[str] = field(default_factory=list)
    """Further notes for the user on how the input was read."""
    duplicate_prompts: int = 0
    """Accepted groups with the prompt of an earlier group; kept."""
    outside_weights: int = 0
    """Accepted groups dropped by `weights`."""
    outside_fraction: int = 0
    """Accepted groups dropped by `fraction`."""

    @property
    def num_rejected(self) -> int:
        """Rejected rows."""
        return sum(self.rejected.values())

    def as_dict(self) -> dict[str, Any]:
        """For `prepare.json`."""
        return {
            "rows": self.rows,
            "rejected": self.num_rejected,
            "rejected_by_field": dict(sorted(self.rejected.items())),
            "overlong_dropped": self.overlong_dropped,
            "overlong_truncated": self.overlong_truncated,
            "special_tokens": self.special_tokens,
            "templated_prompts": self.templated_prompts,
            "repeated_thoughts": self.repeated_thoughts,
            "open_thoughts": self.open_thoughts,
            "without_lead": self.without_lead,
            "rewritten_turns": self.rewritten_turns,
            "labels_against_rewards": self.labels_against_rewards,
            "drawn_responses": self.drawn_responses,
            "drawn_otherwise": self.drawn_otherwise,
            "drawn_of_another_text": self.drawn_of_another_text,
            "sampled_otherwise": self.sampled_otherwise,
            "checked": self.checked,
            "unusable_responses_by_field": dict(sorted(self.dropped.items())),
            "unused_columns": dict(sorted(self.unused.items())),
            "not_written_by_template": dict(sorted(self.not_written.items())),
            "notes": self.notes,
            "duplicate_prompts": self.duplicate_prompts,
            "outside_weights": self.outside_weights,
            "outside_fraction": self.outside_fraction,
        }


def _describe(values: npt.NDArray[Any]) -> dict[str, float]:
    low, median, high, top = np.percentile(values, [0, 50, 95, 100])
    return {"min": float(low), "median": float(median), "mean": float(values.mean()), "p95": float(high), "max": float(top)}


def _lengths(values: Int64) -> dict[str, Any]:
    """Spread of token counts, and a histogram over (2^(n−1), 2^n]."""
    powers, counts = np.unique(np.ceil(np.log2(np.maximum(values, 1))).astype(np.int64), return_counts=True)
    histogram = {str(2 ** int(power)): int(count) for power, count in zip(powers, counts, strict=True)}
    return _describe(values) | {"histogram": histogram}


def compute_statistics(groups: StoredGroups) -> dict[str, Any]:
    """Histograms and spreads of stored groups; reads lengths, rewards, labels and response texts, but no tokens."""
    sizes, counts = np.unique(groups.num_responses(), return_counts=True)
    starts = groups.response_offsets()[:-1]
    rewards = groups.all_rewards()
    contrast = rewards if rewards is not None else groups.all_labels()
    assert contrast is not None  # every group has rewards or labels
    spreads = np.maximum.reduceat(contrast, starts) - np.minimum.reduceat(contrast, starts)
    repeated = groups.num_repeated_texts()
    statistics: dict[str, Any] = {
        "num_responses": {str(size): int(count) for size, count in zip(sizes, counts, strict=True)},
        "prompt_tokens": _lengths(groups.prompt_lengths()),
        "response_tokens": _lengths(groups.all_response_lengths()),
        "without_contrast": int((spreads == 0).sum()),
        "groups_with_duplicate_responses": int((repeated > 0).sum()),
        "duplicate_responses": int(repeated.sum()),
    }
    if rewards is not None:
        statistics["reward"] = _describe(rewards)
        statistics["reward_spread"] = _describe(spreads)
        statistics["reward_spacing"] = summarize_spacing(rewards, groups.num_responses())
    return statistics


# --------------------------------------------------------------------------------------------------- printing


def print_summary(console: Console, title: str, info: PreparedInfo) -> None:
    """Print one data set as a table."""
    stats = info.statistics
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("groups", f"{info.num_groups:,}, {info.num_responses:,} responses")
    table.add_row("responses per group", _histogram(stats["num_responses"], "K ="))
    table.add_row("tokens", f"{info.num_prompt_tokens:,} in prompts, {info.num_response_tokens:,} in responses")
    for name in ("prompt", "response"):
        lengths = stats[f"{name}_tokens"]
        spread = ", ".join(f"{key} {lengths[key]:,.0f}" for key in ("min", "median", "p95", "max"))
        table.add_row(f"tokens per {name}", f"{spread}\n{_histogram(lengths['histogram'], '≤')}")
    if "reward" in stats:
        table.add_row(f"reward ({info.reward_kind})", _spread(stats["reward"]))
        table.add_row("reward spread in a group", _spread(stats["reward_spread"]))
        gaps = stats["reward_spacing"]
        table.add_row("gap between neighbouring rewards", f"mean {gaps['mean']:.4g}, {gaps['tied_share']:.1%} tied")
    else:
        table.add_row("reward", "none; labels only (chosen, rejected)")
    without, equal = stats["without_contrast"], stats["groups_with_duplicate_responses"]
    meaning = f" ({without / info.num_groups:.1%}): kept, but nothing to learn from" if without else ""
    table.add_row("groups without contrast", f"{without:,}{meaning}")
    meaning = f" ({stats['duplicate_responses']:,} repeated texts): kept" if equal else ""
    table.add_row("groups with equal responses", f"{equal:,}{meaning}")
    console.print(table)


_SEAMS = {
    "repeated_thoughts": "thoughts opened by both prompt and response",
    "open_thoughts": "responses that do not end the prompt's thought",
    "without_lead": "responses without the template's empty thought",
    "rewritten_turns": "responses whose earlier turns the template later renders differently",
}
"""Table rows that are shown only if their count is positive."""


def print_tally(console: Console, tally: Tally) -> None:
    """Print what was rejected, dropped or changed, and why."""
    table = Table(title="Reading the input", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("rows read as groups", f"{tally.rows:,}")
    table.add_row("rejected", f"{tally.num_rejected:,}" + (", see rejected.jsonl" if tally.num_rejected else ""))
    for name, count in tally.rejected.most_common():
        table.add_row(f"  {name}", Text(visible(f"{count:,}, for example {tally.examples[name]}")))
    for label, count in (
        ("over-long responses dropped", tally.overlong_dropped),
        ("over-long responses truncated", tally.overlong_truncated),
        ("groups with a prompt seen before", tally.duplicate_prompts),
        ("groups outside fraction", tally.outside_fraction),
        ("groups outside weights", tally.outside_weights),
    ):
        if count:
            table.add_row(label, f"{count:,}")
    if tally.special_tokens:
        meaning = "encoded as control tokens, not as text"
        table.add_row("groups with special tokens in their text", f"{tally.special_tokens:,}: {meaning}")
    for name, count in tally.dropped.most_common():
        example = tally.examples.get(f"dropped {name}", "")
        table.add_row("unusable responses dropped", Text(visible(f"{count:,} × {name}, for example {example}")))
    for name, meaning in _SEAMS.items():
        if count := getattr(tally, name):
            table.add_row(meaning, Text(f"{count:,}, for example {tally.examples.get(name, '')}"))
    if tally.drawn_responses:
        share = f"{tally.drawn_otherwise / tally.drawn_responses:.2%} would be encoded to other tokens"
        table.add_row("responses trained on as sampled", f"{tally.drawn_responses:,}; {share}")
    if tally.drawn_of_another_text:
        example = tally.examples.get("drawn_of_another_text", "")
        told = f"{tally.drawn_of_another_text:,}: their text was encoded, for example {example}"
        table.add_row("responses with token ids of another text", Text(told, style="yellow"))
    for name, count in tally.not_written.most_common():
        table.add_row("omitted by the chat template", Text(visible(f"{name}: {count_of(count, 'groups')}"), style="yellow"))
    for name, count in tally.unused.most_common():
        table.add_row("column or key not used", Text(visible(f"{name}: {count_of(count, 'rows')}"), style="yellow"))
    if tally.checked:
        table.add_row("groups equal to apply_chat_template", f"{tally.checked:,} compared")
    console.print(table)
    for note in tally.notes:
        console.print(Text(note, style="yellow"))
    for warning in _warnings(tally):
        console.print(Text(visible(f"WARNING: {warning}"), style="bold red"))


def _warnings(tally: Tally) -> Iterator[str]:
    """What a user should look at before training."""
    if 2 * tally.num_rejected >= tally.rows:
        rejected = tally.num_rejected / max(1, tally.rows)
        yield f"{rejected:.0%} of the rows were rejected; rejected.jsonl has the reason for each."
    if tally.labels_against_rewards:
        yield (
            f"in {count_of(tally.labels_against_rewards, 'groups')} a chosen response has a lower reward than a rejected one, "
            f"for example {tally.examples.get('labels_against_rewards', '')}. Rewards decide, except with partition = labels. If "
            "lower is better in this column, negate it."
        )
    if tally.sampled_otherwise:
        yield (
            f"the responses of {count_of(tally.sampled_otherwise, 'groups')} were sampled with another prompt than the one "
            f"prepared here, or with another tokenizer: for example {tally.examples.get('sampled_otherwise', '')}."
        )
    if tally.templated_prompts:
        yield (
            f"{tally.templated_prompts:,} prompts look as if a chat template had already been applied, and it was applied again: "
            f"for example {tally.examples.get('templated_prompts', '')}. If so, set prompt_format to templated."
        )


def _spread(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in ("min", "median", "mean", "max"))


def _histogram(counts: dict[str, int], prefix: str) -> str:
    largest, width = max(counts.values()), max(len(key) for key in counts)
    return "\n".join(
        f"{prefix} {key:>{width}} {count:>9,} {'█' * max(1, round(_BAR * count / largest))}" for key, count in counts.items()
    )
