"""A user's own loss: a function in a file, registered as a method and tested before a run starts.

    def hinge(batch: GroupBatch, *, margin: Positive = 1.0) -> Tensor:
        \"\"\"[G] loss of each group; all parameters besides the batch are hyper-parameters.\"\"\"

A function with `@register` declares what it needs and which responses it reads. For a plain function, needed inputs are detected
by omitting them one by one, and all responses of groups with a contrast are scored.

Legend: G groups, K responses.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch
from mpo_megatron.losses.hyperparameters import Hyperparameters
from mpo_megatron.losses.pairing import compute_better
from mpo_megatron.losses.registry import Loss, Needs, enter_loss, list_losses

GROUPS, RESPONSES, TOKENS = 4, 5, 6
"""Size of the test batch."""

LEAVES = ("policy_logps", "token_logps", "token_kl")
"""Inputs that receive gradients."""


def adopt(function: Callable[..., Any], title: str) -> Loss:
    """Register a user's function as a method.

    Args:
        title: name of a function without `@register`
    Raises:
        ValueError: its parameters are not a batch followed by hyper-parameters with types and defaults.
    """
    for loss in list_losses():
        if loss.function is function:
            return loss
    params = build_params_class(function)

    @functools.wraps(function)
    def formula(batch: GroupBatch, values: Any) -> Tensor:
        result: Tensor = function(batch, **{field.name: getattr(values, field.name) for field in dataclasses.fields(values)})
        return result

    needs = functools.partial(find_needs, formula)
    return enter_loss(Loss(title, params, formula, find_contrast, needs, f"{title}, the user's own"))


def build_params_class(function: Callable[..., Any]) -> type[Hyperparameters]:
    """The hyper-parameters of a function: all its parameters except the first, with their annotations as rules.

    Raises:
        ValueError: names the parameter.
    """
    batch, *others = inspect.signature(function).parameters.values() or (None,)
    kinds = inspect.Parameter
    if batch is None or batch.kind not in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
        raise ValueError("its first parameter must be the batch of groups (mpo_megatron.losses.GroupBatch).")
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:
        raise ValueError(f"its annotations cannot be read: {type(error).__name__}: {error}.") from error
    fields = []
    for parameter in others:
        if parameter.kind not in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY):
            raise ValueError(f"its parameter {parameter} accepts any number of arguments; name each hyper-parameter.")
        if parameter.default is kinds.empty or not _is_rule(hints.get(parameter.name)):
            raise ValueError(
                f"its parameter {parameter.name} needs a default, and a type: float, int, bool, a Literal, or Positive, "
                "NonNegative, Count, Smoothing of mpo_megatron.losses.hyperparameters."
            )
        fields.append((parameter.name, hints[parameter.name], dataclasses.field(default=parameter.default)))
    name = f"{getattr(function, '__name__', 'Loss').title()}Params"
    made: type[Hyperparameters] = dataclasses.make_dataclass(name, fields, bases=(Hyperparameters,), frozen=True, kw_only=True)
    return made


def _is_rule(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return _is_rule(get_args(hint)[0])
    return hint in (float, int, bool) or get_origin(hint) is Literal


def find_contrast(batch: GroupBatch, params: Any) -> Tensor:
    """[G, K] bool: all responses of groups in which one is preferred over another."""
    return batch.valid & compute_better(batch).any(dim=-1).any(dim=-1, keepdim=True)


def find_needs(formula: Callable[[GroupBatch, Any], Tensor], params: Any) -> Needs:
    """The inputs that a formula reads, detected by omitting them one by one."""

    def fails_without(name: str) -> bool:
        try:
            bare: dict[str, Any] = {name: None}
            formula(dataclasses.replace(build_batch(), **bare), params)
        except Exception:  # noqa: BLE001  the user's code, on an input that it may not expect
            return True
        return False

    found = {name: fails_without(name) for name in ("reference_logps", "rewards", "labels", "lengths")}
    return Needs(
        reference=found["reference_logps"],
        rewards=found["rewards"],
        labels=found["labels"],
        lengths=found["lengths"],
        preferences=not (found["rewards"] or found["labels"]),
    )


def try_out(loss: Loss, params: Any) -> None:
    """Compute a loss on a small batch, and check the properties that every step relies on.

    Raises:
        ValueError: names the function's error.
    """
    needs = loss.needs(params)
    losses, gradients = _run(loss, params, build_batch())
    contributes = loss.contributes(build_batch(), params)
    if not bool(contributes.any()):
        raise ValueError("`scored` finds no response to learn from in groups with different rewards and labels.")
    if all(gradient is None or not bool(gradient.any()) for gradient in gradients.values()):
        raise ValueError("its gradient is zero: compute the loss from batch.policy_logps, without detach or item.")
    for name, values in (("its value", losses), *((f"its gradient in {name}", g) for name, g in gradients.items())):
        if values is not None and not bool(values[contributes].isfinite().all()):
            raise ValueError(
                f"{name} is not finite. Entries where batch.valid is False are padding and may be NaN: pass values through "
                "compute_log_ratios or torch.where before any arithmetic, and divide by no count that may be 0."
            )
    other, _ = _run(loss, params, build_batch(padding=7.0))
    if not torch.equal(losses, other):
        raise ValueError("its value depends on padding: exclude entries where batch.valid is False.")
    for index in range(GROUPS) if not needs.batch_statistics else ():
        alone, _ = _run(loss, params, build_batch(only=index))
        if not torch.allclose(alone, losses[index : index + 1], rtol=1e-9, atol=1e-12):
            raise ValueError(
                "a group's loss depends on the other groups of the batch, which change with the number of ranks; compute each "
                "group separately, or set needs=Needs(batch_statistics=True, …) in @register."
            )


def _run(loss: Loss, params: Any, batch: GroupBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
    """[G] losses, and their gradients in each of `LEAVES`."""
    leaves = {name: getattr(batch, name).requires_grad_() for name in LEAVES}
    try:
        losses = loss.function(batch, params)
    except Exception as error:
        raise ValueError(f"it raises {type(error).__name__}: {error}{_line(error)}") from error
    if not isinstance(losses, Tensor):
        raise ValueError(f"it returns something of type {type(losses).__name__}; return a tensor [groups].")
    expected = (len(batch.valid),)
    if losses.shape != expected or not losses.is_floating_point():
        raise ValueError(
            f"it returns {losses.dtype} of shape {list(losses.shape)} for a batch of {expected[0]} groups with {RESPONSES} "
            "responses; return one number per group, [groups]."
        )
    losses = torch.where(loss.contributes(batch, params), losses, 0.0)
    if not losses.requires_grad:
        return losses, dict.fromkeys(LEAVES)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    return losses.detach(), dict(zip(LEAVES, gradients, strict=True))


def _line(error: Exception) -> str:
    """The user's file in a traceback: the first frame below this module's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f" ({frames[0].filename}, line {frames[0].lineno})." if frames else "."


def build_batch(*, padding: float = torch.nan, only: int | None = None) -> GroupBatch:
    """Four groups of up to five responses with every input a loss may read; the last group has equal rewards and labels.

    Args:
        padding: value of padding entries
        only: index of the only group to include
    """
    generator = torch.Generator().manual_seed(0)
    shape = (GROUPS, RESPONSES)
    counts = torch.tensor([5, 3, 2, 4])
    valid = torch.arange(RESPONSES) < counts[:, None]
    lengths = torch.randint(1, TOKENS + 1, shape, generator=generator)
    tokens = -3 * torch.rand((*shape, TOKENS), generator=generator, dtype=torch.float64)
    tokens = torch.where(torch.arange(TOKENS) < lengths[..., None], tokens, 0.0)
    reference_tokens = 0.8 * tokens
    rewards = torch.rand(shape, generator=generator, dtype=torch.float64)
    rewards[3] = 0.5
    labels = torch.tensor([1, 0, 1, 0, 0], dtype=torch.int8).repeat(GROUPS, 1)
    labels[3] = 1
    floats = {
        "policy_logps": tokens.sum(dim=-1),
        "reference_logps": reference_tokens.sum(dim=-1),
        "rewards": rewards,
        "token_logps": tokens,
        "reference_token_logps": reference_tokens,
        "token_kl": torch.rand(shape, generator=generator, dtype=torch.float64),
    }
    chosen = slice(None) if only is None else slice(only, only + 1)
    padded = {
        name: torch.where(valid if values.dim() == 2 else valid[..., None], values, padding)[chosen]
        for name, values in floats.items()
    }
    return GroupBatch(
        **padded, valid=valid[chosen], labels=labels[chosen], lengths=lengths[chosen], generator=generator.manual_seed(1)
    )
