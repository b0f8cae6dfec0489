"""YAML for Kubernetes (PyTorchJob, JobSet) and SkyPilot, built as plain dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mpo_megatron.config import KubernetesJob, SkypilotJob
from mpo_megatron.launch.layout import describe, load_run, require_kept
from mpo_megatron.launch.scripts import RANK_MODULE, preamble

PORT = 29500
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torchrun waits for ranks after asking them to stop."""
GRACE_SECONDS = 600
"""Seconds between the request to stop and the kill: must suffice for a step and a save."""


def kubernetes_manifest(job: KubernetesJob) -> str:
    """A ConfigMap with the run's configuration, and the job that mounts it."""
    run = load_run(job)
    require_kept(job, run, "volumes", job.volumes.values())
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{job.name}-config", "namespace": job.namespace},
        "data": {"train.yaml": Path(job.train).read_text()},
    }
    build = pytorch_job if job.kind == "pytorchjob" else job_set
    resource = build(job, RANK_MODULE)
    return f"# Layout: {describe(job, run)}.\n" + yaml.dump_all(
        [config_map, resource], Dumper=_Dumper, sort_keys=False, width=140
    )


def pytorch_job(job: KubernetesJob, module: str) -> dict[str, Any]:
    """Kubeflow's PyTorchJob: its controller passes the other machines' addresses to torchrun through PET_* variables."""
    template = {"spec": pod(job, f"-m {module}")}
    replicas = {"Master": 1, "Worker": job.nodes - 1}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": job.name, "namespace": job.namespace},
        "spec": {
            "nprocPerNode": str(job.ranks),
            "runPolicy": {"backoffLimit": job.max_restarts},
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "OnFailure", "template": template}
                for role, count in replicas.items()
                if count
            },
        },
    }


def job_set(job: KubernetesJob, module: str) -> dict[str, Any]:
    """A JobSet: one indexed job with one pod per machine; when a pod fails, all restart."""
    torchrun = (
        f"--nproc-per-node={job.ranks} --nnodes={job.nodes} --node-rank=$JOB_COMPLETION_INDEX"
        f" --master-addr={job.name}-ranks-0-0.{job.name} --master-port={PORT} -m {module}"
    )
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "namespace": job.namespace},
        "spec": {
            "failurePolicy": {"maxRestarts": job.max_restarts},
            "replicatedJobs": [
                {
                    "name": "ranks",
                    "replicas": 1,
                    "template": {
                        "spec": {
                            "parallelism": job.nodes,
                            "completions": job.nodes,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "template": {"spec": {"restartPolicy": "Never", **pod(job, torchrun)}},
                        }
                    },
                }
            ],
        },
    }


def pod(job: KubernetesJob, torchrun: str) -> dict[str, Any]:
    """The pod of one machine; `torchrun` holds the options that its controller does not set, and the module."""
    gpus = {"nvidia.com/gpu": job.gpus_per_node} if job.gpus_per_node else {}
    command = f"exec python -m torch.distributed.run {torchrun} --config /etc/mpo/train.yaml"
    mounts = {"config": "/etc/mpo", "shared-memory": "/dev/shm", **job.volumes}
    return {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [
            {
                "name": "pytorch",
                "image": job.image,
                "command": ["bash", "-ceu"],
                "args": [shell_lines(job.setup, job.environment, command)],
                "resources": {"limits": {**gpus, **job.resources}},
                "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
            }
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": f"{job.name}-config"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": job.shared_memory}},
            *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in job.volumes),
        ],
    }


def shell_lines(setup: str, environment: dict[str, str], command: str) -> str:
    """A container's shell lines: set-up, environment, and the command, which gets time to save when asked to stop."""
    return "\n".join([preamble(setup, {SHUTDOWN: str(GRACE_SECONDS), **environment}), command, ""])


def skypilot_task(job: SkypilotJob) -> str:
    """A SkyPilot task, for `sky jobs launch`."""
    run = load_run(job)
    require_kept(job, run, "mounts", job.mounts)
    command = (
        f"exec python -m torch.distributed.run --nproc-per-node={job.ranks} --nnodes={job.nodes}"
        ' --node-rank="$SKYPILOT_NODE_RANK" --master-addr="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'
        f" --master-port={PORT} -m {RANK_MODULE} --config /tmp/mpo/train.yaml"
    )
    resources: dict[str, Any] = {"accelerators": f"{job.accelerators}:{job.gpus_per_node}"}
    if job.image:
        resources["image_id"] = job.image
    if job.spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {"strategy": "FAILOVER", "max_restarts_on_errors": 3}
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": resources,
        "file_mounts": {"/tmp/mpo/train.yaml": str(Path(job.train)), **job.mounts},
    }
    if job.setup.strip():
        task["setup"] = job.setup.strip() + "\n"
    task["run"] = "set -euo pipefail\n" + shell_lines("", job.environment, command)
    return f"# Layout: {describe(job, run)}.\n" + yaml.dump(task, Dumper=_Dumper, sort_keys=False, width=140)


class _Dumper(yaml.SafeDumper):
    """Writes multi-line texts as blocks, without anchors, for readability."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
