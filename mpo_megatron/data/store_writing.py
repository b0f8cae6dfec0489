"""Write prepared groups: the Arrow file with its table of pieces, and `prepare.json` (store.py describes the folder)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from mpo_megatron.data.batches import SCHEMA, Digest, to_batch
from mpo_megatron.data.group import RewardKind, TokenizedGroup
from mpo_megatron.data.store import (
    BATCH_GROUPS,
    GROUPS_FILE,
    INFO_FILE,
    PIECES_FILE,
    TEXTS,
    TOKENS,
    PreparedInfo,
    StoredGroups,
    Words,
    map_batches,
)
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import AtomicFolder, writing
from mpo_megatron.files.digests import seal


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> dict[str, Any]:
    """Write record batches to an Arrow file, and `groups.pieces` beside it; digest, size and counts, named as in `PreparedInfo`.

    Raises:
        DataError: a group has no responses, or one without tokens; or only some groups have rewards, or labels.
    """
    digest = Digest()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as file:
        for batch in batches:
            digest.update(batch)
            file.write_batch(batch)
    pieces = _cut_pieces(path).astype("<u8").tobytes()
    path.with_name(PIECES_FILE).write_bytes(pieces)
    stored = StoredGroups(path)
    sizes, prompts, responses = stored.num_responses(), stored.prompt_lengths(), stored.all_response_lengths()
    wholes = prompts + np.add.reduceat(responses, stored.response_offsets()[:-1])
    return {
        "data_digest": digest.hexdigest(),
        "has_labels": stored.all_labels() is not None,
        "num_groups": len(stored),
        "num_responses": len(responses),
        "num_prompt_tokens": int(prompts.sum()),
        "num_response_tokens": int(responses.sum()),
        "max_prompt_tokens": int(prompts.max(initial=0)),
        "max_response_tokens": int(responses.max(initial=0)),
        "max_group_tokens": int(wholes.max(initial=0)),
        "max_responses": int(sizes.max(initial=0)),
        "arrow_bytes": path.stat().st_size,
        "pieces_digest": xxhash.xxh3_128_hexdigest(pieces),
    }


def _cut_pieces(path: Path) -> Words:
    """[3 · batches + 1, 2] end and digest of each piece of an Arrow file."""
    mapped, batches = map_batches(path)

    def start(batch: pa.RecordBatch, column: str) -> int:
        buffers = [buffer for buffer in batch[column].buffers() if buffer is not None and buffer.size]
        return int(buffers[0].address - mapped.address)

    ends: list[int] = []
    for batch in batches:
        texts = [buffer for name in SCHEMA.names[-3:] for buffer in batch[name].buffers() if buffer is not None and buffer.size]
        last = max(buffer.address + buffer.size for buffer in texts) - mapped.address
        ends += [start(batch, TOKENS), start(batch, TEXTS), last]
    ends.append(mapped.size)
    data = memoryview(mapped)
    digests = [xxhash.xxh3_64_intdigest(data[first:end]) for first, end in itertools.pairwise([0, *ends])]
    return np.array([ends, digests], dtype=np.uint64).T


def write_info(folder: Path, info: PreparedInfo) -> None:
    """Write `prepare.json`."""
    (folder / INFO_FILE).write_bytes(seal(dataclasses.asdict(info)))


def write_groups(
    folder: str | Path,
    groups: Iterable[TokenizedGroup],
    *,
    tokenizer_digest: str,
    vocab_size: int,
    end_token_ids: Sequence[int],
    reward_kind: RewardKind,
    statistics: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> PreparedInfo:
    """Write a prepared folder in one step; it must be missing or empty.

    Raises:
        DataError: the folder is not empty or cannot be written, or there are no groups.
    """
    target = Path(folder)
    with AtomicFolder(target) as output:
        with writing(target):
            batches = map(to_batch, itertools.batched(groups, BATCH_GROUPS))
            counts = write_batches(output.path / GROUPS_FILE, batches)
        if not counts["num_groups"]:
            raise DataError(f"{target}: no groups to write.")
        info = PreparedInfo(
            tokenizer_digest=tokenizer_digest,
            vocab_size=vocab_size,
            end_token_ids=tuple(end_token_ids),
            reward_kind=reward_kind,
            statistics=statistics or {},
            config=config or {},
            **counts,
        )
        with writing(target):
            write_info(output.path, info)
        output.commit()
    return info
