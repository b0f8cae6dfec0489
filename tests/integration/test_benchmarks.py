"""Every benchmark runs at its smallest size and writes well-formed results; nothing here depends on time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import timing
from benchmarks.breakdown import kind_of
from tests.distributed.launch import ROOT, run_ranks

PARTS = ("__init__", "fp8_emulation", "hand_loops", "hand_sides", "setup", "timing")
"""Helper modules of the benchmarks."""
COMPARED = ("published",)
"""It measures nothing itself, but compares with published measurements: tests/unit/plan/test_published.py."""
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in PARTS + COMPARED)
NUM_RANKS = {"plan": 2}
"""Where it is not one."""
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


def check(content: dict[str, Any]) -> None:
    assert content["machine"]["date"].count("-") == 2
    assert content["machine"]["versions"]["torch"]
    assert content["machine"]["clock"]
    assert content["rows"]
    assert content["table"]
    assert content["note"]
    assert len({tuple(row) for row in content["table"]}) == 1  # the same columns in every row
    check_numbers(content["rows"])


def check_numbers(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            check_numbers(item)
        if "median" in value:
            assert value["min"] <= value["median"] <= value["max"]
            assert len(value["all"]) >= 1
    elif isinstance(value, list):
        for item in value:
            check_numbers(item)
    elif isinstance(value, float):
        assert math.isfinite(value)


def test_kernels_count_for_the_outermost_operation_with_a_mark_or_for_their_name() -> None:
    def operation(name: str, parent: Any = None) -> Any:
        return SimpleNamespace(name=name, cpu_parent=parent)

    head = operation("_VocabParallelStatisticsBackward")
    assert kind_of(operation("aten::mm", head), "nvjet_sm90_tst_128x256") == "log-probs"
    layer = operation("_LayerNormLinear")  # Transformer Engine's: a norm and a product in one operation
    assert kind_of(layer, "nvjet_sm90_tst_128x256") == "GEMM"
    assert kind_of(layer, "rmsnorm_fwd_tuned_kernel") == "the rest"
    assert kind_of(operation("FusedAttnFuncBackward"), "cudnn_generated_sdpa") == "attention"
    assert kind_of(operation("aten::add_", operation("optimizer step")), "multi_tensor_apply_kernel") == "optimizer"


def measure_until(end: BaseException) -> Callable[[int], timing.Row]:
    """A benchmark that is interrupted in its third case."""

    def measure(case: int) -> timing.Row:
        if case == 2:
            raise end
        return {"case": case}

    return measure


@pytest.fixture
def options(tmp_path: Path) -> Any:
    return timing.build_parser("", ["tiny"]).parse_args(["--size", "tiny", "--output", str(tmp_path / "out")])


def test_what_was_measured_before_a_kill_is_on_disk(options: Any) -> None:
    with pytest.raises(SystemExit):  # like a kill, without time to write
        timing.measure_each("name", options, [0, 1, 2, 3], measure_until(SystemExit()))
    content = json.loads((options.output / "name.json").read_text())
    assert content["rows"] == [{"case": 0}, {"case": 1}]
    assert content["complete"] is False
    assert [path.name for path in options.output.iterdir()] == ["name.json"]


def test_what_was_measured_before_an_interruption_is_reported(options: Any) -> None:
    rows = timing.measure_each("name", options, [0, 1, 2, 3], measure_until(KeyboardInterrupt()))
    assert rows == [{"case": 0}, {"case": 1}]
    content = json.loads(timing.report("name", options, {}, rows, rows, "note").read_text())
    assert (content["complete"], content["table"]) == (False, rows)
    with pytest.raises(KeyboardInterrupt):
        timing.measure_each("name", options, [2], measure_until(KeyboardInterrupt()))


def test_the_gpu_check_names_every_gpu_test() -> None:
    named = re.findall(r"test_gpu_{(.*?)}\.py", (ROOT / "tools" / "gpu_check.sh").read_text())
    assert {f"test_gpu_{name}" for names in named for name in names.split(",")} == {
        path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_runs_at_its_smallest_size(name: str, tmp_path: Path) -> None:
    if name == "trl":
        pytest.importorskip("trl")
    result = run_ranks(
        NUM_RANKS.get(name, 1), f"benchmarks.{name}", ["--size", "tiny", "--repeat", "1", "--output", str(tmp_path)]
    )
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["benchmark"] == name
    assert content["complete"] is True
    check(content)
    assert next(iter(content["table"][0])) in result.stdout


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_kept_results_are_well_formed(path: Path) -> None:
    check(json.loads(path.read_text()))
