"""Checkpoints of a run: Megatron distributed checkpoints, complete or invisible, loadable on any layout.

    <run>/checkpoints/step_00000100/
        megatron/         weights and optimizer states (torch_dist)
        hf/               config, tokenizer, generation config of the model, for `mpo convert`
        conversion.json   as written by `mpo convert`
        state.json        step and what the run must agree on to continue

A checkpoint is written under a temporary name and renamed when it is complete, so a killed save never hides an older one.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron.config import ConfigError, require
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.parallel import Ranks

CONTENT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""Optimizer states are saved parameter by parameter, so that they load on any TP × PP × DP."""

SIDE_FILES = ("hf", "conversion.json")
"""What a step's folder carries over from the model's checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands, and what must stay the same for it to continue."""

    step: int
    """Optimizer steps done."""
    seed: int
    groups_per_step: int
    total_steps: int
    data_digest: str
    loss: str


def verify(folder: Path) -> None:
    """Check that a checkpoint folder is whole, reading only its metadata and the sizes of its files.

    Raises:
        ConfigError: a file is missing or truncated.
    """
    require(
        (folder / "megatron" / "common.pt").is_file(), f"{folder}/megatron/common.pt: no such file; copy the checkpoint again."
    )
    reader = CheckpointReader(folder / "megatron")
    reader.check_files(set(reader.tensors))


def load_weights(model: list[torch.nn.Module], folder: str | Path, ranks: Ranks) -> None:
    """Load the weights of a Megatron checkpoint folder (from `mpo convert` or a run's step) into the model, on any layout.

    Raises:
        ConfigError: files are missing or damaged, or they belong to another model.
    """
    states = _model_states(model, ranks)
    loaded = _load(states, Path(folder), ranks)
    for name, part in zip(states, model, strict=True):
        _unwrap(part).load_state_dict(loaded[name], strict=False)


def save(
    run: Path, state: RunState, model: list[torch.nn.Module], optimizer: MegatronOptimizer, ranks: Ranks, source: Path
) -> Path:
    """Write the checkpoint of `state.step`; all ranks call it. Returns its folder.

    Args:
        source: checkpoint folder of the model, whose side files go along
    """
    final = run / "checkpoints" / f"step_{state.step:08d}"
    partial = final.with_name(final.name + ".partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "megatron").mkdir(parents=True)
    torch.distributed.barrier()
    states: dict[str, Any] = _model_states(model, ranks)
    states["optimizer"] = optimizer.sharded_state_dict(states["model"], metadata=_content(ranks))
    dist_checkpointing.save(
        states,
        str(partial / "megatron"),
        FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), ranks.groups.dp_cp),
        content_metadata=CONTENT,
    )
    torch.distributed.barrier()
    if ranks.is_main:
        copy_side_files(source, partial)
        (partial / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
        _sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(final.parent)
    torch.distributed.barrier()
    return final


def load(folder: Path, model: list[torch.nn.Module], optimizer: MegatronOptimizer, ranks: Ranks) -> None:
    """Restore weights and optimizer states from a step's folder, on any layout."""
    states: dict[str, Any] = _model_states(model, ranks)
    _fill_optimizer_state(optimizer)
    states["optimizer"] = optimizer.sharded_state_dict(states["model"], is_loading=True, metadata=_content(ranks))
    loaded = _load(states, folder, ranks)
    for name, part in zip(_model_states(model, ranks), model, strict=True):
        _unwrap(part).load_state_dict(loaded[name], strict=False)
    _load_optimizer(optimizer, loaded["optimizer"])


def newest(run: Path) -> Path | None:
    """Folder of the newest complete checkpoint of a run, or None."""
    steps = complete_steps(run)
    return steps[-1] if steps else None


def complete_steps(run: Path) -> list[Path]:
    """Folders of a run's complete checkpoints, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if folder.suffix != ".partial" and (folder / "state.json").is_file())


def read_state(folder: Path) -> RunState:
    """The run state in a step's folder."""
    return RunState(**json.loads((folder / "state.json").read_text()))


def remove_old(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed saves left."""
    for folder in complete_steps(run)[:-keep]:
        shutil.rmtree(folder)
    for folder in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(folder)


def check_same_run(saved: RunState, current: RunState, folder: Path) -> None:
    """Refuse to continue a run whose data order or loss would change.

    Raises:
        ConfigError: naming what differs.
    """
    for name in ("seed", "groups_per_step", "total_steps", "data_digest", "loss"):
        before, now = getattr(saved, name), getattr(current, name)
        if before != now:
            raise ConfigError(
                f"cannot resume from {folder}: it was trained with {name} = {before}, now it is {now}; "
                "use the old value, another output folder, or checkpoint.resume = false."
            )


def copy_side_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and conversion record from one checkpoint folder to another."""
    for name in SIDE_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copy2(source / name, target / name)


def _model_states(model: list[torch.nn.Module], ranks: Ranks) -> dict[str, Any]:
    """Sharded state dicts of the model's parts, without Transformer Engine's extra states, which hold no weights."""
    names = ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]
    states = {}
    for name, part in zip(names, model, strict=True):
        state = _unwrap(part).sharded_state_dict(metadata=_content(ranks))
        states[name] = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    return states


def _content(ranks: Ranks) -> dict[str, Any]:
    """How to save, and which ranks hold copies of the same shard."""
    return CONTENT | {"dp_cp_group": ranks.groups.dp_cp}


def _load(states: dict[str, Any], folder: Path, ranks: Ranks) -> dict[str, Any]:
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), ranks.groups.dp_cp)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(states, str(folder / "megatron"), strategy)
    except CheckpointException as error:  # torch's own, which is no Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ConfigError(
            f"{folder}: rank {rank} cannot load it ({cause}); copy the checkpoint again, or convert again."
        ) from error
    except CheckpointingException as error:
        raise ConfigError(f"{folder}: does not fit this model ({error}); is it of the same architecture?") from error
    return loaded


def _unwrap(part: Any) -> Any:
    while hasattr(part, "module"):
        part = part.module
    return part


def _fill_optimizer_state(optimizer: Any) -> None:
    """Give a fresh optimizer the empty states that loading fills: torch's AdamW makes them only at its first step."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not single.optimizer.state:
            single._init_optimizer_states_with_dummy_values()


def _load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Megatron's own loading, made right for torch's AdamW, which keeps a step count per parameter.

    Copying the moments, Megatron stumbles over the counts; and it gives all parameters one tensor, which AdamW would then
    count up once per parameter.
    """
    (single,) = getattr(optimizer, "chained_optimizers", [optimizer])
    moments = loaded.pop("param_state")
    single.load_state_dict(loaded)
    states = single.optimizer.state.values()
    counts = [state.pop("step", None) for state in states]
    single.load_parameter_state_from_fully_reshardable(moments)
    for state, count in zip(states, counts, strict=True):
        if count is not None:
            state["step"] = count.clone()


def _sync_folder(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
