"""Tokenized groups on disk, written once and memory-mapped.

A prepared folder holds

    groups.arrow     one row per group (Arrow IPC file, uncompressed, memory-mapped on load)
    groups.pieces    end of each piece of groups.arrow, and its xxh3 digest: two unsigned 64-bit integers per piece
    prepare.json     `PreparedInfo`: digests, counts, statistics, the configuration; and its own digest
    rejected.jsonl   rejected rows and reasons (written by `mpo prepare`)

A folder gets its name in one step (write beside it, fsync, rename), so an existing one is complete. Lengths are separate columns:
the trainer plans a whole epoch of packed rows without reading a token.

A piece is compared with its digest before its first use, once per process. Each record batch has three pieces (planning columns,
tokens, texts), so planning reads neither tokens nor texts. A last piece holds the file's footer.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pyarrow.compute import list_flatten

from mpo_megatron.data.arrays import Float64, Int8, Int32, Int64, as_numpy
from mpo_megatron.data.batches import SCHEMA, take_rows
from mpo_megatron.data.group import RewardKind, TokenizedGroup
from mpo_megatron.files import DataError
from mpo_megatron.files.digests import DamagedError, unseal

FORMAT_VERSION = 2
GROUPS_FILE = "groups.arrow"
PIECES_FILE = "groups.pieces"
INFO_FILE = "prepare.json"
BATCH_GROUPS = 256
"""Groups per Arrow record batch; bounds the 32-bit offsets of a list column, and the writer's memory."""

TOKENS, TEXTS = "prompt_tokens", "prompt_text"
"""The first columns of a record batch's second and third piece."""
PIECES_A_BATCH = 3

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class PreparedInfo:
    """The content of a prepared folder's `prepare.json`."""

    format_version: int = FORMAT_VERSION
    data_digest: str
    """sha256 over ids, tokens, rewards and labels in order; the same input and options give the same digest."""
    tokenizer_digest: str
    """`Tokenizer.digest()` of the tokenizer used."""
    vocab_size: int
    """Vocabulary size of the tokenizer; every token id is below it."""
    end_token_ids: tuple[int, ...]
    """Token ids that end a response, in the order in which they are appended."""
    reward_kind: RewardKind
    """`scores`: rewards have comparable magnitudes; `ranks`: rewards are −rank; `labels`: only labels exist."""
    has_labels: bool
    num_groups: int
    num_responses: int
    num_prompt_tokens: int
    num_response_tokens: int
    max_prompt_tokens: int
    """Longest prompt, in tokens."""
    max_response_tokens: int
    """Longest response, in tokens."""
    max_group_tokens: int
    """Longest group, in tokens: its prompt once, plus its responses."""
    max_responses: int
    """Largest K."""
    arrow_bytes: int
    """Size of groups.arrow in bytes; another size means a damaged copy."""
    pieces_digest: str
    """xxh3 digest of groups.pieces."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Histograms, spreads and counts, see docs/reference/data.md."""
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration of the `mpo prepare` that wrote the folder."""


def map_batches(path: Path) -> tuple[pa.Buffer, list[pa.RecordBatch]]:
    """A memory-mapped file, and its record batches."""
    mapped = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(pa.BufferReader(mapped))
    return mapped, [reader.get_batch(index) for index in range(reader.num_record_batches)]


class Pieces:
    """The pieces of a mapped file; each is compared with its digest before its first use."""

    def __init__(self, file: Path, data: memoryview, table: Words) -> None:
        """Store the table of `groups.pieces`."""
        self._file, self._data, self._digests = file, data, table[:, 1]
        self._ends = [0, *table[:, 0].tolist()]
        self._whole = np.zeros(len(table), dtype=bool)

    def check(self, index: int) -> None:
        """Compare one piece with its digest, once.

        Raises:
            DataError: they differ; names the file and the range.
        """
        if self._whole[index]:
            return
        start, end = self._ends[index : index + 2] if index >= 0 else self._ends[-2:]
        if xxhash.xxh3_64_intdigest(self._data[start:end]) != self._digests[index]:
            raise DataError(
                f"{self._file}: damaged: bytes {start:,} to {end:,} differ from what was written (digest mismatch); copy it "
                "again, or prepare it again."
            )
        self._whole[index] = True


class StoredGroups:
    """Random access to groups in an Arrow file; memory-mapped, so opening is instant and processes share the pages."""

    def __init__(self, file: Path, pieces: Words | None = None) -> None:
        """Map a file.

        Args:
            pieces: its table of pieces, [pieces, 2]; without it nothing is checked
        Raises:
            DataError: what opening reads (schema, footer, ids, lengths, rewards and labels) differs from what was written.
        """
        self.file, self._pieces = file, None
        if pieces is not None:
            data = memoryview(pa.memory_map(str(file)).read_buffer())
            self._pieces = Pieces(file, data, pieces)
            for index in [
                *range(0, len(pieces), PIECES_A_BATCH),
                -1,
            ]:  # before Arrow, which may crash on damaged data, parses any of it
                self._pieces.check(index)
        _, self._batches = map_batches(file)
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches]).tolist()

    def __reduce__(self) -> tuple[Any, ...]:  # each worker process maps the file itself
        return (StoredGroups, (self.file,))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, index: int, piece: int = 0) -> tuple[pa.RecordBatch, int]:
        """The record batch of a group, with its `piece` checked, and the group's row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        batch = bisect.bisect_right(self._starts, index) - 1
        if self._pieces is not None:
            self._pieces.check(PIECES_A_BATCH * batch + piece)
        return self._batches[batch], index - self._starts[batch]

    def _row(self, index: int, name: str) -> Any:
        """One group's value in a list column as a read-only view of the mapped file; None where null."""
        batch, row = self._locate(index, piece=1 if name.endswith(("tokens", "scored")) else 0)
        values = batch[name][row].values
        if values is None or values.type != pa.bool_():
            return None if values is None else as_numpy(values)
        return values.to_numpy(zero_copy_only=False)  # Arrow stores booleans as bits

    def __getitem__(self, index: int) -> TokenizedGroup:
        """One group; the arrays are read-only views of the mapped file."""
        batch, row = self._locate(index, piece=2)
        prompt_text, response_texts = self.text(index)
        ends = np.cumsum(self._row(index, "response_lengths"))
        mask = self._row(index, "response_scored")
        return TokenizedGroup(
            group_id=batch["group_id"][row].as_py(),
            prompt_tokens=self._row(index, "prompt_tokens"),
            response_tokens=tuple(np.split(self._row(index, "response_tokens"), ends[:-1])),
            scored=None if mask is None else tuple(np.split(mask, ends[:-1])),
            rewards=self.rewards(index),
            labels=self.labels(index),
            prompt_text=prompt_text,
            response_texts=response_texts,
            where=batch["where"][row].as_py(),
        )

    def __iter__(self) -> Iterator[TokenizedGroup]:
        return (self[index] for index in range(len(self)))

    def _column(self, name: str) -> pa.ChunkedArray:
        return pa.Table.from_batches(self._batches, SCHEMA)[name]

    def _flat(self, name: str) -> npt.NDArray[Any]:
        return as_numpy(list_flatten(self._column(name)))

    def _has(self, name: str) -> bool:
        return any(batch[name].null_count < batch.num_rows for batch in self._batches)

    def group_ids(self) -> list[str]:
        """[G] ids of the groups."""
        return self._column("group_id").to_pylist()

    def prompt_lengths(self) -> Int64:
        """[G] number of tokens of every prompt."""
        return as_numpy(self._column("prompt_length")).astype(np.int64)

    def num_responses(self) -> Int64:
        """[G] number of responses K of every group."""
        return as_numpy(self._column("num_responses")).astype(np.int64)

    def response_offsets(self) -> Int64:
        """[G + 1] group g has the responses offsets[g] to offsets[g + 1] − 1 among all responses."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.num_responses())])

    def all_response_lengths(self) -> Int64:
        """[ΣK] number of tokens of every response, group by group; split it with `response_offsets`."""
        return self._flat("response_lengths").astype(np.int64)

    def response_lengths(self, index: int) -> Int64:
        """[K] number of tokens of each response of one group."""
        lengths: Int32 = self._row(index, "response_lengths")
        return lengths.astype(np.int64)

    def all_rewards(self) -> Float64 | None:
        """[ΣK] every reward, group by group; None with labels only."""
        return self._flat("rewards") if self._has("rewards") else None

    def all_labels(self) -> Int8 | None:
        """[ΣK] every label, group by group; None without labels."""
        return self._flat("labels") if self._has("labels") else None

    def prompt_tokens(self, index: int) -> Int32:
        """[P] token ids of one group's prompt."""
        tokens: Int32 = self._row(index, "prompt_tokens")
        return tokens

    def rewards(self, index: int) -> Float64 | None:
        """[K] one group's rewards."""
        rewards: Float64 | None = self._row(index, "rewards")
        return rewards

    def labels(self, index: int) -> Int8 | None:
        """[K] one group's labels, 1 chosen and 0 rejected."""
        labels: Int8 | None = self._row(index, "labels")
        return labels

    def text(self, index: int) -> tuple[str, tuple[str, ...]]:
        """The rendered prompt and the response texts of one group, for reports."""
        batch, row = self._locate(index, piece=2)
        return batch["prompt_text"][row].as_py(), tuple(batch["response_texts"][row].as_py())

    def num_repeated_texts(self) -> Int64:
        """[G] responses of every group whose text one before them has."""
        found = [np.zeros(0, np.int64)]
        for start, batch in zip(self._starts, self._batches, strict=False):
            if batch.num_rows:
                self._locate(start, piece=2)
                texts = batch["response_texts"]
                sizes = texts.value_lengths().to_numpy().astype(np.int64)
                encoded = texts.flatten().dictionary_encode()
                width = max(len(encoded.dictionary), 1)
                group = np.repeat(np.arange(len(sizes)), sizes)
                distinct = np.unique(group * width + encoded.indices.to_numpy()) // width
                found.append(sizes - np.bincount(distinct, minlength=len(sizes)))
        return np.concatenate(found)

    def check_texts(self) -> None:
        """Compare the pieces that `text` reads with their digests.

        Raises:
            DataError: one differs.
        """
        for start, batch in zip(self._starts, self._batches, strict=False):
            if batch.num_rows:
                self._locate(start, piece=2)

    def batches(self, indices: Int64) -> Iterator[pa.RecordBatch]:
        """These groups, in ascending order, as record batches of the usual size."""
        for start, batch in zip(self._starts, self._batches, strict=False):
            for piece in (1, 2) if batch.num_rows else ():
                self._locate(start, piece)
        return take_rows(self._batches, indices, BATCH_GROUPS)


class PreparedGroups(StoredGroups):
    """The groups of a prepared folder (`path`), with its `prepare.json` (`info`)."""

    def __init__(self, path: Path, info: PreparedInfo) -> None:
        super().__init__(path / GROUPS_FILE, _read_pieces(path, info))
        self.path, self.info = path, info

    def __reduce__(self) -> tuple[Any, ...]:
        return (PreparedGroups, (self.path, self.info))


def read_info(folder: str | Path) -> PreparedInfo:
    """The content of a prepared folder's `prepare.json`.

    Raises:
        DataError: the file is missing, damaged, or of another version.
    """
    path = Path(folder) / INFO_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no prepared groups there ({INFO_FILE} is missing); write them with `mpo prepare`.")
    try:
        fields = unseal(path, "copy it again, or prepare it again")
    except DamagedError as error:
        raise DataError(str(error)) from error
    version = fields.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version = {version}; this version reads {FORMAT_VERSION}; prepare the data again.")
    try:
        return PreparedInfo(**fields | {"end_token_ids": tuple(fields["end_token_ids"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: another version wrote it, with other fields ({error}); prepare the data again.") from error


def _read_pieces(folder: Path, info: PreparedInfo) -> Words:
    """[pieces, 2] the table in `groups.pieces`.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / PIECES_FILE
    content = path.read_bytes() if path.is_file() else b""
    if xxhash.xxh3_128_hexdigest(content) != info.pieces_digest:
        raise DataError(f"{path}: damaged or missing ({INFO_FILE} has its digest); copy it again, or prepare it again.")
    return np.frombuffer(content, dtype="<u8").reshape(-1, 2)


def load_groups(folder: str | Path) -> PreparedGroups:
    """Open a prepared folder.

    Raises:
        DataError: a file is missing or damaged.
    """
    path, info = Path(folder), read_info(folder)
    arrow = path / GROUPS_FILE
    if not arrow.is_file():
        raise DataError(f"{arrow}: missing, although {INFO_FILE} exists; copy it too, or prepare the data again.")
    size = arrow.stat().st_size
    if size != info.arrow_bytes:
        raise DataError(
            f"{arrow}: {size} bytes, but {INFO_FILE} lists {info.arrow_bytes}; copy it again, or prepare the data again."
        )
    return PreparedGroups(path, info)
