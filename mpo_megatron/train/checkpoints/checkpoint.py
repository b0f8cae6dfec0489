"""Save and load weights and optimizer states as Megatron distributed checkpoints, on any layout.

step_folders.py describes a checkpoint's folder and which one counts; saving.py decides when and how to write.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config
from torch.distributed.checkpoint.api import CheckpointException

from mpo_megatron.config import ConfigError, require
from mpo_megatron.families.adapters import ADAPTER
from mpo_megatron.families.rules import Rule
from mpo_megatron.files import digests
from mpo_megatron.mcore.gathering import SaveOwnShare, own_share, reserving
from mpo_megatron.mcore.optimizer_states import copy_master_weights, each_single, fill_states, leave_out_classes, load_states
from mpo_megatron.mcore.weights import gather_now, unwrap
from mpo_megatron.mcore.writer import choose_strategy, keep_results_here
from mpo_megatron.model.adapters import linear_adapters_of
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import keep_exact_weights
from mpo_megatron.model.quantized import load_quantized
from mpo_megatron.model.unpickling import check_pickles, common_refusal, reading_safely
from mpo_megatron.train.checkpoints.step_folders import is_step
from mpo_megatron.train.checkpoints.verification import check_whole
from mpo_megatron.train.optimizer import gather_weights

CONTENT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""Optimizer states are saved per parameter, so that they load on any TP × PP × DP × EP, even if a stage without experts has one
optimizer less."""

EXTRA_STATE = "_extra_state"
"""Suffix of the extra states of Transformer Engine's modules; empty for the recipes offered here."""


def verify(folder: Path) -> None:
    """Check that a checkpoint folder is complete; for weight files only the sizes, because `load_weights` checks the content.

    Raises:
        ConfigError: a file is missing, truncated or damaged.
    """
    digests.require_list(folder)
    digests.check_folder(folder, weights=False)
    check_pickles(folder / "megatron")
    reader = CheckpointReader(folder / "megatron")
    reader.check_files(set(reader.tensors))
    require(
        is_step(folder) or not any(name.startswith("optimizer.") for name in reader.tensors),
        f"{folder}: a run's step without its {digests.STATE}; copy the whole folder again, or convert it to Hugging Face and "
        "back.",
    )


def estimate_bytes(model: Path, precision: str, rules: Sequence[Rule] | None = None, num_layers: int = 0) -> int:
    """Size of a run's checkpoint in bytes, from the metadata of the initial model: weights in the training dtype, and float32
    weights, first and second moments of Adam.

    Args:
        rules: rules of the adapter's weights, if only an adapter is trained
        num_layers: layers of the model
    """
    if rules is not None:
        numbers = sum(rule.rows * math.prod(rule.row_shape) * (rule.experts or 1) * rule.num_layers(num_layers) for rule in rules)
    else:
        reader = CheckpointReader(model / "megatron")
        numbers = sum(math.prod(entry.size) for key, entry in reader.tensors.items() if not key.startswith("optimizer."))
    return numbers * ({"bf16": 2, "fp32": 4}[precision] + 3 * 4)


def load_weights(model: list[torch.nn.Module], folder: str | Path, ranks: Ranks) -> None:
    """Load the weights of a Megatron checkpoint folder (from `mpo convert` or a run's step) into the model, on any layout.

    Adapters of the model stay unchanged.

    Raises:
        ConfigError: files are missing or damaged, or belong to another model.
    """
    check_whole(Path(folder))
    states = _model_states(model, ranks, adapters=False)
    loaded = _load(states, Path(folder), ranks)
    for name, part in zip(states, model, strict=True):
        unwrap(part).load_state_dict(loaded[name], strict=False)
        keep_exact_weights(unwrap(part), loaded[name])
    load_quantized(model, Path(folder), ranks)


def load_adapter(model: list[torch.nn.Module], folder: Path, ranks: Ranks) -> None:
    """Load an adapter's Megatron checkpoint folder (from `mpo convert` or a run's step) into the model's adapters.

    Raises:
        ConfigError: files are missing or damaged, or belong to another model.
    """
    check_whole(folder)
    states = _model_states(model, ranks, adapters=True)
    loaded = _load(states, folder, ranks)
    for name, part in zip(states, model, strict=True):
        unwrap(part).load_state_dict(loaded[name], strict=False)


def prepare_save(folder: Path, model: list[torch.nn.Module], optimizer: MegatronOptimizer, ranks: Ranks) -> Any:
    """Plan a checkpoint over all ranks: returns the writer's request (mcore/writer.py) for this rank's part; for a model with
    adapters, only these.

    All ranks call it. Optimizer states that this rank writes are gathered and copied here. Weights on a CPU are copied here,
    weights on a GPU when the request is staged.
    """
    gather_weights(model)
    states: dict[str, Any] = _model_states(model, ranks, adapters=trains_adapters(model))
    fill_states(optimizer)
    with reserving(optimizer) as reserved:
        states["optimizer"] = optimizer.sharded_state_dict(_optimizer_view(states), metadata=_content(ranks))
    leave_out_classes(states["optimizer"])
    force_all_tensors_to_non_fp8(states)  # weights are saved in bf16, dequantized from FP8
    strategy = choose_strategy()
    keep_results_here(strategy)
    request = dist_checkpointing.save(
        states,
        str(folder / "megatron"),
        # One file a rank.
        SaveOwnShare(TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1), ranks.groups.dp_cp, reserved),
        async_sharded_save=True,
        async_strategy=strategy,
        content_metadata=CONTENT,
    )
    assert request is not None
    return request


def load(folder: Path, model: list[torch.nn.Module], optimizer: MegatronOptimizer, ranks: Ranks) -> None:
    """Restore weights and optimizer states from a step's folder, on any layout; for a model with adapters, only theirs."""
    models = _model_states(model, ranks, adapters=trains_adapters(model))
    fill_states(optimizer)
    with reserving(optimizer):
        states = optimizer.sharded_state_dict(_optimizer_view(models), is_loading=True, metadata=_content(ranks))
    own = {index: own_share(single, state.pop("param_state")) for index, single, state in each_single(optimizer, states)}
    loaded = _load({**models, "optimizer": states}, folder, ranks)
    moments = _load({"moments": own}, folder, None).get("moments", {})  # a rank may hold no part of any state
    for name, part in zip(models, model, strict=True):
        unwrap(part).load_state_dict(loaded[name], strict=False)
    load_states(optimizer, loaded["optimizer"], moments)
    if get_model_config(model[0]).fp8_param:  # now quantized from bf16, but after a step from the master weights
        copy_master_weights(optimizer)
        for part in model:
            gather_now(part)


def trains_adapters(model: list[torch.nn.Module]) -> bool:
    """Whether only adapters are trained, and saved."""
    return any(linear_adapters_of(part) for part in model)


def _model_states(model: list[torch.nn.Module], ranks: Ranks, *, adapters: bool) -> dict[str, Any]:
    """Sharded state dicts of the model's parts: their adapters' weights, or all others."""
    names = ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]
    states = {}
    for name, part in zip(names, model, strict=True):
        state = unwrap(part).sharded_state_dict(metadata=_content(ranks))
        states[name] = {
            key: value for key, value in state.items() if not key.endswith(EXTRA_STATE) and (ADAPTER in key) == adapters
        }
    return states


def _optimizer_view(states: dict[str, Any]) -> dict[str, Any]:
    """The model's states in the form in which the optimizer looks up its parameters: one part's own, or all parts'."""
    return states["model"] if "model" in states else dict(states)


def _content(ranks: Ranks) -> dict[str, Any]:
    """Metadata for saving: the format, and which ranks hold copies of the same shard."""
    return CONTENT | {"dp_cp_group": ranks.groups.dp_cp}


def _load(states: dict[str, Any], folder: Path, ranks: Ranks | None) -> dict[str, Any]:
    """Load states; replicas each read a share and exchange it. Without `ranks`, read everything that this rank needs, which may
    be only part of a weight's shards."""
    strategy: Any = TorchDistLoadShardedStrategy()
    if ranks is not None:
        strategy = FullyParallelLoadStrategyWrapper(strategy, ranks.groups.dp_cp)
    path, whole = str(folder / "megatron"), ranks is not None
    try:
        with reading_safely():
            loaded: dict[str, Any] = dist_checkpointing.load(states, path, strategy, validate_access_integrity=whole)
    except CheckpointException as error:  # torch's own, which does not derive from Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, ConfigError):
            raise cause from error
        raise ConfigError(
            f"{folder}: rank {rank} cannot load it ({cause}); copy the checkpoint again, or convert again."
        ) from error
    except pickle.UnpicklingError as error:  # for common.pt; torch's message advises trusting the file
        raise ConfigError(common_refusal(Path(path) / "common.pt", error)) from error
    except CheckpointingException as error:
        raise ConfigError(f"{folder}: does not fit this model ({error}); use a checkpoint of the same architecture.") from error
    # Non-tensors are merged in: without this, Transformer Engine would unpickle module states from them.
    for part in loaded.values():
        for key in [key for key in part if str(key).endswith(EXTRA_STATE)] if isinstance(part, dict) else ():
            del part[key]
    return loaded
