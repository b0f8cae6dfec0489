"""Optimizer states, as loaded from checkpoints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mpo_megatron.mcore.optimizer_states import load_states


def test_counts_of_steps_are_beside_the_weights_whatever_the_checkpoint_says_of_fusing() -> None:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.empty(3, device="meta"))])
    moments = {name: torch.empty(3, device="meta") for name in ("exp_avg", "exp_avg_sq")}

    def load(saved: dict[str, Any]) -> None:  # like Megatron: it takes the count from the groups, into host memory
        groups = [{**group, "params": [0]} for group in saved["optimizer"]["param_groups"]]
        adam.load_state_dict({"state": {0: {**moments, "step": torch.tensor(7.0)}}, "param_groups": groups})

    single = SimpleNamespace(
        optimizer=adam, load_state_dict=load, load_parameter_state_from_fully_reshardable=lambda moments: None
    )
    [group] = adam.state_dict()["param_groups"]
    older = {name: value for name, value in group.items() if name not in ("params", "fused")}
    load_states(single, {"optimizer": {"param_groups": [older]}}, {})
    [state] = adam.state.values()
    assert adam.param_groups[0]["fused"] is True
    assert state["step"].device.type == "meta"  # torch's fused kernel requires this; in practice a GPU
