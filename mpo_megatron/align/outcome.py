"""The result of aligning: held-out numbers of the last evaluation, lengths, and answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mpo_megatron.align.plan import Stages
from mpo_megatron.data.store import read_info
from mpo_megatron.rollout.records import GENERATE_FILE, SAMPLES_FILE, Record, find_lines, read_lines, read_summary
from mpo_megatron.rollout.round_report import REPORT_FILE, read_metrics
from mpo_megatron.terminal.console import Console
from mpo_megatron.terminal.next_command import NextCommand, describe_next
from mpo_megatron.terminal.visible import visible

OUTCOME_FILE = "align.md"
SHOWN = 400
"""Maximum characters of a text in the table of answers."""


@dataclass(frozen=True, kw_only=True)
class BothAnswers:
    """One prompt, and both models' answers."""

    prompt: str
    before: str
    after: str
    tokens: tuple[int, int]
    """Tokens of the two answers."""


@dataclass(frozen=True, kw_only=True)
class AlignOutcome:
    """The final report of `mpo align`."""

    numbers: tuple[tuple[str, str, str], ...]
    """Rows of a table: quantity, before, after."""
    pairs: tuple[BothAnswers, ...]

    def as_markdown(self) -> str:
        """The report as Markdown."""
        lines = ["| held-out groups | before | after |", "|---|---|---|"]
        lines += [f"| {name} | {before} | {after} |" for name, before, after in self.numbers]
        for pair in self.pairs:
            for title, text in (("Prompt", pair.prompt), ("Before", pair.before), ("After", pair.after)):
                lines += ["", f"**{title}**", "", *(f"> {line}" for line in visible(text, lines=True).splitlines() or [""])]
            lines += ["", "---"]
        return "\n".join(lines) + "\n"


def describe_outcome(stages: Stages, num_answers: int) -> AlignOutcome:
    """Build the report from the stages' output."""
    pairs = read_pairs(Path(stages.before.output), Path(stages.after.output)) if num_answers else []
    measured = f"{read_info(stages.folder / 'groups-eval').num_groups:,}"  # so that a few are not taken for many
    numbers = [("groups", measured, measured)]
    numbers += [*read_numbers(stages.folder / "run" / "metrics.jsonl"), *compare_lengths(pairs)]
    return AlignOutcome(numbers=tuple(numbers), pairs=tuple(pairs))


def describe_rounds(rounds: Path, number: int, num_answers: int) -> AlignOutcome:
    """Build the report from the output of `mpo iterate`: the first policy beside the last.

    Args:
        rounds: folder of `mpo iterate`
        number: number of rounds
    """
    reports = read_summary(rounds / REPORT_FILE)["rounds"]
    first, last = reports[0]["before"], reports[-1]["after"]
    pairs = read_pairs(*(rounds / "policies" / f"{policy:02d}" / "samples" for policy in (0, number)))
    before, after = (f"{side['reward']:.4g} ± {side['error']:.2g}" for side in (first, last))
    reward = ("reward per answer, mean ± error", before, after)
    return AlignOutcome(numbers=(reward, *compare_lengths(pairs)), pairs=tuple(pairs[:num_answers]))


def read_numbers(metrics: Path) -> list[tuple[str, str, str]]:
    """Accuracy and margin of the last evaluation; before training, π = π_ref by definition. Without a reference, the loss.

    Raises:
        DamagedError: a line differs from what was written.
    """
    evaluated = [row for row in read_metrics(metrics) if "eval/loss" in row]
    if not evaluated:
        return []
    if "eval/accuracy" not in evaluated[-1]:
        before, after = (f"{row['eval/loss']:.4g}" for row in (evaluated[0], evaluated[-1]))
        return [("loss of held-out groups", before, after)]
    last, found = evaluated[-1], list[tuple[str, str, str]]()
    found.append(("preferred responses ranked above others by log π/π_ref", "50 % by definition", f"{last['eval/accuracy']:.1%}"))
    for name, words in (
        ("eval/margin", "margin of log π/π_ref, nats"),
        ("eval/chosen_log_ratio", "log π/π_ref of preferred responses, nats"),
        ("eval/rejected_log_ratio", "log π/π_ref of other responses, nats"),
    ):
        if name in last:
            found.append((words, "0 by definition", f"{last[name]:+.3g}"))
    return found


def compare_lengths(pairs: list[BothAnswers]) -> list[tuple[str, str, str]]:
    """Mean length of the answers."""
    if not pairs:
        return []
    before, after = (sum(pair.tokens[side] for pair in pairs) / len(pairs) for side in (0, 1))
    return [(f"tokens per answer, mean of {len(pairs)}", f"{before:.0f}", f"{after:.0f}")]


def read_pairs(before: Path, after: Path) -> list[BothAnswers]:
    """The prompts answered by both models."""
    answered = {side: _read_answers(side) for side in (before, after)}
    pairs = []
    for group_id, line in answered[before].items():
        other = answered[after].get(group_id)
        if other is not None and line["responses"] and other["responses"]:
            first, second = line["responses"][0], other["responses"][0]
            tokens = (first["num_tokens"], second["num_tokens"])
            pairs.append(BothAnswers(prompt=_last_words(line), before=first["text"], after=second["text"], tokens=tokens))
    return pairs


def _read_answers(folder: Path) -> dict[str, Record]:
    return {line["group_id"]: line for line in read_lines(find_lines(folder, SAMPLES_FILE, GENERATE_FILE))}


def _last_words(line: Record) -> str:
    prompt = line["prompt"]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def print_outcome(console: Console, outcome: AlignOutcome, aligned: Path, commands: Sequence[NextCommand]) -> None:
    """Print both tables, the aligned model's folder, and the next commands."""
    table = Table("held-out groups", "before", "after", title="What changed")
    for row in outcome.numbers:
        table.add_row(*row)
    console.print(table)
    if outcome.pairs:
        answers = Table("prompt", "before", "after", title="Answers", show_lines=True)
        for pair in outcome.pairs:
            answers.add_row(*(_cut(text) for text in (pair.prompt, pair.before, pair.after)))
        console.print(answers)
    console.print(f"the aligned model: {aligned}", soft_wrap=True)
    console.print(describe_next(commands), soft_wrap=True)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"
