"""Checksums of files that the package writes, compared when they are read.

    JSON, written once          `seal`, `unseal`: a digest as the last key; covers every byte
    lines of JSON               `seal_line`, `unseal_line`: a field `xxh3` in each, so that a file can be truncated and continued
    a few columns of numbers    `name_digest`, `read_named`: the digest is part of the file's name
    everything else             a list with size and digests of each file, in `mpo_digests.json` or another sealed JSON file

The digests are xxh3: they detect accidental changes at the speed of memory, but do not protect against attackers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import xxhash

from mpo_megatron.config import ConfigError

LIST = "mpo_digests.json"
"""The list of a folder that the package writes once, such as a converted or exported checkpoint."""
STATE = "state.json"
"""The list of a step's folder, which has additional content."""
STAGES = {"samples": "generate", "scored": "score", "groups": "select"}
"""File names of a stage's lines, and of the summary that lists them when complete; a shard's have a suffix."""
DIGEST, LINE_DIGEST, END = "digest", "xxh3", "lines"
"""Keys of the digest in sealed JSON and in a sealed line, and of the line count in the last line."""
FINISHED = re.compile(rb'"xxh3": "[0-9a-f]{16}"\}.', re.DOTALL)
"""The end of a sealed line, and the byte expected as its newline."""
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped half of a surrogate pair, with or without the other half."""
WEIGHTS = (".distcp", ".safetensors")
"""Suffixes of the files that hold a checkpoint's weights."""
PIECE = 1 << 26
"""Bytes covered by one digest, so that ranks can share a large file."""
BLOCK = 1 << 22
"""Bytes read at a time."""
AGAIN = "copy it again, or run the command that wrote it again"
"""The usual fix."""


class DamagedError(ConfigError):
    """A file differs from what was written; the message names the file, the place and the fix."""


Entry = tuple[int, str | list[str]]
"""Size of a file in bytes; the digest of the whole, or of each piece of `PIECE` bytes."""
Files = Mapping[str, Entry]
"""Entries by the file's path relative to the list's folder."""


# --------------------------------------------------------------------------------------------------- JSON, written once


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON of `content` with its digest as the last key; `unseal` returns the content."""
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return json.dumps({**plain, DIGEST: _digest(json.dumps(plain))}, indent=2, ensure_ascii=False).encode() + b"\n"


def seal_sorted(content: Mapping[str, Any]) -> bytes:
    """Like `seal`, with sorted keys."""
    digest = _digest(json.dumps(content, sort_keys=True))
    return json.dumps({**content, DIGEST: digest}, indent=1, sort_keys=True).encode() + b"\n"


def unseal(path: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """The content passed to `seal` or `seal_sorted`.

    Raises:
        DamagedError: the file differs in any byte from what was written, or has no digest; ends with the remedy.
        OSError: it cannot be read.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
    except (ValueError, RecursionError) as error:  # invalid UTF-8 raises a ValueError too
        raise DamagedError(f"{path}: damaged, it does not parse ({error}); {remedy}.") from error
    if DIGEST not in content:
        raise DamagedError(f"{path}: damaged, or written by an earlier version: it has no digest; {remedy}.")
    del content[DIGEST]
    try:
        changed = text not in (seal(content), seal_sorted(content))
    except UnicodeEncodeError:  # half of a surrogate pair, which is never written
        changed = True
    if changed:
        raise DamagedError(f"{path}: damaged or changed: its digest does not match; {remedy}.")
    return content


# --------------------------------------------------------------------------------------------------- lines of JSON


def seal_line(record: Mapping[str, Any], *, allow_nan: bool = False) -> bytes:
    """The record as one line, newline included, with its digest in the field `xxh3`.

    Raises:
        ValueError: a number is not finite, which is not valid JSON.
    """
    content = {name: value for name, value in record.items() if name != LINE_DIGEST}
    text = json.dumps(content, allow_nan=allow_nan)
    return json.dumps({**content, LINE_DIGEST: _line_digest(json.loads(text))}, ensure_ascii=False).encode() + b"\n"


def unseal_line(line: bytes, *, sealed: bool = False) -> Any:
    """A line's content, without its digest.

    Args:
        sealed: require a digest; otherwise a line without one, such as a user's own, passes
    Raises:
        ValueError: it is not JSON, holds half of a surrogate pair, or differs from what was written.
    """
    try:
        record = json.loads(line)
        if HALF.search(line):  # half of a surrogate pair could not be written again
            json.dumps(record, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if sealed and not (isinstance(record, dict) and LINE_DIGEST in record):
        raise ValueError("it has no digest")
    check_record(record)
    return record


def is_unfinished(end: bytes) -> bool:
    """Whether the text after a file's last newline can be a sealed line truncated by a kill; otherwise it is damaged."""
    return b"\0" not in end and not FINISHED.search(end)


def check_record(record: Any) -> None:
    """Remove a parsed line's digest after checking it; a line without one passes.

    Raises:
        ValueError: the digest does not match, or its key is damaged.
    """
    if not isinstance(record, dict):
        return
    if LINE_DIGEST in record:
        if record.pop(LINE_DIGEST) != _line_digest(record):
            raise ValueError(f"its digest does not match; if you changed it yourself, remove its field {LINE_DIGEST}")
        return
    last = next(reversed(record), "")
    if len(last) != len(LINE_DIGEST):
        return
    differ = sum(one != other for one, other in zip(last, LINE_DIGEST, strict=True))
    if differ == 1 and len(str(record[last])) == 16:
        raise ValueError(f"its last field is {last!r}, but should be {LINE_DIGEST}, its digest")


def seal_lines(records: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """The records as sealed lines, followed by a line with their number: for a file written at once."""
    number = 0
    for record in records:
        yield seal_line(record, allow_nan=True)
        number += 1
    yield seal_line({END: number})


def unseal_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The records passed to `seal_lines`.

    Raises:
        DamagedError: a line differs from what was written, or is missing; ends with the remedy.
        OSError: the file cannot be read.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            records.append(unseal_line(line, sealed=True))
        except ValueError as error:
            raise DamagedError(f"{path}:{number}: damaged or changed ({error}); {remedy}.") from error
    if not records or records.pop() != {END: len(records)}:
        raise DamagedError(f"{path}: damaged: lines are missing at its end; {remedy}.")
    return records


# --------------------------------------------------------------------------------------------------- digests in names


def name_digest(stem: str, data: bytes, suffix: str) -> str:
    """A file name that ends with the digest of the file's content."""
    return f"{stem}.{_digest(data)}{suffix}"


def read_named(path: Path) -> bytes:
    """The bytes of a file named by `name_digest`.

    Raises:
        DamagedError: they differ from what was written.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if _digest(data) != path.stem.rpartition(".")[2]:
        raise DamagedError(f"{path}: damaged: its digest is not the one in its name; remove it.")
    return data


# --------------------------------------------------------------------------------------------------- lists of files


def digest_file(path: Path) -> tuple[int, str]:
    """Size and digest of a file."""
    size = path.stat().st_size
    return size, _digest_range(path, 0, size)


def list_files(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Entries of these files of a folder, with a digest per piece."""
    files: dict[str, Entry] = {}
    for name in names:
        size = (folder / name).stat().st_size
        files[name] = size, [_digest_range(folder / name, start, PIECE) for start in range(0, max(size, 1), PIECE)]
    return files


def write_list(folder: Path) -> None:
    """Write `mpo_digests.json`, which lists all other files of a folder and its subfolders."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != LIST)
    (folder / LIST).write_bytes(seal({"files": list_files(folder, names)}))


def read_list(folder: Path) -> dict[str, Entry] | None:
    """The files in the list of a checkpoint folder; None if the folder has no list.

    Raises:
        DamagedError: the list itself is damaged.
    """
    if (folder / LIST).is_file():
        return _entries(folder / LIST)
    if (folder / STATE).is_file() and (folder / "megatron").is_dir():
        return _entries(folder / STATE)
    return None


def require_list(folder: Path) -> dict[str, Entry]:
    """The files in the list of a Megatron checkpoint folder.

    Raises:
        DamagedError: the list is missing or damaged.
    """
    files = read_list(folder)
    if files is None:
        raise DamagedError(
            f"{folder}: has no digests (neither {LIST} nor {STATE}): an earlier version converted it, or the copy is "
            "incomplete; convert it again, or copy all of it."
        )
    return files


def _entries(path: Path) -> dict[str, Entry]:
    return entries_of(unseal(path), path)


def entries_of(content: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    """The list of files in the content of a sealed file.

    Raises:
        DamagedError: it has another form, or names a file outside the folder.
    """
    files = content.get("files", {})
    entries = [(name, *entry) for name, entry in files.items() if _is_entry(name, entry)] if isinstance(files, dict) else []
    if not isinstance(files, dict) or len(entries) != len(files):
        raise DamagedError(f"{path}: another version wrote it: its list of files has an unknown form; {AGAIN}.")
    return {name: (size, digests) for name, size, digests in entries}


def _is_entry(name: str, entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return False
    size, digests = entry
    texts = digests if isinstance(digests, list) else [digests]
    return type(size) is int and size >= 0 and all(isinstance(text, str) for text in texts)


def check_pieces(folder: Path, files: Files, *, part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th piece of the listed files, from piece `part` on, with its digest.

    Raises:
        DamagedError: names the first file that is missing, or has another size or content.
    """
    # Large pieces first, to balance the parts.
    pieces = sorted(_pieces(files), key=lambda piece: (-piece[2], piece[:2]))
    own = pieces[part::parts]
    for name in dict.fromkeys(piece[0] for piece in own):
        _check_size(folder / name, files[name][0])
    for name, start, length, digest in own:
        if _digest_range(folder / name, start, length) != digest:
            raise DamagedError(
                f"{folder / name}: its content differs from what was written (the digest of {start:,} to {start + length:,} "
                f"differs); {AGAIN}."
            )


def check_file(path: Path) -> None:
    """Compare a small file of a checkpoint with the list in its folder or up to two levels above; an unlisted file passes.

    Raises:
        DamagedError: the file differs from what was written, or the list is damaged.
    """
    found = _find_list(path.parent)
    if found is not None:
        home, files = found
        name = path.relative_to(home).as_posix()
        check_pieces(home, {name: files[name]} if name in files else {})


def check_folder(folder: Path, *, weights: bool) -> None:
    """Compare the files under a folder with the list there or up to two levels above; unlisted files pass.

    Args:
        weights: False skips weight files
    Raises:
        DamagedError: names the first file that differs from what was written.
    """
    found = _find_list(folder)
    if found is not None:
        home, files = found
        prefix = "" if home == folder else f"{folder.relative_to(home).as_posix()}/"
        chosen = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        check_pieces(home, {name: entry for name, entry in chosen.items() if weights or not name.endswith(WEIGHTS)})


def check_lines(path: Path) -> None:
    """Compare the lines of a finished stage with its summary; other files pass.

    Raises:
        DamagedError: the lines differ from what was written, or the summary is damaged.
    """
    if (path.parent / LIST).is_file():
        check_file(path)
    lines, dash, shard = path.stem.partition("-")
    summary = path.with_name(f"{STAGES.get(lines)}{dash}{shard}.json")
    if lines in STAGES and summary.is_file():
        try:
            files = _entries(summary)
            check_pieces(path.parent, {path.name: files[path.name]} if path.name in files else {})
        except DamagedError as error:
            raise DamagedError(f"{error} To use lines that you changed yourself, rename the file.") from error


def _find_list(folder: Path) -> tuple[Path, dict[str, Entry]] | None:
    for home in (folder, *folder.parents[:2]):
        files = read_list(home)
        if files is not None:
            return home, files
    return None


def _pieces(files: Files) -> Iterator[tuple[str, int, int, str]]:
    """(file, first byte, number of bytes, digest) of each piece."""
    for name, (size, digests) in files.items():
        if isinstance(digests, str):
            yield name, 0, size, digests
            continue
        for index, digest in enumerate(digests):
            yield name, index * PIECE, min(PIECE, size - index * PIECE), digest


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DamagedError(f"{path}: no such file, but the list beside it names it; {AGAIN}.")
    found = path.stat().st_size
    if found != size:
        raise DamagedError(f"{path}: damaged: has {found:,} bytes, but {size:,} were written; {AGAIN}.")


def _digest_range(path: Path, start: int, length: int) -> str:
    """Digest of up to `length` bytes of a file from `start` on."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (block := file.read(min(BLOCK, length))):
            state.update(block)
            length -= len(block)
    return state.hexdigest()


def _digest(data: str | bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data.encode() if isinstance(data, str) else data)


def _line_digest(content: Any) -> str:
    """Digest of a line's content, independent of spacing and key order."""
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
