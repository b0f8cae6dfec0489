"""`mpo doctor`: output and exit codes, with the machine's answers replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed import HashStore

from mpo_megatron import device
from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError, DataConfig, EndpointConfig, LiveVllmConfig, ModelConfig, OnlineConfig, TrainConfig
from mpo_megatron.doctor import abilities, doctor, machine, peers, software
from mpo_megatron.model import precision
from mpo_megatron.stack import packages
from mpo_megatron.stack.problem import Problem
from tests.unit.stack.packages import install
from tests.waiting import TIMEOUT

ABLE = {"layers": {"local": "usable"}, "attention": {"sdpa": "usable"}, "fp8": {"current": "this machine has no GPU"}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Answers that replace processes."""
    able: dict[str, Any] = dict(ABLE)
    monkeypatch.setattr(abilities, "ask", lambda config: dict(able))
    monkeypatch.setattr(software, "import_error_apart", lambda module: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return able


@pytest.mark.usefixtures("quick")
def test_the_page_names_versions_and_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "describe_machine", lambda *given: (machine.describe_machine(*given)[0], []))
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in page
    for heading in ("Software\n", "Machine\n", "Works here\n"):
        assert heading in page
    assert f"{os.cpu_count()} cores" in page
    assert page.rstrip().endswith("No problems found.")


@pytest.mark.parametrize(
    ("online", "choice", "why"),
    [
        ({}, "transformers", "weights travel through host memory"),
        ({"engine": "vllm"}, "vllm 0.33.0, tensor 1 × pipeline 1 a replica", "to the ranks' GPUs, by CUDA IPC"),
        (
            {"engine": "vllm", "vllm": LiveVllmConfig(gpus="own", tensor_parallel=4, options={"quantization": "mxfp8"})},
            "tensor 4 × pipeline 1 a replica, quantised (quantization = mxfp8)",
            "to its own GPUs, by NCCL",
        ),
        (
            {"engine": "server", "endpoint": EndpointConfig(base_url="http://node7:8000/v1", model="m")},
            "vLLM at http://node7:8000/v1",
            "by NCCL",
        ),
    ],
)
def test_the_pairing_of_trainer_and_engine(
    monkeypatch: pytest.MonkeyPatch, online: dict[str, Any], choice: str, why: str
) -> None:
    config = TrainConfig(
        output="run",
        model=ModelConfig(checkpoint="model"),
        data=DataConfig(train="groups"),
        online=OnlineConfig(kl_weight=0.1, **online),
    )
    for version, reason in (("0.33.0", why), ("0.31.1", "another weight update interface than vllm")):
        for module in (abilities, packages):
            monkeypatch.setattr(module, "version_of", lambda name, version=version: version)
        found = next(line for line in abilities.uses(config) if line["what"] == "live samples")
        assert choice in found["choice"].replace("0.31.1", "0.33.0")
        assert (why if found["choice"] == "transformers" else reason) in found["why"]


@pytest.mark.usefixtures("quick")
def test_problems_come_last_and_set_the_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(what="it is slow", cure="make it fast", severity="warning")]
    monkeypatch.setattr(doctor, "describe_machine", lambda *given: (machine.describe_machine(*given)[0], problems))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("Problems\n  warning: it is slow.\n    cure: make it fast\n")
    problems.append(Problem(what="it fails", cure="mend it"))
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"][-1] == {"what": "it fails", "cure": "mend it", "severity": "error"}
    assert {"software", "machine", "abilities", "run", "problems"} == found.keys()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("instructions", "gpu", "precision", "told"),
    [
        ([], False, None, True),
        ([], False, "bf16", True),
        ([], False, "fp32", False),
        ([], True, None, False),
        (["amx_bf16"], False, None, False),
    ],
)
def test_a_processor_without_bfloat16(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    instructions: list[str],
    gpu: bool,
    precision: str | None,
    told: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    config = {"output": str(tmp_path), "data": {"train": "d"}, "model": {"checkpoint": "m", "precision": precision}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["doctor", *([] if precision is None else ["--config", str(tmp_path / "run.yaml")])]) == 0
    page = capsys.readouterr().out
    assert ("no bfloat16" in page) == (not instructions)
    assert ("takes several times as long as fp32.\n    cure: set model.precision to fp32" in page) == told


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; sys.modules['torch'] = None\nfrom mpo_megatron.cli import main; main(['doctor', '--help'])"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert "--config FILE" in done.stdout


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "--config none.yaml: there is no such file."),
        (["--conf", "x"], "--conf x: `mpo doctor` has the options"),
        (["--config"], "--config: expected one argument."),
    ],
)
def test_unknown_options_and_files(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"mpo doctor: {message}")


def test_a_model_that_does_not_load_is_a_problem(quick: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    quick.clear()
    quick["error"] = "ModuleNotFoundError: No module named 'megatron'"
    assert main(["doctor"]) == 1
    assert "error: Megatron-Core's model does not load: ModuleNotFoundError" in capsys.readouterr().out


def test_what_works_here_and_what_a_run_would_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs in this process instead of a separate one."""
    config = tmp_path / "run.yaml"
    options = {
        "output": "run",
        "model": {"checkpoint": str(tmp_path / "none"), "precision": "fp32"},
        "data": {"train": "none"},
        "parallel": {"tensor": 2},
    }
    config.write_text(yaml.safe_dump(options))
    assert abilities.main([str(config)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["attention"]["sdpa"] == "usable"
    assert found["fp8"].keys() == {"current", "blockwise", "mxfp8"}
    if not torch.cuda.is_available():
        assert "no GPU" in found["attention"]["flex"]
        assert "no GPU" in found["fp8"]["mxfp8"]
    uses = {row["what"]: (row["choice"], row["why"]) for row in found["run"]["uses"]}
    assert uses["ranks"][0].endswith("tensor 2 × pipeline 1 × context 1 × 1 replicas") or torch.cuda.is_available()
    assert uses["attention"][0] == "sdpa"
    assert "none" in found["run"]["refused"]
    assert "because: " in doctor.render(
        {"software": [], "machine": _facts(), "abilities": ABLE, "run": found["run"], "problems": []}
    )


def test_recipes_that_the_gpu_is_too_old_for(monkeypatch: pytest.MonkeyPatch) -> None:
    too_old = "Device compute capability 10.0 or higher required for MXFP8"
    monkeypatch.setattr(precision, "missing_for_transformer_engine", lambda: None)
    monkeypatch.setattr(precision, "missing_for_recipe", lambda name: too_old if name == "mxfp8" else None)
    able = abilities.abilities()
    assert able["layers"]["transformer_engine"] == "usable"
    assert able["fp8"] == {"current": "usable", "blockwise": "usable", "mxfp8": too_old}
    able["attention"] = ABLE["attention"]
    page = doctor.render({"software": [], "machine": _facts(), "abilities": able, "run": None, "problems": []})
    assert f"fp8 mxfp8                  {too_old}" in page


def test_what_is_installed_but_does_not_import(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where there are GPUs if it is Transformer Engine, a warning elsewhere."""
    install(site, "transformer-engine", "2.20.2", module="transformer_engine.pytorch")
    install(site, "transformer-engine-torch", "2.20.2")
    install(site, "flash-attn", "2.8.3", module="flash_attn", library=b"libcudart.so.13\0")
    failing = {"transformer_engine.pytorch": "ImportError: undefined symbol: _ZN3c10", "flash_attn": "ImportError: no"}
    monkeypatch.setattr(software, "import_error_apart", failing.get)
    for has_gpus, severity in ((True, "error"), (False, "warning")):
        rows, problems = software.describe_software(has_gpus=has_gpus)
        states = {row["package"]: (row["version"], row["cuda"], row["state"], row["error"]) for row in rows}
        assert states["flash-attn"] == ("2.8.3", "13", "does not import", "ImportError: no")
        assert states["apex"] == (None, None, "absent", None)
        assert states["torch"][2] == "installed"
        found = {problem.what.partition(" ")[0]: problem for problem in problems}
        assert found["transformer-engine"].severity == severity
        assert "it is built for another torch" in found["transformer-engine"].what
        assert found["flash-attn"].severity == "warning"


def test_a_gpu_machine_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "import_error_apart", lambda module: None)
    monkeypatch.setattr(software, "is_installed", lambda: False)
    _, problems = software.describe_software(has_gpus=True)
    (problem,) = [problem for problem in problems if problem.what.startswith("Transformer Engine is not installed")]
    assert "NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install" in problem.cure
    assert not [problem for problem in software.describe_software(has_gpus=False)[1] if "not installed" in problem.what]


def test_a_package_that_megatron_cannot_do_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise ConfigError("transformer-engine does not import; mend it.")

    monkeypatch.setattr(abilities, "abilities", refuse)
    assert abilities.main([]) == 0
    assert json.loads(capsys.readouterr().out) == {"error": "transformer-engine does not import; mend it"}


def test_a_configuration_that_does_not_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("paralel: {}\n")
    assert abilities.main([str(config)]) == 0
    run = json.loads(capsys.readouterr().out.splitlines()[-1])["run"]
    assert "paralel" in run["refused"]
    page = doctor.render({"software": [], "machine": _facts(), "abilities": ABLE, "run": run, "problems": []})
    assert page.count("unknown, because `mpo train` refuses it") == 1


def _facts(**changes: Any) -> dict[str, Any]:
    return machine.describe_machine(Path.cwd(), "bf16")[0] | changes


def test_what_a_gpu_machine_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "unusable_gpus", lambda: None)
    monkeypatch.setattr(machine, "torch_cuda", lambda: (13, 0))
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    facts = _facts(
        gpu_files=["/dev/nvidia0"],
        driver="550.54.14",
        compiler=None,
        shared_memory_gib=0.06,
        disks_gib={"/run": 3.0, "/data": 900.0},
    )
    found = {problem.what: problem for problem in [*machine._gpu_problems(facts), *machine._space_problems(facts)]}
    assert "driver 550.54.14 is older than 580.65, the oldest that CUDA 13 supports" in found
    assert found["there is no C compiler, but Triton needs one (torch.compile)"].cure == "apt install gcc"
    assert found["/dev/shm has 0.06 GiB free; NCCL may need more between GPUs"].severity == "warning"
    assert "/run has 3.0 GiB free" in found
    assert len(found) == 4
    (headers,) = machine._gpu_problems(facts | {"compiler": "gcc", "driver": "580.95.05"})
    assert "there is no Python.h" in headers.what
    (hidden,) = machine._gpu_problems(facts | {"gpu_files": []})
    assert "docker run --gpus all" in hidden.cure


def test_machines_are_compared_and_their_clocks_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    store, facts = HashStore(), {"driver": "580", "gpus": ["H100"]}

    class Late:
        """The second machine's store, with a clock that is 100 seconds behind."""

        def set(self, key: str, value: str) -> None:
            store.set(key, repr(float(value) - 100) if key.startswith("pong") else value)

        def get(self, key: str) -> bytes:
            return store.get(key)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(peers.exchange, Late(), 1, 2, {"host": "b", **facts})
        found = peers.exchange(store, 0, 2, {"host": "a", **facts})
        assert other.result(timeout=TIMEOUT) == []
    assert [peer["host"] for peer in found] == ["a", "b"]
    assert found[1]["clock_seconds"] == pytest.approx(-100, abs=found[1]["clock_error"] + 1e-3)
    (problem,) = peers.compare(found)
    assert problem.what == f"the clock of b is {found[1]['clock_seconds']:+.1f} s off a's"
    found[1]["driver"] = "535"
    assert peers.compare(found)[0].what == "driver differs between machines: 580 on a; 535 on b"
