"""Files of rows: JSON lines, JSON, CSV, TSV and Parquet; text may be compressed."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.raw_rows import RawRow, Source, undecoded_lines
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import check_lines
from mpo_megatron.files.objects import read_pairs

BATCH = 512
"""Number of rows converted from Arrow at a time."""
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
_LARGEST_CELL = 1 << 30
"""Maximum characters of a CSV cell."""


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix in (".zst", ".zstd", ".bz2", ".lz4"):
        codec = {".bz2": "bz2", ".lz4": "lz4"}.get(path.suffix, "zstd")
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), codec), 1 << 20)
    return path.open("rb")


def one_line(error: Exception) -> str:
    """A library's message without its line breaks."""
    return " ".join(str(error).split())


def _guarded(path: Path, rows: Callable[[], Iterator[RawRow]]) -> Iterator[RawRow]:
    """The rows; a read error names the line before it."""
    number = 0
    try:
        for row in rows():
            number = row.line
            yield row
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path}: cannot be read after line {number}: {reason}; damaged or truncated: copy it again.") from error


def _read_jsonl(path: Path) -> Source:
    check_lines(path)
    total = None
    if path.suffix not in _COMPRESSED:
        with path.open("rb") as file:
            total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))

    def rows() -> Iterator[RawRow]:
        with _open(path) as file:
            yield from undecoded_lines(file, str(path))

    return Source(total, _guarded(path, rows))


def _read_json(path: Path) -> Source:
    try:
        with _open(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=read_pairs)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}; a .json file holds one list of "
            "objects; if it holds one object a line, name it .jsonl."
        ) from error
    except (RecursionError, ValueError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{path}: not usable JSON: {one_line(error)}.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; a .json file must hold one list of objects.")
    return Source(len(rows), (RawRow(str(path), number, row) for number, row in enumerate(rows, start=1)))


def _read_csv(path: Path, delimiter: str = ",") -> Source:
    csv.field_size_limit(_LARGEST_CELL)

    def rows() -> Iterator[RawRow]:
        with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter)
            start, names = 1, None
            while True:
                start = reader.line_num + 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    yield RawRow(str(path), start, RowError("row", f"is not valid CSV: {error}"))
                    continue
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: not UTF-8 near line {start}: {error.reason}; convert it to UTF-8.") from error
                if cells is None:
                    return
                if names is None:
                    names = cells
                    if len(set(names)) < len(names):
                        raise DataError(f"{path}:{start}: two columns have the same name: {', '.join(names)}; rename one.")
                elif len(cells) != len(names):
                    error_text = f"has {len(cells)} cells, but the header has {len(names)}"
                    yield RawRow(str(path), start, RowError("row", error_text))
                else:
                    pairs = zip(names, cells, strict=True)
                    yield RawRow(str(path), start, {name: cell for name, cell in pairs if cell != ""})

    return Source(None, _guarded(path, rows))


def _read_tsv(path: Path) -> Source:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Source:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)  # of pages that have one
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {one_line(error)}; copy it again.") from error
    return Source(file.metadata.num_rows, arrow_rows(file.iter_batches(batch_size=BATCH), str(path)))


def arrow_rows(tables: Iterable[pa.Table | pa.RecordBatch], name: str) -> Iterator[RawRow]:
    """The rows of an input that Arrow reads, one table after the other.

    Raises:
        DataError: it is damaged, or holds a text that is not UTF-8.
    """
    number = 0
    try:
        for table in tables:
            table.validate(full=True)  # or a damaged offset may end the process
            for value in _as_rows(table):
                number += 1
                yield RawRow(name, number, value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name}: damaged after row {number}: {one_line(error)}; copy or write it again.") from error


def _as_rows(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of an Arrow table, with decimals as the numbers that they are in JSON: integers where they have no fraction."""
    rows: list[dict[str, Any]] = table.to_pylist()
    return [_without_decimals(row) for row in rows] if "decimal" in str(table.schema) else rows


def _without_decimals(value: Any) -> Any:
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {name: _without_decimals(item) for name, item in value.items()}
    return [_without_decimals(item) for item in value] if isinstance(value, list) else value


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet}


def format_suffix(path: Path) -> str:
    """The suffix that tells a file's format, without compression."""
    compressed = path.suffix in _COMPRESSED
    return Path(path.stem).suffix if compressed else path.suffix


def is_readable(path: Path) -> bool:
    """Whether a file's suffix is that of a kind that is read."""
    return format_suffix(path) in _READERS and (format_suffix(path) != ".parquet" or path.suffix == ".parquet")


def read_file(path: Path, option: str) -> Source:
    """Rows of a file; `option` names it in messages.

    Raises:
        DataError: its suffix is unknown, or it cannot be read.
    """
    if not is_readable(path):
        raise DataError(
            f"{option} = {path}; the suffix must be one of {', '.join(_READERS)}, for text also with {', '.join(_COMPRESSED)} "
            "after it; rename or convert it."
        )
    try:
        return _READERS[format_suffix(path)](path)
    except OSError as error:
        raise DataError(f"{option} = {path}; cannot be read: {error.strerror or error}.") from error


def read_files(files: list[Path], name: str, option: str) -> Source:
    """Rows of files of one kind, in order; each file is opened when reached."""
    if len({format_suffix(path) for path in files}) > 1:
        raise DataError(
            f"{option} = {name}; it holds files of several kinds ({files[0].name} … {files[-1].name}); name one: {files[0]}."
        )
    sources = [read_file(path, option) for path in files]
    totals = [source.total for source in sources]
    total = None if None in totals else sum(count for count in totals if count is not None)
    return Source(total, itertools.chain.from_iterable(source.rows for source in sources))
