"""Sources of rows: a file, a glob, a folder, standard input, a Hugging Face dataset."""

from __future__ import annotations

import glob
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa

from mpo_megatron.data.raw_rows import Source, undecoded_lines
from mpo_megatron.data.row_files import BATCH, arrow_rows, format_suffix, is_readable, one_line, read_file, read_files
from mpo_megatron.data.store import INFO_FILE
from mpo_megatron.files import DataError

STANDARD_INPUT = "-"
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file name that name its split."""
_SHARD = re.compile(r"[-_.]?\d+([-_.]of[-_.]\d+)?$")
"""The end of a file name that only numbers the parts of a split."""


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
        return Source(None, undecoded_lines(sys.stdin.buffer if sys.stdin else (), "standard input"))  # None if closed
    if path.is_file():
        return read_file(path, option)
    if is_pattern:
        files = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(f"{option} = {source}; no file matches this pattern.")
        return read_files(files, source, option)
    if path.is_dir():
        return _open_folder(path, split, subset, option)
    if is_readable(path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise DataError(f"{option} = {source}; no such file or folder.")
    return _load_dataset(source, split, subset, option)


def _open_folder(folder: Path, split: str, subset: str | None, option: str) -> Source:
    from datasets import DatasetDict, load_from_disk  # slow to import, and not needed for files

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            dataset = load_from_disk(str(folder))
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # from damaged JSON
            raise DataError(f"{option} = {folder}: datasets cannot read it: {one_line(error)}; copy it again.") from error
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
    files = sorted(path for path in folder.iterdir() if path.is_file() and is_readable(path))
    if not files or subset is not None or (folder / "README.md").is_file():
        return _load_dataset(str(folder), split, subset, option)
    below = (path for path in folder.glob("[!.]*/**/*") if is_readable(path) and not (path.parent / INFO_FILE).is_file())
    if (unread := min(below, default=None)) is not None:
        here, ending = glob.escape(str(folder)), f"*{unread.suffix}"
        raise DataError(
            f"{option} = {folder}; {unread} is in a folder below, which is not read; give a pattern: '{here}/**/{ending}' "
            f"for all, '{here}/*{files[0].suffix}' without it."
        )
    return read_files(_files_of_split(files, split), str(folder), option)


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
    unclear = [path.name for path in files if kind(labels[path]) is None and format_suffix(path) in {*map(format_suffix, chosen)}]
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
            f"{option} = {name}{where}, subset = {subset}, split = {split}; datasets cannot load it: {one_line(error)}"
        ) from error
    return _read_dataset(dataset, f"{name}[{split}]")


def _read_dataset(dataset: Any, name: str) -> Source:
    return Source(len(dataset), arrow_rows(dataset.with_format("arrow").iter(batch_size=BATCH), name))
