"""What a prepared data set looks like in numbers: `statistics` of `prepare.json`, and the table that `mpo prepare` prints."""

from __future__ import annotations

from collections import Counter
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
from mpo_megatron.terminal.visible import visible

_BAR = 24
"""Width of a histogram's longest bar, in characters."""


@dataclass(kw_only=True)
class Tally:
    """What happened to the rows on the way; counted while they pass."""

    rows: int = 0
    """Groups offered: accepted and rejected."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Rejections by field."""
    examples: dict[str, str] = field(default_factory=dict)
    """By field, the first rejection in words."""
    overlong_dropped: int = 0
    """Responses that left their group for their length."""
    overlong_truncated: int = 0
    """Responses that were cut."""
    special_tokens: int = 0
    """Accepted groups whose texts write out special tokens; kept, and read as these tokens."""
    templated_prompts: int = 0
    """Accepted groups whose prompt looks as if a chat template had been applied to it before."""
    repeated_thoughts: int = 0
    """Responses that opened a thought which the prompt opens already; the second opening was left out."""
    open_thoughts: int = 0
    """Responses that never close the thought which the prompt opens; kept."""
    without_lead: int = 0
    """Responses without what the template writes before an answer's words (an empty thought); kept unchanged."""
    rewritten_turns: int = 0
    """Responses of several turns whose earlier turns the template shows otherwise later; kept as they were generated."""
    labels_against_rewards: int = 0
    """Groups in which a chosen response has a lower reward than a rejected one; kept; rewards decide in most losses."""
    drawn_responses: int = 0
    """Responses whose token ids came with them, and are trained on as they were drawn."""
    drawn_otherwise: int = 0
    """Of these, responses whose text encoded again gives other tokens."""
    drawn_of_another_text: int = 0
    """Responses whose token ids the tokenizer does not decode to their text; the text was encoded."""
    checked: int = 0
    """Groups compared with plain `apply_chat_template`."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Responses that left their group because they could not be used, by field."""
    unused: Counter[str] = field(default_factory=Counter)
    """Columns and keys that no group is made of, with the number of rows that have them."""
    not_written: Counter[str] = field(default_factory=Counter)
    """Parts of prompts that the chat template does not show, with the number of groups that have them."""
    notes: list[str] = field(default_factory=list)
    """What else the user should know of how the input was read."""
    duplicate_prompts: int = 0
    """Accepted groups whose prompt an earlier group has; kept."""
    outside_weights: int = 0
    """Accepted groups that `weights` left out."""
    outside_fraction: int = 0
    """Accepted groups that `fraction` left out."""

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
    """Spread of token counts, and how many lie in (2^(n−1), 2^n]."""
    powers, counts = np.unique(np.ceil(np.log2(np.maximum(values, 1))).astype(np.int64), return_counts=True)
    histogram = {str(2 ** int(power)): int(count) for power, count in zip(powers, counts, strict=True)}
    return _describe(values) | {"histogram": histogram}


def compute_statistics(groups: StoredGroups) -> dict[str, Any]:
    """Histograms and spreads of stored groups; reads lengths, rewards, labels and response texts, no tokens."""
    sizes, counts = np.unique(groups.num_responses(), return_counts=True)
    starts = groups.response_offsets()[:-1]
    rewards = groups.all_rewards()
    contrast = rewards if rewards is not None else groups.all_labels()
    assert contrast is not None  # every group has rewards or labels
    spreads = np.maximum.reduceat(contrast, starts) - np.minimum.reduceat(contrast, starts)
    repeated, with_repeated = 0, 0
    for index in range(len(groups)):
        texts = groups.text(index)[1]
        count = len(texts) - len(set(texts))
        repeated, with_repeated = repeated + count, with_repeated + (count > 0)
    statistics: dict[str, Any] = {
        "num_responses": {str(size): int(count) for size, count in zip(sizes, counts, strict=True)},
        "prompt_tokens": _lengths(groups.prompt_lengths()),
        "response_tokens": _lengths(groups.all_response_lengths()),
        "without_contrast": int((spreads == 0).sum()),
        "groups_with_duplicate_responses": with_repeated,
        "duplicate_responses": repeated,
    }
    if rewards is not None:
        statistics["reward"] = _describe(rewards)
        statistics["reward_spread"] = _describe(spreads)
        statistics["reward_spacing"] = summarize_spacing(np.split(rewards, starts[1:]))
    return statistics


# --------------------------------------------------------------------------------------------------- printing


def print_summary(console: Console, title: str, info: PreparedInfo) -> None:
    """One data set as a table."""
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
        table.add_row("gap of neighbouring rewards", f"mean {gaps['mean']:.4g}, {gaps['tied_share']:.1%} tied")
    else:
        table.add_row("reward", "none; labels only (chosen, rejected)")
    share = stats["without_contrast"] / info.num_groups
    table.add_row("groups without contrast", f"{stats['without_contrast']:,} ({share:.1%}): kept, nothing to learn from")
    table.add_row(
        "groups with equal responses",
        f"{stats['groups_with_duplicate_responses']:,} ({stats['duplicate_responses']:,} repeated texts): kept",
    )
    console.print(table)


_SEAMS = {
    "repeated_thoughts": "thoughts opened by prompt and response",
    "open_thoughts": "responses that do not end the prompt's thought",
    "without_lead": "responses without the template's empty thought",
    "rewritten_turns": "responses whose earlier turns the template shows otherwise",
}
"""Rows of the table that are shown where they count something."""


def print_tally(console: Console, tally: Tally) -> None:
    """What did not come through, and why."""
    table = Table(title="On the way", title_justify="left", show_header=False)
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
    ):
        table.add_row(label, f"{count:,}")
    if tally.outside_weights:
        table.add_row("groups outside weights", f"{tally.outside_weights:,}")
    meaning = ": the model reads them as control tokens, not as text" if tally.special_tokens else ""
    table.add_row("groups with special tokens in their text", f"{tally.special_tokens:,}{meaning}")
    for name, count in tally.dropped.most_common():
        example = tally.examples.get(f"dropped {name}", "")
        table.add_row("unusable responses left out", Text(visible(f"{count:,} × {name}, for example {example}")))
    for name, meaning in _SEAMS.items():
        if count := getattr(tally, name):
            table.add_row(meaning, Text(f"{count:,}, for example {tally.examples.get(name, '')}"))
    if tally.drawn_responses:
        share = f"{tally.drawn_otherwise / tally.drawn_responses:.2%} would be encoded to other tokens"
        table.add_row("responses trained on as drawn", f"{tally.drawn_responses:,}; {share}")
    if tally.drawn_of_another_text:
        example = tally.examples.get("drawn_of_another_text", "")
        told = f"{tally.drawn_of_another_text:,}: their text was encoded, for example {example}"
        table.add_row("responses with token ids of another text", Text(told, style="yellow"))
    for name, count in tally.not_written.most_common():
        table.add_row("not shown by the chat template", Text(visible(f"{name}: {count:,} groups"), style="yellow"))
    for name, count in tally.unused.most_common():
        table.add_row("column or key not used", Text(visible(f"{name}: {count:,} rows"), style="yellow"))
    if tally.checked:
        table.add_row("groups equal to apply_chat_template", f"{tally.checked:,} compared")
    console.print(table)
    for note in tally.notes:
        console.print(Text(note, style="yellow"))
    if 2 * tally.num_rejected >= tally.rows:
        share = tally.num_rejected / max(1, tally.rows)
        text = f"WARNING: {share:.0%} of the rows were rejected; rejected.jsonl has the reason for each."
        console.print(Text(text, style="bold red"))
    if tally.labels_against_rewards:
        text = (
            f"WARNING: in {tally.labels_against_rewards:,} groups a chosen response has a lower reward than a rejected one, for "
            f"example {tally.examples.get('labels_against_rewards', '')}. Rewards decide, except with partition = labels. If "
            "lower is better in this column, negate it."
        )
        console.print(Text(visible(text), style="bold red"))
    if tally.templated_prompts:
        console.print(
            Text(
                f"WARNING: {tally.templated_prompts:,} prompts look as if a chat template had been applied to them already, and "
                f"it was applied again: for example {tally.examples.get('templated_prompts', '')}. If so, set prompt_format to "
                "templated.",
                style="bold red",
            )
        )


def _spread(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in ("min", "median", "mean", "max"))


def _histogram(counts: dict[str, int], prefix: str) -> str:
    largest, width = max(counts.values()), max(len(key) for key in counts)
    return "\n".join(
        f"{prefix} {key:>{width}} {count:>9,} {'█' * max(1, round(_BAR * count / largest))}" for key, count in counts.items()
    )
