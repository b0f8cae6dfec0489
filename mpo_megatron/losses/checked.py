"""`group_loss`: any method by name on plain tensors, with every input checked first. For notebooks and tests.

The checks read values back from the device; the trainer calls `Loss.compute`, which does not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.losses.batch import FLOAT32_MAX, GroupBatch
from mpo_megatron.losses.registry import Needs, build_params, get_loss


def group_loss(
    name: str,
    policy_logps: Tensor,
    reference_logps: Tensor | None = None,
    rewards: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    labels: Tensor | None = None,
    token_logps: Tensor | None = None,
    reference_token_logps: Tensor | None = None,
    token_kl: Tensor | None = None,
    generator: torch.Generator | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """The loss of each group, [G], in the method's units (nats unless it says otherwise), differentiable in `policy_logps`.

    Args:
        name: a method of `list_losses()`.
        policy_logps: [G, K] log π_θ(y | x), summed over the scored tokens, nats.
        reference_logps: [G, K] the same under π_ref; None for methods without a reference.
        rewards: [G, K], higher is better; None for methods that read labels.
        valid: [G, K] bool, False at padding of groups with fewer than K responses; default all True.
        lengths: [G, K] scored tokens per response.
        labels: [G, K] 1 chosen, 0 rejected, −1 neither.
        token_logps: [G, K, T], for token-level methods.
        reference_token_logps: [G, K, T], for token-level methods.
        token_kl: [G, K] KL(π_θ ‖ π_ref) over the vocabulary, summed over tokens, for methods that regularise with it.
        generator: seeded CPU generator, for methods that draw.
        hyperparameters: the method's own; defaults are its paper's.

    Returns:
        [G] float32 (float64 for float64 input). 0 with zero gradient for groups without contrast; the
        training loss is the sum divided by the number of the others.

    Raises:
        ValueError: an unknown method or hyper-parameter; shapes that differ; an input the method needs and did not get;
            NaN, infinity or a reward beyond float32's range in a valid entry; no group with contrast.
    """
    loss = get_loss(name)
    params = build_params(name, hyperparameters)
    check_matrix("policy_logps", policy_logps)
    if valid is None:
        valid = torch.ones_like(policy_logps, dtype=torch.bool)
    batch = GroupBatch(
        policy_logps=policy_logps,
        valid=valid,
        reference_logps=reference_logps,
        rewards=rewards,
        labels=labels,
        lengths=lengths,
        token_logps=token_logps,
        reference_token_logps=reference_token_logps,
        token_kl=token_kl,
        generator=generator,
    )
    check_shapes(batch)
    needs = loss.needs(params)
    check_present(name, batch, needs)
    check_values(batch)
    check_contrast(name, batch, needs, loss.contributes(batch, params))
    return loss.compute(batch, params)


def check_matrix(name: str, values: Tensor) -> None:
    """Refuse anything but a floating-point [G, K] with at least one group and one response."""
    check_tensor(name, values)
    if values.dim() != 2:
        raise ValueError(f"{name}.shape = {tuple(values.shape)}; it must be [groups, responses]; add the missing dimension.")
    if values.numel() == 0:
        raise ValueError(f"{name}.shape = {tuple(values.shape)}; there are no groups, or no responses; pass at least one group.")
    if not values.is_floating_point():
        raise ValueError(f"{name}.dtype = {values.dtype}; log-probs are floating-point; convert it.")


def check_tensor(name: str, values: object) -> None:
    """Refuse anything but a tensor: a list, a NumPy array, None."""
    if not isinstance(values, Tensor):
        raise ValueError(f"{name} is of type {type(values).__name__}; it must be a tensor; convert it with torch.as_tensor.")


def check_shapes(batch: GroupBatch) -> None:
    """Refuse non-tensors, tensors with another shape than `policy_logps`, and masks that are not boolean."""
    for field in dataclasses.fields(batch):
        given = getattr(batch, field.name)
        if given is not None and field.name != "generator":
            check_tensor(field.name, given)
    expected = tuple(batch.policy_logps.shape)
    for name in ("valid", "reference_logps", "rewards", "labels", "lengths", "token_kl"):
        values = getattr(batch, name)
        if values is not None and tuple(values.shape) != expected:
            raise ValueError(
                f"{name}.shape = {tuple(values.shape)}; it must equal policy_logps.shape = {expected}; "
                "pad every group to the same number of responses."
            )
    if batch.valid.dtype != torch.bool:
        raise ValueError(f"valid.dtype = {batch.valid.dtype}; it is a mask; convert it with valid.bool().")
    for name in ("token_logps", "reference_token_logps"):
        values = getattr(batch, name)
        if values is not None and (values.dim() != 3 or tuple(values.shape[:2]) != expected):
            raise ValueError(f"{name}.shape = {tuple(values.shape)}; it must be [*{expected}, tokens]; pad the tokens.")
    policy, reference = batch.token_logps, batch.reference_token_logps
    if policy is not None and reference is not None and policy.shape != reference.shape:
        raise ValueError(
            f"reference_token_logps.shape = {tuple(reference.shape)}; it must equal token_logps.shape = "
            f"{tuple(policy.shape)}; pad both to the same length."
        )


def check_present(name: str, batch: GroupBatch, needs: Needs) -> None:
    """Refuse a missing input, with the reason and the fix."""

    def refuse(field: str, reason: str, fix: str) -> None:
        raise ValueError(f"{field} = None; {name} {reason}; {fix}.")

    if needs.reference and not needs.tokens and batch.reference_logps is None:
        refuse(
            "reference_logps",
            "compares with the reference policy",
            "pass reference_logps, or choose a reference-free loss",
        )
    if needs.rewards and batch.rewards is None:
        if batch.labels is None:
            refuse("rewards", "reads rewards", "pass rewards")
        else:
            refuse(
                "rewards",
                "reads rewards, and labels (chosen / rejected) do not say how much better a response is",
                "pass rewards, or choose a loss or partition that reads labels, such as mpo with partition = labels, or dpo",
            )
    if needs.labels and batch.labels is None:
        refuse(
            "labels",
            "reads which responses were chosen",
            "pass labels, or set a partition by reward, such as mean",
        )
    if needs.preferences and batch.rewards is None and batch.labels is None:
        refuse("rewards", "orders the responses", "pass rewards or labels")
    if needs.lengths and batch.lengths is None:
        refuse("lengths", "uses the number of scored tokens", "pass lengths")
    if needs.tokens and batch.token_logps is None:
        refuse("token_logps", "works token by token", "pass token_logps [G, K, T]")
    if needs.tokens and needs.reference and batch.reference_token_logps is None:
        refuse("reference_token_logps", "works token by token", "pass reference_token_logps [G, K, T]")
    if needs.token_kl and batch.token_kl is None:
        refuse("token_kl", "regularises with the divergence over the vocabulary", "pass token_kl [G, K]")
    if needs.sampled and batch.generator is None:
        refuse("generator", "draws at random", "pass a seeded torch.Generator (CPU)")


def check_values(batch: GroupBatch) -> None:
    """Refuse NaN and infinity, huge rewards, and lengths below one, in valid entries; name the first."""
    for name in ("policy_logps", "reference_logps", "rewards", "token_kl"):
        values = getattr(batch, name)
        if values is not None:
            refuse_first(name, values, batch.valid & ~torch.isfinite(values), "it must be finite")
    if batch.rewards is not None:
        huge = batch.valid & (batch.rewards.abs() > FLOAT32_MAX)
        refuse_first("rewards", batch.rewards, huge, f"it must be within ±{FLOAT32_MAX:.2g}")
    if batch.lengths is None:
        return
    refuse_first("lengths", batch.lengths, batch.valid & (batch.lengths < 1), "a response must have tokens")
    for name in ("token_logps", "reference_token_logps"):
        values = getattr(batch, name)
        if values is not None:
            if int(torch.where(batch.valid, batch.lengths, 0).max()) > values.shape[-1]:
                raise ValueError(f"{name}.shape = {tuple(values.shape)}; lengths go beyond its last dimension; pass all tokens.")
            inside = torch.arange(values.shape[-1], device=values.device) < batch.lengths.unsqueeze(-1)
            bad = (inside & ~torch.isfinite(values)).any(dim=-1)
            refuse_first(name, values, batch.valid & bad, "it must be finite")


def refuse_first(name: str, values: Tensor, bad: Tensor, rule: str) -> None:
    """Raise `ValueError` naming the first entry where `bad` [G, K] is True, if any."""
    if not bool(bad.any()):
        return
    group, response = (int(index) for index in bad.nonzero()[0])
    entry = values[group, response]
    shown = f" = {entry.item():g}" if entry.dim() == 0 else ""
    raise ValueError(f"{name}[group {group}, response {response}]{shown}; {rule}; drop it, or mark it invalid.")


def check_contrast(name: str, batch: GroupBatch, needs: Needs, contributes: Tensor) -> None:
    """Refuse a batch in which no group contributes."""
    if bool(contributes.any()):
        return
    if needs.contrast and int(batch.valid.sum(dim=-1).max() if batch.valid.numel() else 0) < 2:
        raise ValueError(
            f"policy_logps.shape = {tuple(batch.policy_logps.shape)}; {name} compares responses, and no group has two valid "
            "ones; pass at least two responses per group."
        )
    raise ValueError(
        f"groups with contrast = 0 of {batch.valid.shape[0]}; {name} learns from differences inside a group, but none has "
        "both preferred and other responses; drop groups with equal rewards, or check rewards and labels."
    )
