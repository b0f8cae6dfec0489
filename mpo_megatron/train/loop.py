"""A training run, from configuration to the last checkpoint: it reads top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mpo_megatron import device
from mpo_megatron.config import ConfigError, TrainConfig, require, to_dict
from mpo_megatron.data.atomic import replace_file
from mpo_megatron.data.group import PreparedGroups
from mpo_megatron.data.loader import RowShape, StepBatch, build_step, iterate_steps, steps_per_epoch
from mpo_megatron.data.packing import PackingError
from mpo_megatron.model.architecture import use_transformer_engine
from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.model.flops import FlopModel, build_flop_model
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.precision import token_multiple
from mpo_megatron.train import checkpoint, optimizer
from mpo_megatron.train.calibration import calibrate
from mpo_megatron.train.faults import Supervisor, seed_everything
from mpo_megatron.train.hardware import peak_flops
from mpo_megatron.train.incidents import Evidence, Guard, TrainingError, broken_groups, report
from mpo_megatron.train.inputs import Inputs, check_inputs
from mpo_megatron.train.metrics import Mean, combine, compute_metrics
from mpo_megatron.train.objective import Logps, group_batch
from mpo_megatron.train.reference import ReferenceLogps, cache_key, reference_logps
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.resumption import fixed_options, resume
from mpo_megatron.train.saving import Saver, check_whole, only_run
from mpo_megatron.train.step import (
    forward_step,
    fused_step,
    prepare_schedules,
    two_phase_step,
)
from mpo_megatron.train.step_folders import RunState
from mpo_megatron.train.term import GradientTerm
from mpo_megatron.train.tracking import Tracker, build_trackers
from mpo_megatron.train.tracking.facts import record_start
from mpo_megatron.train.tracking.outcomes import forget_later, group_outcomes, log_outcomes


def train(config: TrainConfig, build_term: Callable[[Run], GradientTerm] | None = None) -> str | None:
    """Train a policy on groups; every rank calls it (`python -m mpo_megatron.train` under torchrun).

    Args:
        build_term: makes a term to add to every step's loss, once the models are loaded
    Returns:
        None when the run is complete; why it stopped if it was asked to, or ran out of time, and saved.
    Raises:
        ConfigError: the configuration, its files and the layout do not fit together; raised before weights are loaded.
        TrainingError: a step's loss is not finite; the weights are those before that step.
        SaveError: a checkpoint could not be written.
        DataError: another run is at work in the folder.
    """
    require(
        build_term is not None or config.online.kl_weight == 0,
        f"online.kl_weight = {config.online.kl_weight}; it needs an engine that samples: start ranks with "
        f"`torchrun -m {config.entry_point}`, as `mpo train` does.",
    )
    inputs = check_inputs(config, int(os.environ.get("WORLD_SIZE", "1")))
    with model_parallel(config.parallel, config.seed) as ranks, only_run(Path(config.output), ranks):
        check_whole(Path(config.model.checkpoint))
        flops = build_flop_model(inputs.hf_config)
        shape = build_row_shape(config, ranks, flops)
        policy = build_policy(inputs.hf_config, config.model, config.parallel, ranks, inputs.padded_vocab_size)
        references = compute_references(config, inputs, policy, ranks, shape)
        checkpoint.load_weights(policy, config.model.checkpoint, ranks)
        calibrate(policy, inputs.train, ranks, shape)
        model = optimizer.wrap_data_parallel(policy, config.optimizer, ranks)
        prepare_schedules(model)
        run = Run(
            config=config,
            inputs=inputs,
            references=references,
            ranks=ranks,
            shape=shape,
            flops=flops,
            model=model,
            resident=load_resident(config, inputs, ranks, shape),
        )
        return run.train(None if build_term is None else build_term(run))


def build_row_shape(config: TrainConfig, ranks: Ranks, flops: FlopModel) -> RowShape:
    """How this rank's rows are cut: the same for training, evaluation and the reference."""
    return RowShape(
        row_tokens=config.data.row_tokens,
        layout=config.data.layout,
        multiple=token_multiple(config.model) * config.parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=flops.pair_weight,
        rows_multiple=config.parallel.rows_multiple,
    )


def load_resident(config: TrainConfig, inputs: Inputs, ranks: Ranks, shape: RowShape) -> Resident | None:
    """The reference model in memory, without gradients, if the loss needs more of it than log-probs."""
    return load_reference_model(config, inputs, ranks, shape) if inputs.objective.needs.token_kl else None


def load_reference_model(config: TrainConfig, inputs: Inputs, ranks: Ranks, shape: RowShape) -> Resident:
    """The reference model in memory, without gradients, cut over ranks as the policy is."""
    parts = build_policy(inputs.hf_config, config.model, config.parallel, ranks, inputs.padded_vocab_size)
    checkpoint.load_weights(parts, config.model.reference or config.model.checkpoint, ranks)
    calibrate(parts, inputs.train, ranks, shape)
    return Resident(parts, offload=config.model.resident_offload)


def compute_references(
    config: TrainConfig, inputs: Inputs, policy: list[torch.nn.Module], ranks: Ranks, shape: RowShape
) -> dict[Path, ReferenceLogps]:
    """Reference log-probs of the training and held-out groups, by folder; the policy lends its memory to the reference model.

    Losses without a reference get them too: margins, log-ratios and KL mean the same for every method then.
    """
    loaded = False

    def load_reference() -> list[torch.nn.Module]:
        nonlocal loaded
        if not loaded:
            checkpoint.load_weights(policy, config.model.reference or config.model.checkpoint, ranks)
            calibrate(policy, inputs.train, ranks, shape)
            loaded = True
        return policy

    references = {}
    for data in (inputs.train, inputs.held_out):
        if data is not None:
            key = cache_key(
                inputs.reference_digest,
                data,
                config.model,
                transformer_engine=use_transformer_engine(config.model),
                attention=choose_attention(config.model),
                calibration=inputs.train,
            )
            references[data.path] = reference_logps(
                data,
                data.path / "reference" / key,
                load_reference,
                ranks,
                shape,
                groups_per_part=config.data.groups_per_step,
                tokens=inputs.objective.needs.tokens,
            )
    return references


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run works with."""

    config: TrainConfig
    inputs: Inputs
    references: dict[Path, ReferenceLogps]
    ranks: Ranks
    shape: RowShape
    flops: FlopModel
    model: list[Any]
    resident: Resident | None
    """The reference model, for losses that compare whole distributions with it."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    def train(self, term: GradientTerm | None) -> str | None:
        """Resume or start, then step, evaluate and save until the last step, or until asked to stop; why it stopped early."""
        config, total_steps = self.config, self.inputs.total_steps
        last = min(total_steps, config.stop_after or total_steps)
        adam = optimizer.build_optimizer(config.optimizer, self.model, self.ranks)
        saved = resume(config, self.inputs, self.model, adam, self.ranks)
        done = saved.step
        if term is not None:
            term.resume(done)
        scheduler = optimizer.build_scheduler(config.optimizer, adam, total_steps=total_steps, start_step=done)
        guard = Guard(config.faults, saved.recent_losses, saved.recent_norms, saved.skipped_steps)
        saver = self.build_saver()
        supervisor = Supervisor(config.faults, self.folder)
        supervisor.watch_reduction(self.model)
        trackers = self.start_tracking(done)
        try:
            if self.evaluates(done) and not saved.held_out:
                supervisor.watchdog.beat(f"evaluation at step {done}")
                self.evaluate(done, trackers)
            for batch in supervisor.watch_data(self.steps(range(done, last))):
                supervisor.watchdog.beat(f"step {batch.step + 1}")
                metrics = self.step(batch, adam, term, guard)
                scheduler.step(1)
                done = batch.step + 1
                agreement = supervisor.after_step(has_written=saver.has_written, save_seconds=saver.seconds)
                for tracker in trackers:
                    tracker.log(done, {**metrics, **agreement.metrics})
                if agreement.all_written:
                    saver.finish()
                held_out: dict[str, float] = {}
                stops = agreement.stop is not None and done < last
                if self.evaluates(done) and not stops:
                    supervisor.watchdog.beat(f"evaluation at step {done}")
                    held_out = self.evaluate(done, trackers)
                if stops or done == last or (config.checkpoint.every and done % config.checkpoint.every == 0):
                    supervisor.watchdog.beat(f"save at step {done}")
                    saver.start(self.state(done, held_out, guard), self.model, adam)
                if stops:
                    saver.finish()
                    return agreement.stop
            supervisor.watchdog.beat(f"the last save at step {done}")
            saver.finish()
        except TrainingError:  # raised by all ranks at the same place, so that they can finish together what they began to save
            saver.finish()
            raise
        finally:
            supervisor.close()
            for tracker in trackers:
                tracker.close()
        return None

    def evaluates(self, step: int) -> bool:
        """Whether the held-out groups are evaluated after a step."""
        every = self.config.eval_every
        return step in (0, self.inputs.total_steps) or (every > 0 and step % every == 0)

    def step(self, batch: StepBatch, adam: Any, term: GradientTerm | None, guard: Guard) -> dict[str, float]:
        """One optimizer step and its metrics.

        Raises:
            TrainingError: the step looks wrong, and the run is to end then.
        """
        started = time.perf_counter()
        seed_everything(self.config.seed, batch.step)
        optimizer.zero_gradients(self.model, adam)
        learning_rate, norm, backward_share = optimizer.learning_rate(adam), 0.0, 1.0
        objective, reference = self.inputs.objective, self.reference(self.inputs.train, batch)
        added: dict[str, float] = {}
        if batch.contributes.any():
            if term is not None:
                added = term.add(batch.step)
            if self.two_phase(batch):
                policy, backward_share = two_phase_step(
                    self.model, batch, reference, objective, self.ranks, self.shape, self.generator(batch.step), self.resident
                )
            else:
                policy = fused_step(self.model, batch, reference, objective, self.ranks, self.resident)
            learned, losses = self.metrics(batch, policy, reference)
            norm = optimizer.gradient_norm(adam)
            judgement = guard.judge(learned["loss"].value, norm)
            if judgement.wrong is not None:
                evidence = Evidence(batch=batch, losses=losses, policy=policy, reference=reference, norm=norm)
                report(judgement, evidence, self.folder, Path(self.config.model.checkpoint), is_main=self.ranks.is_main)
            if judgement.apply:
                optimizer.update(self.model, adam)
        else:  # nothing to learn from: the weights stay as they are
            learned = {}
        device.synchronize()
        seconds = time.perf_counter() - started
        return {
            **{name: mean.value for name, mean in learned.items()},
            **added,
            "grad_norm": norm,
            "lr": learning_rate,
            "epoch": (batch.step + 1) / steps_per_epoch(len(self.inputs.train), self.config.data.groups_per_step),
            "skipped_groups": int((~batch.contributes).sum()),
            **({"skipped_steps": guard.skipped} if guard.skipped else {}),
            **({"backward_share": backward_share} if backward_share < 1 else {}),
            **self.throughput(batch, seconds),
            "peak_memory_gib": device.peak_memory_gib(),
        }

    def two_phase(self, batch: StepBatch) -> bool:
        """Whether this step needs the two-phase way.

        Raises:
            ConfigError: it does, but the configuration asks for fused steps.
        """
        if self.config.loss.step == "fused" and batch.plan.split_groups:
            group = batch.table.group_ids[min(batch.plan.split_groups)]
            raise ConfigError(
                f"loss.step = fused, but group {group} is longer than data.row_tokens = {self.config.data.row_tokens}; "
                "raise data.row_tokens, or set loss.step to auto."
            )
        return self.config.loss.step == "two_phase" or self.inputs.objective.needs_whole_batch or bool(batch.plan.split_groups)

    def metrics(self, batch: StepBatch, policy: Logps, reference: Logps) -> tuple[dict[str, Mean], torch.Tensor]:
        """Metrics of a step from the log-probs of all its responses, and the loss of each group [G]; the same on every rank."""
        groups = group_batch(batch.table, policy, reference, generator=self.generator(batch.step))
        losses = self.inputs.objective.compute(groups).detach()
        contributes, computed = torch.from_numpy(batch.contributes), torch.from_numpy(batch.in_rows)
        return compute_metrics(groups, losses, contributes, computed, self.inputs.objective.params), losses

    def evaluate(self, step: int, trackers: list[Tracker]) -> dict[str, float]:
        """Metrics over all held-out groups.

        Raises:
            ConfigError: no held-out group carries a contrast, or they have no metric `checkpoint.best_metric`.
            TrainingError: a group's loss is not finite.
        """
        data, best = self.inputs.held_out, self.config.checkpoint
        if data is None:
            return {}
        parts, outcomes = [], []
        size = self.config.data.groups_per_step
        for start in range(0, len(data), size):
            indices = np.arange(start, min(start + size, len(data)))
            batch = build_step(0, data, indices, self.inputs.objective.select, self.shape)
            if batch.contributes.any():
                policy = forward_step(self.model, batch, self.inputs.objective, self.ranks, self.resident)
                reference = self.reference(data, batch)
                learned, losses = self.metrics(batch, policy, reference)
                if not losses.isfinite().all():
                    raise TrainingError(f"step {step}: held out, the loss is not finite{broken_groups(batch, losses)}.")
                parts.append(learned)
                outcomes += group_outcomes(batch, policy, reference, self.inputs.objective.params)
        if not parts:
            raise ConfigError(f"data.eval = {data.path}: no group carries a contrast; choose other held-out groups.")
        metrics = {f"eval/{name}": value for name, value in combine(parts).items()}
        require(
            best.keep_best == 0 or best.best_metric in metrics,
            f"checkpoint.best_metric = {best.best_metric}; there is no such metric, choose one of {', '.join(metrics)}.",
        )
        for tracker in trackers:
            tracker.log(step, metrics)
        if self.ranks.is_main:
            log_outcomes(self.folder, step, outcomes, data, self.config.logging.num_samples, trackers)
        return metrics

    def throughput(self, batch: StepBatch, seconds: float) -> dict[str, float]:
        """Rates of a step over all ranks; FLOPs are the model's own, without recomputation."""
        pieces = [piece for rows in batch.plan.rows for row in rows for piece in row]
        scored = int(batch.table.lengths[batch.in_rows].sum())
        pairs = sum(piece.num_pairs for piece in pieces)
        work = self.flops.train_step(tokens=batch.plan.num_tokens, pairs=pairs, scored=scored)
        per_rank = work / seconds / torch.distributed.get_world_size()
        peak = peak_flops(device.gpu_name()) if self.config.model.precision == "bf16" else None
        return {
            "tokens_per_second": batch.plan.num_tokens / seconds,
            "groups_per_second": len(batch.groups) / seconds,
            "tflops_per_rank": per_rank / 1e12,
            **({} if peak is None else {"mfu": per_rank / peak}),
            "seconds": seconds,
        }

    def reference(self, data: PreparedGroups, batch: StepBatch) -> Logps:
        """Reference log-probs of a batch."""
        return self.references[data.path].select(batch.table)

    def generator(self, step: int) -> torch.Generator:
        """Generator of what a loss draws at a step; the same on every rank."""
        return torch.Generator().manual_seed(self.config.seed + 1_000_003 * step)

    def steps(self, steps: range) -> Iterator[StepBatch]:
        """The run's batches.

        Raises:
            ConfigError: a response does not fit a row.
        """
        config = self.config
        try:
            yield from iterate_steps(
                steps,
                self.inputs.train,
                self.inputs.objective.select,
                self.shape,
                groups_per_step=config.data.groups_per_step,
                seed=config.seed,
                shuffle=config.data.shuffle,
                first_step=config.data.first_step,
            )
        except PackingError as error:
            raise ConfigError(str(error)) from error

    def state(self, step: int, held_out: dict[str, float], guard: Guard) -> RunState:
        """Where the run stands after `step` steps."""
        return RunState(
            step=step,
            fixed=fixed_options(self.config, self.inputs),
            held_out=held_out,
            recent_losses=list(guard.losses),
            recent_norms=list(guard.norms),
            skipped_steps=guard.skipped,
        )

    def build_saver(self) -> Saver:
        """What writes this run's checkpoints."""
        source = Path(self.config.model.checkpoint)
        size = checkpoint.estimate_bytes(source, self.config.model.precision)
        return Saver(self.folder, self.config.checkpoint, self.ranks, source, size)

    def start_tracking(self, done: int) -> list[Tracker]:
        """Save the final configuration and open the trackers, on the main process only."""
        if not self.ranks.is_main:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
        replace_file(self.folder / "config.yaml", [text.encode()])
        print(f"# {self.folder / 'config.yaml'}\n{text}", flush=True)
        forget_later(self.folder, done)
        inputs = self.inputs
        facts = record_start(
            self.folder,
            self.config,
            step=done,
            total_steps=inputs.total_steps,
            train=inputs.train,
            held_out=inputs.held_out,
            model_digest=inputs.model_digest,
            reference_digest=inputs.reference_digest,
            data_parallel=self.ranks.data_size,
        )
        return build_trackers(
            self.config.logging, self.folder, to_dict(self.config), facts, start_step=done, total_steps=inputs.total_steps
        )
