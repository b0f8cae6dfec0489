"""Rules that decide which responses of a scored group to train on: one function per rule, each counted under its own name.

A response is a record as `mpo generate` and `mpo score` write it: text, finish_reason, num_tokens, reward, …
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_megatron.config import SelectConfig
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import is_reward

ResponseLine = Mapping[str, Any]
DropRule = Callable[[Sequence[ResponseLine], SelectConfig], list[bool]]
"""For each response of a group, whether the rule removes it."""


def apply_rules(responses: Sequence[ResponseLine], config: SelectConfig) -> tuple[list[ResponseLine], Counter[str]]:
    """The responses that pass every rule, in order, and the number that each rule removed; rules apply one after another.

    Raises:
        DataError: a response lacks what a rule needs.
    """
    kept, dropped = list(responses), Counter[str]()
    for name, rule in RULES.items():
        goes = rule(kept, config) if kept else []
        dropped[name] += sum(goes)
        kept = [response for response, out in zip(kept, goes, strict=True) if not out]
    return kept, +dropped


def find_unscored(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """No reward, or not a finite one: a scorer failed on this response."""
    return [not is_reward(response.get("reward")) for response in responses]


def find_empty(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Only white space."""
    return [not str(response.get("text") or "").strip() for response in responses]


def find_truncated(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Ended at the token limit."""
    return [config.truncated == "drop" and response.get("finish_reason") == "length" for response in responses]


def find_repeating(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Stopped by the engine because of repetition."""
    return [config.truncated == "drop" and response.get("finish_reason") == "repetition" for response in responses]


def find_aborted(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Stopped by the engine early, for example at a server's shutdown."""
    return [response.get("finish_reason") in ("abort", "aborted", "error") for response in responses]


def find_filtered(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Cut by a content filter."""
    return [response.get("finish_reason") == "content_filter" for response in responses]


def find_too_short(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Below `min_length`."""
    if not config.min_length:
        return [False] * len(responses)
    return [length < config.min_length for length in measure_lengths(responses, config)]


def find_too_long(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Above `max_length`."""
    if config.max_length is None:
        return [False] * len(responses)
    return [length > config.max_length for length in measure_lengths(responses, config)]


def find_unlike_length(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """More than `max_length_ratio` times longer or shorter than the group's median."""
    if config.max_length_ratio is None:
        return [False] * len(responses)
    lengths = measure_lengths(responses, config)
    median, ratio = statistics.median(lengths), config.max_length_ratio
    return [length > ratio * median or ratio * length < median for length in lengths]


def measure_lengths(responses: Sequence[ResponseLine], config: SelectConfig) -> list[int]:
    """Tokens or characters of each response.

    Raises:
        DataError: tokens were not counted at generation.
    """
    if config.length_unit == "characters":
        return [len(response["text"]) for response in responses]
    lengths = [response.get("num_tokens") for response in responses]
    if None in lengths:
        raise DataError("a response has no num_tokens (mpo generate writes it); set length_unit = characters.")
    return [length for length in lengths if length is not None]


def find_duplicates(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Equal to an earlier response of the group."""
    if config.duplicates == "keep":
        return [False] * len(responses)
    seen: set[str] = set()
    repeated = []
    for response in responses:
        text = response["text"]
        key = " ".join(text.casefold().split()) if config.duplicates == "drop_normalized" else text
        repeated.append(key in seen)
        seen.add(key)
    return repeated


def find_surplus(responses: Sequence[ResponseLine], config: SelectConfig) -> list[bool]:
    """Beyond `max_responses`: keep the best and the worst, and others spaced evenly between them by rank of reward."""
    number, most = len(responses), config.max_responses
    if most is None or number <= most:
        return [False] * number
    by_reward = sorted(range(number), key=lambda index: -responses[index]["reward"])
    # Ranks 0 … number − 1 in most − 1 equal strides; number > most, so no rank repeats.
    stays = {by_reward[round(step * (number - 1) / (most - 1))] for step in range(most)}
    return [index not in stays for index in range(number)]


RULES: dict[str, DropRule] = {
    "no_reward": find_unscored,
    "empty": find_empty,
    "truncated": find_truncated,
    "repeating": find_repeating,
    "aborted": find_aborted,
    "filtered": find_filtered,
    "too_short": find_too_short,
    "too_long": find_too_long,
    "unlike_length": find_unlike_length,
    "duplicate": find_duplicates,
    "surplus": find_surplus,
}
"""Order of application; `surplus` last, so that it counts only otherwise fit responses."""
