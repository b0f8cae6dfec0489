"""The comparison: two methods at tiny size from data to figure, then again with nothing left to do."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.compare import run as compare
from examples.compare.measure import compute_ranking_accuracy
from examples.compare.report import build_comparison
from examples.compare.run import Method, load_methods, parse_arguments, read_result
from mpo_megatron import cli
from mpo_megatron.losses import build_params, list_losses
from tests.distributed.launch import ROOT, run_ranks

METHODS = ("mpo", "simpo")  # a loss of log-ratios, and one without a reference


def run_compare(output: Path, *arguments: str) -> str:
    """The comparison, in this process; returns its output. Ranks are forked instead of started by `mpo train`."""

    def mpo(command: str, **options: object) -> None:
        assert cli.main([command, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0

    def start(command: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
        assert command[:6] == [sys.executable, "-m", "mpo_megatron.cli", "train", "--nproc", "1"]
        return run_ranks(1, "mpo_megatron.train", command[6:])

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "130")
        patch.setattr(compare, "mpo", mpo)
        patch.setattr(compare, "subprocess", SimpleNamespace(run=start, STDOUT=subprocess.STDOUT))
        assert compare.main(["--output", str(output), "--groups", "40", "--held-out", "8", *arguments]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and standard output of a comparison."""
    output = tmp_path_factory.mktemp("compare") / "out"
    return output, run_compare(output, "--methods", *METHODS, "--steps", "2")


@pytest.mark.slow
def test_table_numbers_and_picture(finished: tuple[Path, str]) -> None:
    output, printed = finished
    comparison = json.loads((output / "comparison.json").read_text())
    assert [method["name"] for method in comparison["methods"]] == list(METHODS)
    for method in comparison["methods"]:
        start, *_, last = method["curve"]
        assert [point["step"] for point in method["curve"]] == [0, 1, 2]
        # Before training policy and reference are the same model, whether or not the loss has a reference.
        assert (start["accuracy"], start["margin"], start["chosen"]) == (0.5, 0, 0)
        final = {name: value["mean"] for name, value in method["final"].items()}
        assert final["accuracy"] == last["accuracy"]
        assert 0 <= final["accuracy"] <= 1
        assert final["margin"] == pytest.approx(final["chosen"] - final["rejected"])
        assert abs(final["chosen"]) > 0
        assert final["seconds_per_step"] > 0
        accuracy = f"{100 * final['accuracy']:.1f} ± {100 * method['accuracy_error']:.1f} %"
        (row,) = [line for line in printed.splitlines() if line.startswith(f"│ {method['name']} ")]
        assert accuracy in row
    assert "nothing tuned per" in printed
    assert (output / "comparison.png").stat().st_size > 10_000


@pytest.mark.slow
def test_reference_is_computed_once(finished: tuple[Path, str]) -> None:
    (cache,) = (finished[0] / "data" / "groups" / "reference").iterdir()
    parts = list(cache.iterdir())
    newest_part = max(path.stat().st_mtime for path in parts)
    first_run = finished[0] / "runs" / METHODS[0] / "seed_0" / "metrics.jsonl"
    assert newest_part <= first_run.stat().st_mtime


@pytest.mark.slow
def test_finished_runs_are_skipped(finished: tuple[Path, str]) -> None:
    output, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    numbers = json.loads((output / "comparison.json").read_text())["methods"]
    printed = run_compare(output, "--methods", *METHODS, "--steps", "2")
    assert printed.count("already finished") == len(METHODS)
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == before
    assert json.loads((output / "comparison.json").read_text())["methods"] == numbers


@pytest.mark.slow
def test_other_data_in_the_same_folder_is_refused(finished: tuple[Path, str]) -> None:
    with pytest.raises(SystemExit, match="choose another --output"):
        compare.main(["--output", str(finished[0]), "--groups", "41"])


@pytest.mark.parametrize("method", load_methods().values(), ids=lambda method: method.name)
def test_methods_are_valid(method: Method) -> None:
    build_params(method.loss, method.params)
    assert method.reason
    # One β for all losses of log-ratios, as the comparison claims.
    if "beta" in build_params(method.loss, {}).__dataclass_fields__ and method.loss not in ("simpo", "mpo_reference_free"):
        assert method.params["beta"] == 0.1


def test_guide_lists_every_loss() -> None:
    guide = (ROOT / "docs" / "reference" / "methods.md").read_text(encoding="utf-8")
    listed = [
        line.split("`")[1]
        for line in guide.partition("## All methods")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    ]
    assert sorted(listed[1:]) == [loss.name for loss in list_losses()]


def test_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["mpo"], ["--methods", "mpoo"])
    assert "mpoo" in capsys.readouterr().err


def test_changed_settings_discard_a_run(tmp_path: Path) -> None:
    run = tmp_path / "seed_0"
    run.mkdir()
    (run / "settings.json").write_text('{"steps": 2}')
    assert read_result(run, {"steps": 2}) is None  # interrupted: kept, and resumed
    assert run.is_dir()
    (run / "result.json").write_text('{"curve": []}')
    assert read_result(run, {"steps": 2}) == {"curve": []}
    assert read_result(run, {"steps": 3}) is None
    assert not run.exists()


def test_ranking_accuracy_counts_pairs_of_different_reward() -> None:
    # Rewards 1, 0.5, 0.5, 0: five pairs. Values 3, 1, 2, 2 order (0,1) (0,2) (0,3) right, (1,3) wrong, (2,3) is a tie.
    assert compute_ranking_accuracy([[3.0, 1.0, 2.0, 2.0]], [[1.0, 0.5, 0.5, 0.0]]) == pytest.approx(3.5 / 5)


def test_mean_and_spread_over_seeds() -> None:
    def result(accuracy: float) -> dict[str, object]:
        point = dict.fromkeys(("ranking_accuracy", "plain_accuracy", "margin", "chosen", "rejected", "kl"), 0.0)
        curve = [{"step": 2, "accuracy": accuracy, "accuracy_error": 0.1, **point}]
        return {
            "curve": curve,
            "seconds_per_step": 1.0,
            **dict.fromkeys(("training_seconds", "tokens_per_step", "backward_share"), 1.0),
        }

    (method,) = build_comparison([load_methods()["mpo"]], {"mpo": {0: result(0.6), 1: result(0.8)}}, steps=2)["methods"]
    assert method["final"]["accuracy"] == {"mean": pytest.approx(0.7), "spread": pytest.approx(0.1 * 2**0.5)}
    assert method["accuracy_error"] == pytest.approx(0.1)
    assert method["curve"][0]["accuracy"] == pytest.approx(0.7)
