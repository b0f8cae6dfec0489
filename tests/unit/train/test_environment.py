"""Ranks on GPUs set variables for speed, by layout and architecture, and keep the user's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron import device
from mpo_megatron.config import DataConfig, ModelConfig, OnlineConfig, OptimizerConfig, ParallelConfig, TrainConfig
from mpo_megatron.train import setup
from mpo_megatron.train.environment import ALLOCATOR, compute_capability, recommended, set_environment
from mpo_megatron.train.rank import prepare_rank

MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"}
HOPPER, BLACKWELL = 9, 10


def config(**options: Any) -> TrainConfig:
    return TrainConfig(output="run", model=ModelConfig(checkpoint="model"), data=DataConfig(train="data"), **options)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that replaces the driver's: two Hopper GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


@pytest.mark.parametrize(
    ("parallel", "capability", "connections"),
    [
        ({}, HOPPER, None),
        ({"tensor": 2}, HOPPER, "1"),
        ({"context": 2}, 8, "1"),
        ({"pipeline": 2}, HOPPER, None),
        ({"tensor": 2}, BLACKWELL, "32"),
        ({}, 12, "32"),
    ],
)
def test_queues_follow_the_architecture(parallel: dict[str, int], capability: int, connections: str | None) -> None:
    found = recommended(config(parallel=ParallelConfig(**parallel)), capability)
    assert found.get("CUDA_DEVICE_MAX_CONNECTIONS") == connections
    assert ("NCCL_P2P_NET_CHUNKSIZE" in found) == ("pipeline" in parallel)


def test_what_conflicts_is_left_out() -> None:
    assert recommended(config(), HOPPER)[ALLOCATOR[0]] == "expandable_segments:True"
    assert ALLOCATOR[0] in recommended(config(online=OnlineConfig(engine="vllm")), HOPPER)  # which samples nothing
    assert ALLOCATOR[0] not in recommended(config(online=OnlineConfig(engine="vllm", kl_weight=0.1)), HOPPER)
    assert recommended(config(), HOPPER).keys() >= MARGINS
    assert not recommended(config(optimizer=OptimizerConfig(overlap="none")), HOPPER).keys() & MARGINS


def test_it_is_set_and_printed_once(gpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = config(parallel=ParallelConfig(tensor=2))
    environment: dict[str, str] = {"PATH": str(gpus.parent)}
    monkeypatch.setattr("os.environ", environment)
    chosen = set_environment(run)
    assert chosen["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert environment == {"PATH": str(gpus.parent), **chosen}
    assert capfd.readouterr().out.startswith("set for speed: CUDA_DEVICE_MAX_CONNECTIONS=1 PYTORCH_ALLOC_CONF=")
    assert set_environment(run) == {}  # all variables are set, as for a restarted rank
    environment |= {"RANK": "1"}
    del environment["CUDA_DEVICE_MAX_CONNECTIONS"]
    assert set_environment(run) == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert capfd.readouterr().out == ""


def test_the_users_own_values_stay(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"PATH": str(gpus.parent), "CUDA_DEVICE_MAX_CONNECTIONS": "4", ALLOCATOR[1]: "max_split_size_mb:64"}
    environment = dict(given)
    monkeypatch.setattr("os.environ", environment)
    assert set_environment(config(parallel=ParallelConfig(tensor=2))).keys() == MARGINS
    assert environment.items() >= given.items()
    assert ALLOCATOR[0] not in environment  # the old name's value would be lost


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "true", None])
def test_without_a_gpu_nothing_is_set(gpus: Path, script: str | None) -> None:
    gpus.write_text(f"#!/bin/sh\n{script}\n") if script else gpus.unlink()
    assert compute_capability() is None
    assert set_environment(config(parallel=ParallelConfig(tensor=2))) == {}


def test_a_hidden_gpu_does_not_count(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_capability() == HOPPER
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert compute_capability() is None


def test_the_environment_is_set_before_torch_reads_it() -> None:
    code = """if True:
        import sys
        from unittest import mock
        from mpo_megatron.config import DataConfig, ModelConfig, TrainConfig
        from mpo_megatron.train.rank import prepare_rank
        def look(config):
            raise SystemExit("torch" in sys.modules)
        with mock.patch("mpo_megatron.train.environment.set_environment", look):
            prepare_rank(TrainConfig(model=ModelConfig(checkpoint="c"), data=DataConfig(train="t"), output="o"))
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: done.append("memory"))
    monkeypatch.setattr(setup, "build_setup", lambda config, num_ranks: done.append("setup"))
    prepare_rank(config())
    assert done == ["memory", "setup"]
