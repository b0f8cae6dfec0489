"""Damaged Parquet files and folders of `datasets`: refused in one sentence, never read as other values or ending the process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_megatron.data.row_files import arrow_rows
from mpo_megatron.data.sources import open_source
from mpo_megatron.files import DataError


def texts(content: bytes, offsets: list[int]) -> pa.Table:
    """A table whose texts lie between these offsets of a content, which Arrow does not check."""
    buffers = [None, pa.py_buffer(np.array(offsets, np.int32)), pa.py_buffer(content)]
    return pa.table({"prompt": pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)})


@pytest.mark.parametrize("offsets", [[0, 3, 1, 4], [0, 2**30, 4], [0, -(2**30), 4]])
def test_offsets_outside_the_content(offsets: list[int]) -> None:
    with pytest.raises(DataError, match=r"^rows: damaged after row 1: .*; copy or write it again\.$"):
        list(arrow_rows([pa.table({"prompt": ["whole"]}), texts(b"abcd", offsets)], "rows"))


def test_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(texts(b"ab\xff", [0, 2, 3]), path)
    with pytest.raises(DataError, match=r"rows\.parquet: damaged after row 0: .*UTF.*; copy or write it again\.$"):
        list(open_source(str(path)).rows)


def test_checksums_of_pages_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": ["a question", "another one"]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True, write_statistics=False)
    assert [row.value for row in open_source(str(path)).rows] == table.to_pylist()
    content = path.read_bytes()
    assert content.count(b"question") == 1
    path.write_bytes(content.replace(b"question", b"quastion"))
    with pytest.raises(DataError, match=r"damaged after row 0: .*checksum"):
        list(open_source(str(path)).rows)


@pytest.mark.parametrize(("old", "new"), [('"_type"', '"_tipe"'), ('"dtype"', '"dtipe"'), ('"string"', "3")])
def test_damaged_features_of_datasets(tmp_path: Path, old: str, new: str) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "rows")
    path = tmp_path / "rows" / "dataset_info.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=r"input = .*rows: datasets cannot read it: .*; copy it again\."):
        list(open_source(str(tmp_path / "rows")).rows)
