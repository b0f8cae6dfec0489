"""What is saved, and saves that fail; tests/distributed/test_faults.py has those that fail on one of two ranks."""

from __future__ import annotations

import dataclasses
import functools
import json
import queue
import resource
import shutil
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import CheckpointConfig, ConfigError, ConvertConfig, DataConfig, ModelConfig, TrainConfig
from mpo_megatron.mcore import writer
from mpo_megatron.model.convert import convert
from mpo_megatron.train import loop
from mpo_megatron.train.checkpoints import saving
from mpo_megatron.train.checkpoints.step_folders import SaveError, check_files, complete_steps, require_space
from tests.tiny import random_groups, save_groups, save_model
from tests.training import train
from tests.waiting import TIMEOUT


def test_a_disk_that_is_full_already_when_a_save_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path)
    original, saves = saving.write, []

    def write(writing: Any, buckets: Any) -> None:
        saves.append(writing.partial)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            original(writing, buckets)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(saving, "write", write)
    with pytest.raises(SaveError, match=r"step_00000002\.partial-.*: this checkpoint could not be written .*File too large"):
        train(config)
    [step] = complete_steps(tmp_path / "run")
    assert step.name == "step_00000001"
    check_files(step)
    assert [path.name for path in step.parent.iterdir()] == [step.name]
    monkeypatch.undo()
    assert train(config) is None


def test_a_run_starts_from_the_step_of_another(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    train(config)
    step = complete_steps(tmp_path / "run")[-1]
    again = dataclasses.replace(
        config, output=str(tmp_path / "again"), model=dataclasses.replace(config.model, checkpoint=str(step)), max_steps=1
    )
    assert train(again) is None
    [saved] = complete_steps(tmp_path / "again")
    assert saved.name == "step_00000001"


def test_what_is_saved_is_what_was_there_when_the_save_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes weights and optimizer states while they are written."""
    config = dataclasses.replace(small_run(tmp_path), max_steps=2)
    original, later = saving.write, threading.Event()

    def write(writing: Any, buckets: Any) -> None:
        assert later.wait(TIMEOUT) or writing.state.step != 1  # until the second step is done
        original(writing, buckets)

    def take_step(run: Any, batch: Any, *arguments: Any) -> dict[str, float]:
        metrics = taken(run, batch, *arguments)
        if batch.step == 1:
            later.set()
        return metrics

    taken = loop.take_step
    monkeypatch.setattr(saving, "write", write)
    monkeypatch.setattr(loop, "take_step", take_step)
    train(config)
    monkeypatch.undo()
    train(dataclasses.replace(config, output=str(tmp_path / "short"), stop_after=1))
    steps = [complete_steps(tmp_path / name)[0] for name in ("run", "short")]
    assert steps[0].name == steps[1].name == "step_00000001"
    files = [{path.name: path.read_bytes() for path in (step / "megatron").glob("*.distcp")} for step in steps]
    assert files[0] == files[1]


def small_run(folder: Path) -> TrainConfig:
    convert(ConvertConfig(input=str(save_model(folder / "hf", num_hidden_layers=1)), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(8, seed=1), folder / "hf")
    return TrainConfig(
        output=str(folder / "run"),
        model=ModelConfig(checkpoint=str(folder / "model"), precision="fp32"),
        data=DataConfig(train=str(folder / "train"), groups_per_step=4, row_tokens=256),
        checkpoint=CheckpointConfig(every=1),
        max_steps=3,
    )


def test_engines_stop_at_the_token_that_was_scored() -> None:
    """A base model ends texts with one token, and a chat template responses with another."""
    base = {"hf/config.json": b'{"eos_token_id": 3}', "conversion.json": b"{}"}
    files = saving.add_end_tokens(base, [5])
    assert json.loads(files.pop("hf/generation_config.json")) == {"eos_token_id": [5, 3]}
    assert files == base
    instruct = base | {"hf/generation_config.json": b'{"eos_token_id": [5, 7], "top_p": 0.8}'}
    assert saving.add_end_tokens(instruct, [5]) == instruct
    added = saving.add_end_tokens(instruct, [9, 7])["hf/generation_config.json"]
    assert json.loads(added) == {"eos_token_id": [9, 5, 7], "top_p": 0.8}


def test_room_is_looked_for_where_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's `checkpoints` may be a link to a larger disk."""
    inside, outside = tmp_path / "run", tmp_path / "large"
    inside.mkdir()
    outside.mkdir()
    (inside / "checkpoints").symlink_to(outside)
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(path: Path) -> Any:
        return usage._replace(free=10**12 if path.resolve() == outside.resolve() else 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_space(inside / "checkpoints", 10**9, "a checkpoint")
    with pytest.raises(ConfigError, match="are free"):
        require_space(inside, 10**9, "a checkpoint")


class NvidiaWriter:
    """The shape of nvidia-resiliency-ext's writer: it also takes what opens files."""

    @staticmethod
    def write_preloaded_data(
        transforms: list[Any], open_file: Any, index: int, bucket: Any, results: None, count: None, use_fsync: bool
    ) -> tuple[int, Any]:
        try:
            with open_file(bucket[0], "wb") as file:
                file.write(b"written")
            return index, ["what was written"]
        except OSError as error:
            return index, error

    @staticmethod
    def write_preloaded_data_multithread(*arguments: Any) -> None:
        raise AssertionError("it hides why a file could not be written")


def test_both_writers_are_driven_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("writer_of_nvidia")
    module.FileSystemWriterAsync = NvidiaWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    NvidiaWriter.write_preloaded_data_multithread.__module__ = module.__name__
    results: queue.Queue[Any] = queue.Queue()
    bucket = (str(tmp_path / "file"), "file", ([], []))
    request = types.SimpleNamespace(
        async_fn=functools.partial(NvidiaWriter.write_preloaded_data_multithread, [], False, open),
        async_fn_args=[0, None, results],
        preload_fn=lambda: [bucket],
    )
    assert writer.stage(request) == [bucket]
    assert writer.write_bucket(request, 0, bucket) == ["what was written"]
    assert (tmp_path / "file").read_bytes() == b"written"
    with pytest.raises(FileNotFoundError):
        writer.write_bucket(request, 0, (str(tmp_path / "none" / "file"), "file", ([], [])))
    writer.report(request, {0: ["what was written"]})
    assert results.get_nowait() == {0: ["what was written"]}
    nothing = types.SimpleNamespace(async_fn=None)
    assert writer.stage(nothing) == []
    writer.report(nothing, {})


@pytest.mark.parametrize("installed", [False, True])
def test_the_newer_writer_is_taken_where_it_is(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.strategies, "HAVE_NVRX", installed)
    assert writer.choose_strategy() == ("nvrx" if installed else "mcore")
    if not installed:
        return
    package = "nvidia_resiliency_ext.checkpointing.async_ckpt"
    found = types.ModuleType(f"{package}.filesystem_async")
    for name in ("nvidia_resiliency_ext", "nvidia_resiliency_ext.checkpointing", package):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, found.__name__, found)
    sys.modules[package].filesystem_async = found  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="_results_queue no longer exists"):
        writer.keep_results_here("nvrx")
    found._results_queue = None  # type: ignore[attr-defined]
    writer.keep_results_here("nvrx")
    assert isinstance(found._results_queue, queue.Queue)  # type: ignore[attr-defined]
