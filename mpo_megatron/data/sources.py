"""Sources of rows: files of several kinds, compressed or not, globs, folders, standard input, Hugging Face datasets."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_megatron.data.fields import RowError, mark_written
from mpo_megatron.data.store import INFO_FILE
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import LINE_DIGEST, check_lines, check_record
from mpo_megatron.files.objects import RepeatedNameError, read_pairs

STANDARD_INPUT = "-"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file name that name its split."""
_SHARD = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?$")
"""The end of a file name that only numbers the parts of a split."""
_BATCH = 512
"""Number of rows converted from Arrow at a time."""
_COMPRESSED = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
_PARTS = {"prompt", "tools"}
"""Parts of a line of ours that are read from a row before."""
_LARGEST_CELL = 1 << 30
"""Maximum characters of a CSV cell."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row that cannot become a group."""

    file: str
    line: int
    """Line of the file, or row of the dataset, counted from 1."""
    group_id: str | None
    field: str
    reason: str

    def as_json(self) -> str:
        """One line of `rejected.jsonl`."""
        line = json.dumps(asdict(self), ensure_ascii=False)
        try:
            line.encode()
        except UnicodeEncodeError:  # half a surrogate pair, in an id for example: only its escape can be written
            return json.dumps(asdict(self))
        return line


class RawRow(NamedTuple):
    """One row as read."""

    file: str
    line: int
    value: Any
    """Undecoded JSON as bytes; decoded, or `RowError` where it cannot be."""

    def decode(self) -> RawRow:
        """The row with its value decoded."""
        return RawRow(self.file, self.line, _decode(self.value)) if isinstance(self.value, bytes) else self

    def reject(self, error: RowError, group_id: str | None = None) -> Rejection:
        """The rejection of this row."""
        return Rejection(file=self.file, line=self.line, group_id=group_id, field=error.field, reason=error.reason)


class Source(NamedTuple):
    """Rows of an input, and their approximate number."""

    total: int | None
    """None if only reading everything would tell."""
    rows: Iterable[RawRow]


# --------------------------------------------------------------------------------------------------- files


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


def _one_line(error: Exception) -> str:
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
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise DataError(f"{path}: cannot be read after line {number}: {reason}; damaged or truncated: copy it again.") from error


def _read_jsonl(path: Path) -> Source:
    check_lines(path)
    total = None
    if path.suffix not in _COMPRESSED:
        with path.open("rb") as file:
            total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))

    def rows() -> Iterator[RawRow]:
        with _open(path) as file:
            yield from _decode_lines(file, str(path))

    return Source(total, _guarded(path, rows))


def _decode_lines(lines: Iterable[bytes], name: str) -> Iterator[RawRow]:
    for number, line in enumerate(lines, start=1):
        if line := line.strip():
            yield RawRow(name, number, line)


def _unsealed(row: Any) -> Any:
    """A row; without the digest, if it is a line of ours; a `RowError` if that does not match."""
    is_ours = isinstance(row, dict) and LINE_DIGEST in row
    try:
        check_record(row)
    except ValueError as error:
        return RowError("row", f"is damaged or changed: {error}")
    return row | {name: mark_written(row[name]) for name in _PARTS & row.keys()} if is_ours else row


def _decode(line: bytes) -> Any:
    try:
        return _unsealed(json.loads(line.decode("utf-8-sig"), object_pairs_hook=read_pairs))
    except UnicodeDecodeError as error:
        return RowError("row", f"is not UTF-8 (byte {error.start}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError("row", f"is not valid JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RowError("row", "is not usable JSON: nested too deeply")
    except RepeatedNameError as error:
        return RowError("row", f"is not usable JSON: {error}")
    except ValueError:  # Python refuses integers of more than 4,300 digits
        return RowError("row", "is not usable JSON: a number has thousands of digits")


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
        raise DataError(f"{path}: not usable JSON: {_one_line(error)}.") from error
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
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_one_line(error)}; copy it again.") from error

    def rows() -> Iterator[RawRow]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, value)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged after row {number}: {_one_line(error)}; copy it again.") from error

    return Source(file.metadata.num_rows, rows())


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet}


def _kind(path: Path) -> str:
    """The suffix that tells a file's format, without compression."""
    compressed = path.suffix in _COMPRESSED
    return Path(path.stem).suffix if compressed else path.suffix


def _is_readable(path: Path) -> bool:
    return _kind(path) in _READERS and (_kind(path) != ".parquet" or path.suffix == ".parquet")


def _read_file(path: Path, option: str) -> Source:
    if not _is_readable(path):
        raise DataError(
            f"{option} = {path}; the suffix must be one of {', '.join(_READERS)}, for text also with {', '.join(_COMPRESSED)} "
            "after it; rename or convert it."
        )
    try:
        return _READERS[_kind(path)](path)
    except OSError as error:
        raise DataError(f"{option} = {path}; cannot be read: {error.strerror or error}.") from error


def _read_files(files: list[Path], name: str, option: str) -> Source:
    """Rows of files of one kind, in order; each file is opened when reached."""
    if len({_kind(path) for path in files}) > 1:
        raise DataError(f"{option} = {name}; it holds files of several kinds ({files[0].name} … {files[-1].name}); name one.")
    sources = [_read_file(path, option) for path in files]
    totals = [source.total for source in sources]
    total = None if None in totals else sum(count for count in totals if count is not None)
    return Source(total, itertools.chain.from_iterable(source.rows for source in sources))


# --------------------------------------------------------------------------------------------------- any input


def open_source(source: str, *, split: str = "train", subset: str | None = None, option: str = "input") -> Source:
    """Decoded rows of an input.

    Args:
        option: name of the option that names the input, for messages
    Raises:
        DataError: as `open_undecoded`.
    """
    total, rows = open_undecoded(source, split=split, subset=subset, option=option)
    return Source(total, (row.decode() for row in rows))


def open_undecoded(source: str, *, split: str = "train", subset: str | None = None, option: str = "input") -> Source:
    """Rows of standard input (`-`), a file, a glob pattern, a folder, or a dataset on the hub.

    Args:
        option: name of the option that names the input, for messages
    Raises:
        DataError: there is nothing readable.
    """
    path = Path(source)
    is_pattern = bool(glob.has_magic(source)) and not path.exists()
    if source == STANDARD_INPUT or path.is_file() or is_pattern:
        for name, value, default in (("split", split, "train"), ("subset", subset, None)):
            if value != default:
                raise DataError(f"{name} = {value}; {option} = {source} is one file, which is read as a whole; remove {name}.")
    if source == STANDARD_INPUT:
        return Source(None, _decode_lines(sys.stdin.buffer if sys.stdin else (), "standard input"))  # None if closed
    if path.is_file():
        return _read_file(path, option)
    if is_pattern:
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"{option} = {source}; no file matches this pattern.")
        return _read_files(files, source, option)
    if path.is_dir():
        return _open_folder(path, split, subset, option)
    if _is_readable(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise DataError(f"{option} = {source}; no such file or folder.")
    return _load_dataset(source, split, subset, option)


def _open_folder(folder: Path, split: str, subset: str | None, option: str) -> Source:
    from datasets import DatasetDict, load_from_disk  # slow to import, and not needed for files

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            dataset = load_from_disk(str(folder))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataError(f"{option} = {folder}: datasets cannot read it: {_one_line(error)}; copy it again.") from error
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise DataError(f"split = {split}; {folder} has the splits {', '.join(dataset)}; choose one.")
            dataset = dataset[split]
        return _read_dataset(dataset, str(folder))
    if (folder / INFO_FILE).is_file():
        raise DataError(
            f"{option} = {folder}; it holds groups that are prepared already ({INFO_FILE}); train on them with "
            f"`mpo train --data.train {folder}`, or name the file that they were made from."
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_readable(path))
    if not files or subset is not None or (folder / "README.md").is_file():
        return _load_dataset(str(folder), split, subset, option)
    below = (path for path in folder.glob("[!.]*/**/*") if _is_readable(path) and not (path.parent / INFO_FILE).is_file())
    if (unread := min(below, default=None)) is not None:
        pattern = folder / "**" / f"*{unread.suffix}"
        raise DataError(f"{option} = {folder}; {unread} is in a folder below, which is not read; give a pattern, as '{pattern}'.")
    return _read_files(_files_of_split(files, split), str(folder), option)


def _files_of_split(files: list[Path], split: str) -> list[Path]:
    """The files whose names contain `split`; all of them if no name contains any split.

    A name without its numbers identifies a split: `train_prefs-00000-of-00002` and `train_sft-…` are two splits.
    """
    labels = {path: _SHARD.sub("", path.name.split(".")[0]).lower() for path in files}

    def kind(label: str) -> str | None:
        words = {*re.split(r"[^a-z]+", label)}
        return next((name for name, aliases in _SPLITS.items() if words & {*aliases}), None)

    exact = [path for path in files if labels[path] == split.lower()]
    if exact:
        return exact
    if not any(kind(label) for label in labels.values()):
        return files
    wanted = next((name for name, aliases in _SPLITS.items() if split in aliases), split)
    chosen = [path for path in files if kind(labels[path]) == wanted]
    names = sorted({labels[path] for path in chosen})
    if len(names) > 1:
        raise DataError(
            f"split = {split}; {files[0].parent} holds the splits {', '.join(names)}; name one, or files with a pattern."
        )
    remedy = "name one, or files with a pattern"
    if not chosen:
        raise DataError(f"split = {split}; {files[0].parent} holds {', '.join(path.name for path in files)}; {remedy}.")
    unclear = [path.name for path in files if kind(labels[path]) is None and _kind(path) in {*map(_kind, chosen)}]
    if unclear:
        raise DataError(f"split = {split}; {files[0].parent} holds {', '.join(unclear)}, whose names tell no split; {remedy}.")
    return chosen


def _load_dataset(name: str, split: str, subset: str | None, option: str) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name, subset, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        where = "" if Path(name).exists() else "; no such file or folder here, and as a name on the hub"
        raise DataError(
            f"{option} = {name}{where}, subset = {subset}, split = {split}; datasets cannot load it: {_one_line(error)}"
        ) from error
    return _read_dataset(dataset, f"{name}[{split}]")


def _read_dataset(dataset: Any, name: str) -> Source:
    tables = dataset.with_format("arrow").iter(batch_size=_BATCH)
    values = (value for table in tables for value in table.to_pylist())
    return Source(len(dataset), (RawRow(name, number, value) for number, value in enumerate(values, start=1)))
