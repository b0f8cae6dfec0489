"""Arrow's numbers as NumPy's, without pandas."""

from __future__ import annotations

import pyarrow as pa
import pytest

from mpo_megatron.data.arrays import as_numpy


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.int64(), pa.float32(), pa.float64()])
def test_values_are_those_of_arrow(kind: pa.DataType) -> None:
    whole = pa.array([1, 2, 3], type=kind)
    parts = [whole, whole.slice(1), whole.slice(3), pa.array([], type=kind)]
    for values in (*parts, pa.chunked_array([whole]), pa.chunked_array(parts), pa.chunked_array([], type=kind)):
        found = as_numpy(values)
        assert found.dtype == kind.to_pandas_dtype()
        assert found.tolist() == values.to_pylist()


def test_nulls_are_refused() -> None:
    with pytest.raises(TypeError, match="null"):
        as_numpy(pa.array([1, None]))
