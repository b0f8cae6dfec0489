"""`mpo evaluate` as a command: from sample files, from models, and refusals."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError, EvaluateConfig, HeldOutConfig, ModelConfig
from mpo_megatron.evaluate.evaluate import evaluate
from mpo_megatron.evaluate.samples import is_model
from tests.json_lines import write_lines
from tests.tiny import save_model


def group(name: str, prompt: Any, *responses: tuple[str, float | None]) -> dict[str, Any]:
    return {
        "group_id": name,
        "prompt": prompt,
        "responses": [
            {"text": text, "finish_reason": "stop", "num_tokens": len(text), **({} if reward is None else {"reward": reward})}
            for text, reward in responses
        ],
    }


def evaluation(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return result


@pytest.mark.parametrize(
    ("files", "model"),
    [
        (["config.json"], True),
        (["adapter_config.json"], True),
        (["checkpoints/x", "samples.jsonl", "metrics.jsonl"], True),  # a run that was evaluated on held-out groups
        (["samples.jsonl", "generate.json"], False),
        (["scored.jsonl", "score.json"], False),
    ],
)
def test_models_and_samples_are_told_apart(tmp_path: Path, files: list[str], model: bool) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert is_model(str(tmp_path)) is model


def test_files_of_scored_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = [{"role": "user", "content": "q"}]
    ours = [
        group("a", "q", ("long answer", 1.0), ("x", 3.0)),
        group("b", "r", ("yes", 2.0), ("no", None)),
        group("c", "s", ("?", 0.0)),
        group("d", "t", ("?", None)),
    ]
    # The same prompt, written as messages; in another order; one more prompt.
    theirs = [group("b", "r", ("yes", 2.0)), group("a", question, ("short", 2.0)), group("e", "u", ("!", 5.0))]
    arguments = [
        *("evaluate", "--output", str(tmp_path / "out"), "--name", "ours", "--num_resamples", "50"),
        *("--candidate", str(write_lines(tmp_path / "ours.jsonl", ours))),
        *("--baseline", str(write_lines(tmp_path / "theirs.jsonl", theirs))),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "; 2 without reward among the responses\n" in said
    assert "; 1 of the candidate's prompts left out: not in the baseline's file; 1 of the baseline's prompts" in said
    result = evaluation(tmp_path / "out")
    assert result["candidate"]["reward"]["value"] == pytest.approx((2.0 + 2.0 + 0.0) / 3)
    assert result["candidate"]["without_reward"] == 2
    assert result["candidate"]["prompts_without_reward"] == 1
    assert result["candidate"]["truncated"] == 0
    # a: 1 < 2, 3 > 2; b: a tie; c only here, e only there.
    comparison = result["comparison"]
    assert comparison["win_rate"]["value"] == pytest.approx((0.5 + 0.5) / 2)
    assert (comparison["prompts"], comparison["only_candidate"], comparison["only_baseline"]) == (2, 1, 1)
    assert (comparison["pairs"], comparison["ties"]) == (3, 1)
    # In prompt a, the shorter answer wins, so at equal length the candidate, whose answers are longer here, is no worse.
    assert comparison["length_controlled_win_rate"]["value"] >= comparison["win_rate"]["value"]
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 1000
    assert result["config"]["name"] == "ours"


def test_models_are_sampled_scored_and_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ID": "1", "COUNT": "4"}.items():  # one of four models in a Slurm array: all its prompts, not a quarter
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32}
    models = {name: save_model(tmp_path / name, seed=seed, **sizes) for name, seed in (("ours", 1), ("theirs", 2))}
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"group_id": f"p{i}", "prompt": f"Say {i}."} for i in range(4)])
    turns = write_lines(
        tmp_path / "question.jsonl",
        [
            {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
            {"question_id": 2, "category": "math", "turns": ["Add.", "Again."]},
        ],
    )
    alpaca = tmp_path / "alpaca_eval.json"
    alpaca.write_text(json.dumps([{"instruction": "Say 1.", "dataset": "koala"}]))
    options = {
        "generate": {"num_responses": 2, "max_tokens": 4, "empty": "keep"},
        "score": {"scorers": {"letters": {"kind": "regex", "pattern": "a|e|o"}}},
    }
    arguments = [
        *("evaluate", "--output", str(tmp_path / "out"), "--prompts", str(prompts), "--num_resamples", "20"),
        *("--candidate", str(models["ours"]), "--baseline", str(models["theirs"])),
        *("--generate", json.dumps(options["generate"]), "--score", json.dumps(options["score"])),
        *("--mt_bench", str(turns), "--alpaca_eval", str(alpaca)),
    ]
    assert main(arguments) == 0
    result = evaluation(tmp_path / "out")
    for role in ("candidate", "baseline"):
        assert result[role]["prompts"] == 4
        assert result[role]["responses"] == 8
        assert 0 <= result[role]["reward"]["value"] <= 1
    answers = [json.loads(line) for line in (tmp_path / "out/mt_bench/model_answer/candidate.jsonl").read_text().splitlines()]
    first_turns = [answer["choices"][0]["turns"][0] for answer in answers]
    # The second turn's prompt includes the first answer, each category at its own temperature.
    asked = [json.loads(line) for line in (tmp_path / "out/mt_bench/turn-2-temperature-0.7.jsonl").read_text().splitlines()]
    assert asked[0]["prompt"] == [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": first_turns[0]},
        {"role": "user", "content": "Again."},
    ]
    (cold,) = [json.loads(line) for line in (tmp_path / "out/mt_bench/turn-1-temperature-0.jsonl").read_text().splitlines()]
    assert cold["prompt"][0]["content"] == "Add."
    (output,) = json.loads((tmp_path / "out/alpaca_eval/model_outputs.json").read_text())
    assert (output["dataset"], output["instruction"], output["generator"]) == ("koala", "Say 1.", "candidate")
    # The same command again samples nothing; a benchmark can also use samples of the prompt file.
    stamp = (tmp_path / "out/candidate/samples/samples.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (tmp_path / "out/candidate/samples/samples.jsonl").stat().st_mtime_ns == stamp
    # Another candidate in the same folder uses neither this one's samples nor its benchmark answers.
    capsys.readouterr()
    assert main([str(models["theirs"]) if part == str(models["ours"]) else part for part in arguments]) == 2
    assert "out/candidate/samples" in capsys.readouterr().err
    questions = ["--generate", json.dumps(options["generate"]), "--alpaca_eval", str(alpaca)]
    assert main(["evaluate", "--output", str(tmp_path / "out"), "--candidate", str(models["theirs"]), *questions]) == 2
    assert "out/alpaca_eval/turn-1" in capsys.readouterr().err
    samples = str(tmp_path / "out/candidate/scored")
    assert main(["evaluate", "--output", str(tmp_path / "two"), "--candidate", samples, "--alpaca_eval", str(alpaca)]) == 0
    assert "benchmarks" in evaluation(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate"),
        (["--candidate", "/nowhere"], "candidate = /nowhere; no such"),
        (["--baseline", "FILE"], "no candidate"),
        (["--prompts", "FILE"], "prompts is set, but there is no candidate"),
        (["--score", '{"combine": "sum"}'], "score is set, but there is no candidate"),
        (["--alpaca_eval", "FILE"], "there is no model to answer"),
        (["--candidate", "UNSCORED"], "configure scorers"),
        (["--candidate", "MODEL"], "prompts = None"),
        (["--candidate", "FILE", "--baseline", "OTHER"], "group a has different prompts"),
        (["--candidate", "FILE", "--baseline", "ELSE"], "no prompt in common"),
        (["--candidate", "FILE", "--mt_bench", "FILE"], "question 1: not a question of mt_bench"),
        (["--candidate", "FILE", "--mt_bench", "TURNS"], "question 7 has no answer"),
        (["--candidate", "FILE", "--generate", '{"model": "x"}'], "generate.model"),
        (["--candidate", "FILE", "--score", '{"shard": "0/2"}'], "score.shard"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    files = {
        "FILE": write_lines(tmp_path / "file.jsonl", [group("a", "q", ("x", 1.0))]),
        "OTHER": write_lines(tmp_path / "other.jsonl", [group("a", "r", ("x", 1.0))]),
        "ELSE": write_lines(tmp_path / "else.jsonl", [group("b", "q", ("x", 1.0))]),
        "UNSCORED": write_lines(tmp_path / "unscored.jsonl", [group("a", "q", ("x", None))]),
        "TURNS": write_lines(tmp_path / "turns.jsonl", [{"question_id": 7, "category": "math", "turns": ["z", "y"]}]),
        "MODEL": tmp_path,
    }
    given = [str(files.get(option, option)) for option in options]
    assert main(["evaluate", "--output", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": {"scorers": {"x": {"kind": "match"}}}}, "prompts = None"),
        ({"prompts": "p"}, "configure scorers"),
        ({"generate": {"engine": "vllm"}}, "generate.engine = vllm needs the package vllm, which is not installed"),
        (
            {"prompts": "p", "score": {"scorers": {"x": {"kind": "function", "function": "none.py:f"}}}},
            "score.scorers.x.function = none.py:f; there is no file none.py",
        ),
    ],
)
def test_stages_that_cannot_work_are_named_before_held_out_groups_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    held_out = HeldOutConfig(groups="g", model=ModelConfig(checkpoint="m"))
    config = EvaluateConfig(output=str(tmp_path / "out"), candidate=str(tmp_path), held_out=held_out, **options)
    with pytest.raises(ConfigError, match=re.escape(message)):
        evaluate(config)
    assert not (tmp_path / "out").exists()
