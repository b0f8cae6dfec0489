"""Files, services, facts and samples of a run: written once, continued when the run resumes, without secrets."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_megatron.config import ConfigError, DataConfig, LoggingConfig, ModelConfig, TrainConfig, to_dict
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.outcomes import outcome_files, read_outcomes
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.files.digests import unseal_line
from mpo_megatron.losses import build_params
from mpo_megatron.train.objective import Logps
from mpo_megatron.train.throughput import peak_flops
from mpo_megatron.train.tracking import SampleTable, build_trackers, check_installed
from mpo_megatron.train.tracking.facts import earlier_starts, git_revision, record_start
from mpo_megatron.train.tracking.files import JsonlTracker
from mpo_megatron.train.tracking.outcomes import evenly_spaced, forget_later, group_outcomes, log_outcomes
from mpo_megatron.train.tracking.services import MlflowTracker, WandbTracker, flatten, markdown_table

TABLE = SampleTable(columns=("response", "reward"), rows=(("yes | no\n<b>", 0.5), ("maybe", None)))


def config(folder: Path, **logging: Any) -> TrainConfig:
    return TrainConfig(
        output=str(folder), model=ModelConfig(checkpoint="m"), data=DataConfig(train="d"), logging=LoggingConfig(**logging)
    )


def held_out(folder: Path) -> PreparedGroups:
    groups = [
        TokenizedGroup(
            group_id=f"g{index}",
            prompt_tokens=np.arange(3, dtype=np.int32),
            response_tokens=tuple(np.arange(2 + k, dtype=np.int32) for k in range(size)),
            rewards=np.array(rewards, dtype=np.float64),
            prompt_text=f"prompt {index}",
            response_texts=tuple(f"answer {k}" for k in range(size)),
        )
        for index, (size, rewards) in enumerate([(3, [1, 0, 0]), (2, [1, 1]), (2, [0, 2])])
    ]
    write_groups(folder, groups, tokenizer_digest="t", vocab_size=9, end_token_ids=[], reward_kind="scores")
    return load_groups(folder)


def test_resumed_files_drop_later_and_broken_lines(tmp_path: Path) -> None:
    first = JsonlTracker(tmp_path, start_step=0)
    for step in range(1, 5):
        first.log(step, {"loss": float(step), "margin": math.nan})
        first.log_samples(step, TABLE)
    first.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write('{"step": 5, "response": "ü'.encode()[:-1])  # in the middle of a character
    resumed = JsonlTracker(tmp_path, start_step=2)
    resumed.log(3, {"loss": 30.0})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[0]["margin"] is None
    samples = [unseal_line(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in samples] == [1, 1, 2, 2]
    assert samples[0] == {"step": 1, "response": "yes | no\n<b>", "reward": 0.5}


def test_texts_with_separators_and_damaged_lines_do_not_keep_a_run_from_going_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = SampleTable(columns=("response",), rows=(("one\u2028two\x85three\x0bfour\r",),))
    first = JsonlTracker(tmp_path, start_step=0)
    for step in (1, 2):
        first.log(step, {"loss": float(step)})
        first.log_samples(step, odd)
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\0" * 40 + b"\n" + path.read_bytes() + b"[1]\n{}\n")  # after a machine crashed
    JsonlTracker(tmp_path, start_step=2).close()
    assert f"{path}: 3 lines are damaged" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert [unseal_line(line) for line in (tmp_path / "samples.jsonl").read_bytes().splitlines()] == [
        {"step": step, "response": odd.rows[0][0]} for step in (1, 2)
    ]


def test_tensorboard_keeps_continues_and_shows_samples(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logging = LoggingConfig(tensorboard=True)
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = build_trackers(logging, tmp_path, {"seed": 1}, {"start": start}, start_step=start, total_steps=4)
        for step in steps:
            trackers[2].log(step, {"loss": 10.0 * start + step})
            trackers[2].log_samples(step, TABLE)
        for tracker in trackers:
            tracker.close()
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]
    shown = accumulator.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| yes \\| no ⏎ &lt;b> | 0.500 |" in shown


def test_wandb_works_offline_and_resumes_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for start in (0, 2):
        tracker = WandbTracker(tmp_path, LoggingConfig(wandb_project="test"), {"seed": 1}, {"step": start, "host": f"h{start}"})
        tracker.log(start + 1, {"loss": 1.0})
        tracker.log_samples(start + 1, TABLE)
        assert tracker.run.config["run"]["host"] == f"h{start}"
        tracker.close()
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    tables = sorted(tmp_path.rglob("samples_*.table.json"))
    assert json.loads(tables[0].read_text())["data"] == [["yes | no\n<b>", 0.5], ["maybe", None]]


@pytest.mark.slow
def test_mlflow_works_without_a_server_and_continues_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logging = LoggingConfig(mlflow_experiment="test")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = MlflowTracker(tmp_path, logging, {"seed": 1, "optimizer": {"lr": 0.5}}, {"step": start})
        for step in steps:
            tracker.log(step, {"loss": float(step), "lr": 0.1})
        tracker.log(start, {"eval/loss": 1.0})
        tracker.log_samples(start, TABLE)
        tracker.close()
    client, run_id = tracker.client, tracker.run_id
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
    ]
    assert [metric.step for metric in client.get_metric_history(run_id, "eval/loss")] == [0, 2]
    run = client.get_run(run_id)
    assert run.data.params == {"seed": "1", "optimizer.lr": "0.5"}
    assert (run.data.tags["run.step"], run.info.status) == ("2", "FINISHED")
    saved = json.loads(Path(client.download_artifacts(run_id, "samples/step_00000002.json")).read_text())
    assert saved["data"] == [["yes | no\n<b>", 0.5], ["maybe", None]]

    def unreachable(*arguments: object, **options: object) -> None:
        raise tracker.failure("no route to host")

    monkeypatch.setattr(client, "log_batch", unreachable)
    for step in (5, 6):
        tracker.log(step, {"loss": 1.0})
    assert capsys.readouterr().out.count("no route to host") == 1
    monkeypatch.setattr(client, "set_terminated", unreachable)
    tracker.broken = False  # the server went away only after the last step
    tracker.close()
    assert "no route to host" in capsys.readouterr().out
    monkeypatch.setattr(type(client), "update_run", unreachable)
    resumed = MlflowTracker(tmp_path, logging, {}, {"step": 6})
    resumed.log(7, {"loss": 1.0})
    resumed.close()
    monkeypatch.setattr(type(client), "get_experiment_by_name", unreachable)
    with pytest.raises(ConfigError, match=r"mlflow_experiment = test; MLflow cannot create this run \(no route to host"):
        MlflowTracker(tmp_path / "new", logging, {}, {"step": 0})
    assert capsys.readouterr().out.count("no route to host") == 1


@pytest.mark.parametrize(
    ("logging", "field", "package"),
    [
        (LoggingConfig(wandb_project="test"), "wandb_project", "wandb"),
        (LoggingConfig(mlflow_experiment="test"), "mlflow_experiment", "mlflow-skinny"),
        (LoggingConfig(tensorboard=True), "tensorboard", "tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused_early(
    logging: LoggingConfig, field: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed(LoggingConfig())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"logging\.{field} is set, but .* is not installed: pip install {package}"):
        check_installed(logging)


def test_passwords_are_refused_before_they_are_saved() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as error:
        LoggingConfig(mlflow_experiment="x", mlflow_uri="https://me:hunter2@host/")
    assert "hunter2" not in str(error.value)
    with pytest.raises(ConfigError, match="mlflow_experiment"):
        LoggingConfig(mlflow_uri="https://host/")


def test_markdown_keeps_its_columns() -> None:
    lines = markdown_table(TABLE).splitlines()
    assert lines == ["| response | reward |", "| --- | --- |", "| yes \\| no ⏎ &lt;b> | 0.500 |", "| maybe |  |"]


def test_nested_options_get_dotted_names() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": "x"}) == {"a.b": "1", "a.c.d": "null", "e": "x"}


def test_every_start_is_recorded_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run, data = tmp_path / "run", held_out(tmp_path / "data")
    run.mkdir()
    described = config(run)
    for step in (0, 5):
        facts = record_start(
            run,
            described,
            step=step,
            total_steps=9,
            train=data,
            held_out=None,
            model_digest="m",
            reference_digest="r",
            data_parallel=4,
        )
        assert facts["packages"]["torch"].startswith(torch.__version__.partition("+")[0])  # +cu130 is not in PyPI's name
    whole = (run / "run.json").read_bytes()
    (run / "run.json").write_bytes(whole[: len(whole) // 2])
    assert earlier_starts(run / "run.json") == []
    (run / "run.json").write_bytes(whole)
    text = (run / "run.json").read_text()
    saved = json.loads(text)
    assert "hunter2" not in text
    assert saved["config"] == to_dict(described)
    assert [start["step"] for start in saved["starts"]] == [0, 5]
    assert saved["starts"][1]["layout"]["world_size"] == 4
    assert saved["starts"][1]["job"]["SLURM_JOB_ID"] == "77"
    assert saved["starts"][1]["digests"]["train"] == data.info.data_digest


def test_git_revision_of_tracked_code_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        done = subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package, installed = tmp_path / "code", tmp_path / "site"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    assert git_revision(package) is None
    git("init", "-q")
    git("add", "code")
    git("commit", "-qm", "x")
    assert git_revision(package) == {"revision": git("rev-parse", "HEAD"), "modified": False}
    assert git_revision(installed) is None
    (package / "__init__.py").write_text("changed")
    assert git_revision(package) == {"revision": git("rev-parse", "HEAD"), "modified": True}


def outcomes(data: PreparedGroups, policy: list[list[float]], reference: list[list[float]]) -> Any:
    def select(table: Any) -> Any:
        return np.array([True, False, True]), table.valid & (np.arange(table.valid.shape[1]) != 1)[None]

    shape = RowShape(row_tokens=64, layout="shared", multiple=1, num_replicas=1, replica=0, pair_weight=0.0)
    batch = build_step(0, data, np.arange(3), select, shape)
    logps = [Logps(response=torch.tensor(values, dtype=torch.float64)) for values in (policy, reference)]
    return group_outcomes(batch, *logps, build_params("mpo", {}))


def test_outcomes_and_samples_of_held_out_groups(tmp_path: Path) -> None:
    data = held_out(tmp_path / "data")
    tables: list[tuple[int, SampleTable]] = []

    class Keep:
        def log_samples(self, step: int, samples: SampleTable) -> None:
            tables.append((step, samples))

    reference = [[-3.0, -2, -1], [0, 0, 0], [-5, -5, 0]]
    for step, shift in ((0, 0.0), (10, 1.5)):
        policy = [[-3.0 + shift, -2, -1 - shift], [0, 0, 0], [-5, -5, 0]]
        log_outcomes(tmp_path, step, outcomes(data, policy, reference), data, 1, [Keep()])  # type: ignore[list-item]
    assert list(outcome_files(tmp_path)) == [0, 10]
    first, last = read_outcomes(outcome_files(tmp_path)[10])
    assert (first.index, first.group_id, last.index) == (0, "g0", 2)
    # Response 1 was not computed; group 1 has no contrast; above the mean reward is preferred.
    assert first.policy_logps == (-1.5, None, -2.5)
    assert first.sets == (1, 0, 0)
    assert last.sets == (0, 1)
    assert (first.log_ratio(0), first.log_ratio(1), first.log_ratio(2)) == (1.5, None, -1.5)
    step, table = tables[1]
    assert step == 10
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["log_ratio_before"] for row in rows] == [0.0, None, 0.0]
    assert rows[0] | {"log_ratio_before": 0} == {
        "group_id": "g0",
        "prompt": "prompt 0",
        "response": "answer 0",
        "set": "preferred",
        "reward": 1.0,
        "tokens": 2,
        "reference_logp": -3.0,
        "policy_logp": -1.5,
        "log_ratio_before": 0,
        "log_ratio": 1.5,
    }
    forget_later(tmp_path, 5)
    assert list(outcome_files(tmp_path)) == [0]
    forget_later(tmp_path, 0)
    assert not outcome_files(tmp_path)


def test_samples_are_the_same_groups_every_time() -> None:
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(2, 4) == [0, 1]
    assert evenly_spaced(5, 0) == []


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce GTX 1080", None),
        (None, None),
    ],
)
def test_peak_rates_by_name(name: str | None, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else pytest.approx(1e12 * tflops))
