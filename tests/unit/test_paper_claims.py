"""The papers' page: every claim has its trials, and a verdict follows from differences and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.papers.claims import CLAIMS, Claim, judge
from examples.papers.page import as_record, format_page, mean_reward
from examples.papers.samples import GroupSet, Sizes, keep_sizes
from examples.papers.trial import START, load_entries, mean_late, train_options
from mpo_megatron.config import ConfigError, LossConfig, PrepareConfig, TrainConfig, from_dict

CLAIM = Claim(paper="P", text="a above b", first="a", second="b")
MOVED = Claim(paper="P", text="a above b", first="a", second="b", measure="chosen_log_ratio")


def trial(*rewards: float, moved: float = 0.0) -> dict[str, Any]:
    """The numbers of a trial with these rewards of prompts 0, 1, …"""
    numbers = {"tokens": 100.0, "backward_tokens": 50.0, "cpu_seconds": 3.0, "answer_tokens": 7.0, "rejected_log_ratio": -1.0}
    return {"reward": {str(place): value for place, value in enumerate(rewards)}, "chosen_log_ratio": moved, **numbers}


def test_every_claim_compares_methods_that_are_trained() -> None:
    entries = load_entries()
    assert {name for claim in CLAIMS for name in (claim.first, claim.second)} <= set(entries)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((0.9, 0.8, 0.9), (0.1, 0.1, 0.2), "holds here"),
        ((0.1, 0.1, 0.2), (0.9, 0.8, 0.9), "does not hold here"),
        ((0.9, 0.1, 0.5), (0.1, 0.9, 0.4), "inconclusive"),
    ],
)
def test_seeds_that_agree_are_judged_by_their_prompts(first: tuple[float, ...], second: tuple[float, ...], words: str) -> None:
    a, b = trial(*first), trial(*second)
    assert judge(CLAIM, {"a": {0: a, 1: a}, "b": {0: b, 1: b}}).words == words


def test_one_seed_tells_nothing() -> None:
    verdict = judge(CLAIM, {"a": {0: trial(0.9, 0.8, 0.9)}, "b": {0: trial(0.1, 0.1, 0.2)}})
    assert verdict.words == "inconclusive"
    assert verdict.difference == pytest.approx(11 / 15)


def test_seeds_that_disagree_tell_nothing() -> None:
    """Each seed alone would suffice, but the error over seeds is the larger one."""
    high, low = trial(0.9, 0.9, 0.8), trial(0.1, 0.1, 0.1)
    verdict = judge(CLAIM, {"a": {0: high, 1: low}, "b": {0: low, 1: high}})
    assert verdict.words == "inconclusive"
    assert verdict.seeds == (0, 1)
    assert verdict.error == pytest.approx(23 / 30)  # two values ±23/30 around 0


def test_only_seeds_and_prompts_of_both_count() -> None:
    verdict = judge(CLAIM, {"a": {0: trial(0.5, 0.6, 0.4), 3: trial(0.0)}, "b": {0: trial(0.1, 0.2, 0.0, 1.0)}})
    assert verdict.seeds == (0,)
    assert verdict.difference == pytest.approx(0.4)
    assert judge(CLAIM, {"a": {0: trial(1.0)}, "b": {1: trial(0.0)}}).words == "not run"


def test_log_probabilities_need_several_seeds() -> None:
    one = {"a": {0: trial(0.5, moved=1.0)}, "b": {0: trial(0.5, moved=-1.0)}}
    assert judge(MOVED, one).words == "inconclusive"
    two = {"a": {0: trial(0.5, moved=1.0), 1: trial(0.5, moved=1.2)}, "b": {0: trial(0.5, moved=-1.0), 1: trial(0.5, moved=-1.1)}}
    assert judge(MOVED, two).words == "holds here"
    apart = {
        "a": {0: trial(0.5, moved=1.0), 1: trial(0.5, moved=2.0)},
        "b": {0: trial(0.5, moved=-1.0), 1: trial(0.5, moved=-1.5)},
    }
    assert judge(MOVED, apart).words == "inconclusive"  # 2.75 ± 0.75, but of two values


def test_metrics_of_the_later_steps() -> None:
    assert mean_late([{"margin": value} for value in (9.0, None, 1.0, 2.0)], "margin") == 1.5
    assert mean_late([{"margin": 9.0}, {"margin": None}], "margin") is None


def test_mean_and_the_larger_error() -> None:
    assert mean_reward([{"0": 0.2, "1": 0.4}]) == (pytest.approx(0.3), pytest.approx(0.1))
    assert mean_reward([{"0": 0.2, "1": 0.4}, {"0": 0.6, "1": 0.8}]) == (pytest.approx(0.5), pytest.approx(0.2))


def test_the_page_says_what_was_run_and_what_was_not() -> None:
    entries = load_entries()
    results = {
        START: {0: trial(0.1, 0.1, 0.2)},
        "mpo": dict.fromkeys((0, 1), trial(0.9, 0.8, 0.9, moved=1.5)),
        "dpo": dict.fromkeys((0, 1), trial(0.3, 0.2, 0.2, moved=-2.0)),
    }
    page = format_page(
        entries, results, Sizes(), {2: 0.5, 8: 0.125}, {START: {"Why?": "So. *(1)*"}, "mpo": {"Why?": "Because. *(0.5)*"}}
    )
    assert (
        f"Of {len(CLAIMS)} claims: 1 *holds here*, 0 *does not hold here*, 0 *inconclusive*, {len(CLAIMS) - 1} *not run*." in page
    )
    assert "> Why?\n\n- start: So. *(1)*\n- `mpo`: Because. *(0.5)*" in page
    assert "| 8 | 0.125 | 0.88 |" in page
    assert "| MPO | All K responses beat the best and the worst (DPO) | `mpo` − `dpo` | +0.633" in page
    assert "(2 seeds) | **holds here** |" in page
    left_out = page.partition("## Not run yet")[2]
    assert "| NCA | NCA beats InfoNCA | `nca` − `infonca` |" in left_out
    assert "must be at least about 0.0" in page  # two errors over the three prompts
    assert "| `mpo` | 8 | 2 | 0.867 ± 0.033 | +0.733" in page
    assert "+1.50 (-1.00) | 100 (50%) | 3 |" in page
    assert all(f"`{name}`" in left_out for name in entries if name not in results)
    assert set(as_record(entries, results, Sizes())["results"]) == {START, "mpo", "dpo"}


def test_times_of_resumed_trials_are_left_out() -> None:
    first = trial(0.5, 0.6)
    both = {"mpo": {0: first, 1: {**first, "cpu_seconds": None}}}
    assert "| 3 |" in format_page(load_entries(), both, Sizes())
    assert "(50%) |  |" in format_page(load_entries(), {"mpo": {1: {**first, "cpu_seconds": None}}}, Sizes())


def test_samples_of_other_sizes_are_not_taken(tmp_path: Path) -> None:
    for _ in range(2):
        keep_sizes(tmp_path / "samples" / "sizes.json", Sizes(held_out=5))
    with pytest.raises(ConfigError, match=r"--held-out = 6; .*samples was sampled with 5; use that value, or another --output"):
        keep_sizes(tmp_path / "samples" / "sizes.json", Sizes(held_out=6))


def test_groups_are_named_by_what_is_not_the_default() -> None:
    groups = GroupSet(responses=8, fraction=0.5)
    assert (groups.name, groups.options()) == ("groups-8-fraction-0.5", {"responses": 8, "fraction": 0.5})
    assert GroupSet(responses=2).name == "groups-2"


def test_rows_name_losses_and_options_that_exist() -> None:
    for entry in load_entries().values():
        options = entry.groups.options()
        PrepareConfig(input="a", output="b", tokenizer="c", responses_per_prompt=options.pop("responses"), **options)
        LossConfig(name=entry.loss, params=entry.params)
        training = train_options(entry, 0, Sizes())
        training["model"]["checkpoint"] = training["data"]["train"] = "d"
        from_dict(TrainConfig, {"output": "e", **training}, "train")
