"""The papers' claims that these trials can test, and the verdict on each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Numbers of a trial, by method and seed."""
ERRORS = 2.0
"""Number of standard errors from which a difference counts."""
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57)
"""The same for a standard error from only 2, 3, … 6 values: two-sided 95 % quantiles of Student's t."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim as a comparison of two trials."""

    paper: str
    text: str
    """The paper's claim in short."""
    first: str
    """Method expected to have the larger number."""
    second: str
    measure: Literal["reward", "chosen_log_ratio"] = "reward"
    """Held-out reward; or the change of preferred training responses, in nats."""


CLAIMS = (
    Claim(paper="MPO", text="All K responses beat the best and the worst (DPO)", first="mpo", second="dpo"),
    Claim(paper="MPO", text="More responses help: K = 8 above K = 2", first="mpo", second="mpo_k2"),
    Claim(paper="MPO", text="More responses help: K = 8 above K = 4", first="mpo", second="mpo_k4"),
    Claim(paper="MPO", text="A preferred set beats one preferred response (InfoNCA)", first="mpo", second="infonca"),
    Claim(paper="MPO", text="Two sets beat the full ranking (Plackett–Luce)", first="mpo", second="plackett_luce"),
    Claim(paper="MPO", text="Two sets beat four bins of the ranking", first="mpo", second="mpo_bins_4"),
    Claim(paper="MPO", text="With noisy rewards, two sets beat the ranking", first="mpo_noise", second="plackett_luce_noise"),
    Claim(paper="MPO", text="Two sets beat all their pairs (DPO)", first="mpo", second="dpo_cross_pairs"),
    Claim(paper="MPO", text="Best and worst beat all pairs of the sets (DPO)", first="dpo", second="dpo_cross_pairs"),
    Claim(paper="MPO", text="Half of the prompts: all K responses beat DPO", first="mpo_half", second="dpo_half"),
    Claim(paper="MPO", text="Without a reference, sets beat pairs (SimPO)", first="mpo_reference_free", second="simpo"),
    Claim(paper="MPO", text="Samples of the current policy beat those of the start", first="mpo_segments", second="mpo"),
    Claim(paper="W-MPO", text="Weights by the distance from the mean beat plain sets", first="wmpo", second="mpo"),
    Claim(paper="SWEPO", text="Weighted sets (p = 1) beat the best and the worst (DPO)", first="swepo", second="dpo"),
    Claim(paper="SWEPO", text="Weighted sets beat the rewards' distribution (InfoNCA)", first="swepo", second="infonca"),
    Claim(paper="SWEPO", text="Weights (p = 1) beat none (p = 0, MPO)", first="swepo", second="mpo"),
    Claim(paper="SWEPO", text="Squared deviations (p = 2) beat no weights (p = 0, MPO)", first="swepo_p2", second="mpo"),
    Claim(paper="NCA", text="InfoNCA on all rewards beats DPO on pairs", first="infonca", second="dpo"),
    Claim(paper="NCA", text="InfoNCA: K = 8 above K = 2", first="infonca", second="infonca_k2"),
    Claim(paper="NCA", text="InfoNCA: K = 3 above K = 2", first="infonca_k3", second="infonca_k2"),
    Claim(paper="NCA", text="InfoNCA: K = 4 above K = 3", first="infonca_k4", second="infonca_k3"),
    Claim(paper="NCA", text="InfoNCA: K = 4 above K = 2", first="infonca_k4", second="infonca_k2"),
    Claim(paper="NCA", text="NCA beats InfoNCA", first="nca", second="infonca"),
    Claim(
        paper="NCA",
        text="NCA keeps preferred responses more likely than InfoNCA does",
        first="nca",
        second="infonca",
        measure="chosen_log_ratio",
    ),
    Claim(
        paper="NCA",
        text="NCA keeps preferred responses more likely than DPO does",
        first="nca",
        second="dpo",
        measure="chosen_log_ratio",
    ),
    Claim(paper="NCA", text="A reference beats none", first="nca", second="nca_reference_free"),
    Claim(
        paper="NCA",
        text="Without a reference, a likelihood term helps",
        first="nca_reference_free_sft",
        second="nca_reference_free",
    ),
    Claim(paper="SPO", text="SPO on pairs beats DPO", first="spo_pairs", second="dpo"),
    Claim(paper="SPO", text="SPO on the best of n beats S-DPO", first="spo_best_of_n", second="sdpo"),
    Claim(paper="SPO", text="SPO on rankings beats Plackett–Luce", first="spo_ranked", second="plackett_luce"),
    Claim(paper="SPO", text="SPO on rankings beats S-DPO", first="spo_ranked", second="sdpo_ranked"),
    Claim(paper="SPO", text="KL on live samples beats KL on the data", first="spo_live_kl", second="spo_data_kl"),
    Claim(paper="SPO", text="KL on live samples beats the best's likelihood", first="spo_live_kl", second="spo_log_prob"),
    Claim(paper="SPO", text="KL on live samples beats importance sampling", first="spo_live_kl", second="spo_importance"),
    Claim(paper="MC-PO", text="Negatives of the kernel beat random ones", first="mcpo", second="rnce"),
    Claim(paper="MC-PO", text="Negatives of the kernel beat the likeliest", first="mcpo", second="mcpo_max"),
    Claim(paper="MC-PO", text="Negatives of the kernel beat the least likely", first="mcpo", second="mcpo_min"),
    Claim(paper="MC-PO", text="Three negatives of the kernel beat one", first="mcpo_m3", second="mcpo"),
    Claim(paper="MC-PO", text="Samples of the current policy beat those of the start", first="mcpo_segments", second="mcpo"),
    Claim(paper="MC-PO", text="MC-PO beats DPO", first="mcpo", second="dpo"),
    Claim(
        paper="MC-PO",
        text="With token-swapped negatives, the kernel beats random ones",
        first="mcpo_swapped",
        second="rnce_swapped",
    ),
)


Words = Literal["holds here", "does not hold here", "inconclusive", "not run"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict of the numbers."""

    words: Words
    difference: float = math.nan
    """First minus second."""
    error: float = math.nan
    """Its standard error; NaN if it cannot be computed."""
    seeds: tuple[int, ...] = ()


def judge(claim: Claim, results: Results) -> Verdict:
    """Compare two methods, seed by seed and prompt by prompt.

    Rewards have two standard errors, over prompts and over seeds; the larger one is used. The change of log-probs is one
    number per trial; its standard error is over a few seeds, hence Student's t. One seed gives no verdict: its error over
    prompts is that of two policies, and another order of the data makes others.
    """
    first, second = results.get(claim.first, {}), results.get(claim.second, {})
    seeds = tuple(sorted(set(first) & set(second)))
    if not seeds:
        return Verdict(words="not run")
    needed = ERRORS
    if claim.measure == "reward":
        leads = [subtract(first[seed]["reward"], second[seed]["reward"]) for seed in seeds]
        by_seed = [statistics.fmean(lead.values()) for lead in leads]
        prompts = set.intersection(*(set(lead) for lead in leads))
        errors = [standard_error([statistics.fmean(lead[prompt] for lead in leads) for prompt in prompts])]
    else:
        by_seed, errors = [first[seed][claim.measure] - second[seed][claim.measure] for seed in seeds], []
        if 2 <= len(seeds) < 2 + len(STUDENT):
            needed = STUDENT[len(seeds) - 2]
    if len(seeds) > 1:
        errors.append(standard_error(by_seed))
    difference, error = statistics.fmean(by_seed), max(errors, default=math.nan)
    if len(seeds) < 2 or abs(difference) <= needed * error:
        return Verdict(words="inconclusive", difference=difference, error=error, seeds=seeds)
    words: Words = "holds here" if difference > 0 else "does not hold here"
    return Verdict(words=words, difference=difference, error=error, seeds=seeds)


def subtract(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The difference for each prompt in both."""
    return {prompt: first[prompt] - second[prompt] for prompt in first if prompt in second}


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; NaN with fewer than two."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
