"""The report's statements about runs with known numbers; tests/integration has the page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mpo_megatron.config import ConfigError, ReportConfig
from mpo_megatron.data.outcomes import GroupOutcome, write_outcomes
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files.digests import seal_lines
from mpo_megatron.report.content import content, differences, incident, run_names
from mpo_megatron.report.curves import thin
from mpo_megatron.report.health import findings
from mpo_megatron.report.held_out import Limits, bin_edges, choose, cut, histogram, score, spread
from mpo_megatron.report.report import report, script_json
from mpo_megatron.report.run_record import evenly, read_run
from tests.run_folder import HOSTILE, write_data, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedGroups:
    return write_data(tmp_path_factory.mktemp("prepared") / "groups")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: PreparedGroups) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "first", data)


def titles(folder: Path) -> dict[str, str]:
    return {finding.title: finding.level for finding in findings(read_run(folder))}


def edit_lines(folder: Path, change: Any) -> None:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["xxh3"]
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def embedded(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_a_run_is_read_whole(run: Path, data: PreparedGroups) -> None:
    record = read_run(run)
    assert (record.step, record.total_steps, record.status) == (40, 40, "finished")
    assert [line["step"] for line in record.held_out] == [0, 10, 20, 30, 40]
    assert list(record.outcomes) == [0, 10, 20, 30, 40]
    assert record.held_out_data is not None
    steps, values = record.values("margin", held_out=True)
    assert (steps[-1], values[-1]) == (40, 5.0)


def test_a_run_that_goes_on_and_half_a_line(tmp_path: Path, data: PreparedGroups) -> None:
    folder = write_run(tmp_path / "run", data, steps=15)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    record = read_run(folder)
    assert (record.step, record.status) == (15, "running")
    record = read_run(folder)
    assert "The run has stalled" not in titles(folder)
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert read_run(folder).status == "stopped"
    assert titles(folder)["The run has stalled"] == "warn"


def test_a_step_that_was_evaluated_twice_counts_once(tmp_path: Path, data: PreparedGroups) -> None:
    folder = write_run(tmp_path / "run", data)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "eval/loss": 0.125}\n')
    assert read_run(folder).values("loss", held_out=True)[1][-1] == 0.125


def test_no_held_out_data_and_nothing_but_metrics(tmp_path: Path, data: PreparedGroups) -> None:
    without = write_run(tmp_path / "without", data, held_out=False)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    folders = [str(without), str(bare), str(tmp_path / "empty")]
    report(ReportConfig(runs=folders, output=str(tmp_path / "page.html")))
    shown = embedded(tmp_path / "page.html")
    assert [run["groups"] for run in shown["runs"]] == [[], [], []]
    assert [run["step"] for run in shown["runs"]] == [40, 2, 0]
    assert titles(bare)["The loss was not finite"] == "bad"


def test_data_that_is_gone_or_changed_leaves_a_report_without_texts_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = write_data(tmp_path / "groups")
    folder = write_run(tmp_path / "run", moved)
    shutil.rmtree(tmp_path / "groups")
    [shown] = content([read_run(folder)], Limits(10, 16, 100))["runs"]
    assert shown["groups"][0]["prompt"] is None
    assert titles(folder)["Data is missing from this page"] == "warn"
    assert read_run(folder).missing == tuple(
        f"data.{name} = {tmp_path / 'groups'}: no prepared groups there" for name in ("train", "eval")
    )
    report(ReportConfig(runs=[str(folder)], output=str(tmp_path / "page.html")))
    said = capsys.readouterr().err
    assert said.startswith(f"{folder}: data.train = {tmp_path / 'groups'}: no prepared groups there; data.eval = ")
    assert f"write the new path to {folder / 'config.yaml'}" in said
    write_data(tmp_path / "groups", num_groups=20, seed=1)
    record = read_run(folder)
    assert record.held_out_data is None
    assert record.missing[1] == f"data.eval = {tmp_path / 'groups'}: these groups differ from those that the run used"


@pytest.mark.parametrize(
    ("name", "place", "why"),
    [
        ("prepare.json", 0.5, "damaged"),
        ("groups.pieces", 0.5, "damaged or missing"),
        ("groups.arrow", 0.3, "damaged: bytes "),
        ("groups.arrow", None, " bytes, but prepare.json lists "),
        ("groups.arrow", "answer 0 to question 5", "damaged: bytes "),  # among the texts, which are read last
    ],
)
def test_damaged_data_is_named_on_the_page_and_on_the_terminal(
    tmp_path: Path, name: str, place: float | str | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", write_data(tmp_path / "groups"))
    path = tmp_path / "groups" / name
    changed = bytearray(path.read_bytes())
    if place is None:
        del changed[-1:]
    else:
        at = changed.index(place.encode()) if isinstance(place, str) else int(place * len(changed))
        changed[at] ^= 1
    path.write_bytes(changed)
    report(ReportConfig(runs=[str(folder)], output=str(tmp_path / "page.html")))
    [said] = capsys.readouterr().err.splitlines()
    assert f"data.eval: {tmp_path / 'groups' / name}:" in said
    assert why in said
    assert "no prepared groups there" not in said
    [finding] = [
        found for found in embedded(tmp_path / "page.html")["runs"][0]["findings"] if found["title"].startswith("Data is")
    ]
    assert finding["text"] in said


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 1e400}', '{"step": -1}', '{"step": null, "eval/loss": 1}'],
)
def test_lines_that_are_no_metrics_are_named(tmp_path: Path, line: str) -> None:
    folder = write_run(tmp_path / "run", write_data(tmp_path / "groups"))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": {"a": [1]}, "seconds": "x", "accuracy": NaN}\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2: not a line of a run's metrics"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": {"a": [1]}, "seconds": "x", "accuracy": NaN}\n')
    report(ReportConfig(runs=[str(folder)], output=str(tmp_path / "page.html")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, r"data = null; it must hold options"),
        ({"data": {"train": 0}}, r"data\.train = 0; it must be a path"),
        ({"data": {"groups_per_step": "many"}}, r"data\.groups_per_step = many; it must be a whole number"),
        ({"max_steps": [1]}, r"max_steps = \[1\]; it must be a whole number"),
    ],
)
def test_options_that_a_user_changed_are_named(
    tmp_path: Path, data: PreparedGroups, change: dict[str, Any], message: str
) -> None:
    folder = write_run(tmp_path / "run", data)
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()) | change))
    with pytest.raises(ConfigError, match=rf"config\.yaml: {message}"):
        read_run(folder)


@pytest.mark.parametrize("recorded", ["absolute", "relative"])
def test_a_run_is_the_same_from_elsewhere_and_after_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    """Runs of older versions recorded paths as given."""
    home = tmp_path / "home"
    home.mkdir()
    folder = write_run(home / "run", write_data(home / "groups"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    start = str(home) + "/" if recorded == "absolute" else ""
    config |= {"output": start + "run", "data": {"train": start + "groups", "eval": start + "groups"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(home)
    expected = content([read_run(Path("run"))], Limits(10, 16, 100))["runs"][0]["groups"]
    assert expected[0]["prompt"] is not None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert content([read_run(Path("../home/run"))], Limits(10, 16, 100))["runs"][0]["groups"] == expected
    home.rename(tmp_path / "moved")
    record = read_run(Path("../moved/run"))
    assert record.missing == ()
    assert content([record], Limits(10, 16, 100))["runs"][0]["groups"] == expected


def test_a_run_that_went_on_with_other_held_out_groups(tmp_path: Path, data: PreparedGroups) -> None:
    folder = write_run(tmp_path / "run", data)
    old = GroupOutcome(index=99, group_id="old", policy_logps=(0.0,), reference_logps=(0.0,), sets=(1,))
    write_outcomes(folder, 5, [old], "another digest")
    assert list(read_run(folder).outcomes) == [0, 10, 20, 30, 40]


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        report(ReportConfig(runs=[str(tmp_path)], output=str(tmp_path / "page.html")))
    with pytest.raises(ConfigError, match="is a folder"):
        report(ReportConfig(runs=[str(tmp_path)], output=str(tmp_path)))
    with pytest.raises(ConfigError, match="runs is empty"):
        ReportConfig(runs=[])


def test_groups_come_worst_first_with_how_their_log_probs_moved(run: Path) -> None:
    [shown] = content([read_run(run)], Limits(100, 16, 1000))["runs"]
    margins = [group["margin"] for group in shown["groups"]]
    assert margins == sorted(margins)
    assert margins[0] < 0 < margins[-1]
    by_id = {group["id"]: group for group in shown["groups"]}
    # Group 5 has 4 responses which moved by 1, 0, −1 and −2: margin 1 − mean(0, −1, −2) = 2.
    group = by_id["group-05"]
    assert (group["margin"], group["began"], group["accuracy"]) == (2.0, 0.0, 1.0)
    assert [response["ratios"][-1] for response in group["responses"]] == [1.0, 0.0, -1.0, -2.0]
    assert group["responses"][3]["ratios"] == [0.0, -0.5, -1.0, -1.5, -2.0]
    assert by_id["group-03"]["responses"][1]["text"] == HOSTILE


def test_margin_and_accuracy_by_hand() -> None:
    def outcome(policy: tuple[float | None, ...], sets: tuple[int, ...]) -> GroupOutcome:
        return GroupOutcome(index=0, group_id="g", policy_logps=policy, reference_logps=(0.0,) * len(sets), sets=sets)

    result = score(outcome((2.0, -1.0, 1.0, -1.0), (1, 1, 0, 0)))
    assert (result.margin, result.accuracy) == (0.5, (1 + 1 + 0 + 0.5) / 4)
    assert score(outcome((2.0, None), (1, 0))).margin is None
    assert score(outcome((2.0, 1.0, 5.0), (1, 0, -1))).margin == 1.0


def test_the_worst_groups_are_always_there() -> None:
    chosen = choose(list(range(1000)), 100)
    assert chosen[:50] == list(range(50))
    assert len(chosen) == 100
    assert chosen[-1] == 999
    assert choose([1, 2, 3], 100) == [1, 2, 3]


def test_of_many_responses_the_page_holds_some_of_all_rewards(run: Path) -> None:
    assert (spread([*range(64)], 4), spread([1, 2], 4)) == ([0, 21, 42, 63], [1, 2])
    record = read_run(run)
    [whole], [few] = (content([record], Limits(100, most, 1000))["runs"] for most in (16, 2))
    for every, some in zip(whole["groups"], few["groups"], strict=True):
        rewards = [response["reward"] for response in every["responses"]]
        assert [response["reward"] for response in some["responses"] if response in every["responses"]] in (
            [max(rewards), min(rewards)],
            [min(rewards), max(rewards)],
        )
        assert every["k"] == some["k"] == len(rewards)
    assert any(group["k"] > 2 for group in whole["groups"])
    lines = [{"text": str(k), "reward": float(k % 8)} for k in range(8)]
    assert [response["text"] for response in incident({"responses": lines}, Limits(1, 3, 9))["responses"]] == ["0", "3", "7"]


def test_long_texts_are_cut_with_a_word() -> None:
    assert cut("abcdef", 4) == "abcd … [2 more characters]"
    assert cut("abcd", 4) == "abcd"


def test_histograms_count_everything() -> None:
    values = np.array([-5.0, 0.0, 0.1, 0.5, 1.0, 7.0])
    assert histogram(values, np.array([0.0, 0.5, 1.0])) == [3, 3]
    few = bin_edges(np.array([0.0, 1.0, 1.0, 3.0]))
    assert histogram(np.array([0.0, 1.0, 1.0, 3.0]), few) == [1, 2, 1]
    many = np.random.default_rng(0).lognormal(size=5000)
    assert sum(histogram(many, bin_edges(many))) == 5000


def test_many_evaluations_are_read_in_part() -> None:
    steps = list(range(0, 1000, 10))
    chosen = evenly(steps, 16)
    assert (len(chosen), chosen[0], chosen[-1]) == (16, 0, 990)
    assert chosen == sorted(set(chosen) & set(steps))
    assert evenly([3, 5], 16) == [3, 5]


def test_thinned_curves_keep_ends_and_spikes() -> None:
    values = [1.0] * 10_000
    values[4321] = 99.0
    values[7000] = -99.0
    steps, kept = thin(range(10_000), values, most=200)
    assert len(steps) <= 200
    assert (steps[0], steps[-1]) == (0, 9999)
    assert dict(zip(steps, kept, strict=True))[4321] == 99.0
    assert min(kept) == -99.0
    assert thin([1, 2], [0.1, 0.2]) == ([1, 2], [0.1, 0.2])


def test_healthy_runs_and_sick_ones_are_told_apart(tmp_path: Path, data: PreparedGroups, run: Path) -> None:
    well = titles(run)
    assert well["Held-out loss fell"] == well["Preferences learned"] == well["Preferred responses got more likely"] == "good"
    assert well["Gradient norm has spikes"] == "note"
    assert well.pop("Held-out prompts were trained on") == "warn"  # one folder for both
    assert not {"warn", "bad"} & set(well.values())
    sick = write_run(tmp_path / "sick", data, chosen=-3.0)

    def spoil(line: dict[str, Any]) -> None:
        if "eval/loss" in line:
            line["eval/loss"] = {0: 0.7, 10: 0.3}.get(line["step"], 0.6)
            line["eval/accuracy"] = 0.51
        else:
            line |= {"skipped_groups": 4, "data_wait": 0.2, "step_seconds_max_over_mean": 1.4}
            line["tokens_per_second"] = 100.0 if line["step"] > 35 else 1000.0

    edit_lines(sick, spoil)
    (sick / "incidents").mkdir()
    incident = {
        "step": 7,
        "wrong": "loss 99 is far above the last",
        "grad_norm": 31.0,
        "group_id": "g",
        "loss": "inf",
        "prompt": "p",
    }
    response = {"text": HOSTILE, "num_tokens": 3, "reward": 1.0, "logp": -1.0, "reference_logp": -2.0}
    lines = seal_lines([{**incident, "responses": [response]}])
    (sick / "incidents" / "step_00000007.jsonl").write_bytes(b"".join(lines))
    (sick / "incidents" / "hang_step_9_rank_00001.txt").write_text("stacks")
    ill = titles(sick)
    assert ill["Ranks hung"] == "bad"
    for title in (
        *(
            "1 step looked suspicious",
            "Held-out loss rises again",
            "Preferences hardly learned",
            "Preferred responses got less likely",
        ),
        *("Throughput dropped", "Ranks wait for a slow one", "Steps wait for data"),
    ):
        assert ill[title] == "warn", title
    assert ill["Many groups without contrast"] == "note"
    assert next(iter(ill.values())) == "bad"  # the worst comes first


@pytest.mark.parametrize(
    ("chosen", "title"), [(-0.001, "as before"), (-0.9, "as before"), (-1.2, "even less"), (-2.5, "less likely")]
)
def test_displacement_counts_from_one_nat(tmp_path: Path, data: PreparedGroups, chosen: float, title: str) -> None:
    run = write_run(tmp_path / "run", data, chosen=chosen)
    (found,) = [finding for finding in findings(read_run(run)) if finding.title.startswith("Preferred responses")]
    assert found.title.endswith(title)
    assert found.level == ("warn" if chosen < -2 else "note")  # the others' is −2
    assert "below −1" in found.text


def test_runs_side_by_side(tmp_path: Path, data: PreparedGroups, run: Path) -> None:
    other = write_run(tmp_path / "runs" / "first", data, beta=0.5)
    shown = content([read_run(run), read_run(other)], Limits(5, 16, 100))
    names = [item["name"] for item in shown["runs"]]
    assert len(set(names)) == 2
    assert all(name.endswith("/first") for name in names)
    assert {row["option"]: row["values"] for row in shown["differences"]} == {"loss.params.beta": ["0.1", "0.5"]}
    assert differences([{"a": 1}, {"a": 1}]) == []
    assert run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert run_names([Path("/x/a"), Path("/x/a")]) == ["/x/a (1)", "/x/a (2)"]


def test_the_page_holds_everything_and_texts_stay_texts(tmp_path: Path, run: Path) -> None:
    page = tmp_path / "deep" / "page.html"
    report(ReportConfig(runs=[str(run)], output=str(page), png=str(tmp_path / "pictures")))
    text = page.read_text()
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="(?!data:)', text)
    assert HOSTILE.split()[0] not in text
    groups = {group["id"]: group for group in embedded(page)["runs"][0]["groups"]}
    assert groups["group-03"]["responses"][1]["text"] == HOSTILE
    for name in ("curves.png", "distributions.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_taken_no_step_has_a_page_and_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()  # is there from the start
    report(ReportConfig(runs=[str(tmp_path / "run")], output=str(tmp_path / "page.html"), png=str(tmp_path / "pictures")))
    assert embedded(tmp_path / "page.html")["runs"][0]["curves"] == {}
    assert not any((tmp_path / "pictures").iterdir())


def test_json_in_a_page_cannot_leave_its_element() -> None:
    text = script_json({"a": "</script><!-- <script> & >"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!-- <script> & >"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))
