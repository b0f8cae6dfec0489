"""Selection: each rule's result, computed by hand; dropped responses are counted; labels are the loss's sets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from mpo_megatron.config import ConfigError, PrepareConfig, SelectConfig
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import load_groups
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import seal, unseal
from mpo_megatron.losses import GroupBatch, PartitionParams, compute_partition
from mpo_megatron.rollout.filters import RULES, apply_rules
from mpo_megatron.rollout.select import REMEDIES, Selection, filter_groups, label_groups, select, split_groups
from tests.json_lines import write_lines
from tests.tiny import save_tokenizer

NAMES = "abcdefghijklmnop"


def settings(**options: Any) -> SelectConfig:
    return SelectConfig(input="in", output="out", **options)


def record(rewards: list[float | None], group_id: str = "g", **fields: list[Any]) -> dict[str, Any]:
    """A scored group whose k-th response is the k-th letter repeated, unless `text` says otherwise."""
    responses = []
    for index, reward in enumerate(rewards):
        base = {"text": NAMES[index] * (index + 1), "finish_reason": "stop", "num_tokens": index + 1, "reward": reward}
        responses.append(base | {name: values[index] for name, values in fields.items()})
    return {"group_id": group_id, "prompt": [{"role": "user", "content": f"Prompt {group_id}?"}], "responses": responses}


def kept(group: dict[str, Any], **options: Any) -> tuple[str, Counter[str]]:
    """First letters of the responses that pass the rules, and the counts of the others."""
    responses, dropped = apply_rules(group["responses"], settings(**options))
    return "".join(response["text"][:1] for response in responses), dropped


@pytest.mark.parametrize(
    ("group", "options", "letters", "reason"),
    [
        (record([1, None, 2, float("nan")]), {}, "ac", "no_reward"),
        (record([1, True, 2]), {}, "ac", "no_reward"),
        (record([1, 2, 3], text=["a", " \n", "c"]), {}, "ac", "empty"),
        (record([1, 2, 3], finish_reason=["stop", "length", "stop"]), {}, "ac", "truncated"),
        (record([1, 2, 3], finish_reason=["stop", "repetition", "stop"]), {}, "ac", "repeating"),
        (record([1, 2, 3], finish_reason=["stop", "abort", "stop"]), {"truncated": "keep"}, "ac", "aborted"),
        (record([1, 2, 3], finish_reason=["stop", "content_filter", "stop"]), {"truncated": "keep"}, "ac", "filtered"),
        (record([1, 2, 3, 4]), {"min_length": 3}, "cd", "too_short"),
        (record([1, 2, 3, 4], text=["a", "bbb", "cc", "dddd"]), {"max_length": 2, "length_unit": "characters"}, "ac", "too_long"),
        (record([1, 2, 3, 4, 5], num_tokens=[4, 10, 10, 20, 21]), {"max_length_ratio": 2.0}, "bcd", "unlike_length"),
        (record([1, 2, 3, 4], text=["a", "A ", "b", "a"]), {}, "aAb", "duplicate"),
        (record([1, 2, 3, 4], text=["a x", "A  X ", "b", "ax"]), {"duplicates": "drop_normalized"}, "aba", "duplicate"),
        (record([5, 1, 4, 2, 3]), {"max_responses": 3}, "abe", "surplus"),
        (record([5, 1, 4, 2, 3]), {"max_responses": 2}, "ab", "surplus"),
    ],
)
def test_each_rule(group: dict[str, Any], options: dict[str, Any], letters: str, reason: str) -> None:
    assert kept(group, **options) == (letters, Counter({reason: len(group["responses"]) - len(letters)}))


def test_rules_can_be_switched_off() -> None:
    group = record([1, 2, 3], text=["a", "a", "b"], finish_reason=["stop", "stop", "length"])
    assert kept(group, duplicates="keep", truncated="keep") == ("aab", Counter())


@pytest.mark.parametrize("most", range(2, 12))
def test_largest_k_keeps_both_ends_and_the_right_number(most: int) -> None:
    rewards = np.random.default_rng(most).permutation(12).astype(float).tolist()
    responses, _ = apply_rules(record(rewards)["responses"], settings(max_responses=most))
    left = [response["reward"] for response in responses]
    assert len(left) == most
    assert {min(left), max(left)} == {0.0, 11.0}


def test_tokens_that_were_not_counted_are_named() -> None:
    group = record([1, 2])
    del group["responses"][1]["num_tokens"]
    with pytest.raises(DataError, match=r"in: group g: .*num_tokens.*set length_unit = characters"):
        list(filter_groups([group], settings(min_length=1), Selection()))


def test_groups_without_spread_or_responses_go() -> None:
    selection = Selection()
    groups = [record([1, 1.05], "close"), record([1, 2], "wide"), record([1, None], "single"), record([None, None], "none")]
    left = list(filter_groups(groups, settings(min_spread=0.1), selection))
    assert [group["group_id"] for group in left] == ["wide"]
    assert selection.dropped_groups == {"small_spread": 1, "too_few_responses": 2}
    assert selection.examples["small_spread"] == "close"


@pytest.mark.parametrize("sets", ["mean", "median", "trimmed_mean", "top_bottom", "one_vs_rest"])
def test_labels_are_the_sets_of_the_loss(sets: Any) -> None:
    """Groups of different size split together as each would alone, by the loss's own partition."""
    rng = np.random.default_rng(0)
    groups = [record(rng.choice([0.0, 0.25, 0.5, 1.0], size).tolist()) for size in (2, 4, 9, 5)]
    for group, labels in zip(groups, label_groups(groups, settings(sets=sets)), strict=True):
        rewards = torch.tensor([[response["reward"] for response in group["responses"]]], dtype=torch.float64)
        batch = GroupBatch(policy_logps=rewards, rewards=rewards, valid=torch.ones_like(rewards, dtype=torch.bool))
        positive, negative = compute_partition(batch, PartitionParams(partition=sets))
        assert labels is not None
        assert [label == 1 for label in labels] == positive[0].tolist()
        assert [label == 0 for label in labels] == negative[0].tolist()


def test_sets_by_hand() -> None:
    def labels(sets: Any, **options: Any) -> list[int] | None:
        return label_groups([record([1.0, 4.0, 2.0, 0.0, 3.0])], settings(sets=sets, **options))[0]

    assert labels("all") is None
    assert labels("best_worst") == [-1, 1, -1, 0, -1]
    assert labels("one_vs_rest") == [0, 1, 0, 0, 0]
    assert labels("top_bottom", num_top=1, num_bottom=3) == [0, 1, 0, 0, -1]
    assert labels("mean") == [0, 1, 0, 0, 1]


def test_a_group_without_contrast_goes_and_is_counted() -> None:
    selection = Selection()
    left = list(split_groups([record([1, 1], "flat"), record([1, 2, 3], "good")], settings(sets="best_worst"), selection))
    assert [(group["group_id"], [item["label"] for item in group["responses"]]) for group in left] == [("good", [0, 1])]
    assert selection.dropped_groups == {"no_contrast": 1}
    assert selection.dropped_responses == {"with_its_group": 2, "in_neither_set": 1}


def test_noise_changes_the_choice_and_keeps_the_reward() -> None:
    group = record([0.0, 0.1, None, 0.2])
    (noisy,) = filter_groups([group], settings(reward_noise=1.0), Selection())
    (other,) = filter_groups([group], settings(reward_noise=2.0), Selection())
    shifts = [item["reward"] - item["reward_before_noise"] for item in noisy["responses"]]
    assert [item["reward_before_noise"] for item in noisy["responses"]] == [0.0, 0.1, 0.2]
    doubled = [item["reward"] - item["reward_before_noise"] for item in other["responses"]]
    assert doubled == pytest.approx([2 * shift for shift in shifts])
    assert len({round(shift, 6) for shift in shifts}) == 3


def test_files_counts_and_prepare(tmp_path: Path) -> None:
    """The whole command: counts add up, the plot exists, and `prepare` finds rewards and the chosen labels."""
    rng = np.random.default_rng(1)
    groups = [record(rng.normal(size=size).tolist(), f"g{index}") for index, size in enumerate([2, 4, 6, 6, 6, 3])]
    groups[1]["responses"][0]["reward"] = None
    (tmp_path / "scored").mkdir()
    write_lines(tmp_path / "scored" / "scored.jsonl", groups)
    (tmp_path / "scored" / "score.json").write_bytes(seal({}))
    config = SelectConfig(input=str(tmp_path / "scored"), output=str(tmp_path / "selected"), sets="top_bottom")
    info = select(config, Console(quiet=True))
    assert json.loads(json.dumps(info)) == unseal(tmp_path / "selected" / "select.json")
    assert info["responses_read"] == 27 == info["responses_written"] + sum(info["dropped_responses"].values())
    # Groups of 2, of 3, and of 4 with a missing reward do not have two of each.
    assert info["dropped_groups"] == {"no_contrast": 3}
    assert (info["groups_written"], info["responses_written"]) == (3, 12)
    assert info["sets"]["positive"]["mean_reward"] > info["sets"]["negative"]["mean_reward"]
    assert (tmp_path / "selected" / "reward_spacing.png").read_bytes().startswith(b"\x89PNG")

    save_tokenizer(tmp_path / "tokenizer")
    prepare(
        PrepareConfig(
            input=str(tmp_path / "selected" / "groups.jsonl"),
            output=str(tmp_path / "groups"),
            tokenizer=str(tmp_path / "tokenizer"),
        ),
        Console(quiet=True),
    )
    prepared = load_groups(tmp_path / "groups")
    assert prepared.info.has_labels
    assert prepared.info.reward_kind == "scores"
    for index in range(3):
        rewards, labels = prepared.rewards(index), prepared.labels(index)
        assert rewards is not None
        assert labels is not None
        assert sorted(labels.tolist()) == [0, 0, 1, 1]
        assert rewards[labels == 1].min() > rewards[labels == 0].max()


def test_names_of_groups_and_folders_are_printed_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", [record([1.0], "[/INST]"), record([1.0, 0.0])])
    select(SelectConfig(input=str(source), output=str(tmp_path / "[a]")), Console(width=200))
    shown = capsys.readouterr().out
    assert "for example group [/INST]" in shown
    assert f"{tmp_path.name}/[a]" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no group"),
        (
            '{"group_id": "a", "responses": [{"text": "x"}, {"text": "y"}]}\n',
            r"none of 1 groups is left .*2 × no_reward.*\. no_reward: score the responses",
        ),
        ('{"responses": [{"te\n', r"scored.jsonl:1: is not valid JSON"),
        ('{"group_id": "a", "responses": []}\n' * 2, "group a appears twice; give each group a unique id"),
        ('{"group_id": "a", "responses": ["x", "y"]}\n', r"scored\.jsonl:1: group a: responses\[0\] does not have the form"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "scored.jsonl").write_text(text)
    config = SelectConfig(input=str(tmp_path / "scored.jsonl"), output=str(tmp_path / "selected"))
    with pytest.raises(DataError, match=message):
        select(config, Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["scored.jsonl"]


def test_input_and_output_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input = .*nowhere; no such file"):
        select(SelectConfig(input=str(tmp_path / "nowhere"), output=str(tmp_path / "out")))
    (tmp_path / "scored.jsonl").write_text("")
    with pytest.raises(DataError, match=r"scored\.jsonl is not complete: score\.json is missing"):
        select(SelectConfig(input=str(tmp_path), output=str(tmp_path / "out")))
    source = write_lines(tmp_path / "groups.jsonl", [record([1, 2])])
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        select(SelectConfig(input=str(source), output=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_top": 3}, "it has an effect only with sets = top_bottom"),
        ({"sets": "top_bottom", "num_bottom": 0}, "num_bottom = 0; it must be at least 1"),
        ({"min_spread": -1.0}, "min_spread = -1.0; it must be 0 or positive"),
        ({"min_responses": 1}, "a group needs at least 2 responses"),
        ({"max_responses": 2, "min_responses": 3}, "it must be at least min_responses = 3"),
        ({"max_length": 3, "min_length": 4}, "at least min_length = 4"),
        ({"max_length_ratio": 0.5}, "max_length_ratio = 0.5; it must be at least 1"),
        ({"reward_noise": float("inf")}, "it must be finite"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**options)


def test_every_reason_has_a_remedy() -> None:
    assert set(RULES) | {"too_few_responses", "small_spread", "no_contrast"} == set(REMEDIES) | {"surplus"}  # keeps some
