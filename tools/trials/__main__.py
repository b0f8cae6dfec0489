"""Disturb every stage at every place, run it again, and compare with an undisturbed run.

    python -m tools.trials --each 12

For each command a small undisturbed run counts its file operations. Then, at places spread evenly over them, the disk is full
from there on, or the process is killed, or it is stopped while a second one starts on the same output. After each the same
command runs again, and must end with what the undisturbed run ended with, and leave no temporary files. Further trials: few
open files, locks of other machines, runs that were moved while stopped, launched ranks that are killed or asked to stop, and
expressions and templates that never end.

Commands run in processes forked from this one, which has imported everything. File operations are counted in a library that is
preloaded (failing_writes.c), so that those of Arrow, torch and safetensors count, too; it is compiled at the start, with `cc`.
Exit code 1: something ended otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LIBRARY = "MPO_TRIALS_LIBRARY"


def start_again_preloaded() -> None:
    """Compile the library, and replace this process by itself with the library loaded."""
    library = Path(tempfile.mkdtemp(prefix="mpo-trials-")) / "failing_writes.so"
    source = Path(__file__).with_name("failing_writes.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), LIBRARY: str(library), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    os.execve(sys.executable, [sys.executable, "-m", "tools.trials", *sys.argv[1:]], {**os.environ, **environment})


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Disturb every stage at every place, run it again, compare.")
    parser.add_argument("--each", type=int, default=12, help="Places a command and disturbance.")
    parser.add_argument("--only", nargs="*", help="Kinds of trials; by default all.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="Seed of the places.")
    parser.add_argument("--folder", type=Path, help="Where to work; kept if something is wrong. Default: a temporary folder.")
    arguments = parser.parse_args()
    if LIBRARY not in os.environ:
        start_again_preloaded()
    from tools.trials.trials import run_trials

    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="mpo-trials-"))
    started = time.monotonic()
    faults = run_trials(folder.resolve(), arguments.each, random.Random(arguments.seed), arguments.only)
    print(f"{time.monotonic() - started:.0f} s, seed {arguments.seed}", flush=True)
    if faults:
        print("\n".join(["FAILED", *faults]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
