"""Values kept in a temporary file."""

from __future__ import annotations

import pytest

from mpo_megatron.data import spill
from mpo_megatron.data.spill import SpilledList
from mpo_megatron.files import DataError


def test_a_list_keeps_values_and_order_beyond_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_LIST_BYTES", 64)
    values = SpilledList[str]()
    assert not values
    words = [f"{index}" * (index % 7) for index in range(100)]
    for index, word in enumerate(words):
        values.append(word)
        assert values[index // 2] == words[index // 2]  # reading between two writes
    assert values._file._rolled  # in a file
    assert (len(values), list(values), values[-1]) == (100, words, words[-1])
    pairs = zip(values, values, strict=True)  # two readers at once
    assert all(first == second for first, second in pairs)
    with pytest.raises(IndexError):
        values[100]


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    values = SpilledList[bytes]()

    def fail(_: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(values._file, "write", fail)
    with pytest.raises(DataError, match=r"temporary folder .*: .*No space left on device; free some space, or set TMPDIR"):
        values.append(b"x")
