"""A run says once that groups longer than a row cost one more forward pass."""

from __future__ import annotations

from types import SimpleNamespace as Record
from typing import Any

import pytest

from mpo_megatron.train import loop

SPLITS: list[set[int]] = [set(), {1, 3}, {0}]
"""Split groups of each step."""


def notes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    steps = [Record(step=step, groups=range(4), plan=Record(split_groups=split)) for step, split in enumerate(SPLITS)]
    monkeypatch.setattr(loop, "iterate_steps", lambda *_, **__: iter(steps))
    given = {"is_main": True, "step": "auto", "loss_needs": False, "experts_need": False} | options
    data = Record(groups_per_step=4, row_tokens=3072, shuffle=False, first_step=0)
    run: Any = Record(
        ranks=Record(is_main=given["is_main"]),
        shape=None,
        setup=Record(train=None, objective=Record(select=None, needs_whole_batch=given["loss_needs"])),
        config=Record(
            seed=0, data=data, loss=Record(step=given["step"]), experts=Record(needs_whole_batch=given["experts_need"])
        ),
    )
    assert list(loop.batches(run, range(3))) == steps
    return capsys.readouterr().out.splitlines()


def test_a_run_says_once_that_split_groups_take_another_pass(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    [note] = notes(monkeypatch, capsys)
    assert note.startswith("step 2: 2 of its 4 groups are longer than data.row_tokens = 3,072.")


@pytest.mark.parametrize("option", [{"is_main": False}, {"step": "two_phase"}, {"loss_needs": True}, {"experts_need": True}])
def test_no_note_on_other_ranks_and_where_all_steps_take_it(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert notes(monkeypatch, capsys, **option) == []
