"""Shards of a stage that share only a folder: each writes its own files, and the last to finish joins them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mpo_megatron.config import parse_shard, require
from mpo_megatron.files.lock import hold
from mpo_megatron.terminal.console import Console


class Shard(NamedTuple):
    """Part `part`, from 0, of `total` of the groups: every `total`-th one."""

    part: int
    total: int

    def name(self, file: str) -> str:
        """The shard's version of a file name: samples.jsonl → samples-00003-of-00008.jsonl."""
        stem, suffix = file.rsplit(".", 1)
        return file if self.total == 1 else f"{stem}-{self.part:05}-of-{self.total:05}.{suffix}"

    def all_names(self, file: str) -> list[str]:
        """All shards' versions of a file name, in order."""
        return [Shard(part, self.total).name(file) for part in range(self.total)]


def choose_shard(text: str | None) -> Shard:
    """The configured shard; else this Slurm array task's, split further among torchrun's ranks.

    Raises:
        ConfigError: the array's tasks are not evenly spaced, as in `--array=1,3,7`, so that a task's part is unknown.
    """
    if text is not None:
        return Shard(*parse_shard(text))
    ranks = Shard(*torchrun_rank())
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return ranks
    first, step = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default)) for name, default in (("MIN", 0), ("STEP", 1)))
    (part, rest), total = divmod(int(task) - first, step), int(os.environ["SLURM_ARRAY_TASK_COUNT"])
    require(rest == 0 and part < total, f"task {task} of this Slurm array of {total} is out of range; set the part: --shard i/n.")
    return Shard(part * ranks.total + ranks.part, total * ranks.total)


def torchrun_rank() -> tuple[int, int]:
    """This process's rank and the number of ranks, if torchrun started it to share a stage; else 0 of 1."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_shards(output: Path, shard: Shard, summary: str, join: Callable[[], None], console: Console) -> bool:
    """Join the shards once all are complete; whether they are joined now.

    Args:
        summary: the file that each shard, and `join`, writes last
    """
    missing = [part for part, name in enumerate(shard.all_names(summary)) if not (output / name).is_file()]
    if missing:
        console.print(
            f"Shard {shard.part} of {shard.total} is complete; shards {missing} are still missing.",
            highlight=False,
            soft_wrap=True,
        )
        return False
    with hold(output / ".join.lock", output, wait_seconds=math.inf):  # several shards may finish at once
        if not (output / summary).is_file():
            join()
    return True
