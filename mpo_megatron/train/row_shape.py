"""The shape of a run's rows, shared by training, evaluation, the reference and later inspection."""

from __future__ import annotations

from mpo_megatron.config import TrainConfig
from mpo_megatron.data.loader import RowShape
from mpo_megatron.hf.flops import FlopModel
from mpo_megatron.hf.fp8 import token_multiple


def build_row_shape(config: TrainConfig, flops: FlopModel, *, num_replicas: int, replica: int) -> RowShape:
    """The shape of one replica's rows."""
    return RowShape(
        row_tokens=config.data.row_tokens,
        layout=config.data.layout,
        multiple=token_multiple(config.model) * config.parallel.row_parts,
        num_replicas=num_replicas,
        replica=replica,
        pair_weight=flops.pair_weight,
        window=flops.window,
        rows_multiple=config.parallel.rows_multiple,
    )
