"""A private Slurm: munged, slurmctld and one slurmd on this machine, in a folder, on free ports.

A job that is queued again waits for `cred_expire` seconds (Slurm's default: two minutes), because the node refuses the
credentials that it revoked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CryptoType=crypto/munge
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=5
SwitchType=switch/none
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def installed() -> bool:
    """Whether Slurm's daemons are installed, and may be started: this requires root."""
    return os.geteuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged"))


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run Slurm, only one instance per machine; yields the environment for its commands."""
    for path in (folder, *folder.parents[:-1]):
        path.chmod(path.stat().st_mode | 0o055)  # munged requires that all users can reach it
    for name in ("spool", "state"):
        (folder / name).mkdir()
    controller, daemon = _free_ports(2)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=socket.gethostname().split(".")[0], controller=controller, daemon=daemon))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    munge = [f"--{name}={folder}/munge{end}" for name, end in MUNGE_FILES.items()]
    daemons = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c", "-f", str(config)],
        ["slurmd", "-D", "-c", "-f", str(config)],
    ]
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((Path(tempfile.gettempdir()) / "mpo-tests-slurm.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in daemons:
            log = stack.enter_context((folder / f"{command[0]}.out").open("w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            stack.callback(_stop, process)
            time.sleep(1)  # the next daemon connects to this one
        _wait_until_idle(environment)
        yield environment
        subprocess.run(["scancel", "--full", "--user=root"], env=environment, check=False)


MUNGE_FILES = {"socket": ".socket", "key-file": ".key", "pid-file": ".pid", "log-file": ".log", "seed-file": ".seed"}


def _wait_until_idle(environment: dict[str, str]) -> None:
    for _ in range(60):
        shown = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False)
        if shown.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise AssertionError(f"Slurm did not start: {shown.stdout}{shown.stderr}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
