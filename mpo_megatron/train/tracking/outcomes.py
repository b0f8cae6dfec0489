"""Keep every held-out group's outcome at every evaluation, and log a few as samples.

Legend: G groups of a step, K responses of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.data.loader import StepBatch
from mpo_megatron.data.outcomes import GroupOutcome, outcome_files, read_digest, read_outcomes, write_outcomes
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files.digests import DamagedError
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.metrics import compute_sets
from mpo_megatron.train.objective import Logps, group_batch
from mpo_megatron.train.tracking.tracker import SampleTable, Tracker

COLUMNS = (
    "group_id",
    "prompt",
    "response",
    "set",
    "reward",
    "tokens",
    "reference_logp",
    "policy_logp",
    "log_ratio_before",
    "log_ratio",
)
"""Columns of a table of samples; `log_ratio_before` is from the previous evaluation."""


def group_outcomes(batch: StepBatch, policy: Logps, reference: Logps | None, params: object) -> list[GroupOutcome]:
    """Outcomes of the groups with contrast in an evaluation step.

    Args:
        policy: [G, K]
        reference: [G, K]; None if not needed
        params: hyper-parameters of the loss
    """
    positive, negative = compute_sets(group_batch(batch.table, policy, reference), params)
    sets = (positive.int() - (~positive & ~negative).int()).tolist()
    logps = policy.response.tolist()
    references = [[None] * len(row) for row in logps] if reference is None else reference.response.tolist()
    outcomes = []
    for slot, size in enumerate(batch.table.valid.sum(axis=1).tolist()):
        if batch.contributes[slot]:
            known = batch.in_rows[slot, :size].tolist()
            outcomes.append(
                GroupOutcome(
                    index=int(batch.table.indices[slot]),
                    group_id=batch.table.group_ids[slot],
                    policy_logps=tuple(logps[slot][k] if known[k] else None for k in range(size)),
                    reference_logps=tuple(references[slot][k] if known[k] else None for k in range(size)),
                    sets=tuple(sets[slot][:size]),
                )
            )
    return outcomes


def sample_table(outcomes: Iterable[GroupOutcome], before: Sequence[GroupOutcome], data: PreparedGroups) -> SampleTable:
    """Groups with their responses, rewards, and the change of their log-probs; one row per response.

    Args:
        before: outcomes of the previous evaluation; empty without one
    """
    earlier = {outcome.index: outcome for outcome in before}
    rows = []
    for outcome in outcomes:
        group = data[outcome.index]
        for k, text in enumerate(group.response_texts or ("",) * len(outcome.sets)):
            row: dict[str, Any] = {
                "group_id": outcome.group_id,
                "prompt": group.prompt_text,
                "response": text,
                "set": {1: "preferred", 0: "other"}.get(outcome.sets[k], ""),
                "reward": None if group.rewards is None else float(group.rewards[k]),
                "tokens": len(group.response_tokens[k]),
                "reference_logp": outcome.reference_logps[k],
                "policy_logp": outcome.policy_logps[k],
                "log_ratio_before": earlier[outcome.index].log_ratio(k) if outcome.index in earlier else None,
                "log_ratio": outcome.log_ratio(k),
            }
            rows.append(tuple(row[name] for name in COLUMNS))
    return SampleTable(columns=COLUMNS, rows=tuple(rows))


def forget_later(run: Path, start_step: int) -> None:
    """Remove outcomes of evaluations that a run starting after `start_step` will repeat, or that another run left."""
    for step, path in outcome_files(run).items():
        if step > start_step or not start_step:
            path.unlink()


def log_outcomes(
    run: Path, step: int, outcomes: Sequence[GroupOutcome], data: PreparedGroups, num_samples: int, trackers: Sequence[Tracker]
) -> None:
    """Store the outcomes of the evaluation after `step` steps, and log some as samples: the same groups every time."""
    write_outcomes(run, step, outcomes, data.info.data_digest)
    wanted = evenly_spaced(len(outcomes), num_samples)
    if wanted:
        before = outcomes_before(run, step, data.info.data_digest)
        table = sample_table([outcomes[place] for place in wanted], before, data)
        for tracker in trackers:
            tracker.log_samples(step, table)


def outcomes_before(run: Path, step: int, data_digest: str) -> list[GroupOutcome]:
    """Outcomes of the evaluation before `step`; empty without one on these groups, or if its file is damaged."""
    try:
        for done, path in reversed(outcome_files(run).items()):
            if done < step and read_digest(path) == data_digest:
                return read_outcomes(path)
    except DamagedError as error:
        print(f"{visible(error)} The samples of step {step} are logged without the previous evaluation.", flush=True)
    return []


def evenly_spaced(size: int, count: int) -> list[int]:
    """`count` evenly spaced indices of 0 … size − 1, or all of them if there are fewer."""
    count = min(size, count)
    return [place * size // count for place in range(count)]
