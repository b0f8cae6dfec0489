"""Compare a checkpoint's files with their digests before use; all ranks share the work."""

from __future__ import annotations

from pathlib import Path

from torch.distributed import all_gather_object, get_rank, get_world_size

from mpo_megatron.config import ConfigError
from mpo_megatron.files.digests import DamagedError, check_pieces, require_list
from mpo_megatron.train.checkpoints.step_folders import check_files, is_step


def check_whole(folder: Path) -> None:
    """Check every byte of a checkpoint; all ranks call it.

    Raises:
        DamagedError: on all ranks, names the file.
    """
    problem = damage_of(folder)
    if problem is not None:
        raise DamagedError(problem)


def damage_of(folder: Path) -> str | None:
    """The damage of a checkpoint, each rank checking its share of the files; None if it is intact.

    Raises:
        OSError, ConfigError: a rank cannot read it, or its format is unknown; on all ranks.
    """
    own: Exception | None = None
    try:
        _check_share(folder, get_rank(), get_world_size())
    except (OSError, ConfigError) as error:
        own = error
    problems: list[Exception | None] = [None] * get_world_size()
    all_gather_object(problems, own)
    found = [problem for problem in problems if problem is not None]
    for problem in found:
        if not isinstance(problem, DamagedError):
            raise problem
    return str(found[0]) if found else None


def _check_share(folder: Path, part: int, parts: int) -> None:
    if is_step(folder):
        check_files(folder, part=part, parts=parts)
    else:
        check_pieces(folder, require_list(folder), part=part, parts=parts)
