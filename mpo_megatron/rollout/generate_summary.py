"""What `mpo generate` counts in its lines: generate.json, and what it prints."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_megatron.config import GenerateConfig, to_dict
from mpo_megatron.files.digests import list_files
from mpo_megatron.rollout.prompts import PromptSet
from mpo_megatron.rollout.records import digest_lines, read_lines
from mpo_megatron.rollout.shards import Shard
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.counts import count_of
from mpo_megatron.terminal.visible import visible

REJECTED_FILE = "rejected.jsonl"


def summarize(samples: Path, prompts: PromptSet, identity: Mapping[str, Any], config: GenerateConfig) -> dict[str, Any]:
    """generate.json: counts come from the lines, so they do not depend on the number of resumptions."""
    counts, reasons, dropped, unusable = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    other_models = Counter[str]()
    uncontrolled = set[str]()
    for record in read_lines(samples):
        texts = [response["text"] for response in record["responses"]]
        counts["groups"] += 1
        counts["responses"] += len(texts)
        counts["tokens"] += sum(response["num_tokens"] for response in record["responses"])
        counts["empty"] += sum(not text.strip() for text in texts)
        counts["duplicates"] += len(texts) - len(set(texts))
        counts["groups_with_duplicates"] += len(set(texts)) < len(texts)
        counts["resampled"] += sum(response.get("attempt", 0) for response in record["responses"])
        reasons.update(response["finish_reason"] for response in record["responses"])
        counts["with_token_ids"] += sum("token_ids" in response for response in record["responses"])
        other_models.update(response["model"] for response in record["responses"] if "model" in response)
        uncontrolled.update(record.get("uncontrolled", ()))
        dropped.update(record.get("dropped", {}))
        unusable.update(record.get("unusable", {}))
    found = {"dropped": dict(dropped), "unusable": dict(unusable), "finish_reasons": dict(sorted(reasons.items()))}
    return {
        "identity": identity,
        "samples_digest": digest_lines(samples),
        "files": list_files(samples.parent, [samples.name]),
        "counts": {**counts, **found},
        "uncontrolled": sorted(uncontrolled),
        "other_models": dict(other_models),
        "prompts": dict(prompts.counts),
        "config": to_dict(config),
    }


def print_prompts(console: Console, config: GenerateConfig, prompts: PromptSet, shard: Shard) -> None:
    """Print how many prompts there are, and the first that was left out."""
    others = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in prompts.counts.items() if kind != "prompts")
    first = next(iter(prompts.rejections), None)
    console.print(
        f"{config.prompts}: {count_of(len(prompts.records), 'prompts')}"
        + (f"; left out: {others}; the first: {first.file}:{first.line}: {first.field} {first.reason}" if first else "")
        + (f"; see {Path(config.output) / REJECTED_FILE}" if first else "")
        + (f"; part {shard.part} of {shard.total}" if shard.total > 1 else "")
        + ".",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def print_summary(console: Console, samples: Path, summary: Mapping[str, Any]) -> None:
    """Print the counts of a finished generate.json, and what a user should check."""
    counts = summary["counts"]
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    size = f"{count_of(counts['groups'], 'groups')}, {count_of(counts['responses'], 'responses')}, {counts['tokens']:,} tokens"
    say(
        f"{samples}: {size} ({counts['finish_reasons'].get('length', 0):,} at the limit); {counts['empty']:,} empty and "
        f"{counts['duplicates']:,} duplicate responses kept, {sum(counts['dropped'].values()):,} dropped, "
        f"{counts['resampled']:,} redrawn."
    )
    if counts["unusable"]:
        say(f"unusable draws: {', '.join(f'{count:,} × {label}' for label, count in counts['unusable'].items())}.")
    if counts["with_token_ids"] < counts["responses"]:
        say(
            f"{counts['responses'] - counts['with_token_ids']:,} responses have no token ids: training uses their text, encoded "
            "again."
        )
    for name, count in summary.get("other_models", {}).items():
        say(f"WARNING: {count:,} responses come from the model {visible(name)}, not from endpoint.model.")
    if summary["uncontrolled"]:
        say(
            f"The server may have applied its own {', '.join(summary['uncontrolled'])}: it does not identify its kind, so these "
            "settings were not sent. Set endpoint.server, or check its defaults."
        )
