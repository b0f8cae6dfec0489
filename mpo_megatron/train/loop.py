"""A training run, from configuration to the last checkpoint; read it top to bottom.

run.py holds everything a run works with, step.py a step's forward and backward pass, evaluation.py held-out groups, checkpoints/
saving and resuming, faults/ the watchdogs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from mpo_megatron import device
from mpo_megatron.config import ConfigError, OptimizerConfig, require, to_dict
from mpo_megatron.config.run_paths import with_absolute_paths
from mpo_megatron.config.sealed import seal_yaml
from mpo_megatron.data.loader import StepBatch, iterate_steps, steps_per_epoch
from mpo_megatron.data.overlap import describe_overlap
from mpo_megatron.data.packing import PackingError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.hf.identity import ADAPTER_FILE
from mpo_megatron.model.adapter_weights import adapter_norm
from mpo_megatron.stack.checks import shortfalls
from mpo_megatron.train import optimizer
from mpo_megatron.train.checkpoints.resumption import only_run, resume, run_options
from mpo_megatron.train.checkpoints.saving import Saver
from mpo_megatron.train.checkpoints.step_folders import RunState
from mpo_megatron.train.dead_gradients import warn_dead_gradients
from mpo_megatron.train.evaluation import evaluate
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.incidents import Evidence, Guard, TrainingError, report
from mpo_megatron.train.faults.stopping import Stopped
from mpo_megatron.train.faults.supervisor import Supervisor, seed_everything
from mpo_megatron.train.inputs import checkpoint_bytes
from mpo_megatron.train.routing import unmeasured_drift
from mpo_megatron.train.run import Run, open_run
from mpo_megatron.train.session import session
from mpo_megatron.train.setup import Setup, check_contrasts
from mpo_megatron.train.step import fused_step, two_phase_step
from mpo_megatron.train.term import GradientTerm
from mpo_megatron.train.throughput import throughput
from mpo_megatron.train.tracking import Tracker, build_trackers
from mpo_megatron.train.tracking.facts import record_start
from mpo_megatron.train.tracking.outcomes import forget_later

NO_REFERENCE = (
    "loss.name = {loss} reads no reference log-probs, so margin, accuracy, log-ratios and kl are not measured; to measure them, "
    "at the cost of one more forward pass over the groups, set logging.reference_metrics = true"
)
"""A note at the start of a run."""
SPLIT = (
    "step {step}: {count} of its {groups} groups are longer than data.row_tokens = {row_tokens:,}. Such a step takes one more "
    "forward pass, about a third more work; raise data.row_tokens if memory allows"
)
"""A note at a run's first step with such a group."""


def train(setup: Setup, build_term: Callable[[Run], GradientTerm] | None = None) -> str | None:
    """Train a policy on groups; every rank calls it (`python -m mpo_megatron.train` under torchrun).

    Args:
        build_term: builds a term to add to every step's loss, once the models are loaded
    Returns:
        None when the run is complete; otherwise why it stopped and saved: a request, or the time limit.
    Raises:
        ConfigError: a checkpoint does not fit or is damaged, no group has different rewards, or a run that samples has no
            engine.
        TrainingError: a step's loss is not finite; the weights are those before that step.
        SaveError: a checkpoint could not be written.
        DataError: another run is using the folder.
    """
    kl_weight = setup.config.online.kl_weight
    require(
        build_term is not None or kl_weight == 0,
        f"online.kl_weight = {kl_weight}; the run needs a sampling engine: start its ranks with "
        "`torchrun -m mpo_megatron.train`, as `mpo train` does.",
    )
    check_contrasts(setup)
    with session(setup) as place, only_run(setup.folder, place.ranks):
        try:
            run = open_run(place)
        except Stopped as request:  # raised in the reference pass, which has saved its parts
            return str(request)
        term = None if build_term is None else build_term(run)
        signals.defer()  # from here on, there is something to save
        return train_steps(run, term)


def train_steps(run: Run, term: GradientTerm | None) -> str | None:
    """Resume or start, then step, evaluate and save until the last step or a request to stop; why it stopped early, or None."""
    config, total_steps = run.config, run.setup.total_steps
    last = run.setup.last_step
    adam = optimizer.build_optimizer(config.optimizer, run.model, run.ranks)
    saved = resume(run.setup, run.model, adam, run.ranks)
    done = saved.step
    if done >= last and run.ranks.is_main:
        print(f"nothing is left to train: step {done} of {total_steps} is saved", flush=True)
    if term is not None:
        term.resume(done)
    scheduler = optimizer.build_scheduler(config.optimizer, adam, total_steps=total_steps, start_step=done)
    guard = Guard(config.faults, saved.recent_losses, saved.recent_norms, saved.skipped_steps)
    saver = build_saver(run)
    supervisor = Supervisor(config.faults, run.folder)
    supervisor.watch_reduction(run.model)
    trackers = start_tracking(run, done)
    try:
        if evaluates(run, done) and not saved.held_out:
            evaluate(run, done, trackers, supervisor.pauses(f"evaluation at step {done}", saver.seconds))
        for batch in supervisor.watch_data(batches(run, range(done, last))):
            supervisor.watchdog.beat(f"step {batch.step + 1}")
            metrics = take_step(run, batch, adam, term, guard)
            scheduler.step(1)
            done = batch.step + 1
            agreement = supervisor.after_step(has_written=saver.has_written, save_seconds=saver.seconds)
            for tracker in trackers:
                tracker.log(done, {**metrics, **agreement.metrics})
            if agreement.all_written:
                saver.finish()
            held_out: dict[str, float] = {}
            stop = agreement.stop if done < last else None
            if evaluates(run, done) and stop is None:
                try:
                    held_out = evaluate(run, done, trackers, supervisor.pauses(f"evaluation at step {done}", saver.seconds))
                except Stopped as request:  # the resumed run repeats this evaluation
                    stop = str(request)
            if stop is not None or done == last or (config.checkpoint.every and done % config.checkpoint.every == 0):
                supervisor.watchdog.beat(f"save at step {done}")
                saver.start(state_after(run, done, held_out, guard), run.model, adam)
            if stop is not None:
                saver.finish()
                return stop
        supervisor.watchdog.beat(f"the last save at step {done}")
        saver.finish()
    except Stopped as request:  # raised in the evaluation before the first step: nothing new to save
        return str(request)
    except TrainingError:  # raised on all ranks at the same point, so they can finish a running save together
        saver.finish()
        raise
    finally:
        supervisor.close()
        for tracker in trackers:
            tracker.close()
    return None


def evaluates(run: Run, step: int) -> bool:
    """Whether the held-out groups are evaluated after a step."""
    every = run.config.eval_every
    return step in (0, run.setup.total_steps) or (every > 0 and step % every == 0)


def take_step(run: Run, batch: StepBatch, adam: Any, term: GradientTerm | None, guard: Guard) -> dict[str, float]:
    """One optimizer step and its metrics.

    Raises:
        TrainingError: the step is suspicious, and the configuration ends the run then.
    """
    started = time.perf_counter()
    seed_everything(run.config.seed, batch.step)
    optimizer.zero_gradients(run.model, adam)
    learning_rate, norm, backward_share = optimizer.learning_rate(adam), 0.0, 1.0
    # Before the update: with `optimizer.overlap: all`, new weights arrive with the next forward pass.
    adapter = {} if run.setup.adapter is None else {"adapter_norm": adapter_norm(run.model, run.ranks)}
    routing = run.routing(run.setup.train, batch) if batch.contributes.any() else None
    objective, reference = run.setup.objective, run.reference(run.setup.train, batch, routing)
    added: dict[str, float] = {}
    if batch.contributes.any():
        if term is not None:
            added = term.add(batch.step)
        if two_phase(run, batch):
            result = two_phase_step(
                run.model, batch, reference, objective, run.ranks, run.shape, run.generator(batch.step), run.resident, routing
            )
        else:
            result = fused_step(run.model, batch, reference, objective, run.ranks, run.resident, routing)
        backward_share = result.backward_share
        learned = run.measure(batch, result.policy, reference, result.losses)
        norm = optimizer.gradient_norm(adam)
        judgement = guard.judge(learned["loss"].value, norm)
        if judgement.wrong is not None:
            evidence = Evidence(batch=batch, losses=result.losses, policy=result.policy, reference=reference, norm=norm)
            report(judgement, evidence, run.folder, run.setup.model_folder, is_main=run.ranks.is_main)
        if judgement.apply:
            optimizer.update(run.model, adam)
    else:  # no contrast: the weights stay unchanged
        learned = {}
    device.synchronize()
    seconds = time.perf_counter() - started
    return {
        **{name: mean.value for name, mean in learned.items()},
        **({} if routing is None else {name: mean.value for name, mean in routing.measured.items()}),
        **added,
        "grad_norm": norm,
        "lr": learning_rate,
        "epoch": (batch.step + 1) / steps_per_epoch(len(run.setup.train), run.config.data.groups_per_step),
        "skipped_groups": int((~batch.contributes).sum()),
        **adapter,
        **({"skipped_steps": guard.skipped} if guard.skipped else {}),
        **({"backward_share": backward_share} if backward_share < 1 else {}),
        **throughput(run.setup.flops, batch, seconds, run.config.model.precision),
        "peak_memory_gib": device.peak_memory_gib(),
    }


def two_phase(run: Run, batch: StepBatch) -> bool:
    """Whether this step needs two phases.

    Raises:
        ConfigError: it does, but the configuration requests fused steps.
    """
    if run.config.loss.step == "fused" and batch.plan.split_groups:
        group = batch.table.group_ids[min(batch.plan.split_groups)]
        raise ConfigError(
            f"loss.step = fused, but group {group} is longer than data.row_tokens = {run.config.data.row_tokens}; "
            "raise data.row_tokens, or set loss.step to auto."
        )
    return run.config.loss.step == "two_phase" or needs_whole_batch(run) or bool(batch.plan.split_groups)


def needs_whole_batch(run: Run) -> bool:
    """Whether the loss, or the experts' balance, needs the whole global batch before any backward pass."""
    return run.setup.objective.needs_whole_batch or run.config.experts.needs_whole_batch


def batches(run: Run, steps: range) -> Iterator[StepBatch]:
    """The run's batches.

    Raises:
        ConfigError: a response does not fit into a row.
    """
    config = run.config
    silent = not run.ranks.is_main or config.loss.step != "auto" or needs_whole_batch(run)
    try:
        for batch in iterate_steps(
            steps,
            run.setup.train,
            run.setup.objective.select,
            run.shape,
            groups_per_step=config.data.groups_per_step,
            seed=config.seed,
            shuffle=config.data.shuffle,
            first_step=config.data.first_step,
        ):
            if batch.plan.split_groups and not silent:
                counts = {"count": len(batch.plan.split_groups), "groups": len(batch.groups)}
                print(SPLIT.format(step=batch.step + 1, row_tokens=config.data.row_tokens, **counts), flush=True)
                silent = True
            yield batch
    except PackingError as error:
        raise ConfigError(str(error)) from error


def state_after(run: Run, step: int, held_out: dict[str, float], guard: Guard) -> RunState:
    """The run's state after `step` steps."""
    return RunState(
        step=step,
        fixed=run_options(run.setup),
        held_out=held_out,
        recent_losses=list(guard.losses),
        recent_norms=list(guard.norms),
        skipped_steps=guard.skipped,
    )


def build_saver(run: Run) -> Saver:
    """The writer of this run's checkpoints."""
    source, record = run.setup.model_folder, run.setup.record
    size = checkpoint_bytes(run.config, run.setup.family, record)
    extra = {} if record is None else {ADAPTER_FILE: record.to_bytes()}
    return Saver(run.folder, run.config.checkpoint, run.ranks, source, size, run.setup.train.info.end_token_ids, extra)


def start_tracking(run: Run, done: int) -> list[Tracker]:
    """Save the final configuration and open the trackers, on the main process only."""
    if not run.ranks.is_main:
        return []
    run.folder.mkdir(parents=True, exist_ok=True)
    setup = run.setup
    config = with_absolute_paths(setup.given)  # the folder may be read from other directories
    replace_file(run.folder / "config.yaml", [seal_yaml(to_dict(config))])
    print(f"every option of this run: {run.folder / 'config.yaml'}", flush=True)
    for shortfall in shortfalls(transformer_engine=run.config.model.from_engine, precision=run.config.model.precision):
        print(f"slower than it could be: {shortfall}", flush=True)
    if note := unmeasured_drift(run.config.experts, run.setup.family.experts, resident=run.resident is not None):
        print(note, flush=True)
    if warning := warn_dead_gradients(setup.objective, setup.train):
        print(warning, flush=True)
    if setup.held_out is not None and (overlap := describe_overlap(setup.train, setup.held_out)):
        print(f"WARNING: {overlap}", flush=True)
    if not setup.needs_reference:
        unused = config.model.reference is not None and config.online.kl_weight == 0 and not setup.objective.needs.token_kl
        ignored = f"; model.reference = {config.model.reference} has no effect" if unused else ""
        print(NO_REFERENCE.format(loss=config.loss.title) + ignored, flush=True)
    if run.setup.adapter is not None and config.optimizer.lr == OptimizerConfig().lr:
        print(
            f"optimizer.lr = {config.optimizer.lr:g} is the default for all weights; adapters usually need 10 to 100 times that"
        )
    forget_later(run.folder, done)
    facts = record_start(
        run.folder,
        config,
        step=done,
        total_steps=setup.total_steps,
        train=setup.train,
        held_out=setup.held_out,
        model_digest=setup.model_digest,
        reference_digest=setup.reference_digest,
        data_parallel=run.ranks.data_size,
    )
    return build_trackers(
        run.config.logging, run.folder, to_dict(setup.given), facts, start_step=done, total_steps=setup.total_steps
    )
