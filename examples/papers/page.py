"""The results as a page: what was trained, its results and costs, and the verdict on each claim."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from examples.papers.claims import CLAIMS, ERRORS, Claim, Results, Verdict, Words, judge, standard_error, subtract
from examples.papers.samples import NUM_RESPONSES, Sizes
from examples.papers.trial import NUM_ANSWERS, START, Entry

INTRODUCTION = """# The papers' claims on a pretrained model

    python -m examples.papers          # resumes; skips what is done

SmolLM2-135M-Instruct is trained with each method on the same samples. All policies then answer the same held-out
prompts. A program computes the reward: the share of a prompt's two instructions that an answer follows, as in

> What is a lighthouse for? Do not use commas. Use at most 12 words.

The program knows nothing of whether an answer is right ([task.py](../../examples/instructions/task.py)).
"""
CAVEAT = """\
A claim **holds here** if the difference is more than {errors:g} standard errors above zero, **does not hold here** if it
is as far below zero, else it is **inconclusive**. Standard errors are those over prompts or over seeds, whichever is
larger. With one seed nothing can be told: another order of the data makes another policy. Log-ratios have the error over
seeds alone, and its bound is Student's t.

- **Power.** {power}
- **Chance.** Of many comparisons without a real difference, one in twenty passes {errors:g} standard errors.
- **Nothing is tuned per method**: one learning rate, β = 0.1 in every loss of log-ratios
  ([methods.yaml](../../examples/papers/methods.yaml)). Adam's steps are about equally long whatever a loss's scale, so
  that methods differ in direction more than in speed.
- **Scale.** A model of 135 M parameters, a few steps and exact rewards say little about the papers' own setting: large
  models, long training, learned rewards.
"""
NOT_RUN = """\
## Not run yet

`python -m examples.papers` runs these, too; `--methods {some} --seeds 0` a part of them:
{names}.

| paper | claim | compared |
|---|---|---|
"""


def format_page(
    entries: Mapping[str, Entry],
    results: Results,
    sizes: Sizes,
    spacing: Mapping[int, float] | None = None,
    examples: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The page in Markdown.

    Args:
        spacing: mean gap of neighbouring rewards, by number of responses
        examples: by method and prompt, an answer
    """
    done = [name for name in entries if results.get(name)]
    missing = [name for name in entries if not results.get(name)]
    verdicts = [(claim, judge(claim, results)) for claim in CLAIMS]
    judged = [(claim, verdict) for claim, verdict in verdicts if verdict.words != "not run"]
    left = [claim for claim, verdict in verdicts if verdict.words == "not run"]
    lines = [INTRODUCTION, *describe_sizes(sizes), "", "## Claims", "", count_verdicts(verdicts), "", *format_claims(judged), ""]
    lines += [CAVEAT.format(errors=ERRORS, power=describe_power(judged))]
    lines += ["## Methods", "", *format_methods(entries, done, results), ""]
    if spacing:
        lines += ["## Spacing of rewards", "", *format_spacing(spacing), ""]
    if examples:
        lines += ["## Answers", "", *format_examples(examples), ""]
    if missing:
        names = textwrap.fill(", ".join(f"`{name}`" for name in missing), 118)
        lines += [NOT_RUN.format(names=names, some=" ".join(missing[:2])) + "\n".join(map(format_left, left)), ""]
    return "\n".join(lines)


def describe_sizes(sizes: Sizes) -> list[str]:
    """What was sampled, trained and measured."""
    return [
        "| what | number |",
        "|---|---|",
        f"| training prompts × samples of the start | {sizes.prompts} × {NUM_RESPONSES}, up to {sizes.max_tokens} tokens |",
        f"| training | {sizes.epochs:g} epoch, {sizes.groups_per_step} prompts a step, Adam, peak learning rate {sizes.lr:.0e} |",
        f"| held-out prompts × answers | {sizes.held_out} × {NUM_ANSWERS} |",
    ]


def format_claims(judged: Sequence[tuple[Claim, Verdict]]) -> list[str]:
    """A table with one row per claim."""
    lines = ["| paper | claim | compared | difference | verdict |", "|---|---|---|---|---|"]
    for claim, verdict in judged:
        unit = " nats" if claim.measure == "chosen_log_ratio" else ""
        number = f"{plus_minus(verdict.difference, verdict.error, sign=True)}{unit}"
        seeds = count(len(verdict.seeds), "seed")
        compared = f"`{claim.first}` − `{claim.second}`"
        lines.append(f"| {claim.paper} | {claim.text} | {compared} | {number} ({seeds}) | **{verdict.words}** |")
    return lines


def count_verdicts(verdicts: Sequence[tuple[Claim, Verdict]]) -> str:
    """How many claims have each verdict."""
    counts = Counter(verdict.words for _, verdict in verdicts)
    return f"Of {len(verdicts)} claims: " + ", ".join(f"{counts[words]} *{words}*" for words in get_args(Words)) + "."


def format_left(claim: Claim) -> str:
    """The table row of a claim that was not run."""
    return f"| {claim.paper} | {claim.text} | `{claim.first}` − `{claim.second}` |"


def describe_power(judged: Sequence[tuple[Claim, Verdict]]) -> str:
    """The smallest detectable reward difference, estimated from the measured errors."""
    errors = [verdict.error for claim, verdict in judged if claim.measure == "reward" and not math.isnan(verdict.error)]
    if not errors:
        return "Nothing was compared yet."
    return f"A difference of rewards must be at least about {ERRORS * statistics.median(errors):.2f} to be detected here."


def format_methods(entries: Mapping[str, Entry], done: Sequence[str], results: Results) -> list[str]:
    """A table with one row per completed method."""
    lines = [
        "- Reward: mean of held-out answers. Gain: over the start, with the same prompts and sampling seeds.",
        "- ±: one standard error, the larger of that over prompts and that over seeds.",
        "- Moved: mean log π/π_ref of the preferred (and of the other) training responses that the loss compares, in the",
        "  second half of the steps.",
        "- Tokens: those of the steps' rows, and the share of them in the backward pass.",
        "- CPU seconds: training with the start of its process; for the first method of each K also the reference's",
        "  log-probabilities. Trials that were stopped and resumed are left out.",
        "",
        "| method | K | seeds | reward | gain | tokens per answer | moved, nats | tokens trained | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    start = results.get(START, {})
    for name in [START] * bool(start) + list(done):
        trials = results[name]
        seeds = sorted(trials)
        reward = plus_minus(*mean_reward([trials[seed]["reward"] for seed in seeds]))
        length = f"{statistics.fmean(trials[seed]['answer_tokens'] for seed in seeds):.1f}"
        cells = [f"`{name}`" if name != START else "start", "", str(len(seeds)), reward, "", length, "", "", ""]
        if name != START:
            cells[1] = str(entries[name].groups.responses)
            both = [seed for seed in seeds if seed in start]
            if both:
                leads = [subtract(trials[seed]["reward"], start[seed]["reward"]) for seed in both]
                cells[4] = plus_minus(*mean_reward(leads), sign=True)
            moved = [[trials[seed][side] for seed in seeds] for side in ("chosen_log_ratio", "rejected_log_ratio")]
            if all(value is not None for side in moved for value in side):
                chosen, rejected = map(statistics.fmean, moved)
                cells[6] = f"{chosen:+.2f} ({rejected:+.2f})"
            tokens, backward = (statistics.fmean(trials[seed][key] for seed in seeds) for key in ("tokens", "backward_tokens"))
            cells[7] = f"{tokens:,.0f} ({backward / tokens:.0%})"
            measured = [trials[seed]["cpu_seconds"] for seed in seeds if trials[seed]["cpu_seconds"] is not None]
            cells[8] = f"{statistics.fmean(measured):.0f}" if measured else ""
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_spacing(spacing: Mapping[int, float]) -> list[str]:
    """A table with one row per number of responses."""
    return [
        "MPO's Fig. 10: the mean gap between neighbours of a prompt's sorted rewards falls about as 1 / K, so that a ranking of",
        "more responses rests on smaller differences. Here, on the shared samples before training:",
        "",
        "| K | mean gap | gap × (K − 1): the mean range |",
        "|---|---|---|",
        *(f"| {number} | {gap:.3f} | {gap * (number - 1):.2f} |" for number, gap in sorted(spacing.items())),
    ]


def format_examples(examples: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The answers to each prompt, one below the other."""
    lines = ["The first answer of each policy to the first held-out prompts, with its reward."]
    for prompt in dict.fromkeys(prompt for answers in examples.values() for prompt in answers):
        lines += ["", f"> {prompt}", ""]
        for name, answers in examples.items():
            label = f"`{name}`" if name != START else name
            lines += [f"- {label}: {answers[prompt]}"] if prompt in answers else []
    return lines


def mean_reward(trials: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Mean over seeds and prompts, and the larger of the two standard errors."""
    prompts = set.intersection(*(set(trial) for trial in trials))
    by_prompt = [statistics.fmean(trial[prompt] for trial in trials) for prompt in prompts]
    by_seed = [statistics.fmean(trial.values()) for trial in trials]
    errors = [error for error in (standard_error(by_prompt), standard_error(by_seed)) if not math.isnan(error)]
    return statistics.fmean(by_seed), max(errors, default=math.nan)


def plus_minus(value: float, error: float, *, sign: bool = False) -> str:
    """A number with its error, if any."""
    number = f"{value:+.3f}" if sign else f"{value:.3f}"
    return number if math.isnan(error) else f"{number} ± {error:.3f}"


def count(number: int, word: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {word}{'s' * (number != 1)}"


def as_record(entries: Mapping[str, Entry], results: Results, sizes: Sizes) -> dict[str, Any]:
    """The numbers in the page."""
    return {
        "sizes": sizes.as_dict(),
        "methods": {name: entry.settings() for name, entry in entries.items()},
        "results": {
            name: {str(seed): dict(trial) for seed, trial in trials.items()} for name, trials in results.items() if trials
        },
    }
