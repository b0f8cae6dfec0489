"""Loss, gradients and three steps equal those of plain `transformers` and torch's AdamW: the core of `python -m tools.parity`."""

from __future__ import annotations

import pytest

from tests.distributed.parity import Result, World, run_cases
from tests.distributed.parity_cases import CASES, TOLERANCE, Case

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_core_layouts(world: World, ranks: int) -> None:
    cases = [case for case in CASES if case.core and case.ranks == ranks]
    results = run_cases(world, cases, "core")
    assert len(results) >= 5
    for result in results:
        assert result.passed, describe(result)
        assert (result.report["split"] > 0) == (result.case.row_tokens < 256), describe(result)


def describe(result: Result) -> str:
    return (
        f"{result.case} on {result.case.ranks} ranks: the loss is off by {result.loss:.1e}, the norm by {result.norm:.1e}, the "
        f"gradient of {result.gradient_name} by {result.gradients:.1e}, after three steps {result.weight_name} by "
        f"{result.weights:.1e}; the tolerance is {result.gradient_tolerance:.1e} and {result.weight_tolerance:.1e}"
    )


def test_every_weight_moves_far_beyond_the_tolerance(world: World) -> None:
    """A missed, doubled or wrongly clipped step shows in every tensor; the clipping norm depends on all of them."""
    truth = world.truth(Case(model="qwen3"))
    assert truth.norm > 1.1
    for name, before in truth.before.items():
        change = (truth.after[name] - before).abs().max() / before.abs().max()
        assert change > 50 * TOLERANCE, name


def test_the_list_has_every_form_of_parallelism() -> None:
    assert len(CASES) >= 30
    assert {case.ranks for case in CASES} == {1, 2, 4, 8}
    assert len({(case.ranks, str(case)) for case in CASES}) == len(CASES)
