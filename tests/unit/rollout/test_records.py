"""Lines on disk: only whole ones, in a fixed order, and a summary that marks them complete."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import DamagedError, list_files, seal_line
from mpo_megatron.rollout.records import (
    IndexedLines,
    LineWriter,
    check_started,
    find_lines,
    is_reward,
    join_lines,
    read_answered,
    read_ids,
    read_lines,
    read_summary,
    write_summary,
)
from mpo_megatron.rollout.shards import choose_shard


@pytest.mark.parametrize("rest", [b"", b'{"group_id": "c"', b"x" * 200_000])
def test_an_incomplete_line_is_dropped(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    with LineWriter(path) as lines:
        lines.write({"group_id": "a"})
        lines.write({"group_id": "b", "text": "ü\u2028\n"})
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert [record["group_id"] for record in read_lines(path)] == ["a", "b"]
    with LineWriter(path) as lines:
        lines.write({"group_id": "d"})
    assert path.read_bytes() == whole + seal_line({"group_id": "d"})
    assert read_ids(path) == {"a", "b", "d"}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"group_id": "a"}\n{"group_id": \n{"group_id": "c"}\n')
    with pytest.raises(DataError, match=r"lines\.jsonl:2: is not valid JSON"):
        list(read_lines(path))
    for line, found in ((b'{"id": "a"}\n', "no group_id"), (b'{"group_id": 3}\n', "group_id = 3")):
        path.write_bytes(line)
        with pytest.raises(DataError, match=rf'lines\.jsonl:1: .* it has {found}; give each group .*"group_id": "1", "prompt"'):
            list(read_lines(path))


def test_lines_that_changed_are_refused(tmp_path: Path) -> None:
    """A single line in a growing file, and the whole file once a summary lists it."""
    path = tmp_path / "samples.jsonl"
    with LineWriter(path) as lines:
        lines.write({"group_id": "a", "text": "one"})
        lines.write({"group_id": "b", "text": "two"})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"two", b"twp"))
    with pytest.raises(
        DataError, match=r"samples\.jsonl:2: damaged or changed: .* remove its field xxh3; remove the line, and run"
    ):
        list(read_lines(path))
    path.write_bytes(whole)
    write_summary(tmp_path / "generate.json", {"files": list_files(tmp_path, ["samples.jsonl"])})
    assert len(list(read_lines(path))) == 2
    path.write_bytes(whole.splitlines(keepends=True)[0])
    with pytest.raises(DamagedError, match=r"samples\.jsonl: damaged: has .* bytes, .* rename the file"):
        list(read_lines(path))
    path.rename(tmp_path / "mine.jsonl")
    assert len(list(read_lines(tmp_path / "mine.jsonl"))) == 1
    (tmp_path / "generate.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"generate\.json: damaged, or written by an earlier version"):
        read_summary(tmp_path / "generate.json")


def test_lines_are_joined_in_order_once_each(tmp_path: Path) -> None:
    for name, ids in (("one", "db"), ("two", "abe")):
        with LineWriter(tmp_path / name) as lines:
            for group_id in ids:
                lines.write({"group_id": group_id, "from": name})
    assert join_lines([tmp_path / "one", tmp_path / "two"], tmp_path / "one", "abcd") == 3
    assert [(record["group_id"], record["from"]) for record in read_lines(tmp_path / "one")] == [
        ("a", "two"),
        ("b", "one"),
        ("d", "one"),
    ]


def test_lines_are_found_by_id(tmp_path: Path) -> None:
    path = tmp_path / "failures.jsonl"
    with LineWriter(path) as lines:
        for number, group_id in enumerate("aba"):
            lines.write({"group_id": group_id, "number": number})
        found = IndexedLines(path)
        lines.write({"group_id": "c", "number": 3})  # written later, so unknown
    assert [found.get(group_id) for group_id in "abc"] == [{"group_id": "a", "number": 2}, {"group_id": "b", "number": 1}, None]
    found.close()
    path.write_bytes(path.read_bytes().replace(b"1", b"7"))
    with pytest.raises(DataError, match=r"failures\.jsonl:2: damaged or changed"):
        IndexedLines(path)


def test_an_unfinished_stage_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no samples\.jsonl"):
        find_lines(tmp_path, "samples.jsonl", "generate.json")
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(DataError, match=r"not complete: generate\.json is missing"):
        find_lines(tmp_path, "samples.jsonl", "generate.json")
    write_summary(tmp_path / "generate.json", {})
    assert find_lines(tmp_path, "samples.jsonl", "generate.json") == tmp_path / "samples.jsonl"


def test_lines_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(ConfigError, match="of unknown origin"):
        check_started(tmp_path, "started.json", {"a": 1}, "samples*.jsonl")


def test_shards_that_start_at_once_do_not_refuse_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another shard writes its note and its first line while this one looks for a note."""
    look = Path.glob

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        monkeypatch.undo()
        check_started(folder, "started.json", {"a": 1}, pattern)
        LineWriter(folder / "samples-00001-of-00002.jsonl").close()
        return look(folder, pattern)

    monkeypatch.setattr(Path, "glob", glob)
    check_started(tmp_path, "started.json", {"a": 1}, "samples*.jsonl")
    with pytest.raises(ConfigError, match="made with another a"):
        check_started(tmp_path, "started.json", {"a": 2}, "samples*.jsonl")


def test_two_may_replace_a_file_at_once(tmp_path: Path) -> None:
    """Shards in containers on two machines may have the same process id."""

    def chunks() -> Iterator[bytes]:
        yield b"first "
        replace_file(tmp_path / "file", [b"second"])
        yield b"whole"

    replace_file(tmp_path / "file", chunks())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first whole"


def test_tasks_of_an_array_with_gaps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sbatch --array=1,3,7`: no variable tells which of three parts task 7 is."""
    for name, value in {"ID": "7", "MIN": "1", "STEP": "1", "COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(ConfigError, match=r"Slurm array .*--shard"):
        choose_shard(None)
    assert choose_shard("2/3") == (2, 3)


@pytest.mark.parametrize(
    ("responses", "place"),
    [
        (None, 'it needs a list "responses"'),
        ("abc", 'it needs a list "responses"'),
        ([None], r"responses\[0\] does not have the form of a response"),
        ([{"text": "a"}, {"text": 7}], r"responses\[1\]\.text does not have the form"),
        ([{"text": "a", "num_tokens": "3"}], r"responses\[0\]\.num_tokens does not have the form"),
        ([{"text": "a", "num_tokens": 10**400}], r"responses\[0\]\.num_tokens does not have the form"),
        ([{"text": "a", "reward": -1e308}], r"responses\[0\]\.reward is -1e\+308; a reward must be within ±1e\+30"),
        ([{"text": "a", "reward": 10**400}], r"responses\[0\]\.reward is 10\^400 or so; a reward must be within"),
    ],
)
def test_responses_of_another_form_are_named(responses: Any, place: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(seal_line({"group_id": "g", "responses": responses}))
    with pytest.raises(DataError, match=rf"lines\.jsonl:1: group g: {place}.*; fix the line\.$"):
        list(read_answered(path))


def test_a_line_nested_without_end_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"[" * 100_000)
    assert list(read_lines(path)) == []  # a stage that continues drops an incomplete last line
    with pytest.raises(DataError, match=r"lines\.jsonl:1: the last line is incomplete"):
        list(read_answered(path))
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(DataError, match=r"lines\.jsonl:1: damaged or changed: nested too deeply"):
        list(read_answered(path))


def test_half_a_surrogate_pair_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """It ended in a UnicodeEncodeError where the line was written again."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"group_id": "a", "prompt": "\\ud83d\\ude00", "responses": []}\n')
    assert next(read_lines(path))["prompt"] == "\U0001f600"
    path.write_text(path.read_text() + '{"group_id": "b", "prompt": "\\ud83d", "responses": []}\n')
    with pytest.raises(DataError, match=r"lines\.jsonl:2: damaged or changed: .*surrogates not allowed; remove the line"):
        list(read_lines(path))


@pytest.mark.parametrize(("value", "usable"), [(10**400, False), (1e31, False), (float("nan"), False), (True, False), (3, True)])
def test_rewards_are_finite_numbers_of_bounded_size(value: object, usable: bool) -> None:
    assert is_reward(value) == usable
