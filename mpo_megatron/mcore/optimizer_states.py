"""Corrections where Megatron-Core's own saving and loading of optimizer states fails or changes them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def follow_parameter_order(optimizer: Any) -> None:
    """Make Megatron's distributed optimizer find the states of weights when two dtypes share a parameter group.

    It numbers a group's weights in buffer order, but passes float32 weights to Adam before all others.
    """
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        for index, group in enumerate(getattr(single, "opt_group_ranges", [])):
            weights = sorted(group["params"], key=lambda weight: weight.dtype is not torch.float32)
            single.model_param_group_index_map.update({weight: (index, order) for order, weight in enumerate(weights)})


def fill_states(optimizer: Any) -> None:
    """Create an optimizer's states before its first step: zero moments, step count 0.

    Adam creates them at its first step, and Megatron can neither save nor load missing states. Its own way is a step with zero
    gradients, which counts as a step, and with weight decay changes weights unless the learning rate is 0.
    """
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(single, "is_stub_optimizer", False) or single.optimizer.state:
            continue
        groups = single.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 0.0
        single._init_optimizer_states_with_dummy_values()
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:  # Transformer Engine's Adam counts steps per group
                group["step"] = 0
        for state in single.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()


def fuse_adam(optimizer: Any) -> None:
    """Make torch's AdamW, if used, update each weight in one pass; Megatron requests its multi-pass loop."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(single, "optimizer", None)
        for group in adam.param_groups if type(adam) is torch.optim.AdamW else ():
            group["fused"] = True


def leave_out_classes(states: dict[Any, Any]) -> None:
    """Remove Adam's classes from the options that Megatron's offloading optimizer keeps: torch would refuse to load them."""
    for single in [states] if "optimizer" in states else states.values():
        for group in single["optimizer"]["param_groups"] if "optimizer" in single else ():
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]


def each_single(optimizer: Any, states: dict[Any, Any]) -> list[tuple[int, Any, dict[Any, Any]]]:
    """Index, optimizer and its states: one for dense weights, one for experts if any."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        (index, single, states if len(chained) == 1 else states[index])
        for index, single in enumerate(chained)
        if not getattr(single, "is_stub_optimizer", False)
    ]


def load_states(optimizer: Any, loaded: dict[Any, Any], moments: dict[int, Any]) -> None:
    """Megatron's own loading, corrected for torch's AdamW, which keeps a step count per parameter.

    When copying the moments, Megatron fails on the counts. And it gives all parameters one shared tensor, which AdamW would
    then increment once per parameter.
    """
    for index, single, state_dict in each_single(optimizer, loaded):
        if type(single.optimizer) is torch.optim.AdamW:
            for group in state_dict["optimizer"]["param_groups"]:
                group["fused"] = True  # loaded options replace ours; with it, torch keeps step counts beside the weights
        single.load_state_dict(state_dict)
        states = single.optimizer.state.values()
        counts = [state.pop("step", None) for state in states]
        single.load_parameter_state_from_fully_reshardable(moments.get(index, {}))
        for state, count in zip(states, counts, strict=True):
            if count is not None:
                state["step"] = count.clone()
        if isinstance(single.optimizer, HybridDeviceOptimizer):
            # Before each step it copies its groups' options to its inner optimizers. The loaded step count would reset
            # Transformer Engine's, which counts per group.
            for group in single.optimizer.param_groups:
                group.pop("step", None)


def copy_master_weights(optimizer: Any) -> None:
    """Set the model's weights to the optimizer's master weights, in the model's dtype."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        single._copy_main_params_to_model_params()
