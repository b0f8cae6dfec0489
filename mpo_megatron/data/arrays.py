"""NumPy array types by element type, and NumPy views of Arrow arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Bools = npt.NDArray[np.bool_]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def as_numpy(values: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """A read-only view of an Arrow array without nulls; a copy if it has several chunks.

    Arrow's own `to_numpy` imports pandas if installed, which takes half a second.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    return np.from_dlpack(values)
