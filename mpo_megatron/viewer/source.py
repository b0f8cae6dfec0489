"""Find what to inspect: a group of a prepared folder, or a row of a run's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpo_megatron.config import ConfigError, InspectConfig, TrainConfig, load_yaml, require, to_dict
from mpo_megatron.config.run_paths import find_input
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import GroupTable, RowShape, build_step, group_table, step_indices, steps_per_epoch
from mpo_megatron.data.packing import Row, build_row, plan_rows
from mpo_megatron.data.store import PreparedGroups, load_groups
from mpo_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mpo_megatron.files.digests import unseal

Sets = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A row with its groups."""

    title: str
    row: Row
    groups: tuple[TokenizedGroup, ...]
    """[G] the groups that the row's slots refer to."""
    left_out: tuple[tuple[int, int], ...]
    """(slot, response) of responses of the row's groups that the loss does not use."""
    sets: Sets | None
    """[G, K] 1 preferred, 0 other, −1 neither, as the run's loss splits groups; None without a run."""
    tokenizer: Tokenizer


def look(config: InspectConfig) -> Sight:
    """Find the row that the options select.

    Raises:
        ConfigError: no such group, step, row or replica, or no tokenizer.
        DataError: the data is missing or damaged.
    """
    return _row_of_run(config) if config.run is not None else _group_of_data(config)


def _group_of_data(config: InspectConfig) -> Sight:
    data = load_groups(str(config.data))
    index = find_group(data, config.group)
    group = data[index]
    lengths = [len(tokens) for tokens in group.response_tokens]
    whole = len(group.prompt_tokens) * (1 if config.layout == "shared" else len(lengths)) + sum(lengths)
    plan = plan_rows(
        [len(group.prompt_tokens)],
        [lengths],
        np.ones((1, len(lengths)), dtype=bool),
        row_tokens=whole,
        num_replicas=1,
        layout=config.layout,
    )
    row = build_row(plan.rows[0][0], [group], layout=config.layout)
    source = config.tokenizer or data.info.config.get("tokenizer")
    require(source is not None, f"{config.data} does not record its tokenizer; set --tokenizer.")
    return Sight(
        title=f"{config.data}: group {group.group_id}, number {index} of {len(data)}",
        row=row,
        groups=(group,),
        left_out=(),
        sets=None,
        tokenizer=_tokenizer(str(source), data, "--tokenizer"),
    )


def find_group(data: PreparedGroups, wanted: str) -> int:
    """The index of a group given by id or index.

    Raises:
        ConfigError: no such group.
    """
    ids = data.group_ids()
    if wanted in ids:
        return ids.index(wanted)
    if wanted.isdigit() and int(wanted) < len(data):
        return int(wanted)
    raise ConfigError(f"group = {wanted}: {data.path} has {len(data)} groups, but none with this id; the first id is {ids[0]}.")


def _row_of_run(config: InspectConfig) -> Sight:
    folder = Path(str(config.run))
    require((folder / "config.yaml").is_file(), f"run = {folder} has no config.yaml; name the --output of an `mpo train`.")
    train = _find_inputs(load_yaml(TrainConfig, folder / "config.yaml"), folder)
    data = load_groups(train.data.train)
    replicas = num_replicas(folder)
    require(config.replica < replicas, f"replica = {config.replica}: the run has {replicas} model replicas, counted from 0.")
    from mpo_megatron.train.objective import build_objective

    shape = _row_shape(train, replicas, config.replica)
    first = train.data.first_step
    require(config.step > first, f"step = {config.step}: the data of {folder} starts after step {first}; choose a later step.")
    indices = step_indices(
        config.step - 1 - first, len(data), train.data.groups_per_step, seed=train.seed, shuffle=train.data.shuffle
    )
    batch = build_step(config.step - 1, data, indices, build_objective(train.loss).select, shape)
    require(
        config.row < len(batch.rows),
        f"row = {config.row}: replica {config.replica} has {len(batch.rows)} rows at step {config.step}, counted from 0.",
    )
    row = batch.rows[config.row]
    slots = sorted(set(row.responses[:, 0].tolist()))
    left_out = [(slot, k) for slot in slots for k in np.flatnonzero(batch.table.valid[slot] & ~batch.in_rows[slot]).tolist()]
    epoch = (config.step - 1 - first) // steps_per_epoch(len(data), train.data.groups_per_step) + 1
    return Sight(
        title=f"{folder}: step {config.step} (epoch {epoch}), row {config.row} of {len(batch.rows)} of replica {config.replica}",
        row=row,
        groups=batch.groups,
        left_out=tuple(left_out),
        sets=_sets(train, batch.groups),
        tokenizer=_tokenizer(train.model.checkpoint, data, "model.checkpoint"),
    )


def _find_inputs(train: TrainConfig, run: Path) -> TrainConfig:
    """The run's configuration with the current paths of its inputs."""
    recorded = to_dict(train)
    data = replace(train.data, train=find_input(run, recorded, "data", "train"))
    return replace(train, data=data, model=replace(train.model, checkpoint=find_input(run, recorded, "model", "checkpoint")))


def num_replicas(run: Path) -> int:
    """Model replicas at the run's last start, from run.json; 1 without it.

    Raises:
        DamagedError: run.json differs from what the run wrote.
    """
    path = run / "run.json"
    if not path.is_file():
        return 1
    replicas: int = unseal(path)["starts"][-1]["layout"]["data"]
    return replicas


def _row_shape(train: TrainConfig, replicas: int, replica: int) -> RowShape:
    """The shape of the run's rows."""
    from mpo_megatron.families import load_family
    from mpo_megatron.hf.flops import build_flop_model
    from mpo_megatron.train.row_shape import build_row_shape

    flops = build_flop_model(load_family(Path(train.model.checkpoint) / "hf"))
    return build_row_shape(train, flops, num_replicas=replicas, replica=replica)


def _sets(train: TrainConfig, groups: Sequence[TokenizedGroup]) -> Sets:
    import torch

    from mpo_megatron.train.metrics import compute_sets
    from mpo_megatron.train.objective import Logps, build_objective, group_batch

    table: GroupTable = group_table(groups, np.arange(len(groups)))
    batch = group_batch(table, Logps(response=torch.zeros(table.valid.shape)), None)
    positive, negative = compute_sets(batch, build_objective(train.loss).params)
    sets: Sets = (positive.long() - (~positive & ~negative).long()).numpy()
    return sets


def _tokenizer(source: str, data: PreparedGroups, name: str) -> Tokenizer:
    tokenizer = load_tokenizer(source)
    require(
        tokenizer.digest() == data.info.tokenizer_digest,
        f"{data.path} was prepared with another tokenizer than {source}; set {name} to the right one.",
    )
    return tokenizer
