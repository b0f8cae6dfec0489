"""`mpo generate` end to end: kills, shards, policies, faults; the output is the same in all cases."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, GenerateConfig
from mpo_megatron.files import DataError
from mpo_megatron.rollout import generate as stage
from mpo_megatron.rollout.engines import Generation, Prompt, Response, Sampling
from mpo_megatron.rollout.records import read_lines
from tests.json_lines import write_lines


def run(config: GenerateConfig) -> Path:
    return stage.generate(config, Console(quiet=True))


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> GenerateConfig:
    prompts = [
        {"id": f"p{index}", "prompt": f"Question {index} " * (1 + index % 4), "reference_answer": index} for index in range(20)
    ]
    path = write_lines(tmp_path / "prompts.jsonl", prompts)
    return GenerateConfig(
        prompts=str(path), model=str(model_folder), output=str(tmp_path / "out"), num_responses=2, max_tokens=8, empty="keep"
    )


def test_one_line_a_prompt_in_the_order_of_the_file(config: GenerateConfig) -> None:
    samples = run(config)
    records = list(read_lines(samples))
    assert [record["group_id"] for record in records] == [f"p{index}" for index in range(20)]
    assert [record["reference_answer"] for record in records] == [*range(20)]
    assert all(len(record["responses"]) == 2 for record in records)
    assert all(
        set(response) == {"text", "finish_reason", "num_tokens", "seed", "token_ids"}
        for record in records
        for response in record["responses"]
    )
    counts = json.loads((samples.parent / "generate.json").read_text())["counts"]
    assert (counts["groups"], counts["responses"]) == (20, 40)
    before = samples.stat()
    run(config)  # complete: nothing to do
    assert samples.stat() == before


def test_shards_give_the_same_file(config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(config).read_bytes()
    cut = dataclasses.replace(config, output=str(tmp_path / "cut"))
    assert run(dataclasses.replace(cut, shard="2/3")).name == "samples-00002-of-00003.jsonl"
    for name, value in {"TASK_ID": "4", "TASK_MIN": "4", "TASK_STEP": "2", "TASK_COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    assert run(cut).name == "samples-00000-of-00003.jsonl"
    assert not (tmp_path / "cut" / "generate.json").exists()
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "6")
    joined = run(cut)
    assert joined.name == "samples.jsonl"
    assert joined.read_bytes() == whole
    mine, theirs = (json.loads((Path(item.output) / "generate.json").read_text()) for item in (config, cut))
    assert mine["counts"] == theirs["counts"]
    assert mine["samples_digest"] == theirs["samples_digest"]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_file(config: GenerateConfig, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "many.jsonl", [{"prompt": f"Question {index}"} for index in range(300)])
    config = dataclasses.replace(config, prompts=str(prompts), max_tokens=32)
    whole = run(dataclasses.replace(config, output=str(tmp_path / "whole"))).read_bytes()
    command = [sys.executable, "-m", "mpo_megatron.cli", "generate", "--prompts", config.prompts, "--model", config.model]
    command += ["--output", config.output, "--num_responses", "2", "--max_tokens", "32", "--empty", "keep"]
    command += ["--transformers.batch_size", "4", "--transformers.device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    partial = Path(config.output) / "samples.jsonl"
    while process.poll() is None and not (partial.is_file() and partial.stat().st_size > 5000):
        time.sleep(0.01)
    assert process.poll() is None  # killed in the middle
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = partial.read_bytes()
    assert 0 < done.count(b"\n") < 300
    assert not (partial.parent / "generate.json").exists()
    partial.write_bytes(done + b'{"group_id": "p')  # as if killed within a line
    drawn = []
    original = stage.answer

    def spy(engine: Any, window: Sequence[Any], *rest: Any) -> Iterator[Any]:
        drawn.extend(group.record["group_id"] for group in window)
        return original(engine, window, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "answer", spy)
        assert run(config).read_bytes() == whole
    assert len(drawn) == 300 - done.count(b"\n")


class Scripted:
    """An engine that answers with a test's function of (group id, index, attempt)."""

    def __init__(self, script: Any, sampling_seed: int = 1234) -> None:
        self.script, self.asked = script, []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        from mpo_megatron.rollout.engines import response_seed

        for prompt in reversed(prompts):
            names = {
                response_seed(sampling.seed, prompt.group_id, index, attempt): (index, attempt)
                for index in range(sampling.num_responses)
                for attempt in range(5)
            }
            responses, error = [], None
            for seed in prompt.seeds:
                self.asked.append((prompt.group_id, *names[seed]))
                text = self.script(prompt.group_id, *names[seed])
                if text is None:
                    error = "lost"
                else:
                    responses.append(Response(text=text, finish_reason="stop", num_tokens=2, seed=seed))
            yield Generation(group_id=prompt.group_id, responses=tuple(responses), error=error)

    def close(self) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, script: Any) -> Scripted:
    engine = Scripted(script)
    monkeypatch.setattr(stage, "_load_engine", lambda *_: engine)
    return engine


def test_empty_and_equal_responses_are_drawn_again(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(group_id: str, index: int, attempt: int) -> str:
        if group_id == "p3":
            return " \n" if attempt < 2 and index == 1 else f"answer {index}"  # the third try succeeds
        if group_id == "p4":
            return "same"  # for ever
        return f"answer {index}"

    engine = use(monkeypatch, script)
    config = dataclasses.replace(config, empty="resample", duplicates="resample", num_responses=3)
    records = {record["group_id"]: record for record in read_lines(run(config))}
    assert [response["text"] for response in records["p3"]["responses"]] == ["answer 0", "answer 1", "answer 2"]
    assert [response.get("attempt", 0) for response in records["p3"]["responses"]] == [0, 2, 0]
    assert [response.get("attempt", 0) for response in records["p4"]["responses"]] == [0, 2, 2]  # kept in the end, counted
    assert len(engine.asked) == 20 * 3 + 2 + 4
    counts = json.loads((Path(config.output) / "generate.json").read_text())["counts"]
    assert (counts["resampled"], counts["duplicates"], counts["empty"]) == (6, 2, 0)


def test_several_temperatures_in_one_run(config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Response k equals response k of a run at its own temperature; a run that lost some requests them at the right
    temperature."""
    hot, cold = (
        dataclasses.replace(config, num_responses=4, temperature=value, output=str(tmp_path / str(value))) for value in (1.0, 0.5)
    )
    mixed = dataclasses.replace(config, num_responses=4, temperatures=[1.0, 0.5])
    expected = [[list(read_lines(run(item))) for item in (hot, cold)][index] for index in (0, 1)]
    for index, record in enumerate(read_lines(run(mixed))):
        assert [response["temperature"] for response in record["responses"]] == [1.0, 0.5, 1.0, 0.5]
        for place, response in enumerate(record["responses"]):
            assert response["text"] == expected[place % 2][index]["responses"][place]["text"]
    asked = []

    class Recording(Scripted):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
            asked.append((sampling.temperature, sum(len(prompt.seeds) for prompt in prompts)))
            return super().generate(prompts, sampling)

    engine = Recording(lambda group_id, index, attempt: None if (group_id, index) == ("p3", 1) else f"answer {index}")
    monkeypatch.setattr(stage, "_load_engine", lambda *_: engine)
    again = dataclasses.replace(mixed, output=str(tmp_path / "again"))
    with pytest.raises(DataError, match="1 of 20 prompts failed"):
        run(again)
    engine.script = lambda group_id, index, attempt: f"answer {index}"
    run(again)
    assert asked == [(1.0, 40), (0.5, 40), (0.5, 1)]
    with pytest.raises(ConfigError, match=r"temperature = 0\.3, temperatures = .*remove one of them"):
        dataclasses.replace(mixed, temperature=0.3)


def test_empty_and_equal_responses_are_dropped(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda group_id, index, attempt: {"p1": "", "p2": "same"}.get(group_id, f"answer {index}"))
    config = dataclasses.replace(config, empty="drop", duplicates="drop")
    records = {record["group_id"]: record for record in read_lines(run(config))}
    assert (records["p1"]["responses"], records["p1"]["dropped"]) == ([], {"empty": 2})
    assert ([response["text"] for response in records["p2"]["responses"]], records["p2"]["dropped"]) == (
        ["same"],
        {"duplicates": 1},
    )
    counts = json.loads((Path(config.output) / "generate.json").read_text())["counts"]
    assert counts["dropped"] == {"empty": 2, "duplicates": 1}


def test_failures_are_kept_and_tried_again(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = {("p2", 1), ("p5", 0), ("p5", 1)}
    use(monkeypatch, lambda group_id, index, attempt: None if (group_id, index) in lost else f"answer {index}")
    output = Path(config.output)
    with pytest.raises(DataError, match=r"2 of 20 prompts failed: 2 × lost.*again to retry"):
        run(config)
    assert len(list(read_lines(output / "samples.jsonl"))) == 18
    failures = {line["group_id"]: line for line in read_lines(output / "failures.jsonl")}
    assert {key: (line["error"], len(line["responses"])) for key, line in failures.items()} == {
        "p2": ("lost", 1),
        "p5": ("lost", 0),
    }
    engine = use(monkeypatch, lambda group_id, index, attempt: f"answer {index}")
    records = list(read_lines(run(config)))
    assert sorted(engine.asked) == [("p2", 1, 0), ("p5", 0, 0), ("p5", 1, 0)]  # received responses were not requested again
    assert all([response["text"] for response in record["responses"]] == ["answer 0", "answer 1"] for record in records)
    assert not (output / "failures.jsonl").exists()


def test_a_kill_leaves_what_arrived_of_failed_groups(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """failures.jsonl always contains the responses that were paid for."""
    use(monkeypatch, lambda group_id, index, attempt: None if (group_id, index) == ("p2", 1) else f"answer {index}")
    original, seen = os.replace, []

    def replace(source: Path, target: Path) -> None:
        if target.name == "failures.jsonl":
            seen.append([len(line["responses"]) for line in read_lines(source)])
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    run(dataclasses.replace(config, max_failed=0.05))
    assert seen == [[1]]


def test_some_failures_may_be_allowed(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda group_id, index, attempt: None if group_id == "p2" else "text")
    assert len(list(read_lines(run(dataclasses.replace(config, max_failed=0.05))))) == 19
    assert [line["group_id"] for line in read_lines(Path(config.output) / "failures.jsonl")] == ["p2"]


def test_another_question_in_the_same_folder_is_refused(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, lambda *_: "text")
    run(config)
    with pytest.raises(ConfigError, match=r"made with another sampling .*choose another folder"):
        run(dataclasses.replace(config, temperature=0.5))
    write_lines(Path(config.prompts), [{"prompt": "another"}])
    with pytest.raises(ConfigError, match="made with another prompts"):
        run(config)


def test_faults_show_before_a_model_loads(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_load_engine", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"max_tokens = 5000; .*model's 4096 positions; choose at most"):
        run(dataclasses.replace(config, max_tokens=5000))
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ConfigError, match=r"engine = vllm needs the package vllm, which is not installed: pip install"):
            run(dataclasses.replace(config, engine="vllm"))
    with pytest.raises(ConfigError, match=r"endpoint\.base_url is missing"):
        run(dataclasses.replace(config, engine="openai"))
    with pytest.raises(ConfigError, match="no such folder"):
        run(dataclasses.replace(config, model="nowhere"))
    with pytest.raises(ConfigError, match=r"shard = 3/3; parts are counted from 0"):
        dataclasses.replace(config, shard="3/3")


@pytest.mark.slow
def test_our_own_checkpoint_is_exported_once(config: GenerateConfig, tmp_path: Path, model_folder: Path) -> None:
    from mpo_megatron.model.convert_import import import_from_hf

    import_from_hf(model_folder, tmp_path / "run" / "checkpoints" / "step_00000003", vocab_multiple=128)
    direct = run(config).read_bytes()
    ours = dataclasses.replace(config, model=str(tmp_path / "run"), output=str(tmp_path / "ours"))
    assert run(ours).read_bytes() == direct
    exported = tmp_path / "run" / "checkpoints" / "step_00000003" / "exported"
    before = (exported / "model.safetensors").stat().st_mtime_ns
    run(dataclasses.replace(ours, output=str(tmp_path / "again")))
    assert (exported / "model.safetensors").stat().st_mtime_ns == before
