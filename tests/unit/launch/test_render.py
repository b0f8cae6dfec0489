"""Output of `mpo launch`: shells accept it, its numbers match the job, and unsuitable layouts are refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError, KubernetesJob, SkypilotJob, SlurmArray, SlurmJob, TorchrunJob
from mpo_megatron.launch.launch import TARGETS, render

TRICKY = {"NCCL_DEBUG": "WARN", "NOTE": 'it\'s "quoted" $HOME'}


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A training configuration with 2 × 2 model-parallel ranks, in a folder with a space in its name."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    path = folder / "train.yaml"
    path.write_text("output: /data/run\nmodel: {checkpoint: model}\ndata: {train: groups}\nparallel: {tensor: 2, pipeline: 2}\n")
    (folder / "score.yaml").write_text("input: samples\noutput: scored\nscorers: {exact: {kind: match}}\n")
    (folder / "generate.yaml").write_text("prompts: prompts.jsonl\nmodel: model\noutput: samples\n")
    return str(path)


def shell_jobs(config: str) -> list[Any]:
    common = {"train": config, "environment": TRICKY, "setup": "module load cuda\nsource .venv/bin/activate"}
    return [
        *(TorchrunJob(**common, nodes=nodes, rendezvous=way) for nodes in (1, 4) for way in ("static", "c10d")),
        SlurmJob(**common, nodes=4, partition="gpu", account="me", qos="high", cpus_per_rank=12, sbatch=["--exclusive"]),
        SlurmJob(**common, container="nvcr.io#nvidia/pytorch:25.10-py3", mounts=["/data:/data", "/home:/home"]),
        SlurmJob(**common, container="image file.sif", container_runtime="apptainer", mounts=["/data:/data"]),
        SlurmJob(**common, gpus_per_node=0, ranks_per_node=4),
        SlurmArray(generate=config.replace("train", "generate"), environment=TRICKY, tasks=3, setup="module load cuda"),
        SlurmArray(score=config.replace("train", "score"), environment=TRICKY, gpus_per_task=0),
    ]


def test_shells_accept_every_script(config: str, tmp_path: Path) -> None:
    for number, job in enumerate(shell_jobs(config)):
        text, _ = render(job)
        path = tmp_path / f"{number}.sh"
        path.write_text(text)
        subprocess.run(["bash", "-n", str(path)], check=True)
        if shutil.which("shellcheck"):
            checked = subprocess.run(["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stdout


def test_environment_survives_the_shell(config: str, tmp_path: Path) -> None:
    text, _ = render(TorchrunJob(train=config, environment=TRICKY, gpus_per_node=1, ranks_per_node=4))
    exports = "\n".join(line for line in text.splitlines() if line.startswith("export NOTE"))
    seen = subprocess.run(["bash", "-c", f'{exports}\nprintf %s "$NOTE"'], capture_output=True, text=True, check=True).stdout
    assert seen == TRICKY["NOTE"]


def test_mounts_survive_the_shell(config: str) -> None:
    mounts = ["/my data/$x:/data", "/home:/home"]
    text, _ = render(SlurmJob(train=config, container="image", mounts=mounts))
    option = next(line.strip() for line in text.splitlines() if "--container-mounts" in line)
    seen = subprocess.run(["bash", "-c", f"PWD=/here; printf %s {option}"], capture_output=True, text=True, check=True).stdout
    assert seen == f"--container-mounts=/here:/here,{','.join(mounts)}"


def test_slurm_directives(config: str) -> None:
    job = SlurmJob(
        train=config,
        name="big-run",
        nodes=4,
        gpus_per_node=8,
        time="2-00:00:00",
        partition="gpu",
        warn_seconds=120,
        sbatch=["--x"],
    )
    text, submit = render(job)
    directives = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert text.index("#SBATCH") < text.index("set -euo")  # Slurm reads directives up to the first command
    assert submit == ["sbatch"]
    for expected in (
        *("--job-name=big-run", "--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8", "--time=2-00:00:00", "--partition=gpu"),
        *("--signal=USR1@120", "--requeue", "--open-mode=append", "--x"),
    ):
        assert expected in directives
    assert "# Layout: 32 ranks on 4 machines of 8: tensor 2 × pipeline 2 × context 1 × data 8." in text


def test_a_job_on_cpus_sees_no_gpu(config: str) -> None:
    text, _ = render(SlurmJob(train=config, gpus_per_node=0, ranks_per_node=4))
    assert "export CUDA_VISIBLE_DEVICES=''" in text
    assert "--gres" not in text


@pytest.mark.parametrize("nodes", [1, 4])
def test_pytorch_job(config: str, nodes: int) -> None:
    job = KubernetesJob(train=config, image="registry/mpo:1", nodes=nodes, volumes={"data": "/data"}, resources={"rdma/ib": "8"})
    config_map, resource = yaml.safe_load_all(render(job)[0])
    assert config_map["data"]["train.yaml"] == Path(config).read_text()
    specs = resource["spec"]["pytorchReplicaSpecs"]
    assert sum(spec["replicas"] for spec in specs.values()) == nodes
    assert resource["spec"]["nprocPerNode"] == "8"
    for spec in specs.values():
        check_pod(spec["template"]["spec"], config_map["metadata"]["name"])


def test_job_set(config: str) -> None:
    job = KubernetesJob(
        train=config, kind="jobset", image="registry/mpo:1", nodes=4, volumes={"data": "/data"}, resources={"rdma/ib": "8"}
    )
    config_map, resource = yaml.safe_load_all(render(job)[0])
    indexed = resource["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (indexed["parallelism"], indexed["completions"], indexed["completionMode"]) == (4, 4, "Indexed")
    pod = indexed["template"]["spec"]
    check_pod(pod, config_map["metadata"]["name"])
    # A JobSet's pods are named <jobset>-<replicated job>-<job>-<pod>, under a service with the JobSet's name.
    assert "--master-addr=mpo-ranks-0-0.mpo" in pod["containers"][0]["args"][0]
    assert resource["spec"]["replicatedJobs"][0]["name"] == "ranks"


def check_pod(pod: dict[str, Any], config_map: str) -> None:
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "rdma/ib": "8"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["data"] == "/data"
    assert {"name": "config", "configMap": {"name": config_map}} in pod["volumes"]
    assert f"--config {mounts['config']}/train.yaml" in container["args"][0]
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)


@pytest.mark.parametrize("output", ["run", "/data/../run", "/database/run", "~/run"])
def test_a_run_whose_folder_would_be_lost_with_its_machines_is_refused(config: str, output: str) -> None:
    Path(config).write_text(Path(config).read_text().replace("/data/run", output))
    message = rf"output = {output} in .*train.yaml is in the job's own file system, .* mount storage with "
    for volumes, where in (({}, "where it is mounted"), ({"claim": "/data"}, "below /data")):
        with pytest.raises(ConfigError, match=rf"{message}--volumes, and set output to an absolute path {where}"):
            render(KubernetesJob(train=config, image="registry/mpo:1", volumes=volumes))
        mounts = {path: f"s3://{claim}" for claim, path in volumes.items()}
        with pytest.raises(ConfigError, match=rf"{message}--mounts, and set output to an absolute path {where}"):
            render(SkypilotJob(train=config, accelerators="H100", mounts=mounts))


def test_skypilot_task(config: str) -> None:
    job = SkypilotJob(
        train=config, accelerators="H100", nodes=2, spot=True, mounts={"/data": "s3://bucket"}, setup="pip install x"
    )
    text, submit = render(job)
    task = yaml.safe_load(text)
    assert submit == ["sky", "jobs", "launch"]
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["use_spot"] is True
    assert task["file_mounts"] == {"/tmp/mpo/train.yaml": config, "/data": "s3://bucket"}
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 3, "gpus_per_node": 1}, "does not divide the number of ranks, 3"),
        ({"nodes": 4, "gpus_per_node": 1}, "must share a machine"),
        ({"name": "My Run"}, "lower-case"),
        ({"gpus_per_node": 0}, "ranks_per_node"),
        ({"environment": {"A-B": "1"}}, "'A-B' cannot be a variable's name"),
        ({"train": "nowhere.yaml"}, "nowhere.yaml; no such file"),
    ],
)
def test_refused(config: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render(TorchrunJob(**{"train": config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time": "a day"}, "24:00:00"),
        ({"sbatch": ["exclusive"]}, "must start with --"),
        ({"sbatch": ["--exclusive\nrm x"]}, "and be one line"),
        ({"partition": "a b"}, r"partition = 'a b'; in a Slurm job it must not contain spaces"),
        ({"logs": "$HOME/logs"}, r"logs = '\$HOME/logs'; in a Slurm job it must not contain spaces, quotes or \$"),
        ({"cpus_per_rank": 0}, "cpus_per_rank = 0; it must be at least 1"),
    ],
)
def test_slurm_refused(config: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlurmJob(**{"train": config, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": "nowhere.yaml"}, "nowhere.yaml; no such file"),
        ({"name": "my job"}, "name = 'my job'"),
        ({"gpus_per_task": -1}, "gpus_per_task = -1"),
        ({"score": "score.yaml"}, "give either generate, .* or score"),
        ({"generate": None}, "give either generate, .* or score"),
        ({"generate": None, "score": "nowhere.yaml"}, "score = nowhere.yaml; no such file; write the options of `mpo score`"),
    ],
)
def test_arrays_refused(config: str, changes: dict[str, Any], message: str) -> None:
    generate = {"generate": config.replace("train", "generate")}
    with pytest.raises(ConfigError, match=message):
        render(SlurmArray(**{**generate, **changes}))


@pytest.mark.parametrize("command", ["generate", "score"])
def test_arrays_run_their_command_by_shards(config: str, command: str) -> None:
    path = config.replace("train", command)
    text, submit = render(SlurmArray(**{command: path}, tasks=3))
    assert submit == ["sbatch"]
    assert {f"#SBATCH --job-name=mpo-{command}", "#SBATCH --array=0-2"} <= set(text.splitlines())
    assert f"""\nmpo {command} --config '{path}' --shard "$SLURM_ARRAY_TASK_ID/3" &\n""" in text
    assert "--job-name=mine" in render(SlurmArray(**{command: path}, name="mine"))[0]


def test_arrays_of_another_command_are_refused(config: str) -> None:
    with pytest.raises(ConfigError, match="data: there is no such option"):
        render(SlurmArray(generate=config))
    with pytest.raises(ConfigError, match="prompts: there is no such option"):
        render(SlurmArray(score=config.replace("train", "generate")))


def test_a_broken_training_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("output: /data/run\nmodel: {checkpoint: model}\ndata: {train: groups}\nparalel: {tensor: 2}\n")
    with pytest.raises(ConfigError, match=r"train\.yaml:4: paralel: .* did you mean parallel"):
        render(TorchrunJob(train=str(path)))
    path.write_text("output: /data/run\nmodel: {checkpoint: model}\ndata: {train: groups}\nlogging: {wandb_run: x}\n")
    with pytest.raises(ConfigError, match=r"train = logging\.wandb_run = x has no effect without logging\.wandb_project"):
        render(TorchrunJob(train=str(path)))


def test_dry_run_writes_the_file_and_submits_nothing(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # no sbatch
    output = tmp_path / "jobs" / "job.sh"
    arguments = ["launch", "slurm", "--train", config, "--output", str(output)]
    assert main([*arguments, "--dry_run", "true"]) == 0
    assert "srun" in output.read_text()
    assert main(arguments) == 2
    assert "sbatch, which submits the job, is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["folder", "train.yaml/job.sh"])
def test_outputs_that_cannot_be_written(
    config: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(config).parent)
    Path("folder").mkdir()
    assert main(["launch", "torchrun", "--train", config, "--output", output]) == 2
    assert "is a folder; name a file" in (printed := capsys.readouterr().err) or "is a file, not a folder" in printed


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_tells_of_each_target(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *arguments]) == 0
    shown = capsys.readouterr().out
    for target in TARGETS:
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [target]]
        assert len(line.split()) > 4


def test_an_unknown_target_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "lsf"]) == 2
    assert "slurm | slurm-array | kubernetes | skypilot" in capsys.readouterr().err
