"""Faults on two ranks, and in a real `mpo train`: nothing is lost, the message is right, and the run continues."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.config import ConvertConfig
from mpo_megatron.files.digests import unseal_line, unseal_lines
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.train.checkpoints.step_folders import check_files, complete_steps, damaged_steps, read_state, step_folder
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, training groups and held-out groups."""
    folder = tmp_path_factory.mktemp("faults")
    convert(ConvertConfig(input=str(save_model(folder / "hf", num_hidden_layers=1)), output=str(folder / "model")))
    convert(ConvertConfig(input=str(save_model(folder / "other_hf", num_hidden_layers=1, seed=7)), output=str(folder / "other")))
    save_groups(folder / "train", random_groups(24, seed=1), folder / "hf")
    save_groups(folder / "eval", random_groups(6, seed=2), folder / "hf")
    return folder


@pytest.fixture(scope="module")
def results(inputs: Path) -> dict[str, Any]:
    """The outcome of each scenario."""
    run_ranks(2, "tests.distributed.faults_worker", [str(inputs), str(inputs / "results.json")])
    return json.loads((inputs / "results.json").read_text())


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(step_folder(run, step) / "megatron")
    return {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [unseal_line(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def learning(run: Path) -> list[dict[str, Any]]:
    """Metrics without those of time and machine."""
    machine = ("seconds", "per_second", "tflops", "peak", "mfu", "slowest", "data_wait", "memory")
    return [{key: value for key, value in line.items() if not any(part in key for part in machine)} for line in metrics(run)]


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete_steps(run)]


def test_an_undisturbed_run_is_whole_to_the_byte(inputs: Path, results: dict[str, Any]) -> None:
    assert results["whole"] == {"stopped": None, "error": None}
    run = inputs / "runs" / "whole"
    assert steps(run) == list(range(1, STEPS + 1))
    for folder in complete_steps(run):
        check_files(folder)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step_{step:08d}" for step in range(1, STEPS + 1)}
    evaluated = {line["step"]: line for line in metrics(run) if "eval/loss" in line}
    for step in range(1, STEPS + 1):
        held_out = read_state(step_folder(run, step))[0].held_out
        assert held_out == {key: value for key, value in evaluated.get(step, {}).items() if key not in ("step", "xxh3")}


def test_a_skipped_step_leaves_weights_and_optimizer_and_goes_on(inputs: Path, results: dict[str, Any]) -> None:
    assert results["skip"] == {"stopped": None, "error": None}
    run, whole = inputs / "runs" / "skip", inputs / "runs" / "whole"
    assert same(tensors(run, 2), tensors(whole, 2))
    assert same(tensors(run, 3), tensors(run, 2))
    assert not same(tensors(run, 4), tensors(run, 3))
    lines = {line["step"]: line for line in metrics(run) if "lr" in line}
    clean = {line["step"]: line for line in metrics(whole) if "lr" in line}
    assert lines[3]["loss"] == clean[3]["loss"]
    assert [lines[step].get("skipped_steps") for step in range(1, STEPS + 1)] == [None, None, 1, 1, 1, 1]
    assert [lines[step]["lr"] for step in lines] == [clean[step]["lr"] for step in clean]
    assert [lines[step]["skipped_groups"] for step in lines] == [clean[step]["skipped_groups"] for step in clean]  # same data
    assert read_state(step_folder(run, STEPS))[0].skipped_steps == 1


def test_the_groups_of_a_bad_step_are_written_down(inputs: Path, results: dict[str, Any]) -> None:
    run = inputs / "runs" / "skip"
    [path] = (run / "incidents").iterdir()
    assert path.name == "step_00000003.jsonl"
    groups = unseal_lines(path, "copy it again")
    line = next(line for line in metrics(run) if line["step"] == 3 and "lr" in line)
    assert len(groups) == 8 - line["skipped_groups"]
    assert "gradient norm nan" in groups[0]["wrong"]
    losses = [group["loss"] for group in groups]
    assert losses == sorted(losses, reverse=True)
    assert sum(losses) / len(losses) == pytest.approx(line["loss"])
    made = {group.group_id: group for group in random_groups(24, seed=1)}
    for group in groups:
        expected = made[group["group_id"]]
        assert [response["reward"] for response in group["responses"]] == pytest.approx(list(expected.rewards))
        assert [response["num_tokens"] for response in group["responses"]] == [len(ids) for ids in expected.response_tokens]
        assert all(response["logp"] < 0 and response["reference_logp"] < 0 for response in group["responses"])


def test_a_run_may_be_saved_before_its_first_update(inputs: Path, results: dict[str, Any]) -> None:
    runs = inputs / "runs"
    assert results["skip first"] == results["skip first, resumed"] == {"stopped": None, "error": None}
    assert same(tensors(runs / "skip_first", 2), tensors(runs / "skip_first", 1))
    assert same(tensors(runs / "skip_first_resumed", STEPS), tensors(runs / "skip_first", STEPS))
    assert learning(runs / "skip_first_resumed") == learning(runs / "skip_first")


def test_a_bad_step_ends_the_run_and_what_was_being_saved_is_saved(inputs: Path, results: dict[str, Any]) -> None:
    error = results["stop"]["error"]
    assert error.startswith("TrainingError: step 3: ")
    assert "not finite" in error
    assert "faults.on_nan" in error
    assert steps(inputs / "runs" / "stop") == [1, 2]
    assert "max_skips" in results["too many skips"]["error"]
    assert steps(inputs / "runs" / "too_many") == [1, 2, 3]


def test_a_request_on_one_rank_stops_all_and_the_run_goes_on_bit_for_bit(inputs: Path, results: dict[str, Any]) -> None:
    assert results["request"] == {"stopped": "SIGUSR1", "error": None}
    assert results["request, resumed"] == {"stopped": None, "error": None}
    run, whole = inputs / "runs" / "request", inputs / "runs" / "whole"
    assert same(tensors(run, STEPS), tensors(whole, STEPS))
    # On a stop request at an evaluated step, the run saves first; the evaluation follows on resuming, with the same numbers.
    assert learning(run) == learning(whole)


def test_a_request_in_an_evaluation_is_answered_and_the_resumed_run_evaluates(inputs: Path, results: dict[str, Any]) -> None:
    assert results["asked in evaluation"] == {"stopped": "SIGTERM", "error": None}
    assert results["asked in evaluation, resumed"] == {"stopped": None, "error": None}
    run = inputs / "runs" / "evaluating"
    assert steps(run) == list(range(1, STEPS + 1))
    evaluated = [line["step"] for line in metrics(run) if "eval/loss" in line]
    assert evaluated == [0, 3, 6]


def test_a_run_stops_before_its_time_is_over(inputs: Path, results: dict[str, Any]) -> None:
    assert results["time over"] == {"stopped": "the time is nearly over", "error": None}
    assert steps(inputs / "runs" / "time_over") == [1]


def test_from_damaged_checkpoints_an_older_one_is_taken(inputs: Path, results: dict[str, Any]) -> None:
    run = inputs / "runs" / "damaged"
    assert results["damaged"] == {"stopped": None, "error": None}
    assert damaged_steps(run) == ["step_00000004.damaged", "step_00000005.damaged"]
    assert same(tensors(run, STEPS), tensors(inputs / "runs" / "whole", STEPS))


def test_without_a_whole_checkpoint_nothing_starts_over_silently(inputs: Path, results: dict[str, Any]) -> None:
    for name in ("hopeless", "hopeless again"):
        error = results[name]["error"]
        assert error.startswith("DamagedError: ")
        assert "step_00000001.damaged, step_00000002.damaged" in error
        assert "checkpoint.resume = false" in error
    assert results["hopeless, anew"]["error"] is None
    aside = inputs / "runs" / "hopeless" / "checkpoints.before"
    assert {path.name for path in aside.glob("step_*")} == {"step_00000001.damaged", "step_00000002.damaged"}


def test_what_would_change_the_course_of_a_run_is_refused_and_the_rest_is_not(inputs: Path, results: dict[str, Any]) -> None:
    names = {
        "--loss.name": "loss.name = mpo, now it is dpo",
        "--loss.params.beta": "loss.params.beta = 0.1, now it is 0.2",
        "--seed": "seed = 1234, now it is 5",
        "--max_steps": "number of steps = 6, now it is 7",
        "--data.groups_per_step": "data.groups_per_step = 8, now it is 4",
        "--data.shuffle": "data.shuffle = True, now it is False",
        "--data.train": "groups of data.train = ",
        "--optimizer.lr": "optimizer.lr = 0.001, now it is 0.002",
        "--optimizer.schedule": "optimizer.schedule = cosine, now it is linear",
        "--optimizer.warmup_fraction": "optimizer.warmup_fraction = 0.1, now it is 0.5",
        "--optimizer.weight_decay": "optimizer.weight_decay = 0.0, now it is 0.1",
        "--optimizer.clip_grad": "optimizer.clip_grad = 1.0, now it is 0.0",
        "--model.precision": "model.precision = fp32, now it is bf16",
        "--model.reference": "reference model = ",
    }
    run = inputs / "runs" / "changed"
    found = {key.split()[1]: result["error"] for key, result in results.items() if key.startswith("changed --")}
    assert found.keys() == names.keys()
    for name, error in found.items():
        begins = f"ConfigError: cannot resume from {step_folder(run, 3)}: it was trained with {names[name]}"
        assert error.startswith(begins), error
        assert "use the old value" in error
    assert results["changed freely"]["error"] is None
    # Rows and steps of other kinds sum in another order; three Adam steps of lr 1e-3. Refused runs left no files.
    expected, weights_now = tensors(inputs / "runs" / "whole", STEPS), tensors(run, STEPS)
    weights = [name for name in expected if not name.startswith("optimizer.")]
    assert max(float((weights_now[name] - expected[name]).abs().max()) for name in weights) < 1e-5


def test_a_checkpoint_without_its_state_is_damaged(inputs: Path, results: dict[str, Any]) -> None:
    run = inputs / "runs" / "headless"
    assert results["headless"]["error"] is None
    assert damaged_steps(run) == ["step_00000003.damaged"]
    assert same(tensors(run, STEPS), tensors(inputs / "runs" / "whole", STEPS))
    assert results["headless alone"]["error"].startswith("DamagedError: ")  # and does not start over


def test_a_checkpoint_of_a_newer_version_stays_as_it_is(inputs: Path, results: dict[str, Any]) -> None:
    assert results["newer format"]["error"].startswith("ConfigError: ")
    assert "has format 1, but this version of mpo_megatron reads format 0" in results["newer format"]["error"]
    assert steps(inputs / "runs" / "newer") == [1, 2, 3]


def test_a_folder_serves_one_run_at_a_time(inputs: Path, results: dict[str, Any]) -> None:
    error = results["in use"]["error"]
    assert error.startswith("DataError: ")
    assert "another run is writing it (process " in error
    assert results["no longer in use"]["error"] is None
    assert same(tensors(inputs / "runs" / "in_use", STEPS), tensors(inputs / "runs" / "whole", STEPS))


def test_what_another_machine_sees_late_is_waited_for_and_what_it_never_sees_is_refused(
    inputs: Path, results: dict[str, Any]
) -> None:
    assert results["late"]["error"] is None
    assert steps(inputs / "runs" / "late") == [STEPS]
    error = results["never"]["error"]
    assert error.startswith(f"DataError: output = {inputs / 'runs' / 'late'}: {socket.gethostname()} do not see")
    assert "all machines share" in error


def test_what_cannot_be_deleted_costs_no_checkpoint_and_what_cannot_be_written_is_told_to_all(
    inputs: Path, results: dict[str, Any]
) -> None:
    assert results["removal fails"] == {"stopped": None, "error": None}
    assert steps(inputs / "runs" / "removal") == [1, 2, 3]
    assert results["read only"]["error"].startswith("PermissionError: ")  # on both ranks, none waits for the other


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_full_disk_costs_no_checkpoint(inputs: Path, results: dict[str, Any], asynchronous: str) -> None:
    error = results[f"disk full {asynchronous}"]["error"]
    assert error.startswith("SaveError: ")
    assert "rank 1" in error
    assert "File too large" in error
    run = inputs / "runs" / f"disk_full_{asynchronous}"
    last = steps(run)[-1]
    assert last in (1, 2)  # the disk is full in step 3; in the background, step 2 may not have been written yet
    assert f"step_{last + 1:08d}.partial-" in error
    check_files(step_folder(run, last))
    assert not list((run / "checkpoints").glob("*.partial*"))


def test_too_little_room_is_an_error_before_it_costs_anything(inputs: Path, results: dict[str, Any]) -> None:
    assert results["no room at the start"]["error"].startswith("ConfigError: ")
    assert "GB are free" in results["no room at the start"]["error"]
    assert not (inputs / "runs" / "no_room").exists()
    assert results["no room later"]["error"].startswith("SaveError: ")
    assert steps(inputs / "runs" / "no_room_later") == [1, 2]


def test_a_hung_collective_ends_every_rank_with_its_stacks(inputs: Path) -> None:
    """Ten seconds without computation."""
    result = run_ranks(2, "tests.distributed.faults_worker", [str(inputs), "hang"], check=False)
    assert result.returncode == 1
    run = inputs / "runs" / "hang"
    for rank, where in ((0, "finalize_gradients"), (1, "stay_away_from_the_collective")):
        assert f"rank {rank} on {socket.gethostname()}: no progress for" in result.stderr
        text = (run / "incidents" / f"hang_step_3_rank_{rank:05d}.txt").read_text()
        assert "in step 3 (faults.hang_minutes)" in text
        assert where in text
    assert steps(run)[-1] >= 1  # a restart continues from there


def test_a_rank_that_fails_ends_although_others_know_of_nothing(tmp_path: Path) -> None:
    """NCCL's communicators are destroyed together: a rank that tried would wait for those that compute."""
    result = run_ranks(2, "tests.distributed.failing_worker", [str(tmp_path)], check=False)
    assert result.returncode == 1
    assert f"rank 1 on {socket.gethostname()} failed:\n" in result.stderr
    assert "RuntimeError: out of memory" in result.stderr
    assert "rank 1 has ended" in result.stdout


def test_slow_ranks_and_slow_data_are_told(inputs: Path, results: dict[str, Any]) -> None:
    slow = [line for line in metrics(inputs / "runs" / "slow") if "lr" in line]
    assert all(line["slowest_rank"] == 1 for line in slow)
    assert all(line["step_seconds_max_over_mean"] > 1.5 for line in slow)  # 2, without the other rank's share
    waiting = [line for line in metrics(inputs / "runs" / "slow_data") if "lr" in line]
    assert all(line["data_wait"] >= 1000 for line in waiting)
    assert all(line["data_wait"] < 1000 for line in slow)


def test_the_best_checkpoints_are_kept(inputs: Path, results: dict[str, Any]) -> None:
    run = inputs / "runs" / "best"
    scores = {line["step"]: line["eval/accuracy"] for line in metrics(run) if "eval/accuracy" in line and line["step"]}
    best = sorted(scores, key=lambda step: (scores[step], step))[-2:]
    assert steps(run) == sorted({*best, STEPS})
    assert "there is no such metric" in results["no such metric"]["error"]
