"""The table of methods: name → loss function, hyper-parameters, needs and source.

To add a method, write its hyper-parameters and its formula, and import the file in `losses/__init__.py`:

    @dataclass(frozen=True, kw_only=True)
    class MarginParams(PairParams):
        margin: float = 1.0
        \"\"\"Desired difference of the log-ratios, in nats.\"\"\"

    @register("margin", params=MarginParams, scored=find_paired, needs=needs_reference_pairs, source="Someone 2030")
    def compute_margin(batch: GroupBatch, params: MarginParams) -> Tensor:
        \"\"\"max(0, margin − (s_w − s_l)), averaged over the group's pairs; nats.\"\"\"
        pairs = compute_pairs(batch, params)
        return pairs.reduce(torch.relu(params.margin - pairs.margins(compute_log_ratios(batch))))

The function may return any finite number for a group that does not contribute: the registry replaces it with 0.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a loss reads besides `policy_logps` and `valid`, and how it must be run."""

    reference: bool = False
    """`reference_logps`; with `tokens`, `reference_token_logps` instead."""
    rewards: bool = False
    """`rewards`."""
    labels: bool = False
    """`labels`."""
    preferences: bool = False
    """`rewards`, or `labels` without rewards: any ordering of the responses suffices."""
    lengths: bool = False
    """`lengths`."""
    tokens: bool = False
    """`token_logps`; the gradient goes there, not to `policy_logps`."""
    token_kl: bool = False
    """`token_kl`: needs whole next-token distributions of policy and reference, not only log-probs of given tokens."""
    batch_statistics: bool = False
    """The loss contains a mean over the batch, so `compute` needs the whole global batch at once."""
    sampled: bool = False
    """`compute` draws from `generator`; two calls differ."""
    contrast: bool = True
    """At least two responses per group; False only for purely supervised losses."""


@dataclass(frozen=True)
class Loss:
    """One method. `compute` and `scored` are pure and never synchronize with the device."""

    name: str
    """Its name in the configuration."""
    params: type[Any]
    """Frozen dataclass of its hyper-parameters, with the paper's defaults."""
    function: Callable[[GroupBatch, Any], Tensor]
    """The formula: [G] per-group loss; arbitrary but finite where the group does not contribute."""
    scored: Callable[[GroupBatch, Any], Tensor]
    """[G, K] bool: responses whose log-prob the loss may depend on, before any sampling; computed only from rewards, labels and
    `valid`. A group without any does not contribute."""
    needs: Callable[[Any], Needs]
    """What it reads, given its hyper-parameters."""
    source: str
    """Paper and equation."""

    @property
    def summary(self) -> str:
        """First paragraph of the formula's docstring, on one line."""
        paragraph = (self.function.__doc__ or "").strip().split("\n\n")[0]
        return " ".join(paragraph.split())

    def contributes(self, batch: GroupBatch, params: Any) -> Tensor:
        """[G] bool: groups with contrast. Needs no log-probs, so groups can be counted before any forward pass."""
        return self.scored(batch, params).any(dim=-1)

    def compute(self, batch: GroupBatch, params: Any) -> Tensor:
        """[G] loss per group in nats, float32 (float64 for float64 input); exactly 0, with zero gradient,
        where the group does not contribute. The training loss is Σ compute / Σ contributes over the global batch."""
        return torch.where(self.contributes(batch, params), self.function(batch, params), 0.0)


_LOSSES: dict[str, Loss] = {}


def register[Params](
    name: str,
    *,
    params: type[Params],
    scored: Callable[[GroupBatch, Params], Tensor],
    needs: Needs | Callable[[Params], Needs],
    source: str,
) -> Callable[[Callable[[GroupBatch, Params], Tensor]], Callable[[GroupBatch, Params], Tensor]]:
    """Decorator: register a loss function under `name`."""
    find_needs: Callable[[Params], Needs] = (lambda _: needs) if isinstance(needs, Needs) else needs

    def enter(function: Callable[[GroupBatch, Params], Tensor]) -> Callable[[GroupBatch, Params], Tensor]:
        if name in _LOSSES:
            raise ValueError(f"loss = {name!r}; it is already registered; choose another name.")
        enter_loss(Loss(name, params, function, scored, find_needs, source))
        return function

    return enter


def enter_loss(loss: Loss) -> Loss:
    """Add a method to the table, replacing one with the same name."""
    _LOSSES[loss.name] = loss
    return loss


def get_loss(name: str) -> Loss:
    """The method called `name`.

    Raises:
        ValueError: no method has this name; suggests similar names.
    """
    if name in _LOSSES:
        return _LOSSES[name]
    nearest = difflib.get_close_matches(str(name), _LOSSES, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(nearest)}?" if nearest else f"choose one of {', '.join(sorted(_LOSSES))}."
    raise ValueError(f"loss = {name!r}; there is no such method; {fix}")


def list_losses() -> list[Loss]:
    """Every method, sorted by name."""
    return [_LOSSES[name] for name in sorted(_LOSSES)]


def build_params(name: str, hyperparameters: dict[str, Any]) -> Any:
    """The hyper-parameters of the method `name`: `hyperparameters` over the paper's defaults, checked.

    Raises:
        ValueError: an unknown name, an unknown hyper-parameter, a wrong type or value.
    """
    loss = get_loss(name)
    valid = [field.name for field in dataclasses.fields(loss.params)]
    unknown = sorted(set(hyperparameters) - set(valid))
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), valid, n=1)
        choices = f"it has {', '.join(valid)}" if valid else "it has none"
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"{name}.{unknown[0]}; {name} has no such hyper-parameter; {choices}{meant}")
    try:
        return loss.params(**hyperparameters)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
