"""What a prepared data set looks like in numbers: `statistics` of `prepare.json`, and the table that `mpo prepare` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from mpo_megatron.data.group import Float64, Int64
from mpo_megatron.data.rewards import summarize_spacing
from mpo_megatron.data.store import PreparedInfo, StoredGroups

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
    duplicate_prompts: int = 0
    """Accepted groups whose prompt an earlier group has; kept."""
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
            "duplicate_prompts": self.duplicate_prompts,
            "outside_fraction": self.outside_fraction,
        }


def _cut(values: npt.NDArray[Any] | None, offsets: Int64) -> Iterator[npt.NDArray[Any]]:
    return iter(() if values is None else np.split(values, offsets[1:-1]))


def _describe(values: npt.NDArray[Any]) -> dict[str, float]:
    low, median, high, top = np.percentile(values, [0, 50, 95, 100])
    return {"min": float(low), "median": float(median), "mean": float(values.mean()), "p95": float(high), "max": float(top)}


def _lengths(values: Int64) -> dict[str, Any]:
    """Spread of token counts, and how many lie in (2^(n−1), 2^n]."""
    powers = Counter(int(2 ** np.ceil(np.log2(max(1, value)))) for value in values.tolist())
    return _describe(values) | {"histogram": {str(power): powers[power] for power in sorted(powers)}}


def compute_statistics(groups: StoredGroups) -> dict[str, Any]:
    """Histograms and spreads of stored groups; reads lengths, rewards, labels and response texts, no tokens."""
    sizes, offsets = Counter(groups.num_responses().tolist()), groups.response_offsets()
    rewards: list[Float64] = list(_cut(groups.all_rewards(), offsets))
    contrast = rewards or list(_cut(groups.all_labels(), offsets))
    texts = (groups.text(index)[1] for index in range(len(groups)))
    duplicates = [len(group) - len(set(group)) for group in texts]
    statistics: dict[str, Any] = {
        "num_responses": {str(size): sizes[size] for size in sorted(sizes)},
        "prompt_tokens": _lengths(groups.prompt_lengths()),
        "response_tokens": _lengths(groups.all_response_lengths()),
        "without_contrast": sum(bool((values == values[0]).all()) for values in contrast),
        "groups_with_duplicate_responses": sum(count > 0 for count in duplicates),
        "duplicate_responses": sum(duplicates),
    }
    if rewards:
        statistics["reward"] = _describe(np.concatenate(rewards))
        statistics["reward_spread"] = _describe(np.array([values.max() - values.min() for values in rewards]))
        statistics["reward_spacing"] = summarize_spacing(rewards)
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


def print_tally(console: Console, tally: Tally) -> None:
    """What did not come through, and why."""
    table = Table(title="On the way", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("rows read as groups", f"{tally.rows:,}")
    table.add_row("rejected", f"{tally.num_rejected:,}" + (", see rejected.jsonl" if tally.num_rejected else ""))
    for name, count in tally.rejected.most_common():
        table.add_row(f"  {name}", f"{count:,}, for example {tally.examples[name]}")
    for label, count in (
        ("over-long responses dropped", tally.overlong_dropped),
        ("over-long responses truncated", tally.overlong_truncated),
        ("groups with a prompt seen before", tally.duplicate_prompts),
        ("groups outside fraction", tally.outside_fraction),
    ):
        table.add_row(label, f"{count:,}")
    meaning = ": the model reads them as control tokens, not as text" if tally.special_tokens else ""
    table.add_row("groups with special tokens in their text", f"{tally.special_tokens:,}{meaning}")
    console.print(table)


def _spread(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {values[name]:.4g}" for name in ("min", "median", "mean", "max"))


def _histogram(counts: dict[str, int], prefix: str) -> str:
    largest, width = max(counts.values()), max(len(key) for key in counts)
    return "\n".join(
        f"{prefix} {key:>{width}} {count:>9,} {'█' * max(1, round(_BAR * count / largest))}" for key, count in counts.items()
    )
