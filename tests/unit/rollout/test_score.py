"""`mpo score` end to end: combination, missing scores, resuming; `mpo prepare` reads its output."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from rich.console import Console

from mpo_megatron.config import ConfigError, PrepareConfig, ScoreConfig, load_yaml, parse
from mpo_megatron.config.score import RegexScorer, build_scorer_config
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import load_groups
from mpo_megatron.files import DataError
from mpo_megatron.rollout.records import Record, read_lines
from mpo_megatron.rollout.score import _score_chunk, score, standardize
from mpo_megatron.rollout.scorers import Scorer, Scores
from tests.json_lines import write_lines
from tests.unit.rollout.conftest import group_line

SCRIPT = """
import pathlib
def length(response, group):
    log, stop = (pathlib.Path(__file__).with_name(name) for name in ("log", "stop"))
    if stop.exists() and group["group_id"] == stop.read_text():
        raise RuntimeError("stopped")
    with log.open("a") as file:
        file.write(group["group_id"] + "\\n")
    return None if response == "unscored" else len(response)
"""


def run(config: ScoreConfig) -> list[dict[str, Any]]:
    return list(read_lines(score(config, Console(quiet=True))))


@pytest.fixture
def config(tmp_path: Path) -> ScoreConfig:
    (tmp_path / "mine.py").write_text(SCRIPT)
    groups = [group_line(f"g{index}", "x" * index, "yes", "1,000", reference_answer="yes") for index in range(1, 8)]
    scorers = {
        "length": {"kind": "function", "function": f"{tmp_path / 'mine.py'}:length", "weight": 0.5},
        "right": {"kind": "match", "weight": -2},
    }
    path = write_lines(tmp_path / "groups.jsonl", groups)
    return ScoreConfig(input=str(path), output=str(tmp_path / "out"), scorers=scorers, chunk_groups=2)


def test_weighted_sum(config: ScoreConfig) -> None:
    for index, record in enumerate(run(config), start=1):
        assert [response["scores"] for response in record["responses"]] == [
            {"length": float(index), "right": 0.0},
            {"length": 3.0, "right": 1.0},
            {"length": 5.0, "right": 0.0},
        ]
        assert [response["reward"] for response in record["responses"]] == [0.5 * index, 1.5 - 2, 2.5]
    summary = json.loads((Path(config.output) / "score.json").read_text())
    assert {name: item["weight"] for name, item in summary["identity"]["scorers"].items()} == {"length": 0.5, "right": -2.0}
    assert summary["best_reward"] == pytest.approx(statistics.fmean(max(0.5 * index, 2.5) for index in range(1, 8)))
    assert summary["statistics"]["right"]["mean"] == pytest.approx(1 / 3)


def test_standardised_within_the_group(config: ScoreConfig) -> None:
    for index, record in enumerate(run(dataclasses.replace(config, combine="zscore")), start=1):
        mean, deviation = (index + 8) / 3, statistics.pstdev([index, 3, 5])
        right = [-1 / 3 / statistics.pstdev([0, 1, 0]), 2 / 3 / statistics.pstdev([0, 1, 0])]
        expected = [
            0.5 * (value - mean) / deviation - 2 * right[value_is_right] for value, value_is_right in ((index, 0), (3, 1), (5, 0))
        ]
        assert [response["reward"] for response in record["responses"]] == pytest.approx(expected)
    assert standardize([0.1 + 0.2, 0.30000000000000004]) == [0.0, 0.0]


def test_an_interrupted_run_continues_to_the_same_file(
    config: ScoreConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(dataclasses.replace(config, output=str(tmp_path / "whole")))
    (tmp_path / "log").unlink()
    (tmp_path / "stop").write_text("g6")
    with pytest.raises(DataError, match=r"group g6, response 0: raised RuntimeError: stopped"):
        run(config)
    partial = Path(config.output) / "scored.jsonl"
    assert [record["group_id"] for record in read_lines(partial)] == ["g1", "g2", "g3", "g4"]
    partial.write_bytes(partial.read_bytes() + b'{"group_id": "g5", "resp')
    (tmp_path / "stop").unlink()
    (tmp_path / "log").unlink()
    capsys.readouterr()
    run(config)
    assert "scoring: 3 groups in" in capsys.readouterr().err  # the rate is that of the three, not of all seven
    assert {*(tmp_path / "log").read_text().split()} == {"g5", "g6", "g7"}
    assert partial.read_bytes() == (tmp_path / "whole" / "scored.jsonl").read_bytes()


@pytest.mark.parametrize("missing", ["drop_response", "drop_group"])
def test_shards_give_the_same_file(
    config: ScoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Literal["drop_response", "drop_group"]
) -> None:
    lines = Path(config.input).read_text().replace("xxx", "unscored")  # a response of three groups has no score
    Path(config.input).write_text(lines + json.dumps(group_line("last", "unscored", "unscored")) + "\n")
    config = dataclasses.replace(config, missing=missing)
    whole, cut = Path(config.output), dataclasses.replace(config, output=str(tmp_path / "cut"))
    score(config, Console(quiet=True))
    (tmp_path / "log").unlink()
    assert score(dataclasses.replace(cut, shard="2/3"), Console(quiet=True)).name == "scored-00002-of-00003.jsonl"
    assert [*(tmp_path / "log").read_text().split()] == ["g3"] * 3 + ["g6"] * 3
    score(dataclasses.replace(cut, shard="1/3"), Console(quiet=True))
    assert not (tmp_path / "cut" / "scored.jsonl").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    joined = score(cut, Console(quiet=True))
    assert joined.read_bytes() == (whole / "scored.jsonl").read_bytes()
    mine, theirs = (json.loads((folder / "score.json").read_text()) for folder in (whole, joined.parent))
    same = {"config": None, "digest": None}
    assert mine | same == theirs | same
    assert mine["counts"]["groups_dropped"] >= 1


def with_gaps(config: ScoreConfig) -> ScoreConfig:
    groups = [group_line("a", "x", "unscored", "yy"), group_line("b", "x", "yy"), group_line("c", "unscored", "unscored")]
    write_lines(Path(config.input), groups)
    return dataclasses.replace(config, scorers={"length": config.scorers["length"]})


def test_missing_scores_stop_the_command_after_the_others(config: ScoreConfig) -> None:
    config = with_gaps(config)
    with pytest.raises(DataError, match=r"scores are missing: 2 groups from length; the first: group a from length"):
        run(config)
    assert [record["group_id"] for record in read_lines(Path(config.output) / "scored.jsonl")] == ["b"]
    assert not (Path(config.output) / "score.json").exists()


def test_missing_scores_are_dropped_and_counted(config: ScoreConfig, tmp_path: Path) -> None:
    config = with_gaps(config)
    by_response = run(dataclasses.replace(config, missing="drop_response"))
    assert [(record["group_id"], len(record["responses"])) for record in by_response] == [("a", 2), ("b", 2)]
    assert by_response[0]["missing"] == {"length": 1}
    summary = json.loads((Path(config.output) / "score.json").read_text())
    assert (summary["missing_scores"], summary["counts"]["groups_dropped"]) == ({"length": 3}, 1)
    by_group = run(dataclasses.replace(config, missing="drop_group", output=str(tmp_path / "other")))
    assert [record["group_id"] for record in by_group] == ["b"]


def test_that_nothing_could_be_scored_is_said_with_the_reasons(tmp_path: Path) -> None:
    source = tmp_path / "groups.jsonl"
    scorers = {"answer": {"kind": "match"}}
    config = ScoreConfig(input=str(source), output=str(tmp_path / "out"), scorers=scorers, missing="drop_response")
    write_lines(source, [group_line("a", "x", "y")])
    with pytest.raises(DataError, match=r"has a reward: 2 scores from answer are missing; 1 × no_reference \(answer\)"):
        score(config, Console(quiet=True))
    source.write_text("")
    with pytest.raises(DataError, match=r"groups.jsonl: it holds no group; check the stage that wrote it\.$"):
        score(dataclasses.replace(config, output=str(tmp_path / "other")), Console(quiet=True))


def test_one_id_for_two_groups_is_refused(config: ScoreConfig) -> None:
    """Lines are identified by their ids: the second group would be lost, and the first one written twice."""
    write_lines(Path(config.input), [group_line("a", "x"), group_line("b", "y"), group_line("a", "z")])
    with pytest.raises(DataError, match=r"groups\.jsonl: group a appears twice; give each group a unique id"):
        run(dataclasses.replace(config, scorers={"length": config.scorers["length"]}))
    assert not (Path(config.output) / "score.json").exists()


def test_other_scorers_in_the_same_folder_are_refused(config: ScoreConfig) -> None:
    run(config)
    with pytest.raises(ConfigError, match="made with another scorers"):
        run(dataclasses.replace(config, scorers={"right": {"kind": "match"}}))
    with pytest.raises(ConfigError, match="made with another combine"):
        run(dataclasses.replace(config, combine="zscore"))


def test_what_is_scored_can_be_prepared(config: ScoreConfig, tmp_path: Path, model_folder: Path) -> None:
    records = run(config)
    prepare(
        PrepareConfig(
            input=str(Path(config.output) / "scored.jsonl"), output=str(tmp_path / "data"), tokenizer=str(model_folder)
        ),
        Console(quiet=True),
    )
    prepared = load_groups(tmp_path / "data")
    assert prepared.group_ids() == [record["group_id"] for record in records]
    for group, record in zip(prepared, records, strict=True):
        assert group.rewards is not None
        assert group.rewards.tolist() == [response["reward"] for response in record["responses"]]
        assert list(group.response_texts) == [response["text"] for response in record["responses"]]


@pytest.mark.parametrize("way", ["file", "arguments"])
def test_texts_in_options_are_taken_as_they_stand(tmp_path: Path, way: str) -> None:
    """A pattern that would parse as a list or a boolean stays text."""
    scorers = {name: {"kind": "regex", "pattern": pattern} for name, pattern in (("x", "[a-z]"), ("y", "no"))}
    options = {"input": "in", "output": "out", "scorers": scorers}
    if way == "file":
        path = tmp_path / "score.yaml"
        path.write_text(yaml.safe_dump(options))
        config = load_yaml(ScoreConfig, path)
    else:
        config = parse(ScoreConfig, ["--input", "in", "--output", "out", "--scorers", json.dumps(scorers)])
    assert config.scorers == scorers
    built = [build_scorer_config(name, config.scorers[name]) for name in scorers]
    assert [scorer.pattern for scorer in built if isinstance(scorer, RegexScorer)] == ["[a-z]", "no"]


@pytest.mark.parametrize("prompt", ["What?", [{"role": "user", "content": "What?"}]])
def test_a_text_is_a_question(prompt: object, tmp_path: Path) -> None:
    line = {"group_id": "1", "prompt": prompt, "responses": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    score(
        ScoreConfig(
            input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"), scorers={"x": {"kind": "regex", "pattern": "a"}}
        )
    )
    scored = json.loads((tmp_path / "out" / "scored.jsonl").read_text().splitlines()[0])
    assert scored["prompt"] == [{"role": "user", "content": "What?"}]


def test_scores_beyond_every_sum_are_missing() -> None:
    class Huge(Scorer):
        def score(self, groups: Sequence[Record]) -> Scores:
            return [[1e308, -1e30, None, math.inf]]

    record: Record = {"group_id": "1", "responses": [{"text": "a"} for _ in range(4)]}
    (missing,) = _score_chunk([record], [Huge("huge", RegexScorer(pattern="a"))])
    assert [response["scores"]["huge"] for response in record["responses"]] == [None, -1e30, None, None]
    assert missing == {"huge": 3}
    assert record["notes"] == {"huge": {"too_large": 1}}


def test_a_reward_made_too_large_by_weights_is_refused(tmp_path: Path) -> None:
    line = {"group_id": "1", "prompt": "What?", "responses": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    scorer = {"kind": "regex", "pattern": "a", "found": 1e15, "weight": 1e15}
    scorers = {"one": scorer, "two": scorer}
    with pytest.raises(DataError, match=r"group 1: the weighted sum of its scores is 2e\+30; a reward must be within"):
        score(ScoreConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"), scorers=scorers))


@pytest.mark.parametrize("prompt", [None, 3, [], ["text"], {"role": "user"}, [{"content": "no role"}]])
def test_a_prompt_that_is_none(prompt: object, tmp_path: Path) -> None:
    line = {"group_id": "1", "prompt": prompt, "responses": [{"text": "a"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    options = ScoreConfig(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out"), scorers={"x": {"kind": "match"}})
    with pytest.raises(DataError, match=r"group 1: prompt is neither a text nor messages"):
        score(options)
