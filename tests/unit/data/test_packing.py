"""Rows: every scored token once, predicted by the token before it, in its own context; deterministic, balanced, within budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mpo_megatron.data.loader import RowShape, group_table, indices_of_steps, iterate_steps, pack, step_indices, steps_per_epoch
from mpo_megatron.data.packing import PackingError, Row, RowPlan, build_row, count_pairs, plan_rows, response_places
from tests.tiny import random_groups, save_groups, save_model

BUDGET = 128


def make_plan(groups, scored=None, **options) -> RowPlan:
    table = group_table(groups, np.arange(len(groups)))
    lengths = [[len(tokens) for tokens in group.response_tokens] for group in groups]
    settings = {"row_tokens": BUDGET, "num_replicas": 2, "layout": "shared"} | options
    return plan_rows(table.prompt_lengths.tolist(), lengths, table.valid if scored is None else scored, **settings)


def build_rows(groups, plan, layout="shared", multiple=16) -> list[Row]:
    return [build_row(pieces, groups, layout=layout, multiple=multiple) for rows in plan.rows for pieces in rows]


def contexts(row: Row) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each response of the row: the tokens that the predictor of each scored token attends to, listed from the segments."""
    seen = {}
    for index, (slot, k) in enumerate(row.responses):
        own = row.response_of == index
        visible, positions = [], []
        for source in row.sources[own]:
            (segment,) = [segment for segment in row.segments if segment[0] <= source < segment[1]]
            start, _, context_start, context_end = segment
            where = np.concatenate((np.arange(context_start, context_end), np.arange(start, source + 1)))
            visible.append(row.tokens[where])
            positions.append(row.position_ids[where])
        seen[int(slot), int(k)] = (visible, positions, row.targets[own])
    return seen


@pytest.mark.parametrize("layout", ["shared", "unshared"])
@pytest.mark.parametrize("row_tokens", [64, 128, 1024])
def test_every_token_is_predicted_from_its_own_context(layout, row_tokens) -> None:
    groups = [
        *random_groups(20, seed=3),
        *random_groups(12, seed=4, max_responses=16, prompt_tokens=(0, 1), response_tokens=(1, 3)),
    ]
    assert {len(group.prompt_tokens) for group in groups} >= {0, 1}
    plan = make_plan(groups, layout=layout, row_tokens=row_tokens)
    found = {}
    for row in build_rows(groups, plan, layout):
        found |= contexts(row)
    assert set(found) == {(slot, k) for slot, group in enumerate(groups) for k in range(group.num_responses)}
    for (slot, k), (visible, positions, targets) in found.items():
        prompt, response = groups[slot].prompt_tokens, groups[slot].response_tokens[k]
        first = 0 if len(prompt) else 1  # without a prompt nothing predicts the first token
        assert np.array_equal(targets, response[first:])
        for t in range(first, len(response)):
            assert np.array_equal(visible[t - first], np.concatenate((prompt, response[:t])))
            assert np.array_equal(positions[t - first], np.arange(len(prompt) + t))


def test_segments_cover_the_row_and_padding_is_apart() -> None:
    groups = random_groups(10, seed=5)
    for row in build_rows(groups, make_plan(groups)):
        edges = row.segments[:, :2].ravel()
        assert edges[0] == 0
        assert edges[-1] == len(row.tokens)
        assert np.array_equal(edges[1:-1:2], edges[2::2])
        assert len(row.tokens) % 16 == 0
        assert row.num_tokens <= BUDGET
        padding = np.arange(row.num_tokens, len(row.tokens))
        assert not np.isin(row.sources, padding).any()


def test_plan_counts_tokens_and_pairs() -> None:
    groups = random_groups(8, seed=6)
    for layout in ("shared", "unshared"):
        plan = make_plan(groups, layout=layout)
        rows = build_rows(groups, plan, layout)
        assert plan.num_tokens == sum(row.num_tokens for row in rows)
        pairs = sum(
            (end - start) * (end - start + 1) // 2 + (end - start) * (context_end - context_start)
            for row in rows
            for start, end, context_start, context_end in row.segments
            if start < row.num_tokens
        )
        assert pairs == sum(piece.num_pairs for replica in plan.rows for row in replica for piece in row)


def test_shared_prompts_are_computed_once() -> None:
    groups = random_groups(8, seed=6)
    shared, unshared = make_plan(groups, row_tokens=1024), make_plan(groups, row_tokens=1024, layout="unshared")
    repeated = sum(len(group.prompt_tokens) * (group.num_responses - 1) for group in groups)
    assert unshared.num_tokens - shared.num_tokens == repeated


def test_replicas_get_as_many_rows_and_like_work() -> None:
    groups = random_groups(64, seed=8)
    everything = sorted(piece for piece in make_plan(groups, row_tokens=100_000, num_replicas=1).rows[0][0])
    for replicas in (1, 2, 3, 8):
        for row_tokens in (BUDGET, 1000, 4000):  # the last could hold all in one row
            plan = make_plan(groups, num_replicas=replicas, row_tokens=row_tokens, pair_weight=0.01)
            assert len({len(rows) for rows in plan.rows}) == 1
            rows = [row for own in plan.rows for row in own]
            assert max(sum(piece.num_tokens for piece in row) for row in rows) <= row_tokens
            assert sorted(piece for row in rows for piece in row) == everything or row_tokens == BUDGET  # some are split there
            work = [sum(piece.num_tokens + 0.01 * piece.num_pairs for row in own for piece in row) for own in plan.rows]
            assert max(work) <= 1.1 * min(work)
    assert {len(rows) % 4 for rows in make_plan(groups, num_replicas=2, rows_multiple=4).rows} == {0}


def test_more_replicas_than_groups_and_rows_too_tight_to_deal_anew() -> None:
    groups = random_groups(3, seed=8)
    rows = [row for (row,) in make_plan(groups, num_replicas=8, row_tokens=1000).rows]
    assert sorted(len(row) for row in rows) == [0, 0, 0, 0, 0, 1, 1, 1]
    # 60 + 40, 30 + 30 + 40: assigned one by one, longest first, the last would not fit.
    groups = random_groups(5, prompt_tokens=(1, 1), max_responses=2)
    sizes = (60, 40, 40, 30, 30)
    groups = [
        dataclasses.replace(group, prompt_tokens=np.zeros(size - 2, np.int32), response_tokens=(np.zeros(2, np.int32),) * 2)
        for group, size in zip(groups, sizes, strict=True)
    ]
    (rows,) = make_plan(groups, num_replicas=1, row_tokens=100).rows
    assert sorted(sorted(piece.num_tokens for piece in row) for row in rows) == [[30, 30, 40], [40, 60]]


def test_rows_are_full() -> None:
    groups = random_groups(200, seed=9)
    plan = make_plan(groups, num_replicas=1, row_tokens=1024)
    rows = [row for row in plan.rows[0] if row]
    assert plan.num_tokens / (1024 * len(rows)) >= 0.95


def test_unscored_responses_take_no_place() -> None:
    groups = random_groups(6, seed=10)
    table = group_table(groups, np.arange(6))
    scored = table.valid.copy()
    scored[:, 0] = False
    scored[2] = False
    rows = build_rows(groups, make_plan(groups, scored=scored))
    found = {(int(slot), int(k)) for row in rows for slot, k in row.responses}
    assert found == {(slot, k) for slot, k in np.argwhere(scored).tolist()}


def test_split_groups_are_named_and_too_long_responses_refused() -> None:
    groups = random_groups(6, seed=11, prompt_tokens=(20, 20), response_tokens=(30, 30), max_responses=6)
    plan = make_plan(groups, row_tokens=60)
    assert plan.split_groups == frozenset(slot for slot, group in enumerate(groups) if group.num_responses >= 2)
    with pytest.raises(PackingError, match=r"group group-0: .* take 49 tokens.*raise data.row_tokens"):
        make_plan(groups, row_tokens=48, names=[group.group_id for group in groups])


def test_filler_rows_score_nothing() -> None:
    row = build_row((), [], layout="shared", multiple=16)
    assert len(row.tokens) == 16
    assert len(row.targets) == len(row.responses) == row.num_tokens == 0


def test_steps_cover_each_epoch_once_and_depend_on_the_seed() -> None:
    steps = steps_per_epoch(23, 5)
    assert steps == 5
    for epoch in range(2):
        seen = np.concatenate([step_indices(epoch * steps + i, 23, 5, seed=1, shuffle=True) for i in range(steps)])
        assert sorted(seen) == list(range(23))
    first = [step_indices(0, 23, 5, seed=seed, shuffle=True).tolist() for seed in (1, 1, 2)]
    assert first[0] == first[1] != first[2]
    assert step_indices(0, 23, 5, seed=1, shuffle=True).tolist() != step_indices(5, 23, 5, seed=1, shuffle=True).tolist()
    assert step_indices(1, 23, 5, seed=1, shuffle=False).tolist() == [5, 6, 7, 8, 9]
    for num_steps in (1, 4, 5, 7, 40):
        reached = indices_of_steps(num_steps, 23, 5, seed=1, shuffle=True).tolist()
        assert reached == sorted({int(i) for step in range(num_steps) for i in step_indices(step, 23, 5, seed=1, shuffle=True)})


def test_steps_do_not_depend_on_replicas_or_where_they_start(tmp_path) -> None:
    data = save_groups(tmp_path / "groups", random_groups(20, seed=12), save_model(tmp_path / "hf"))

    def select(table):
        return table.valid.any(axis=1), table.valid

    def steps(start, replicas):
        parts = []
        for replica in range(replicas):
            shape = RowShape(
                row_tokens=BUDGET, layout="shared", multiple=16, num_replicas=replicas, replica=replica, pair_weight=0.0
            )
            parts.append(list(iterate_steps(range(start, 6), data, select, shape, groups_per_step=8, seed=7, shuffle=True)))
        return [
            sorted((int(batch.table.indices[slot]), int(k)) for part in step for row in part.rows for slot, k in row.responses)
            for step in zip(*parts, strict=True)
            for batch in step[:1]
        ]

    whole = steps(0, 1)
    assert steps(0, 3) == whole
    assert steps(2, 2) == whole[2:]
    assert steps(6, 1) == []


def test_repacking_keeps_only_what_is_asked() -> None:
    groups = random_groups(6, seed=13)
    table = group_table(groups, np.arange(6))
    shape = RowShape(row_tokens=BUDGET, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=0.0)
    wanted = np.zeros_like(table.valid)
    wanted[1, 0] = wanted[4, 1] = True
    _, rows = pack(table, groups, wanted, shape)
    assert sorted((int(slot), int(k)) for row in rows for slot, k in row.responses) == [(1, 0), (4, 1)]


def mask_some(groups, seed=0):
    """The same groups with some tokens not generated by the model: never a response's first or last."""
    rng = np.random.default_rng(seed)

    def mask(length):
        keep = rng.random(length) < 0.6
        keep[[0, -1]] = True
        return keep

    return [dataclasses.replace(group, scored=tuple(mask(len(ids)) for ids in group.response_tokens)) for group in groups]


@pytest.mark.parametrize("layout", ["shared", "unshared"])
def test_tokens_that_the_model_did_not_generate_are_inputs_and_never_targets(layout) -> None:
    groups = random_groups(12, seed=21)
    masked = mask_some(groups)
    plan = make_plan(groups, layout=layout)
    for row, whole in zip(build_rows(masked, plan, layout), build_rows(groups, plan, layout), strict=True):
        for name in ("tokens", "position_ids", "segments", "responses", "inputs"):
            assert np.array_equal(getattr(row, name), getattr(whole, name))
        keep = np.concatenate([masked[slot].scored[k] for slot, k in row.responses] or [np.zeros(0, bool)])
        for name in ("sources", "targets", "response_of"):
            assert np.array_equal(getattr(row, name), getattr(whole, name)[keep])
        for (slot, k), (start, end) in zip(row.responses, row.inputs, strict=True):
            assert np.array_equal(row.tokens[start:end], groups[slot].response_tokens[k][:-1])


def test_lengths_that_losses_divide_by_leave_out_what_is_not_scored() -> None:
    groups = random_groups(2, seed=14, prompt_tokens=(0, 0), response_tokens=(1, 3)) + mask_some(random_groups(2, seed=15))
    table = group_table(groups, np.arange(4))
    plan = make_plan(groups, row_tokens=1000, num_replicas=1)
    (row,) = build_rows(groups, plan)
    for index, (slot, k) in enumerate(row.responses):
        assert table.scored_lengths[slot, k] == max(1, (row.response_of == index).sum())
    assert (table.scored_lengths < table.lengths)[table.valid].any()


@pytest.mark.parametrize(("length", "context"), [(5, 0), (5, 7), (1, 9), (12, 3), (0, 4)])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_pairs_within_a_window_are_those_that_attend(length: int, context: int, window: int) -> None:
    spelled_out = sum(min(context + token + 1, window) for token in range(length))
    assert count_pairs(length, context, (window, 1.0)) == spelled_out
    assert count_pairs(length, context, (window, 0.0)) == count_pairs(length, context)


@pytest.mark.parametrize("layout", ["shared", "unshared"])
@pytest.mark.parametrize("row_tokens", [64, 1024])
def test_every_input_token_of_a_group_counts_once(layout, row_tokens) -> None:
    """For any packing, a group's prompt and its packed responses each have one counted copy, at the right place."""
    groups = [*random_groups(12, seed=5), *random_groups(4, seed=6, prompt_tokens=(0, 0))]
    table = group_table(groups, np.arange(len(groups)))
    scored = table.valid & (np.random.default_rng(0).random(table.valid.shape) < 0.7)
    plan = make_plan(groups, scored, layout=layout, row_tokens=row_tokens)
    found: dict[int, list[int]] = {slot: [] for slot in range(len(groups))}
    for row in build_rows(groups, plan, layout):
        assert (row.slots < 0).sum() == len(row.tokens) - row.num_tokens
        for token, slot, place, counts in zip(row.tokens, row.slots, row.places, row.counted, strict=True):
            if slot < 0:
                assert (place, counts) == (-1, False)
                continue
            group = groups[slot]
            everything = np.concatenate((group.prompt_tokens, *(response[:-1] for response in group.response_tokens)))
            assert everything[place] == token
            if counts:
                found[slot].append(int(place))
    for slot, group in enumerate(groups):
        ends = response_places(group)
        expected = list(range(ends[0])) if scored[slot].any() else []
        for k in np.flatnonzero(scored[slot]):
            expected += range(ends[k], ends[k + 1])
        assert sorted(found[slot]) == expected
