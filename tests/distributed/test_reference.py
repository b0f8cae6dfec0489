"""`mpo reference`: computed once, resumed when killed, found by `mpo train`, never used for another model or data."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_megatron.config import ConfigError, ConvertConfig, ParallelConfig, TrainConfig, parse
from mpo_megatron.data.loader import group_table, indices_of_steps
from mpo_megatron.data.outcomes import outcome_files, read_outcomes
from mpo_megatron.data.store import load_groups
from mpo_megatron.files import DataError
from mpo_megatron.model.convert import convert
from mpo_megatron.model.parallel import model_parallel
from mpo_megatron.report.content import describe
from mpo_megatron.report.held_out import Limits
from mpo_megatron.report.run_record import read_run
from mpo_megatron.train import reference, reference_cache
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.stopping import Stopped
from mpo_megatron.train.loop import train
from mpo_megatron.train.metrics import REFERENCE_METRICS
from mpo_megatron.train.reference_cache import PartWriter, ReferenceLogps, read_cache
from mpo_megatron.train.session import session
from mpo_megatron.train.setup import build_setup
from tests.distributed.launch import kill_ranks_when, run_ranks
from tests.distributed.test_train import metrics
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

NUM_GROUPS = 48


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models (model, other), groups (train) and other groups (eval)."""
    folder = tmp_path_factory.mktemp("reference")
    for name, seed in (("model", 0), ("other", 1)):
        convert(ConvertConfig(input=str(save_model(folder / f"{name}-hf", seed=seed)), output=str(folder / name)))
    save_groups(folder / "train", random_groups(NUM_GROUPS, seed=1), folder / "model-hf")
    save_groups(folder / "eval", random_groups(6, seed=2), folder / "model-hf")
    return folder


@pytest.fixture
def data(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the groups without a cache."""
    for name in ("train", "eval"):
        shutil.copytree(inputs / name, tmp_path / name, ignore=shutil.ignore_patterns("reference"))
    return tmp_path


def options(inputs: Path, data: Path, *more: str) -> list[str]:
    return [
        *("--output", str(data / "run"), "--model.checkpoint", str(inputs / "model")),
        *("--data.train", str(data / "train"), "--data.eval", str(data / "eval")),
        *("--data.groups_per_step", "8", "--data.row_tokens", "256", "--max_steps", "1", "--model.precision", "fp32"),
        *more,
    ]


def caches(data: Path) -> list[Path]:
    return sorted((data / "reference").iterdir()) if (data / "reference").exists() else []


def read(cache: Path) -> dict[int, np.ndarray]:
    tables = [pq.read_table(path) for path in sorted(cache.glob("*.parquet"))]
    rows = [row for table in tables for row in zip(table["index"].to_pylist(), table["logps"].to_pylist(), strict=True)]
    assert len(rows) == len(dict(rows))  # no group twice
    return {index: np.array(logps) for index, logps in rows}


def files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}


def compute_here(inputs: Path, data: Path, *more: str, whole: bool = True) -> str | None:
    """`mpo reference` on one rank, in this process, or the pass before a run's first step; returns why it stopped early."""
    try:
        with session(build_setup(parse(TrainConfig, options(inputs, data, *more)), 1)) as place:
            place.references(whole=whole)
    except Stopped as request:
        return str(request)
    return None


@pytest.fixture(scope="module")
def computed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups with the cache of an undisturbed rank; only to be copied."""
    data = tmp_path_factory.mktemp("computed")
    for name in ("train", "eval"):
        shutil.copytree(inputs / name, data / name)
    compute_here(inputs, data)
    return data


@pytest.fixture(scope="module")
def expected(computed: Path) -> dict[int, np.ndarray]:
    (cache,) = caches(computed / "train")
    return read(cache)


@pytest.fixture
def cached(computed: Path, tmp_path: Path) -> Path:
    """A copy of the groups with the whole cache."""
    for name in ("train", "eval"):
        shutil.copytree(computed / name, tmp_path / name)
    return tmp_path


def test_killed_and_resumed_on_another_layout(inputs: Path, data: Path, expected: dict[int, np.ndarray]) -> None:
    command = (
        "mpo_megatron.train.reference_main",
        options(inputs, data, "--data.groups_per_step", "1", "--data.row_tokens", "128"),
    )

    def some_are_written() -> bool:
        return len(list((data / "train").glob("reference/*/part-*"))) >= 3

    kill_ranks_when(some_are_written, 1, *command, data / "log")
    (cache,) = caches(data / "train")
    finished = {name: when for name, when in files(cache).items() if name.endswith(".parquet")}
    done = len(read(cache))
    assert 0 < done < NUM_GROUPS

    more = ("--parallel.tensor", "2", "--data.groups_per_step", "5")
    result = run_ranks(2, "mpo_megatron.train.reference_main", options(inputs, data, *more))
    assert f"{done} of {NUM_GROUPS} groups are cached" in result.stdout
    assert f"{NUM_GROUPS - done} groups in" in result.stdout
    assert all(rate in result.stdout for rate in ("groups/s", "tokens/s"))
    assert files(cache).items() >= finished.items()  # completed groups were not computed again
    resumed = read(cache)
    assert resumed.keys() == expected.keys()
    for index, logps in expected.items():
        np.testing.assert_allclose(resumed[index], logps, rtol=1e-5)


def test_train_computes_nothing_after_it(inputs: Path, cached: Path) -> None:
    before = {name: files(cache) for name in ("train", "eval") for cache in caches(cached / name)}
    result = run_ranks(2, "mpo_megatron.train", options(inputs, cached, "--data.groups_per_step", "12"))
    assert "reference log-probs of" not in result.stdout  # no progress line: nothing was computed
    assert {name: files(cache) for name in ("train", "eval") for cache in caches(cached / name)} == before
    (start, *_) = [line for line in metrics(cached / "run") if "eval/margin" in line]
    assert start["eval/margin"] == pytest.approx(0, abs=1e-4)  # they are the model's own


@pytest.mark.parametrize("more", [("--model.reference", "other"), ("--model.precision", "bf16")])
def test_another_model_or_precision_gets_a_cache_of_its_own(
    inputs: Path, cached: Path, expected: dict[int, np.ndarray], more: tuple[str, str]
) -> None:
    (first,) = caches(cached / "train")
    before = files(first)
    name, value = more
    compute_here(inputs, cached, name, str(inputs / value) if value == "other" else value)
    (second,) = set(caches(cached / "train")) - {first}
    assert files(first) == before
    assert read(second).keys() == expected.keys()
    assert np.abs(read(second)[0] - expected[0]).max() > 1e-3


def test_other_data_gets_a_cache_of_its_own(inputs: Path, cached: Path) -> None:
    shutil.move(cached / "train" / "reference", cached / "kept")
    shutil.rmtree(cached / "train")
    save_groups(cached / "train", random_groups(NUM_GROUPS, seed=3), inputs / "model-hf")
    shutil.move(cached / "kept", cached / "train" / "reference")  # as after preparing the folder again in place
    (first,) = caches(cached / "train")
    compute_here(inputs, cached)
    assert len(caches(cached / "train")) == 2
    assert first in caches(cached / "train")


def test_tokens_serve_both_kinds(inputs: Path, data: Path, expected: dict[int, np.ndarray]) -> None:
    compute_here(inputs, data, "--loss.name", "grpo_offline")
    (cache,) = caches(data / "train")
    before = files(cache)
    assert all(name.startswith("tokens-") for name in before)
    for index, logps in read(cache).items():
        np.testing.assert_allclose(logps, expected[index], rtol=1e-5)
    compute_here(inputs, data)  # a loss that reads no tokens
    compute_here(inputs, data, "--loss.name", "grpo_offline")
    assert files(cache) == before


def test_a_run_computes_the_groups_that_it_reaches(inputs: Path, data: Path, expected: dict[int, np.ndarray]) -> None:
    shape = ("--max_steps", "9", "--stop_after", "2", "--data.groups_per_step", "3")
    compute_here(inputs, data, *shape, whole=False)
    (cache,) = caches(data / "train")
    reached = indices_of_steps(2, NUM_GROUPS, 3, seed=1234, shuffle=True).tolist()
    assert sorted(read(cache)) == reached
    assert len(read(caches(data / "eval")[0])) == 6
    before = files(cache)
    compute_here(inputs, data, *shape, whole=False)
    assert files(cache) == before
    compute_here(inputs, data, *shape)
    assert files(cache).items() >= before.items()
    extended = read(cache)
    assert extended.keys() == expected.keys()
    for index, logps in expected.items():
        np.testing.assert_allclose(extended[index], logps, rtol=1e-5)


def test_a_loss_without_a_reference_goes_without_the_pass(
    inputs: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = ("--loss.name", "simpo", "--optimizer.lr", "1e-3")
    train(build_setup(parse(TrainConfig, options(inputs, data, *free)), 1))
    assert "loss.name = simpo reads no reference log-probs, so margin, accuracy" in capsys.readouterr().out
    assert not caches(data / "train")
    assert not caches(data / "eval")
    names = {name.removeprefix("eval/") for line in metrics(data / "run") for name in line}
    assert "loss" in names
    assert not names & set(REFERENCE_METRICS)
    outcomes = read_outcomes(outcome_files(data / "run")[1])
    assert all(outcome.log_ratio(0) is None for outcome in outcomes)
    page = describe(read_run(data / "run"), "run", Limits(6, 16, 100))
    assert "loss" in page["curves"]
    assert not page["curves"].keys() & set(REFERENCE_METRICS)
    assert page["drift"] is None
    assert "Not compared with a reference" in [finding["title"] for finding in page["findings"]]

    asked = (*free, "--logging.reference_metrics", "true", "--output", str(data / "asked"))
    train(build_setup(parse(TrainConfig, options(inputs, data, *asked)), 1))
    assert len(read(caches(data / "train")[0])) == 8
    assert [line["loss"] for line in metrics(data / "asked") if "loss" in line] == [
        line["loss"] for line in metrics(data / "run") if "loss" in line
    ]
    assert {"margin", "kl"} <= {name for line in metrics(data / "asked") for name in line}
    with pytest.raises(ConfigError, match=r"best_metric = eval/accuracy, but loss.name = simpo reads no reference log-probs"):
        build_setup(parse(TrainConfig, options(inputs, data, *free, "--checkpoint.keep_best", "1")), 1)


def test_parts_are_few(inputs: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("mpo_megatron.train.reference_cache.time.monotonic", lambda: clock[0])
    groups, cache = load_groups(data / "train"), data / "cache"
    with model_parallel(ParallelConfig(), 1) as ranks:
        writer = PartWriter(cache, ranks, [], None, tokens=False)
        for index in range(NUM_GROUPS):
            writer.add(pa.table({"index": [index], "logps": [np.full(groups.num_responses()[index], float(-index))]}), None)
            clock[0] += 5
        writer.finish()
        # At once, after 5 s, 10 and 20; then every 30 s, and the rest.
        assert [int(path.name[5:13]) for path in sorted(cache.glob("part-*"))] == [0, 1, 2, 3, 5, 9, 15, 21, 27, 33, 39, 45]
        logps = read_cache(cache, groups, ranks, tokens=False)
    assert not len(logps.missing())
    assert all((logps.response[logps.of_group(index)] == -index).all() for index in range(NUM_GROUPS))
    assert logps.missing(np.array([3])).size == 0


def test_select_pads_as_the_step_does(inputs: Path, data: Path) -> None:
    groups = load_groups(data / "train")
    logps = ReferenceLogps.empty(groups, tokens=True)
    assert logps.token is not None
    logps.response[:] = np.arange(len(logps.response))
    logps.token[:] = np.arange(len(logps.token))
    indices = np.array([7, 2])
    table = group_table([groups[int(index)] for index in indices], indices)
    selected = logps.select(table)
    assert selected.token is not None
    for slot, index in enumerate(indices):
        lengths = groups.response_lengths(int(index))
        first_response = int(groups.num_responses()[:index].sum())
        first_token = int(groups.all_response_lengths()[:first_response].sum())
        for k, length in enumerate(lengths):
            assert selected.response[slot, k] == first_response + k
            tokens = selected.token[slot, k].numpy()
            np.testing.assert_array_equal(tokens[:length], first_token + np.arange(length))
            assert not tokens[length:].any()
            first_token += length
        assert not selected.response[slot, len(lengths) :].any()


def test_damaged_part_is_computed_again(
    inputs: Path, cached: Path, expected: dict[int, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    (cache,) = caches(cached / "train")
    damaged = sorted(cache.iterdir())[1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1000] + bytes([whole[-1000] ^ 1]) + whole[-999:])
    compute_here(inputs, cached)
    assert f"{damaged}: damaged" in capsys.readouterr().out
    repaired = read(cache)
    assert repaired.keys() == expected.keys()
    for index, logps in expected.items():
        np.testing.assert_allclose(repaired[index], logps, rtol=1e-6)


def test_full_disk_keeps_what_is_finished(inputs: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, written = os.replace, []
    monkeypatch.setattr(reference_cache, "SECONDS_BETWEEN_PARTS", 0)

    def full_after_two(partial: Path, path: Path) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        replace(partial, path)

    monkeypatch.setattr(os, "replace", full_after_two)
    with pytest.raises(DataError, match="cannot write reference log-probs: No space left on device; finished parts"):
        compute_here(inputs, data)
    (cache,) = caches(data / "train")
    assert [name.split(".")[0] for name in sorted(files(cache))] == ["part-00000000-00000007", "part-00000008-00000015"]
    monkeypatch.undo()
    compute_here(inputs, data)
    assert len(read(cache)) == NUM_GROUPS


def test_asked_to_stop_it_keeps_the_part_under_way(inputs: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, requests = reference._compute_part, list[signal.Signals]()

    def asked_meanwhile(*arguments: Any) -> Any:
        requests.append(signal.SIGUSR1)
        return compute(*arguments)

    monkeypatch.setattr(signals, "_received", requests)
    monkeypatch.setattr(reference, "_compute_part", asked_meanwhile)
    assert compute_here(inputs, data, "--data.groups_per_step", "4") == "SIGUSR1"
    (cache,) = caches(data / "train")
    assert len(read(cache)) == 4
    monkeypatch.undo()
    assert compute_here(inputs, data) is None
    assert len(read(cache)) == NUM_GROUPS


def test_before_its_time_is_over_it_stops_after_a_part(inputs: Path, data: Path) -> None:
    assert compute_here(inputs, data, "--faults.walltime_minutes", "0.5") == "the time is nearly over"
    (cache,) = caches(data / "train")
    assert 0 < len(read(cache)) < NUM_GROUPS


def test_unwritable_folder_is_named_by_all_ranks_together(inputs: Path, data: Path) -> None:
    (data / "train" / "reference").write_text("a file where the folder should be")
    result = run_ranks(2, "mpo_megatron.train.reference_main", options(inputs, data), check=False)
    assert result.returncode != 0
    assert f"mpo reference: {data / 'train' / 'reference'}" in result.stderr
    assert "cannot write reference log-probs: Not a directory" in result.stderr
