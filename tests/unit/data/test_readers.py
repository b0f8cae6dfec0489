from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_megatron.data.group import Group
from mpo_megatron.data.raw_rows import Rejection
from mpo_megatron.data.readers import read_groups
from mpo_megatron.files import DataError
from tests.unit.data.conftest import Writer

ROWS = [
    {"prompt": f"Q{index}", "responses": [{"text": "A", "reward": float(index)}, {"text": "B", "reward": -1.0}]}
    for index in range(5)
]


def groups_of(source: Any, **options: Any) -> list[Group]:
    items = list(read_groups(str(source), **options).items)
    assert all(isinstance(item, Group) for item in items), items
    return items  # type: ignore[return-value]


def rejections_of(source: Any, **options: Any) -> list[Rejection]:
    return [item for item in read_groups(str(source), **options).items if isinstance(item, Rejection)]


def contents(groups: list[Group]) -> list[tuple[Any, ...]]:
    return [(group.prompt, group.responses, group.rewards) for group in groups]


def test_every_kind_of_file_gives_the_same_groups(tmp_path: Path, write_lines: Writer) -> None:
    datasets = pytest.importorskip("datasets")
    wanted = contents(groups_of(write_lines(*ROWS)))
    assert len(wanted) == 5
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select(range(2))).save_to_disk(tmp_path / "splits")
    for name in ("rows.json", "rows.parquet", "saved", "splits"):
        assert contents(groups_of(tmp_path / name)) == wanted, name
    assert contents(groups_of(tmp_path / "splits", split="test")) == wanted[:2]
    with pytest.raises(DataError, match=r"split = dev; .* has the splits train, test"):
        read_groups(str(tmp_path / "splits"), split="dev")
    # Rows taken out of order go through an indices mapping.
    dataset.select([3, 1]).save_to_disk(tmp_path / "picked")
    assert contents(groups_of(tmp_path / "picked")) == [wanted[3], wanted[1]]
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"saved: datasets cannot read it: .*No such file"):
        read_groups(str(tmp_path / "saved"))


def test_a_folder_of_files(tmp_path: Path, write_lines: Writer) -> None:
    (tmp_path / "plain").mkdir()
    write_lines(*ROWS[:2], name="plain/a.jsonl")
    write_lines(*ROWS[2:], name="plain/b.jsonl")
    assert [group.rewards[0] for group in groups_of(tmp_path / "plain")] == [0, 1, 2, 3, 4]
    (tmp_path / "split").mkdir()
    write_lines(*ROWS[:2], name="split/train-0.jsonl")
    write_lines(*ROWS[2:], name="split/test-0.jsonl")
    assert len(groups_of(tmp_path / "split")) == 2
    assert len(groups_of(tmp_path / "split", split="test")) == 3
    with pytest.raises(DataError, match=r"split = validation; .* holds test-0.jsonl, train-0.jsonl"):
        read_groups(str(tmp_path / "split"), split="validation")
    (tmp_path / "plain" / "c.json").write_text("[]")
    with pytest.raises(DataError, match="files of several kinds"):
        read_groups(str(tmp_path / "plain"))
    (tmp_path / "plain" / "prepare.json").touch()
    with pytest.raises(DataError, match=r"holds groups that are prepared already .*; train on them with `mpo train"):
        read_groups(str(tmp_path / "plain"))


def test_files_in_folders_below_are_not_left_out_silently(tmp_path: Path, write_lines: Writer) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    write_lines(*ROWS[:2], name="data/a.jsonl")
    (tmp_path / "data" / "more" / "notes.txt").touch()
    assert len(groups_of(tmp_path / "data")) == 2
    write_lines(*ROWS[2:], name="data/more/b.jsonl")
    with pytest.raises(
        DataError,
        match=r"more/b.jsonl is in a folder below, which is not read; .*'.*data/\*\*/\*.jsonl' for all, '.*data/\*.jsonl' w",
    ):
        read_groups(str(tmp_path / "data"))
    assert len(groups_of(tmp_path / "data" / "*.jsonl")) == 2
    assert len(groups_of(tmp_path / "data" / "**" / "*.jsonl")) == 5
    (tmp_path / "data" / "more" / "prepare.json").touch()  # written by `mpo prepare`
    assert len(groups_of(tmp_path / "data")) == 2


def test_the_pattern_for_folders_below_can_be_copied(tmp_path: Path, write_lines: Writer) -> None:
    (tmp_path / "[old]" / "more").mkdir(parents=True)
    for number in range(2):
        write_lines(*ROWS[number : number + 1], name=("[old]/a.jsonl", "[old]/more/b.jsonl")[number])
    with pytest.raises(DataError, match="is in a folder below") as refused:
        read_groups(str(tmp_path / "[old]"))
    everything, above = re.findall("'(.*?)'", str(refused.value))
    assert (len(groups_of(everything)), len(groups_of(above))) == (2, 1)


def test_decimals_of_arrow_are_numbers_everywhere(tmp_path: Path) -> None:
    """Databases write integers as decimals, too."""
    datasets = pytest.importorskip("datasets")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"most": Decimal("1.5")}}}
    row = {"id": Decimal(7), "prompt": "Q", "response_1": "A", "response_2": "B", "winner": Decimal("2.0"), "tools": [tool]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "saved"):
        (group,) = groups_of(tmp_path / name)
        assert (group.group_id, group.labels, group.tools[0]["function"]["parameters"]) == ("7", (0, 1), {"most": 1.5})


def test_a_dataset_folder_as_the_hub_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    groups = groups_of(tmp_path / "hub")
    assert [group.rewards[0] for group in groups] == [0, 1, 2, 3, 4]
    assert groups[4].where.endswith("hub[train]:5")
    with pytest.raises(DataError, match=r"split = test; datasets cannot load it"):
        read_groups(str(tmp_path / "hub"), split="test")


def test_a_hub_name_goes_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(groups_of("owner/name", split="test", subset="small", max_rows=3)) == 3
    assert asked == [(("owner/name", "small"), {"split": "test"})]  # nothing that would run a dataset's own code


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "/no/such/folder", "~/x", "groups"])
def test_a_missing_path_is_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=f"input = {source}; no such file or folder"):
        read_groups(source)


def test_bad_lines_are_rejected_with_file_and_line(write_lines: Writer, tmp_path: Path) -> None:
    path = write_lines(ROWS[0], "{not json", "", '{"prompt": "cut', "[1, 2]", '"text"', ROWS[1])
    with open(path, "ab") as file:
        file.write(b'{"prompt": "\xff"}\n' + b"[" * 100_000 + b"\n" + b'{"reward": ' + b"9" * 5000 + b"}\n")
        file.write(b'{"prompt": "Q", "responses": [{"text": "A", "reward": 1, "reward": 5}]}\n')
    items = list(read_groups(path).items)
    assert [item.where for item in items if isinstance(item, Group)] == [f"{path}:1", f"{path}:7"]
    assert [(item.file, item.line, item.field, item.reason) for item in items if isinstance(item, Rejection)] == [
        (path, 2, "row", "is not valid JSON: Expecting property name enclosed in double quotes at character 2"),
        (path, 4, "row", "is not valid JSON: Unterminated string starting at at character 12"),
        (path, 5, "row", "is of type list, not an object with fields"),
        (path, 6, "row", "is of type str, not an object with fields"),
        (path, 8, "row", "is not UTF-8 (byte 12); save the file as UTF-8"),
        (path, 9, "row", "is not usable JSON: nested too deeply"),
        (path, 10, "row", "is not usable JSON: a number has thousands of digits"),
        (path, 11, "row", "is not usable JSON: reward is given twice"),
    ]


def test_unusable_files_are_errors(tmp_path: Path, write_lines: Writer) -> None:
    with pytest.raises(DataError, match=r"none of its first 2 rows is an object with fields; the first: .*:1: row is not valid"):
        read_groups(write_lines("{", "["))
    with pytest.raises(DataError, match=r"rows\.jsonl; it is empty"):
        read_groups(write_lines())
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rows.json:2: not valid JSON: Extra data .* name it .jsonl"):
        read_groups(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('[{"prompt": "a", "prompt": "b"}]')
    with pytest.raises(DataError, match=r"rows.json: not usable JSON: prompt is given twice"):
        read_groups(str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"holds one dict; a .json file must hold one list of objects"):
        read_groups(str(tmp_path / "rows.json"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        read_groups(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.txt").write_text("a,b\n")
    with pytest.raises(DataError, match=r"the suffix must be one of .jsonl, .json, .csv, .tsv, .parquet, for text also with .gz"):
        read_groups(str(tmp_path / "rows.txt"))
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8bnot really")
    with pytest.raises(DataError, match=r"rows.jsonl.gz: cannot be read after line 0: .*damaged or truncated"):
        read_groups(str(tmp_path / "rows.jsonl.gz"))


def test_options_for_folders_are_refused_for_files(write_lines: Writer) -> None:
    with pytest.raises(DataError, match=r"split = test; input = .* is one file, which is read as a whole; remove split"):
        read_groups(write_lines(*ROWS), split="test")
    with pytest.raises(DataError, match=r"subset = a; input = "):
        read_groups(write_lines(*ROWS), subset="a")


def test_duplicates_are_rejected(write_lines: Writer) -> None:
    path = write_lines(ROWS[0] | {"id": "x"}, ROWS[1] | {"id": "x"}, ROWS[2], ROWS[2], ROWS[3] | {"id": "y"})
    assert [(item.line, item.group_id, item.field, item.reason) for item in rejections_of(path)][:1] == [
        (2, "x", "id", f"repeats the id of {path}:1")
    ]
    assert [(item.line, item.reason) for item in rejections_of(path)][1:] == [
        (4, f"repeats the prompt, responses and rewards of {path}:3")
    ]


def test_a_rejection_names_the_group(write_lines: Writer) -> None:
    bad = {"id": "g7", "prompt": "Q", "responses": [{"text": "A", "reward": 1}, {"text": "B"}]}
    rejection = rejections_of(write_lines(ROWS[0], bad))[0]
    assert json.loads(rejection.as_json()) == {
        "file": rejection.file,
        "line": 2,
        "group_id": "g7",
        "field": "responses[1].reward",
        "reason": "is missing",
    }


def test_ratings_are_gathered_by_prompt(write_lines: Writer) -> None:
    rows = [("P", "a", 1), ("Q", "b", 2), ("P", "c", 3), ("R", "lonely", 4), ("Q", "d", 5), ("P", "", 1)]
    path = write_lines(*({"prompt": p, "response": r, "helpfulness": h} for p, r, h in rows))
    stream = read_groups(path)
    items = list(stream.items)
    groups = [item for item in items if isinstance(item, Group)]
    assert [(group.where[-2:], group.responses, group.rewards) for group in groups] == [
        (":1", ("a", "c"), (1.0, 3.0)),
        (":2", ("b", "d"), (2.0, 5.0)),
    ]
    assert [(item.line, item.reason) for item in items if isinstance(item, Rejection)] == [
        (6, "is empty"),
        (4, "has K = 1 response; a group needs at least two"),
    ]
    assert stream.total == len(rows)


def test_max_rows(write_lines: Writer) -> None:
    stream = read_groups(write_lines(*ROWS), max_rows=2)
    assert stream.total == 2
    assert len(list(stream.items)) == 2


def test_real_files(real_data: Path) -> None:
    for name, count, size in (("alpaca_eval_k8", 603, 8), ("gsm8k_k4", 1319, 4)):
        groups = groups_of(real_data / f"{name}.jsonl")
        assert len(groups) == count
        assert {len(group.responses) for group in groups} == {size}


def test_a_closed_standard_input_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="input = -; it is empty"):
        read_groups("-")
