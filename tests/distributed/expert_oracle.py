"""Routers of plain `transformers`: forced choices, the load-balancing loss of `transformers`, the z-loss and the drift."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mpo_megatron.data.group import TokenizedGroup


class Gates:
    """A model's routers: the results of the last pass, and the experts that they are forced to choose."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
        self.topk: int = self.modules[0].top_k
        self.logits: list[Tensor] = [torch.empty(0)] * len(self.modules)
        """[T, E] by layer."""
        self.indices: list[Tensor] = list(self.logits)
        """[T, k] the routers' own choices, per layer."""
        self.forced: list[Tensor] | None = None
        """[T, k] choices to force, per layer."""
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
    """A policy whose routers are recorded, and forced to the reference's choices if `options` require it."""

    def __init__(self, policy: Any, reference: Any, options: dict[str, Any]) -> None:
        self.ours, self.theirs, self.options = Gates(policy), Gates(reference), options
        self.chosen: dict[tuple[int, ...], list[Tensor]] = {}
        self.seen: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor]]] = {}

    def __call__(self, row: Tensor) -> Any:
        key = tuple(row[0].tolist())
        if key not in self.chosen:
            with torch.no_grad():
                self.theirs.model(row)
            self.chosen[key] = list(self.theirs.indices)
        if self.options.get("routing") == "replay":
            self.ours.forced = self.chosen[key]
        result = self.ours.model(row)
        self.seen[key] = list(self.ours.logits), list(self.ours.indices)
        return result

    def terms(self, groups: Sequence[TokenizedGroup]) -> tuple[Tensor, dict[str, float]]:
        """Router losses and metrics of all sequences since the last call; a prompt counts once."""
        layers = range(len(self.ours.modules))
        units: list[list[Tensor]] = [[] for _ in layers]  # by layer and group
        agreed = number = 0
        for group in groups:
            parts: list[list[Tensor]] = [[] for _ in layers]
            start = 0
            for response in group.response_tokens:
                key = tuple(np.concatenate((group.prompt_tokens, response)).tolist())
                if key not in self.seen:
                    continue
                for layer, (logits, ours, theirs) in enumerate(zip(*self.seen[key], self.chosen[key], strict=True)):
                    parts[layer].append(logits[start:-1])
                    agreed += int((ours[start:-1, :, None] == theirs[start:-1, None, :]).sum())
                    number += ours[start:-1].numel()
                start = len(group.prompt_tokens)
            for layer in layers:
                if sum(map(len, parts[layer])):
                    units[layer].append(torch.cat(parts[layer]))
        self.seen = {}
        everything = [torch.cat(of_layer) for of_layer in units]
        if self.options.get("balance_over") == "step":
            units = [[tokens] for tokens in everything]
        zero = everything[0].new_zeros(())
        balance, z = zero, zero
        for layer in layers:
            losses = [load_balancing_loss_func((tokens,), tokens.shape[1], self.ours.topk) for tokens in units[layer]]
            balance = (
                balance + torch.stack(losses).mean() / self.ours.topk
            )  # perfect balance is k there, but 1 here and in the paper
            z = z + (everything[layer].logsumexp(dim=-1) ** 2).mean()
        measured = {"router_drift": 1 - agreed / number}
        if self.options.get("balance_coeff"):
            measured["load_balancing_loss"] = balance.item() / len(layers)
        if self.options.get("z_coeff"):
            measured["router_z_loss"] = z.item() / len(layers)
        return self.options.get("balance_coeff", 0.0) * balance + self.options.get("z_coeff", 0.0) * z, measured
