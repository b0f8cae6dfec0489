"""Groups as Arrow record batches: built from groups, selected from other batches, checked, and digested."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.files import DataError

SCHEMA = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("prompt_length", pa.int32(), nullable=False),
        pa.field("num_responses", pa.int32(), nullable=False),
        pa.field("response_lengths", pa.list_(pa.int32()), nullable=False),
        pa.field("rewards", pa.list_(pa.float64())),
        pa.field("labels", pa.list_(pa.int8())),
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),  # of all K responses, concatenated
        pa.field("response_scored", pa.list_(pa.bool_())),  # of the same tokens; null where the loss scores all of them
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("response_texts", pa.list_(pa.string()), nullable=False),
        pa.field("where", pa.string(), nullable=False),
    ]
)

Cells = list[memoryview | None]
"""For each row, the bytes of its values; None where it is null."""


def to_batch(groups: Sequence[TokenizedGroup]) -> pa.RecordBatch:
    """Groups as one Arrow record batch of `SCHEMA`."""
    responses = [tokens for group in groups for tokens in group.response_tokens]
    texts = [text for group in groups for text in group.response_texts]
    masks = [mask for group in groups for mask in group.scored or ()]
    sizes = [len(group.response_tokens) for group in groups]
    lengths = np.fromiter(map(len, responses), np.int32, len(responses))
    num_tokens = [sum(map(len, group.response_tokens)) for group in groups]
    columns = [
        pa.array([group.group_id for group in groups], pa.string()),
        pa.array([len(group.prompt_tokens) for group in groups], pa.int32()),
        pa.array(sizes, pa.int32()),
        _to_lists([lengths], sizes, np.int32),
        _to_lists(*_present([group.rewards for group in groups]), np.float64),
        _to_lists(*_present([group.labels for group in groups]), np.int8),
        _to_lists(*_present([group.prompt_tokens for group in groups]), np.int32),
        _to_lists(responses, num_tokens, np.int32),
        _to_lists(
            masks, [None if group.scored is None else size for group, size in zip(groups, num_tokens, strict=True)], np.bool_
        ),
        pa.array([group.prompt_text for group in groups], pa.string()),
        pa.ListArray.from_arrays(
            pa.array(np.cumsum([0, *(len(group.response_texts) for group in groups)], dtype=np.int32)),
            pa.array(texts, pa.string()),
        ),
        pa.array([group.where for group in groups], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _present(cells: list[npt.NDArray[Any] | None]) -> tuple[list[npt.NDArray[Any]], list[int | None]]:
    """The arrays of some cells, and the size of each cell; None where it is null."""
    return [cell for cell in cells if cell is not None], [None if cell is None else len(cell) for cell in cells]


def _to_lists(values: Sequence[npt.NDArray[Any]], sizes: Sequence[int | None], kind: type[np.generic]) -> pa.ListArray:
    """The values of some arrays, one after the other, as lists of these sizes; null where a size is None.

    Raises:
        DataError: there are more than Arrow's offsets can count.
    """
    ends = np.cumsum([0, *(size or 0 for size in sizes)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise DataError(
            f"{ends[-1]} tokens in one batch of {len(sizes)} groups; at most 2^31 − 1 fit: lower max_response_tokens."
        )
    flat = np.concatenate(values) if values else np.zeros(0)
    absent = np.array([size is None for size in sizes] + [False])
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32), mask=absent), pa.array(flat.astype(kind, copy=False)))


def take_rows(batches: Sequence[pa.RecordBatch], indices: Int64, size: int) -> Iterator[pa.RecordBatch]:
    """Rows of some batches as new batches of `size` rows; the last one may be smaller.

    Args:
        indices: indices of the rows, ascending
    Raises:
        DataError: a batch would exceed the number of tokens that Arrow's offsets can count.
    """
    ends = np.cumsum([batch.num_rows for batch in batches])
    for start in range(0, len(indices), size):
        wanted = indices[start : start + size]
        of_batch = np.searchsorted(ends, wanted, side="right")
        parts = []
        for number in np.unique(of_batch).tolist():
            batch = batches[number]
            rows = wanted[of_batch == number] - (ends[number] - batch.num_rows)
            parts.append(batch if len(rows) == batch.num_rows else batch.take(pa.array(rows)))
        try:
            yield pa.concat_batches(parts)
        except pa.ArrowInvalid as error:
            raise DataError(f"more than 2^31 − 1 tokens or characters in one batch of {len(wanted)} groups.") from error


class Digest:
    """The digest of groups in order, and a check that they can be trained on together."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.kinds = set[tuple[bool, bool]]()

    def update(self, batch: pa.RecordBatch) -> None:
        """Add a batch's groups. Every part is preceded by its length, so different stores never feed the same bytes.

        Raises:
            DataError: a group has no responses, or one without tokens; or only some groups have rewards, or labels.
        """
        ids, masks = batch["group_id"].to_pylist(), _cells(batch["response_scored"])
        prompts, rewards, labels = (_cells(batch[name]) for name in ("prompt_tokens", "rewards", "labels"))
        responses = _with_lengths(batch["response_tokens"], batch["response_lengths"])
        for row, lengths in enumerate(batch["response_lengths"].to_pylist()):
            mask, scored = masks[row], list[memoryview]()
            if mask is not None:
                scored = [mask[start:end] for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0))]
            self.kinds.add((rewards[row] is None, labels[row] is None))
            wrong = "some groups have rewards or labels, and others do not" if len(self.kinds) > 1 else ""
            if not lengths or 0 in lengths:
                wrong = "it has no responses, or one without tokens"
            elif not all(map(any, scored)):
                wrong = "one of its responses has no scored token"
            if wrong:
                raise DataError(f"{batch['where'][row]}: group {ids[row]}: {wrong}.")
            fed: list[bytes | memoryview] = [(4 + len(lengths) + len(scored)).to_bytes(8, "little")]
            fed += _with_length(ids[row].encode())
            fed += _with_length(prompts[row])
            fed.append(responses[row])
            for part in (rewards[row], labels[row], *scored):
                fed += _with_length(part)
            self.sha.update(b"".join(fed))

    def hexdigest(self) -> str:
        """The digest of all groups so far."""
        return self.sha.hexdigest()


def _with_length(part: bytes | memoryview | None) -> tuple[bytes, bytes | memoryview]:
    return (-1 if part is None else len(part)).to_bytes(8, "little", signed=True), part or b""


def _with_lengths(tokens: pa.ListArray, lengths: pa.ListArray) -> list[memoryview]:
    """Of each group the bytes of its responses, each behind its own length: `_with_length` for a whole batch at once."""
    sizes = lengths.flatten().to_numpy().astype(np.int64)
    words = (4 * sizes).astype("<i8").view("<i4")  # a length is as long as two tokens
    flat = np.insert(tokens.flatten().to_numpy().astype("<i4", copy=False), np.repeat(np.cumsum(sizes) - sizes, 2), words)
    data = memoryview(flat).cast("B")
    ends = np.cumsum(4 * tokens.value_lengths().to_numpy() + 8 * lengths.value_lengths().to_numpy(), dtype=np.int64).tolist()
    return [data[start:end] for start, end in itertools.pairwise([0, *ends])]


def _cells(column: pa.ListArray) -> Cells:
    values: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    data = memoryview(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))).cast("B")
    sizes = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) * values.itemsize
    ends = np.cumsum(sizes)
    known = column.is_valid().to_pylist()
    starts = (ends - sizes).tolist()
    return [data[start:end] if there else None for start, end, there in zip(starts, ends.tolist(), known, strict=True)]
