"""Verdicts in a judge's answer, missing verdicts, and the judge's biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, ScoreConfig
from mpo_megatron.config.score import build_scorer_config
from mpo_megatron.rollout.records import read_lines
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.scorers import Scorer, build_scorer
from mpo_megatron.rollout.scorers.comparison import score_by_comparison
from mpo_megatron.rollout.scorers.verdicts import read_comparison, read_grade
from tests.json_lines import write_lines
from tests.unit.rollout.conftest import Server, completion, group_line

GRADES: dict[str, float | None] = {
    "Score: 7": 7, "Score: 7/10": 7, "Score: 7 out of 10": 7, "**Score:** 7": 7, "**Score**: **7**.": 7, "[[6]]": 6,
    "Rating: [[6]]": 6,    "Overall score (1-10): 7": 7, "Grade = -2.5": -2.5, "Score: 2e1": 20,
    "<score> 7 </score>": 7, "Score:\n7\n": 7,
    '{"score": 7}': 7, '{"reason": "Score: 3 is too low", "score": 7}': 7, '{"score": 7, "reason": "a score: 9 needs more"}': 7,
    '```json\n{"rating": "7/10"}\n```': 7, 'I say {"score": 7}': 7, "Score: 3 at first. Score: 7": 7,
    "Score: 7.\nFor a score of 9 it lacks examples.": 7, "<think>Score: 1</think>\nScore: 7": 7,
    "Score: seven": None, "I cannot judge this.": None, "Score: 7-8": None, "Score: 7 or 8": None, "Score: 7 to 8": None,
    "Score: 70%": None, "<think>Score: 1": None, '{"score": true}': None, '{"score": [7]}': None, "Score: 1e999": None, "": None,
    "7": None, "[" * 5000: None, "score:" + "*" * 10**5: None,
}  # fmt: skip
CHOICES: dict[str, float | None] = {
    "[[A]]": 1, "[[B]]": 0, "[[C]]": 0.5, "[[tie]]": 0.5, "[[A>>B]]": 1, "[[A>B]]": 1, "[[A=B]]": 0.5, "[[A<B]]": 0, "[[B>A]]": 0,
    "[[B>>A]]": 0, "My final verdict is: [[B>>A]].": 0, "Verdict: [[A]]": 1, "Verdict: A": 1, "**Verdict:** B.": 0,
    "Verdict: A, because it is shorter.": 1, "Winner: Response B": 0, "Verdict: assistant A\nDone": 1,
    "The better response is: B": 0, "verdict: a tie": 0.5, "Verdict: Tie": 0.5,
    "<verdict>A</verdict>": 1,
    "<verdict>tie</verdict>": 0.5, '{"winner": "B"}': 0,
    '```json\n{"reason": "[[A]] at first", "verdict": "tie"}\n```': 0.5, "[[A]]? No: [[B]]": 0, "<think>[[B]]</think>[[A]]": 1,
    "Verdict: A and B are equally good": None, "Verdict: A, B are alike": None, "Verdict: both": None, "A": None,
    "I cannot say.": None,    "<think>[[A]]": None, '{"winner": "both"}': None, "Verdict: Apples": None, "": None,
}  # fmt: skip


def test_grades_and_choices_are_read() -> None:
    assert {text: read_grade(text) for text in GRADES} == GRADES
    assert {text: read_comparison(text) for text in CHOICES} == CHOICES


def judge(server: Server, tmp_path: Path, **options: Any) -> Scorer:
    compares = options.get("mode") == "compare"
    (tmp_path / "template").write_text("{{ a }}|{{ b }}" if compares else "{{ response }}")
    endpoint = {"base_url": server.url, "model": "judge", "retries": 0, "concurrency": 4} | options.pop("endpoint", {})
    options = {"kind": "judge", "template": str(tmp_path / "template"), "endpoint": endpoint, **options}
    return build_scorer("it", build_scorer_config("it", options))


@pytest.mark.parametrize("reason", ["length", "content_filter", "repetition"])
def test_an_answer_that_is_cut_is_no_verdict(server: Server, tmp_path: Path, reason: str) -> None:
    server.answer = lambda path, body: completion("Score: 8", reason=reason)
    scorer = judge(server, tmp_path, garbage_retries=1)
    assert scorer.score([group_line("a", "x")]) == [[None]]
    assert scorer.notes["a"]["filtered" if reason == "content_filter" else "cut"] == 2


def test_a_grade_outside_the_scale_is_garbage(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, body: completion(f"Score: {body['messages'][0]['content']}")
    scorer = judge(server, tmp_path, scale=[1, 10], garbage_retries=0)
    assert scorer.score([group_line("a", "10", "11", "0")]) == [[10.0, None, None]]


def test_a_verdict_is_forced_by_a_schema(server: Server, tmp_path: Path) -> None:
    server.answer = lambda path, body: completion('{"reason": "fine", "score": 7}')
    scorer = judge(server, tmp_path, structured=True, scale=[1, 10], endpoint={"server": "vllm"})
    assert scorer.score([group_line("a", "x")]) == [[7.0]]
    schema = server.requests[0]["response_format"]["json_schema"]["schema"]
    assert [*schema["properties"]] == schema["required"] == ["reason", "score"]
    assert schema["properties"]["score"] == {"type": "number", "minimum": 1, "maximum": 10}
    with pytest.raises(ConfigError, match=r"scorers\.it\.structured = true; a server of kind transformers ignores JSON schemas"):
        judge(server, tmp_path, structured=True, endpoint={"server": "transformers"}).score([group_line("a", "x")])


@pytest.mark.parametrize(
    "contradictions, expected", [("tie", [0.25, 0.75, 0.5]), ("missing", [0.0, 1.0, None]), ("group_missing", [None] * 3)]
)
def test_orders_that_contradict_each_other(contradictions: Any, expected: list[float | None]) -> None:
    """Response 1 beats 0 in either order; against response 2, the first one wins."""
    notes: dict[str, Any] = {}
    scores = score_by_comparison(
        [group_line("a", "x", "y", "z"), group_line("b", "x", "y")],
        lambda pairs: [1.0 if 2 in (pair.a, pair.b) else float(pair.a == 1) for pair in pairs],
        tournament=False, both_orders=True, notes=notes, contradictions=contradictions,
    )  # fmt: skip
    assert scores == [expected, [0.0, 1.0]]
    assert notes["a"]["orders_agree"] == 1
    assert notes["a"]["orders_differ"] == 2
    assert (notes["a"]["first_place_won"], notes["a"]["second_place_won"]) == (5, 1)


def test_biases_and_cost_are_reported(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that says A unless B is at least twice as long."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        a, b = body["messages"][0]["content"].split("|")
        return completion(f"[[{'B' if len(b) >= 2 * len(a) else 'A'}]]")

    server.answer = answer
    groups = [group_line(f"g{index}", "x" * 10, "y" * 12, "z" * 30) for index in range(6)]
    path = write_lines(tmp_path / "groups.jsonl", groups)
    scorer = judge(server, tmp_path, mode="compare")
    options = {"kind": "judge", "mode": "compare", "template": scorer.config.template, "prompt_price": 1000.0}  # type: ignore[union-attr]
    options |= {"endpoint": {"base_url": server.url, "model": "judge"}}
    config = ScoreConfig(input=str(path), output=str(tmp_path / "scored"), scorers={"judge": options})
    score(config, Console(width=120))
    summary = json.loads((tmp_path / "scored" / "score.json").read_text())
    assert summary["judges"]["judge"] == {
        "decided": 36, "first_place_share": 24 / 36, "orders_agree_share": 12 / 18, "answers": 36, "prompt_tokens": 36,
        "completion_tokens": 108, "cost": pytest.approx(0.036),
    }  # fmt: skip
    assert summary["statistics"]["judge"]["length_correlation"] > 0.9
    assert summary["warnings"][-1] == "judge favours the first position: it wins 67% of 36 decided comparisons."
    said = capsys.readouterr().out
    assert "the first position wins 67% of 36 decided comparisons, both orders agree in 67%, 36 answers, 36 tokens read" in said
    assert "36 answers in" in said
    assert "Warning: judge favours the first position" in said


@pytest.mark.parametrize(
    "scores, warning",
    [
        ([[3.0, 3.0], [3.0, 3.0]], "same is 3 for every response"),
        ([[1.0, 1.0], [2.0, 2.0]], "same is the same for all responses of a group, in every group"),
        ([[2.0, 8.0], [8.0, 2.0]], None),
        ([[1.0, 4.0], [1.0, 4.0]], "same says little beyond the length of the response: r = 1.00"),
    ],
)
def test_rewards_that_teach_nothing_are_pointed_out(tmp_path: Path, scores: list[list[float]], warning: str | None) -> None:
    groups = [group_line(f"g{index}", "x", "yyyy", meta={"s": values}) for index, values in enumerate(scores)]
    path = write_lines(tmp_path / "groups.jsonl", groups)
    (tmp_path / "mine.py").write_text("def same(responses, group):\n    return group['meta']['s']\n")
    scorers = {"same": {"kind": "function", "function": f"{tmp_path / 'mine.py'}:same"}}
    score(ScoreConfig(input=str(path), output=str(tmp_path / "out"), scorers=scorers), Console(quiet=True))
    warnings = json.loads((tmp_path / "out" / "score.json").read_text())["warnings"]
    assert any(line.startswith(warning) for line in warnings) if warning else not warnings


def test_missing_scores_are_pointed_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "groups.jsonl", [group_line(f"g{index}", "x", "yy", "bad") for index in range(4)])
    (tmp_path / "mine.py").write_text("def odd(response):\n    return float('nan') if response == 'bad' else len(response) % 2\n")
    scorers = {"odd": {"kind": "function", "function": f"{tmp_path / 'mine.py'}:odd"}}
    config = ScoreConfig(input=str(path), output=str(tmp_path / "out"), scorers=scorers, missing="drop_response")
    assert all(len(record["responses"]) == 2 for record in read_lines(score(config, Console(quiet=True))))
    warnings = json.loads((tmp_path / "out" / "score.json").read_text())["warnings"]
    assert "odd is missing for 4 responses, 4 of them NaN or infinite." in warnings


def test_wrong_options_are_named(tmp_path: Path) -> None:
    for options, message in (
        ({"scale": [5]}, "scale = "),
        ({"contradictions": "missing"}, "it needs mode = compare"),
        ({"structured": True, "parse": "(x)"}, "remove one of them"),
        ({"prompt_price": -1.0}, "prompt_price"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_scorer_config("it", {"kind": "judge", "template": "t", "endpoint": {}, **options})
