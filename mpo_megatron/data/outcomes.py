"""A policy's log-probs of held-out groups: one file per evaluation of a run, `<run>/groups/step_<step>.<digest>.parquet`.

Legend: K responses of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import name_digest, read_named

FOLDER = "groups"
SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("policy_logps", pa.list_(pa.float64()), nullable=False),
        pa.field("reference_logps", pa.list_(pa.float64()), nullable=False),
        pa.field("sets", pa.list_(pa.int8()), nullable=False),
    ]
)
"""A group's index in the held-out data; for its K responses, log π and log π_ref in nats (null where the loss needs none) and
the set: 1 preferred (Y+), 0 other (Y−), −1 neither. Rewards, lengths and texts are in the data."""


@dataclass(frozen=True, kw_only=True)
class GroupOutcome:
    """The policy's log-probs of one held-out group."""

    index: int
    """Index in the held-out data."""
    group_id: str
    policy_logps: tuple[float | None, ...]
    """[K] log π of each response, in nats; None where the loss needs none."""
    reference_logps: tuple[float | None, ...]
    """[K] log π_ref; None where the loss needs none."""
    sets: tuple[int, ...]
    """[K] 1 preferred, 0 other, −1 neither."""

    def log_ratio(self, response: int) -> float | None:
        """log π − log π_ref of a response."""
        policy, reference = self.policy_logps[response], self.reference_logps[response]
        return None if policy is None or reference is None else policy - reference


def write_outcomes(run: Path, step: int, outcomes: Sequence[GroupOutcome], data_digest: str) -> Path:
    """Write the outcomes of the evaluation after `step` steps; the path of the file.

    Args:
        data_digest: digest of the held-out data, which has the texts
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step:08d}"
    columns = {column: [getattr(outcome, column) for outcome in outcomes] for column in SCHEMA.names}
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=SCHEMA.with_metadata({"data_digest": data_digest})), stream)
    content = stream.getvalue().to_pybytes()
    path = folder / name_digest(name, content, ".parquet")
    replace_file(path, [content])
    for other in folder.glob(f"{name}.*"):
        if other != path:  # of this step, from before the run was resumed at an earlier step
            other.unlink()
    return path


def read_outcomes(path: Path) -> list[GroupOutcome]:
    """The outcomes of one evaluation.

    Raises:
        DamagedError: the file differs from what was written.
    """
    return [
        GroupOutcome(
            index=row["index"],
            group_id=row["group_id"],
            policy_logps=tuple(row["policy_logps"]),
            reference_logps=tuple(row["reference_logps"]),
            sets=tuple(row["sets"]),
        )
        for row in pq.read_table(pa.BufferReader(read_named(path))).to_pylist()
    ]


def outcome_files(run: Path, data_digest: str | None = None) -> dict[int, Path]:
    """The files of a run's evaluations by step, in order.

    Args:
        data_digest: only evaluations on this data; a run may change its held-out groups
    Raises:
        DamagedError: a file differs from what was written; only with `data_digest`.
    """
    files = {int(path.name.split(".")[0].removeprefix("step_")): path for path in sorted((run / FOLDER).glob("step_*.parquet"))}
    return {step: path for step, path in files.items() if data_digest in (None, read_digest(path))}


def read_digest(path: Path) -> str:
    """Digest of the held-out data of an evaluation.

    Raises:
        DamagedError: the file differs from what was written.
    """
    digest: bytes = pq.read_schema(pa.BufferReader(read_named(path))).metadata[b"data_digest"]
    return digest.decode()
