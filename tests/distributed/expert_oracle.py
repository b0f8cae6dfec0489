"""Routers of plain `transformers`: forced choices, the load-balancing loss of `transformers`, the z-loss and the drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


class Gates:
    """A model's routers: the results of the last pass, and the experts that they are forced to choose."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self.topk: int = self.modules[0].top_k
        self.logits: list[Tensor] = [torch.empty(0)] * len(self.modules)
        """[N · T, E] by layer."""
        self.indices: list[Tensor] = list(self.logits)
        """[N · T, k] the routers' own choices, per layer."""
        self.forced: list[Tensor] | None = None
        """[N · T, k] choices to force, per layer."""
        for place, module in enumerate(self.modules):
            module.forward = self._watched(place, module, module.forward)

    def _watched(self, place: int, gate: Any, original: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, weights, indices = original(hidden)
            self.logits[place], self.indices[place] = logits, indices
            if self.forced is not None:
                indices = self.forced[place]
                weights = logits.float().softmax(dim=-1).gather(1, indices)
                if getattr(gate, "norm_topk_prob", True):
                    weights = weights / weights.sum(dim=-1, keepdim=True)
            return logits, weights, indices

        return forward


class Routed:
    """A policy whose routers are recorded, and forced to the reference's choices if `options` require it.

    Args:
        tokens: [N, T] the rows of each pass
        groups: [N · T] the group in whose routing a place counts; -1: in none
    """

    def __init__(self, policy: Any, reference: Any, tokens: Tensor, groups: Tensor, options: dict[str, Any]) -> None:
        self.ours, self.groups, self.options = Gates(policy), groups, options
        theirs = Gates(reference)
        with torch.no_grad():
            reference(tokens)
        self.chosen = list(theirs.indices)
        """[N · T, k] the reference's choices, per layer."""
        if options.get("routing") == "replay":
            self.ours.forced = self.chosen

    def __call__(self, tokens: Tensor) -> Any:
        return self.ours.model(tokens)

    def terms(self) -> tuple[Tensor, dict[str, float]]:
        """Router losses and metrics of the last pass."""
        counted = self.groups >= 0
        pairs = list(zip(self.ours.indices, self.chosen, strict=True))
        agreed = sum(int((ours[counted, :, None] == theirs[counted, None, :]).sum()) for ours, theirs in pairs)
        number = sum(ours[counted].numel() for ours, _ in pairs)
        groups = [self.groups == group for group in self.groups[counted].unique()]
        units = [counted] if self.options.get("balance_over") == "step" else groups
        balance = z = self.ours.logits[0].new_zeros(())
        for logits in self.ours.logits:
            losses = [load_balancing_loss_func((logits[unit],), logits.shape[1], self.ours.topk) for unit in units]
            # Perfect balance is k there, but 1 here and in the paper.
            balance = balance + torch.stack(losses).mean() / self.ours.topk
            z = z + (logits[counted].logsumexp(dim=-1) ** 2).mean()
        measured = {"router_drift": 1 - agreed / number}
        layers = len(self.ours.modules)
        if self.options.get("balance_coeff"):
            measured["load_balancing_loss"] = balance.item() / layers
        if self.options.get("z_coeff"):
            measured["router_z_loss"] = z.item() / layers
        return self.options.get("balance_coeff", 0.0) * balance + self.options.get("z_coeff", 0.0) * z, measured
