"""One step: rows through the model, log-probs into the loss, gradients into the optimizer's buffers.

Two modes give the same loss and gradients to rounding. *fused*: every group is in one row; the last pipeline stage computes the
loss of the row's groups and backpropagates. *two-phase*: a forward pass collects all log-probs, the loss of the whole global
batch gives each response (or token) its coefficient ∂L/∂logp, and a second pass backpropagates Σ coefficient·logp.

Scale of the loss. Every row's loss is divided by the number of contributing groups of the *global* batch before backward, and
Megatron sums gradients over rows and replicas: with `calculate_per_token_loss` a loss function that returns three values is
not divided by the number of micro-batches (schedules.forward_step_calc_loss), DDP's gradient_scaling_factor is 1, and
`finalize_gradients` passes no token count, so nothing is divided afterwards.

Legend: T tokens of a row, S its scored tokens, R its responses, G groups of a step, K responses of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.distributed import all_reduce, broadcast

from mpo_megatron import device
from mpo_megatron.data.loader import RowShape, StepBatch, pack
from mpo_megatron.data.packing import Row
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.routing import RowRouting
from mpo_megatron.train.objective import Logps, Objective, group_batch, take_groups
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.routing import StepRouting, guide_rows
from mpo_megatron.train.schedule import LossFunction, run_schedule, to_device
from mpo_megatron.train.schedule import RowTensors as RowTensors  # re-exported for loss functions of rows

RowLoss = Callable[[RowTensors, Tensor, Tensor | None], Tensor]
"""From a row, the log-probs [S] of its scored tokens and, with a resident reference, their divergences [S], to the scalar to
backpropagate."""

RowOutput = tuple[RowTensors, Tensor, Tensor | None]
"""A row with its log-probs [S] and, with a resident reference, divergences [S], detached."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of a step's passes, the same on every rank, in host memory."""

    policy: Logps
    """The policy's log-probs before the update."""
    losses: Tensor
    """[G] loss of each group in nats; 0 where a group does not contribute."""
    backward_share: float = 1.0
    """Share of the forward pass's tokens that were backpropagated."""


def sum_responses(row: RowTensors, token_logps: Tensor) -> Tensor:
    """[R] log-probs of the row's responses: segment sums of [S], in float64 to keep precision for long responses.

    Their order is fixed: `index_add` on a GPU adds in any order, so a repeated or resumed run would get other sums.
    """
    if not len(row.responses):  # a filler
        return token_logps.double()
    starts = torch.arange(len(row.responses) + 1, device=row.response_of.device)
    return torch.segment_reduce(token_logps.double(), "sum", offsets=torch.searchsorted(row.response_of, starts))


def token_index(row: RowTensors) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, k, t) of each scored token of the row: its index in a [G, K, T] tensor."""
    starts = torch.searchsorted(row.response_of, torch.arange(len(row.responses), device=row.response_of.device))
    position = torch.arange(len(row.response_of), device=row.response_of.device) - starts[row.response_of]
    slot, k = row.responses[row.response_of].unbind(dim=1)
    return slot, k, position


def run_rows(
    model: list[torch.nn.Module],
    rows: Sequence[Row],
    ranks: Ranks,
    row_loss: RowLoss | None,
    resident: Resident | None = None,
    routings: Sequence[RowRouting] | None = None,
) -> list[RowOutput]:
    """Run Megatron's schedule over the rows: forward and backward of `row_loss`, or only forward without one.

    Args:
        resident: the reference model, for divergences
        routings: routers' inputs for each row
    Returns:
        On the last pipeline stage, the rows with the results for their scored tokens; empty on the others.
    """
    references = None if resident is None else resident.run(rows, ranks)
    told: Sequence[RowRouting | None] = routings if routings is not None else [None] * len(rows)
    if resident is not None and resident.choices:
        told = guide_rows(told, rows, resident.choices, ranks, replay=resident.replay)

    def forward(iterator: Any, part: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        index, source = next(iterator)
        row = to_device(source, told[index])
        reference = references[index] if references else None
        output = part(row.tokens, row.position_ids, row.layout, row.sources, row.targets, reference)

        def loss(result: Tensor) -> tuple[Tensor, Tensor, Any]:
            token_logps, token_kl = (result, None) if reference is None else result.unbind()
            scalar = result.sum() if row_loss is None else row_loss(row, token_logps, token_kl)
            return (
                scalar,
                torch.ones((), dtype=torch.int),
                (row, token_logps.detach(), None if token_kl is None else token_kl.detach()),
            )

        return output, loss

    outputs = run_schedule(model, rows, forward, forward_only=row_loss is None)
    return outputs if ranks.is_last_stage else []


def finalize_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None, **groups: Any) -> None:
    """Megatron's gradient reduction without its division by tokens, because the loss is already scaled (see the module's
    text)."""
    finalize_model_grads(model, None, **groups)


def collect_logps(
    outputs: Sequence[RowOutput], shape: tuple[int, ...], ranks: Ranks, num_tokens: int | None = None, *, kl: bool = False
) -> Logps:
    """Log-probs (and divergences) of all rows of all replicas, on every rank, in host memory.

    Sums over replicas (each response is in one replica's rows), then copies from the last pipeline stage to the others.

    Args:
        shape: (G, K)
        num_tokens: T, to collect per-token log-probs as well
    """
    response = torch.zeros(shape, dtype=torch.float64, device=device.device())
    token = torch.zeros((*shape, num_tokens), device=device.device()) if num_tokens is not None else None
    divergence = torch.zeros_like(response) if kl else None
    for row, token_logps, token_kl in outputs:
        slot, k = row.responses.unbind(dim=1)
        response[slot, k] = sum_responses(row, token_logps)
        if divergence is not None and token_kl is not None:
            divergence[slot, k] = sum_responses(row, token_kl)
        if token is not None:
            token[token_index(row)] = token_logps.float()

    shared = [None if tensor is None else _share(tensor, ranks) for tensor in (response, token, divergence)]
    assert shared[0] is not None
    return Logps(response=shared[0], token=shared[1], kl=shared[2])


def _share(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Sum over replicas, each of which has its own part, then copy from the last pipeline stage to the others; on the host."""
    all_reduce(tensor, group=ranks.data)
    if ranks.pipeline.size() > 1:
        broadcast(tensor, group=ranks.pipeline, group_src=ranks.pipeline.size() - 1)
    return tensor.cpu()


def forward_step(
    model: list[torch.nn.Module],
    batch: StepBatch,
    objective: Objective | None,
    ranks: Ranks,
    resident: Resident | None = None,
    routing: StepRouting | None = None,
) -> Logps:
    """Log-probs of the batch's scored responses, without gradients; also per token for token-level objectives."""
    routings = None if routing is None else routing.rows(batch.rows)
    outputs = run_rows(model, batch.rows, ranks, None, resident, routings)
    if routing is not None and routings is not None:
        routing.finish(routings)
    return collect_logps(outputs, batch.table.valid.shape, ranks, _token_width(batch, objective), kl=resident is not None)


def fused_step(
    model: list[torch.nn.Module],
    batch: StepBatch,
    reference: Logps | None,
    objective: Objective,
    ranks: Ranks,
    resident: Resident | None = None,
    routing: StepRouting | None = None,
) -> StepResult:
    """Gradients of the mean loss over the global batch's contributing groups, each row computing the loss of its groups.

    Args:
        routing: for a model with experts; adds its terms' gradients
    """
    num_contributing = int(batch.contributes.sum())
    width = _token_width(batch, objective)
    # Copied once for all rows: a row's loss inputs are then on the device, and its backward pass follows without waiting.
    unknown = Logps(response=torch.zeros(batch.table.valid.shape, device=device.device()))
    step_groups = group_batch(batch.table, unknown, reference)
    precision = torch.float64 if width is None else torch.float32  # that dtype of responses' log-probs, and of tokens'
    losses = torch.zeros(len(batch.table.valid), dtype=precision, device=device.device())

    def row_loss(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
        if len(row.responses) == 0:  # a filler row; its zero has a graph that the schedule can backpropagate
            return token_logps.sum()
        shape = (len(row.slots), batch.table.valid.shape[1])
        zeros = token_logps.new_zeros(shape, dtype=torch.float64)
        place = (row.group_of, row.responses[:, 1])
        response = zeros.index_put(place, sum_responses(row, token_logps))
        kl = None if token_kl is None else zeros.index_put(place, sum_responses(row, token_kl))
        token = None
        if width is not None:
            _, k, position = token_index(row)
            zeros = token_logps.new_zeros((*shape, width), dtype=torch.float32)
            token = zeros.index_put((row.group_of[row.response_of], k, position), token_logps)
        groups = replace(take_groups(step_groups, row.slots), policy_logps=response, token_logps=token, token_kl=kl)
        row_losses = objective.compute(groups)
        losses[row.slots] = row_losses.detach().to(losses.dtype)
        return row_losses.sum() / num_contributing

    routings = None if routing is None else routing.rows(batch.rows, learn=True)
    outputs = run_rows(model, batch.rows, ranks, row_loss, resident, routings)
    if routing is not None and routings is not None:
        routing.finish(routings)
    policy = collect_logps(outputs, batch.table.valid.shape, ranks, width, kl=resident is not None)
    return StepResult(policy=policy, losses=_share(losses, ranks))


def two_phase_step(
    model: list[torch.nn.Module],
    batch: StepBatch,
    reference: Logps | None,
    objective: Objective,
    ranks: Ranks,
    shape: RowShape,
    generator: torch.Generator,
    resident: Resident | None = None,
    routing: StepRouting | None = None,
) -> StepResult:
    """Gradients of the mean loss over the global batch's contributing groups, through each response's coefficient.

    Responses with coefficient zero (negatives that MC-PO did not draw) are omitted from the backward pass, unless routers add to
    the loss and so give them a gradient.

    Args:
        routing: for a model with experts; adds its terms' gradients
    """
    routings = None if routing is None else routing.rows(batch.rows)
    outputs = run_rows(model, batch.rows, ranks, None, resident, routings)
    width = _token_width(batch, objective)
    policy = collect_logps(outputs, batch.table.valid.shape, ranks, width, kl=resident is not None)
    loads = None
    if routing is not None and routings is not None:
        loads = routing.loads(routings)
        routing.finish(routings)
    losses, coefficients, kl_coefficients = loss_coefficients(batch, policy, reference, objective, generator)
    weight = coefficients.abs() if coefficients.dim() == 2 else coefficients.abs().sum(dim=-1)
    needed = (weight if kl_coefficients is None else weight + kl_coefficients.abs()).numpy() != 0
    plan, rows = (batch.plan, batch.rows)
    if (needed != batch.in_rows).any() and not (routing is not None and routing.adds_terms):
        plan, rows = pack(batch.table, batch.groups, needed, shape)
    coefficients = device.upload(coefficients)
    kl_coefficients = None if kl_coefficients is None else device.upload(kl_coefficients)

    def row_loss(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
        if len(row.responses) == 0:
            return token_logps.sum()
        slot, k = row.responses.unbind(dim=1)
        if coefficients.dim() == 3:
            return (coefficients[token_index(row)] * token_logps).sum()
        total = (coefficients[slot, k] * sum_responses(row, token_logps)).sum()
        if kl_coefficients is not None and token_kl is not None:
            total = total + (kl_coefficients[slot, k] * sum_responses(row, token_kl)).sum()
        return total

    routings = None if routing is None else routing.rows(rows, learn=True, loads=loads)
    run_rows(model, rows, ranks, row_loss, resident, routings)
    if routing is not None and routings is not None:
        routing.finish(routings, drift=False)
    return StepResult(policy=policy, losses=losses, backward_share=plan.num_tokens / max(1, batch.plan.num_tokens))


def loss_coefficients(
    batch: StepBatch, policy: Logps, reference: Logps | None, objective: Objective, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """On the host, with L the mean loss: each group's loss [G]; ∂L/∂logp of every response [G, K], or of every token [G, K, T]
    for token-level losses; and ∂L/∂KL of every response [G, K] for losses that regularise with it."""
    by_token = policy.token is not None
    leaf = (policy.token if policy.token is not None else policy.response).detach().requires_grad_()
    kl = None if policy.kl is None else policy.kl.detach().requires_grad_()
    logps = Logps(response=policy.response, token=leaf, kl=kl) if by_token else Logps(response=leaf, kl=kl)
    losses = objective.compute(group_batch(batch.table, logps, reference, generator=generator))
    mean = losses.sum() / int(batch.contributes.sum())
    coefficients = torch.autograd.grad(mean, [leaf] if kl is None else [leaf, kl])
    return losses.detach(), coefficients[0], None if kl is None else coefficients[1]


def prepare_schedules(model: list[Any]) -> None:
    """Configure how Megatron's schedules finalize gradients; call once after the model is wrapped."""
    config = get_model_config(model[0])  # the parts share it
    config.finalize_model_grads_func = finalize_gradients
    if model[0].ddp_config.overlap_grad_reduce:  # all rows except the last only add to the buffers
        config.no_sync_func = model[0].no_sync if len(model) == 1 else [part.no_sync for part in model]


def _token_width(batch: StepBatch, objective: Objective | None) -> int | None:
    if objective is None or not objective.needs.tokens:
        return None
    return int(batch.table.lengths.max())
