"""Whether FP8 trains like bf16: the same run in both, with loss curve, accuracy and speed side by side.

    python -m benchmarks.fp8                  # two CPU cores: bf16 against float32, which runs the same code
    python -m benchmarks.fp8 --emulate        # two CPU cores: FP8's rounding (fp8_emulation.py) against bf16
    python -m benchmarks.fp8 --size 1.5b      # one GPU: every FP8 recipe it has against bf16

Every side starts from the same random weights, computes the reference in its own precision, and takes the same steps over the
same groups: prompts whose responses are better the more of their tokens are in the lower half of the vocabulary, which
generalizes to held-out groups. The yardstick is the first side again with the groups in another order: two precisions agree if
they differ by less than two orders of the data. docs/experiments/fp8.md explains the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks import fp8_emulation, timing
from benchmarks.setup import SHAPES, Bench, as_data, bench, make_groups
from mpo_megatron import device
from mpo_megatron.config import ConfigError, LossConfig, ModelConfig, OptimizerConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import StepBatch, build_step, step_indices
from mpo_megatron.hf.fp8 import RECIPES, token_multiple
from mpo_megatron.model.precision import validate_fp8
from mpo_megatron.train import optimizer
from mpo_megatron.train.objective import Logps, Objective, build_objective, group_batch
from mpo_megatron.train.step import forward_step, fused_step

BETA = 0.1
RESPONSES = 4
NOISE = 0.15
"""Standard deviation of the rewards around their learnable part: held-out accuracy stays below 1."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A run of one model size."""

    steps: int
    groups: int
    """Training groups; a quarter as many are held out."""
    groups_per_step: int
    prompt: int
    response: int
    row_tokens: int
    lr: float


TINY = Size(steps=2, groups=8, groups_per_step=4, prompt=8, response=8, row_tokens=128, lr=1e-3)
SMALL = Size(steps=40, groups=640, groups_per_step=16, prompt=16, response=16, row_tokens=1024, lr=1e-3)
REAL = Size(steps=40, groups=1280, groups_per_step=32, prompt=256, response=128, row_tokens=8192, lr=1e-4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every side and report."""
    parser = timing.build_parser(__doc__, list(SHAPES), repeat=1)
    parser.add_argument("--steps", type=int, help="optimizer steps of each side")
    parser.add_argument("--emulate", action="store_true", help="FP8's rounding alone, by torch on a CPU")
    options = timing.parse(parser, arguments)
    name = "fp8_emulated" if options.emulate else "fp8"
    size = {"tiny": TINY, "small": SMALL}.get(options.size, REAL)
    size = dataclasses.replace(size, steps=options.steps or size.steps)
    with bench(options.size) as own:
        sides, refused = choose_sides(own)
        if options.emulate:
            sides = {"bf16": ModelConfig(checkpoint="random", precision="bf16", backend="local")}
        train, held_out = make_data(own, size)
        first = next(iter(sides))
        recipes = fp8_emulation.RECIPES if options.emulate else ()
        planned: list[tuple[str, ModelConfig, int, str | None]] = [
            *((side, model, 0, None) for side, model in sides.items()),
            *((f"emulated {recipe}", sides[first], 0, recipe) for recipe in recipes),
            (f"{first}, other order", sides[first], 1, None),
        ]

        def measure(side: tuple[str, ModelConfig, int, str | None]) -> timing.Row:
            title, model, seed, recipe = side
            return {"side": title, **run(own, model, size, train, held_out, seed=seed, recipe=recipe)}

        runs = {row["side"]: row for row in timing.measure_each(name, options, planned, measure)}
    rows = [{**row, **differences(row, runs[first], same_order="order" not in side)} for side, row in runs.items()]
    table = [
        {
            "side": row["side"],
            "first − ln": f"{row['first_loss_off']:.1e}",
            "last loss": f"{row['last_loss']:.4f}",
            "|Δ loss|, mean": "–" if row["loss_difference"] is None else f"{row['loss_difference']:.1e}",
            "held-out loss": f"{row['held_out_loss']:.4f}",
            "Δ held-out": f"{row['held_out_difference']:+.4f}",
            "accuracy": f"{row['accuracy']:.3f}",
            "Δ accuracy": f"{row['accuracy_difference']:+.3f}",
            "s / step": f"{row['seconds']['median']:.3f}",
            "speed": f"{runs[first]['seconds']['median'] / row['seconds']['median']:.2f}×",
            "peak, GiB": f"{row['peak_gib']:.2f}",
        }
        for row in rows
    ]
    note = (
        f"Differences are from {first}, over the loss curve of {size.steps} steps and on the held-out groups (loss, accuracy of "
        "pairs); the last line is the yardstick. First loss − ln: difference from ln(K / |Y+|), 0 if policy and reference "
        "compute alike. Adam's step included; peak memory on a CPU is the process's so far."
    )
    for recipe, reason in refused.items():
        note += f"\nNot run: {recipe}: {reason}"
    timing.report(name, options, {**dataclasses.asdict(size), "beta": BETA}, rows, table, note)


def choose_sides(own: Bench) -> tuple[dict[str, ModelConfig], dict[str, str]]:
    """The precisions to compare, the baseline first; and the recipes that do not run here, with the reason."""
    bf16 = ModelConfig(checkpoint="random", precision="bf16")
    if not device.has_gpu():
        return {"fp32": ModelConfig(checkpoint="random", precision="fp32"), "bf16": bf16}, {}
    sides, refused = {"bf16": bf16}, {}
    for name in RECIPES:
        model = dataclasses.replace(bf16, fp8=name)  # type: ignore[arg-type]
        try:
            validate_fp8(model, own.parallel, own.config)
        except ConfigError as error:
            refused[name] = str(error)
        else:
            sides[f"fp8 {name}"] = model
    return sides, refused


def make_data(own: Bench, size: Size) -> tuple[list[TokenizedGroup], list[TokenizedGroup]]:
    """Training and held-out groups; a response's reward is its share of tokens from the vocabulary's lower half, plus noise."""
    half = own.config.vocab_size // 2
    rng = np.random.default_rng(0)

    def respond(tokens: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The same response with another share of lower tokens; the last token, which ends the response, stays."""
        lower = rng.random(len(tokens) - 1) < rng.uniform(0.2, 0.8)
        return np.append(tokens[:-1] % half + np.where(lower, 0, half - 8), tokens[-1]).astype(np.int32)

    groups = []
    for group in make_groups(
        size.groups * 5 // 4, prompt=size.prompt, response=size.response, responses=RESPONSES, vocab_size=2 * half, spread=0.5
    ):
        responses = tuple(respond(tokens) for tokens in group.response_tokens)
        rewards = np.array([np.mean(tokens < half) for tokens in responses]) + rng.normal(0, NOISE, RESPONSES)
        groups.append(dataclasses.replace(group, response_tokens=responses, rewards=rewards))
    return groups[: size.groups], groups[size.groups :]


def run(
    own: Bench,
    model: ModelConfig,
    size: Size,
    train: list[TokenizedGroup],
    held_out: list[TokenizedGroup],
    *,
    seed: int,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Train one side from the start: its curve, and its held-out results.

    Args:
        recipe: the FP8 recipe to emulate
    """
    gc.collect()
    device.synchronize()
    if device.has_gpu():
        torch.cuda.reset_peak_memory_stats()
    policy = own.build_policy(model)
    with fp8_emulation.emulate(recipe, policy) if recipe else contextlib.nullcontext():
        return train_policy(own, model, policy, size, train, held_out, seed)


def train_policy(
    own: Bench,
    model: ModelConfig,
    policy: list[torch.nn.Module],
    size: Size,
    train: list[TokenizedGroup],
    held_out: list[TokenizedGroup],
    seed: int,
) -> dict[str, Any]:
    """Like `run`, for a built model."""
    objective = build_objective(LossConfig(name="mpo", params={"beta": BETA}))
    shape = dataclasses.replace(own.shape(size.row_tokens), multiple=token_multiple(model) * own.parallel.row_parts)
    order = [step_indices(step, len(train), size.groups_per_step, seed=seed, shuffle=True) for step in range(size.steps)]
    batches = [build_step(step, as_data(train), indices, objective.select, shape) for step, indices in enumerate(order)]
    references = [forward_step(policy, batch, objective, own.ranks) for batch in batches]
    test = build_step(0, as_data(held_out), np.arange(len(held_out)), objective.select, shape)
    test_reference = forward_step(policy, test, objective, own.ranks)
    wrapped = own.wrap(policy)
    adam = optimizer.build_optimizer(OptimizerConfig(lr=size.lr), wrapped, own.ranks)
    losses, seconds = [], []
    for batch, reference in zip(batches, references, strict=True):
        started = timing.now()
        optimizer.zero_gradients(wrapped, adam)
        logps = fused_step(wrapped, batch, reference, objective, own.ranks).policy
        optimizer.update(wrapped, adam)
        seconds.append(timing.now() - started)
        losses.append(mean_loss(batch, logps, reference, objective))
    found = forward_step(wrapped, test, objective, own.ranks)
    return {
        "losses": losses,
        "first_loss_off": abs(losses[0] - expected_first_loss(batches[0])),
        "last_loss": float(np.mean(losses[-5:])),
        "held_out_loss": mean_loss(test, found, test_reference, objective),
        "accuracy": accuracy(test, found, test_reference),
        "seconds": timing.summarize(seconds[1:] or seconds),
        "peak_gib": device.peak_memory_gib(),
    }


def differences(side: dict[str, Any], first: dict[str, Any], *, same_order: bool) -> dict[str, float | None]:
    """Differences of a side from the first one; step by step only if both saw the same groups."""
    steps = np.abs(np.array(side["losses"]) - np.array(first["losses"]))
    return {
        "loss_difference": float(steps.mean()) if same_order else None,
        "held_out_difference": side["held_out_loss"] - first["held_out_loss"],
        "accuracy_difference": side["accuracy"] - first["accuracy"],
    }


def mean_loss(batch: StepBatch, policy: Logps, reference: Logps, objective: Objective) -> float:
    """Mean over the groups with contrast."""
    losses = objective.compute(group_batch(batch.table, policy, reference))
    return float(losses.sum() / max(1, int(batch.contributes.sum())))


def expected_first_loss(batch: StepBatch) -> float:
    """ln(K / |Y+|), averaged over the groups with contrast."""
    assert batch.table.rewards is not None
    preferred = (batch.table.rewards > batch.table.rewards.mean(axis=1, keepdims=True)).sum(axis=1)
    counted = batch.contributes
    return float(np.log(batch.table.valid.sum(axis=1)[counted] / preferred[counted]).mean())


def accuracy(batch: StepBatch, policy: Logps, reference: Logps) -> float:
    """Share of pairs of a group's responses whose implicit rewards are ordered as their rewards; a tie counts half."""
    assert batch.table.rewards is not None
    implicit = (policy.response - reference.response).cpu().numpy()
    rewards = batch.table.rewards
    better = rewards[:, :, None] > rewards[:, None, :]
    gap = implicit[:, :, None] - implicit[:, None, :]
    return float(((gap > 0) + 0.5 * (gap == 0))[better].mean())


if __name__ == "__main__":
    main()
