"""Process groups and seeds: the only module that sets up `torch.distributed` and Megatron's `parallel_state`."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from mpo_megatron import device
from mpo_megatron.config import ParallelConfig
from mpo_megatron.config.rendezvous import RendezvousError


@dataclass(frozen=True)
class Ranks:
    """This process's position in the layout, and the groups in which it communicates."""

    groups: ProcessGroupCollection
    """Megatron-Core's collection of groups, as its modules expect it."""

    @property
    def tensor(self) -> ProcessGroup:
        """Ranks that hold shards of the same matrices."""
        return self.groups.tp

    @property
    def pipeline(self) -> ProcessGroup:
        """Ranks that hold the stages of one model replica."""
        return self.groups.pp

    @property
    def context(self) -> ProcessGroup:
        """Ranks with the same weights that see different tokens of the same rows."""
        return self.groups.cp

    @property
    def data(self) -> ProcessGroup:
        """Ranks with the same weights that see different rows."""
        return self.groups.dp

    @property
    def data_rank(self) -> int:
        """Index of this rank's model replica."""
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        """Number of model replicas."""
        return self.groups.dp.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, and so computes log-probs."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and side files: exactly one rank does."""
        return torch.distributed.get_rank() == 0


@contextlib.contextmanager
def model_parallel(config: ParallelConfig, seed: int) -> Iterator[Ranks]:
    """Start `torch.distributed` from torchrun's environment, create Megatron's groups, seed the generators; undo it at the end.

    Without torchrun, the world size is 1.

    Raises:
        RendezvousError: the other ranks did not connect.
    """
    device.select(int(os.environ.get("LOCAL_RANK", "0")))
    started = not torch.distributed.is_initialized()
    if started:
        _join_ranks(config)
    with _single_ranks_share_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.expert_tensor,
            # Ranks that communicate most are neighbours, on the same machine: tensor for every matrix, context twice a layer,
            # expert in every layer with experts, data once a step, pipeline least. See docs/parallelism.md.
            order="tp-cp-ep-dp-pp",
            distributed_timeout_minutes=max(1, round(config.timeout_minutes)),
            # The extra gloo groups serve a checkpoint format that we do not use; without a GPU every group is gloo already.
            create_gloo_process_groups=False,
        )
    model_parallel_cuda_manual_seed(seed)
    try:
        yield Ranks(ProcessGroupCollection.use_mpu_process_groups())
    except GeneratorExit:
        raise  # the interpreter is shutting down: torch is partly gone, and there is nothing left to undo
    except BaseException:
        # NCCL waits for the machine's other ranks when it destroys communicators, but these may not know of the failure. They
        # would then fail with lost connections before this rank has reported the reason. This process is about to end, and
        # takes its groups with it (train/faults/ending.py).
        if torch.distributed.get_world_size() == 1 or not (started or device.has_gpu()):
            _take_down(started)
        raise
    _take_down(started)


def _join_ranks(config: ParallelConfig) -> None:
    in_torchrun = "RANK" in os.environ
    try:
        torch.distributed.init_process_group(
            device.distributed_backend(),
            init_method="env://" if in_torchrun else "tcp://127.0.0.1:0",
            timeout=datetime.timedelta(minutes=config.timeout_minutes),
            rank=-1 if in_torchrun else 0,  # −1: from the environment
            world_size=-1 if in_torchrun else 1,
        )
    except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError) as error:
        raise RendezvousError(config.timeout_minutes) from error


@contextlib.contextmanager
def _single_ranks_share_groups() -> Iterator[None]:
    """Within this context, Megatron-Core creates one group for each single rank, instead of one for each of its purposes.

    Nothing is communicated in these groups, but each gloo group has a thread that wakes up 100 times a second: a run on one rank
    had 20, which took 2 % of its CPU time. All ranks enter the context together and then create the same groups.
    """
    create = parallel_state.create_group
    created: dict[int, Any] = {0: torch.distributed.group.WORLD} if torch.distributed.get_world_size() == 1 else {}

    def create_group(ranks: Sequence[int], *arguments: Any, **options: Any) -> Any:
        if len(ranks) > 1:
            return create(ranks, *arguments, **options)
        if ranks[0] not in created:
            created[ranks[0]] = create(ranks, *arguments, **options)
        return created[ranks[0]]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = create


def _take_down(started: bool) -> None:
    if started:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()  # and every group in it
        return
    groups = parallel_state._global_process_group_list or []  # Megatron forgets them, torch does not: dozens of threads
    parallel_state.destroy_model_parallel()
    for group in groups:
        if group is not None and group is not torch.distributed.GroupMember.NON_GROUP_MEMBER:
            torch.distributed.destroy_process_group(group)
