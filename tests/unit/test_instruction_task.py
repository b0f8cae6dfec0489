"""The example's task: every instruction is checked, and every prompt has the fields that its reward reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.instructions.model import INSTALL
from examples.instructions.run import summarize
from examples.instructions.task import INSTRUCTIONS, PAIRS, build_prompts, follow, reward, write_prompts

CASES: list[tuple[str, Any, str, str]] = [
    ("no_comma", None, "Red and blue lamps.", "Red, and blue lamps."),
    ("short", 4, "One two three four", "One two three four five"),
    ("bullets", 2, "* one lamp\n* two lamps\n", "* one lamp\n* two lamps\n* three"),
    ("bullets", 2, "  * one lamp\n\n* two lamps", "Here they are:\n* one lamp\n* two lamps"),
    ("word", "light", "There is Light, always.", "A lighthouse is there."),
    ("forbidden", "the", "There is a Theory of light.", "See The light there."),
    ("sentence", None, " It guides ships!\n", "It guides ships. Really."),
    ("sentence", None, "It guides ships.", "It guides ships. And it"),
]


@pytest.mark.parametrize(("kind", "value", "right", "wrong"), CASES)
def test_instructions(kind: str, value: Any, right: str, wrong: str) -> None:
    assert follow(right, [[kind, value]]) == [True]
    assert follow(wrong, [[kind, value]]) == [False]


def test_every_kind_is_tested() -> None:
    assert {case[0] for case in CASES} == set(INSTRUCTIONS)
    assert {kind for pair in PAIRS for kind in pair} == set(INSTRUCTIONS)


def test_an_answer_of_one_word_follows_nothing() -> None:
    assert follow("ok", [["no_comma", None], ["short", 8]]) == [False, False]


def test_an_answer_that_repeats_an_instruction_follows_nothing() -> None:
    for instruction in INSTRUCTIONS.values():
        text = f"Sure. {instruction.text.format(value=2)}"
        assert follow(text, [["no_comma", None], ["short", 20]]) == [False, False]


def test_the_reward_is_the_share_of_instructions() -> None:
    group = {"meta": {"instructions": [["no_comma", None], ["short", 4]]}}
    assert [reward(text, group) for text in ("It guides ships", "It, too, guides", "It guides boats, too, now")] == [1, 0.5, 0]


def test_prompts_differ_and_say_what_is_checked(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", build_prompts(300, seed=4))
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len({prompt["prompt"] for prompt in prompts}) == 300
    assert prompts == json.loads(json.dumps(build_prompts(300, seed=4)))
    for prompt in prompts:
        for kind, value in prompt["instructions"]:
            assert INSTRUCTIONS[kind].text.format(value=value) in prompt["prompt"]
    with pytest.raises(ValueError, match="different questions"):
        build_prompts(10**4)


def test_gains_are_paired_by_seed() -> None:
    results = {"0": _result(0.4, 0.5), "1": _result(0.6, 0.8)}
    summary = summarize(results)
    assert summary["gain"] == {"mean": pytest.approx(0.15), "error": pytest.approx(0.05)}
    assert summarize({"0": _result(0.4, 0.5)})["gain"]["error"] is None


def _result(before: float, after: float) -> dict[str, Any]:
    return {"before": {"reward": before}, "after": {"reward": after}}


def test_make_installs_the_versions_that_the_message_names() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert INSTALL.removeprefix("pip install") in makefile
