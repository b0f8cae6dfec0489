"""Where data lies, source → groups: JSONL, JSON, Parquet, folders of them, and Hugging Face datasets on disk or on the hub.

    stream = read_groups("pairs.jsonl")
    for item in stream.items:        # `Group`, or `Rejection` for a row that cannot become one
        ...

Rows come in the order of the input, so what follows may be parallel and still be reproducible.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_megatron.data import DataError
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import Layout, Parsed, build_group, detect, parse
from mpo_megatron.data.group import Group

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file's name that say which split it holds."""
_SAMPLE = 64
"""Rows that the format is detected from."""
_BATCH = 512
"""Rows converted from Arrow at a time."""


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
        return json.dumps(asdict(self), ensure_ascii=False)


class RawRow(NamedTuple):
    """One row as it was read; `value` is a `RowError` if it could not be decoded."""

    file: str
    line: int
    value: Any

    def reject(self, error: RowError, group_id: str | None = None) -> Rejection:
        """The rejection of this row."""
        return Rejection(file=self.file, line=self.line, group_id=group_id, field=error.field, reason=error.reason)


class Source(NamedTuple):
    """Rows of an input, and how many there are."""

    total: int
    rows: Iterable[RawRow]


class GroupStream(NamedTuple):
    """Groups of an input in its order, and what they all have."""

    layout: Layout
    total: int
    """About how many items follow; for the progress bar."""
    items: Iterator[Group | Rejection]


# --------------------------------------------------------------------------------------------------- sources


def _read_jsonl(path: Path) -> Source:
    with path.open("rb") as file:
        total = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))

    def rows() -> Iterator[RawRow]:
        number = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield RawRow(str(path), number, _decode(line.strip()))
        except OSError as error:
            raise DataError(f"{path}: cannot be read after line {number}: {error.strerror or error}.") from error

    return Source(total, rows())


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("row", f"is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        return RowError("row", f"is not valid JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RowError("row", "is not usable JSON: nested too deeply")
    except ValueError:  # Python reads no integer of more than 4,300 digits
        return RowError("row", "is not usable JSON: a number has thousands of digits")


def _read_json(path: Path) -> Source:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}; a .json file holds one list of "
            "objects; if it holds one object a line, name it .jsonl."
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: not usable JSON: {error}.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; a .json file holds one list of objects.")
    return Source(len(rows), (RawRow(str(path), number, row) for number, row in enumerate(rows, start=1)))


def _read_parquet(path: Path) -> Source:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error

    def rows() -> Iterator[RawRow]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=_BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(str(path), number, value)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: damaged after row {number}: {error}") from error

    return Source(file.metadata.num_rows, rows())


def _read_dataset(dataset: Any, name: str) -> Source:
    tables = dataset.with_format("arrow").iter(batch_size=_BATCH)
    values = (value for table in tables for value in table.to_pylist())
    return Source(len(dataset), (RawRow(name, number, value) for number, value in enumerate(values, start=1)))


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def open_source(source: str, *, split: str = "train", subset: str | None = None) -> Source:
    """Rows of a file, a folder, or a dataset on the hub.

    Raises:
        DataError: nothing readable there.
    """
    path = Path(source)
    if path.is_file():
        for name, value, default in (("split", split, "train"), ("subset", subset, None)):
            if value != default:
                raise DataError(f"{name} = {value}; input = {source} is one file, which is read as a whole; leave {name} out.")
        if path.suffix in (".gz", ".zst", ".bz2", ".xz", ".zip"):
            raise DataError(f"input = {source}; it is compressed; unpack it first.")
        if path.suffix not in _READERS:
            raise DataError(f"input = {source}; the suffix must be one of {', '.join(_READERS)}; rename or convert it.")
        try:
            return _READERS[path.suffix](path)
        except OSError as error:
            raise DataError(f"input = {source}; cannot be read: {error.strerror or error}.") from error
    if path.is_dir():
        return _open_folder(path, split, subset)
    if path.suffix in _READERS or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise DataError(f"input = {source}; no such file or folder.")
    return _load_dataset(source, split, subset)


def _open_folder(folder: Path, split: str, subset: str | None) -> Source:
    from datasets import DatasetDict, load_from_disk  # a second to import, and optional for files

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            dataset = load_from_disk(str(folder))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise DataError(f"input = {folder}: datasets cannot read it: {error}; copy it again.") from error
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise DataError(f"split = {split}; {folder} has the splits {', '.join(dataset)}.")
            dataset = dataset[split]
        return _read_dataset(dataset, str(folder))
    files = sorted(path for path in folder.iterdir() if path.suffix in _READERS)
    if not files or subset is not None or (folder / "README.md").is_file():
        return _load_dataset(str(folder), split, subset)
    files = _files_of_split(files, split)
    if len({path.suffix for path in files}) > 1:
        raise DataError(f"input = {folder}; it holds files of several kinds ({files[0].name} … {files[-1].name}); name one.")
    sources = [_READERS[path.suffix](path) for path in files]
    return Source(sum(item.total for item in sources), itertools.chain.from_iterable(item.rows for item in sources))


def _files_of_split(files: list[Path], split: str) -> list[Path]:
    """The files whose names say `split`; all of them if no name says any split."""

    def named(path: Path) -> str | None:
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        return next((name for name, aliases in _SPLITS.items() if words & {*aliases}), None)

    wanted = next((name for name, aliases in _SPLITS.items() if split in aliases), split)
    names = {path: named(path) for path in files}
    if not any(names.values()):
        return files
    chosen = [path for path in files if names[path] == wanted]
    if not chosen:
        raise DataError(f"split = {split}; {files[0].parent} holds {', '.join(path.name for path in files)}.")
    return chosen


def _load_dataset(name: str, split: str, subset: str | None) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name, subset, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        where = "" if Path(name).exists() else "; no such file or folder here, and as a name on the hub"
        raise DataError(f"input = {name}{where}, subset = {subset}, split = {split}; datasets cannot load it: {error}") from error
    return _read_dataset(dataset, f"{name}[{split}]")


# --------------------------------------------------------------------------------------------------- groups


def read_groups(
    source: str,
    *,
    format_name: str = "auto",
    split: str = "train",
    subset: str | None = None,
    rating: str | None = None,
    max_rows: int | None = None,
) -> GroupStream:
    """Groups of an input, in its order; every row that is not one comes as a `Rejection`.

    Raises:
        DataError: the input cannot be read, or its format not be told.
    """
    total, rows = open_source(source, split=split, subset=subset)
    if max_rows is not None:
        total, rows = min(total, max_rows), itertools.islice(rows, max_rows)
    rows = iter(rows)
    head = list(itertools.islice(rows, _SAMPLE))
    sample = [row.value for row in head if isinstance(row.value, dict)]
    if not head:
        raise DataError(f"input = {source}; it is empty.")
    if not sample:
        first = f"{head[0].file}:{head[0].line}: {_describe(head[0].value)}"
        raise DataError(f"input = {source}; none of its first {len(head)} rows is an object with fields; the first: {first}.")
    layout = detect(sample, format_name, rating)
    parsed = _parse_rows(itertools.chain(head, rows), layout)
    if layout.format == "ratings":
        gathered = list(_gather(parsed))  # rows of one prompt may stand anywhere
        return GroupStream(layout, len(gathered), _build(gathered))
    return GroupStream(layout, total, _build(parsed))


def _describe(value: Any) -> str:
    return str(value) if isinstance(value, RowError) else f"it is of type {type(value).__name__}"


def _parse_rows(rows: Iterable[RawRow], layout: Layout) -> Iterator[tuple[RawRow, Parsed | RowError]]:
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            yield row, parse(row.value, layout)
        except RowError as error:
            yield row, error


def _gather(parsed: Iterable[tuple[RawRow, Parsed | RowError]]) -> Iterator[tuple[RawRow, Parsed | RowError]]:
    """Join the responses that rows give to the same prompt; a group stands where its first row stood."""
    together: dict[str, list[tuple[RawRow, Parsed]]] = {}
    errors: list[tuple[RawRow, Parsed | RowError]] = []
    for row, part in parsed:
        if isinstance(part, RowError):
            errors.append((row, part))
        else:
            together.setdefault(json.dumps(part.prompt, sort_keys=True), []).append((row, part))
    yield from errors
    for rows in together.values():
        parts = [part for _, part in rows]
        responses = tuple(response for part in parts for response in part.responses)
        rewards = tuple(reward for part in parts for reward in part.rewards or ())
        yield rows[0][0], Parsed(prompt=parts[0].prompt, responses=responses, rewards=rewards)


def _build(parsed: Iterable[tuple[RawRow, Parsed | RowError]]) -> Iterator[Group | Rejection]:
    """Groups with distinct ids."""
    seen: dict[str, str] = {}
    for row, part in parsed:
        if isinstance(part, RowError):
            yield row.reject(part, _peek_id(row.value))
            continue
        where = f"{row.file}:{row.line}"
        try:
            group = build_group(part, where)
        except RowError as error:
            yield row.reject(error, part.group_id)
            continue
        if group.group_id in seen:
            what = "repeats the id" if part.group_id else "repeats the prompt, responses and rewards"
            yield row.reject(RowError("id", f"{what} of {seen[group.group_id]}"), group.group_id)
            continue
        seen[group.group_id] = where
        yield group


def _peek_id(value: Any) -> str | None:
    """The id a faulty row gives itself, to find it by."""
    found = value.get("group_id", value.get("id")) if isinstance(value, dict) else None
    return str(found) if isinstance(found, str | int) else None
